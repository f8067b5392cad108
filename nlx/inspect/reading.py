# SPDX-License-Identifier: Apache-2.0
"""A language model while it reads: what each token costs, and what each memory does with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nlx.inspect.traces import Trace, follow, surprise
from nlx.nn.checks import check_integers
from nlx.nn.model import LanguageModel
from nlx.nn.recall import Ticks


class Watched(NamedTuple):
    """What happened while a text was read."""

    bits: Float[Array, "b t-1"]  # -log2 p of every token but the first
    levels: dict[str, Trace]  # path of a level -> arrays [b, t, h], a column a head


def watch(model: LanguageModel, tokens: Int[Array, "b t"]) -> Watched:
    """Reads a text, and follows the memories of all mixers.

    Every module with a method `ticks` is followed: its own `nest`, which is what its op computes,
    run tick by tick on what its own maps make of the text. Attention has none, since it keeps
    tokens as they are. Levels of several heads that differ only in an index are one.

    model: a `LanguageModel`. tokens: integers, at least two a row; nothing came before the first.
    Raises TypeError or ValueError for others.
    """
    check_integers("tokens", tokens)
    if tokens.shape[1] < 2:
        raise ValueError(f"`tokens` has shape {tokens.shape}; it must be [b, t], t at least 2.")
    x, levels = model.embed(tokens), {}
    for n, block in enumerate(model.blocks):
        read = block.norm(x)
        mixer: Any = block.mixer
        for path, module in nnx.iter_modules(mixer):
            if (ticks := getattr(module, "ticks", None)) is not None:
                name = ".".join(map(str, ("blocks", n, "mixer", *path)))
                found = _follow(module, ticks(read))
                levels |= {f"{name}.{level}": trace for level, trace in found.items()}
        x, _ = block(x)
    return Watched(surprise(model.read_out(x)[:, :-1], tokens[:, 1:]), _by_heads(levels))


def _follow(module: Any, ticks: Ticks) -> dict[str, Trace]:
    """`follow` for every row and head; arrays [b, t, h]."""
    params, contexts = jax.tree.map(_wide, tuple(ticks))
    heads = jax.vmap(lambda params, contexts: follow(module.nest(), params, contexts), (0, 1), 1)
    return jax.vmap(heads, (None, 0))(params, contexts)


def _wide(array: Array) -> Array:
    """At least float32, if it holds floats."""
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32)) if floats else array


def _by_heads(levels: dict[str, Trace]) -> dict[str, Trace]:
    """Levels named by their head as one: "memory.0", "memory.1" become "memory"."""
    groups: dict[str, list[Trace]] = {}
    for name, trace in levels.items():
        groups.setdefault(name.rstrip("0123456789").rstrip("."), []).append(trace)
    join = lambda *arrays: jnp.concatenate(arrays, -1)
    return {name: jax.tree.map(join, *group) for name, group in groups.items()}
