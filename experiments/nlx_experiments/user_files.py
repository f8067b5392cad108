# SPDX-License-Identifier: Apache-2.0
"""Users' memories as files: whole or not at all, checked when read, nothing in them executed.

A file is written beside the old one, handed to the disk (fsync), put in its place by one rename,
and the folder is handed to the disk too. So at every moment the name holds the old memory or the
new one, each whole. A file is .safetensors, and its header holds the digest of all numbers and of
the model whose memory it is.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nlx_experiments.errors import Refused
from nlx_experiments.user_memory import Memory
from nlx_experiments.weights import named

HALF = ".half"


class Unsettled(OSError):
    """Names in a folder are as they must be, but the disk does not say that they last."""


def write(path: pathlib.Path, memory: Memory, model: str, *, lasting: bool = True) -> None:
    """Writes a memory; when this returns it outlives the process and the machine's power.

    model: what `user_memory.identity` says of the model that made it. lasting: False for what
    need not outlive them, which is not waited for.
    Raises OSError where the disk is full or may not be written; the old file is then as it was,
    unless it is Unsettled: then the new one has its place.
    """
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in named(memory).items()}
    about = {"model": model, "sha256": digest(arrays, model)}
    write_bytes(path, save(arrays, {"nlx": json.dumps(about)}), lasting=lasting)


def write_bytes(path: pathlib.Path, content: bytes, *, lasting: bool = True) -> None:
    """Writes a file that no other account reads. lasting, errors: see `write`."""
    half = path.with_name(path.name + HALF)
    try:
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(content)
            stream.flush()
            if lasting:
                os.fsync(stream.fileno())
        os.replace(half, path)
    except OSError:
        half.unlink(missing_ok=True)
        raise
    if lasting:
        settle(path.parent)


def settle(folder: pathlib.Path) -> None:
    """Hands to the disk which names a folder holds. Raises Unsettled."""
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        raise Unsettled(error.errno, error.strerror) from None


def read(path: pathlib.Path, like: Memory, model: str) -> Memory:
    """The memory of a file.

    like: one of the same model. model: see `write`.
    Raises Refused, one sentence: no such file, damaged, or of another model.
    """
    leaves, tree = jax.tree_util.tree_flatten(like)
    try:
        with safe_open(path, "numpy") as held:
            about = json.loads((held.metadata() or {}).get("nlx", "{}"))
            arrays = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise Refused("no memory was saved.") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise Refused(f"the saved memory is damaged and can't be read ({error}).") from None
    made_by = about.get("model") if isinstance(about, dict) else None
    if made_by is not None and made_by != model:
        raise Refused("the saved memory is of another model, or of other weights.")
    if made_by is None or about.get("sha256") != digest(arrays, model):
        raise Refused("the saved memory is damaged: its checksum is another.")
    own = list(named(like))
    fits = set(own) == set(arrays) and all(
        arrays[name].shape == np.shape(leaf) and arrays[name].dtype == np.asarray(leaf).dtype
        for name, leaf in zip(own, leaves, strict=True)
    )
    if not fits:
        raise Refused("the saved memory is of another model: its arrays are others.")
    return jax.tree.unflatten(tree, [arrays[name] for name in own])


def digest(arrays: dict[str, np.ndarray], model: str) -> str:
    """Of the model, and of names, kinds, shapes and numbers of all arrays."""
    found = hashlib.sha256(model.encode())
    for name in sorted(arrays):
        array: Any = arrays[name]
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()
