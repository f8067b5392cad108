# SPDX-License-Identifier: Apache-2.0
"""Weights as one .safetensors file: every parameter under its dotted path."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nlx_experiments.errors import Refused


def write(path: pathlib.Path, params: PyTree[Array], header: dict[str, str]) -> None:
    """Writes a tree of parameters, whole or not at all."""
    arrays = {name: np.asarray(leaf) for name, leaf in named(params).items()}
    half = path.with_name(path.name + ".half")
    try:
        save_file(arrays, half, metadata=header)
        half.replace(path)
    except (OSError, SafetensorError) as error:
        half.unlink(missing_ok=True)
        raise Refused(f"`out` is {path}, which cannot be written ({error}).") from error


def read(
    path: pathlib.Path,
    like: PyTree[Array],
    place: Callable[[Any, Any], Any] = lambda x, _: x,
    *,
    argument: str = "init_from",
    of: str = "model",
) -> PyTree[Array]:
    """A tree like `like` with the numbers of a file.

    place: (array, the one it is for) -> the array where that one lives. argument, of: what gave
    the path, and what the numbers are of, for what is refused.

    Raises Refused: no such file, another format, names, shapes or kinds of numbers.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    try:
        with safe_open(path, "numpy") as held:
            there = set(held.keys())
            wanted = [_name(place_of) for place_of, _ in leaves]
            for name in sorted(there ^ set(wanted)):
                what = "has no" if name in wanted else "has"
                raise Refused(
                    f"`{argument}` is {path}, which {what} {name}; it is of another {of}."
                )
            made = []
            for name, (_, leaf) in zip(wanted, leaves, strict=True):
                array = held.get_tensor(name)
                if array.shape != leaf.shape or array.dtype != leaf.dtype:
                    raise Refused(
                        f"`{argument}` is {path}, in which {name} is {array.dtype}"
                        f"{list(array.shape)}; it must be {leaf.dtype}{list(leaf.shape)}."
                    )
                made.append(place(array, leaf))
    except (OSError, SafetensorError) as error:
        raise Refused(f"`{argument}` is {path}, which cannot be read ({error}).") from error
    return jax.tree.unflatten(tree, made)


def named(params: PyTree[Array]) -> dict[str, Array]:
    """Dotted path -> parameter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
