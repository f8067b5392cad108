# SPDX-License-Identifier: Apache-2.0
"""What the levels of a mixer hand to each other, and what the slow maps hand to them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nlx.inspect.rows import starred
from nlx.inspect.tracing import (
    Asking,
    Start,
    moved,
    moved_by_attention,
    read_by_attention,
)
from nlx.nest import Nest
from nlx.nn.attention import Attention
from nlx.nn.convolution import Convolution
from nlx.nn.neural_memory import DeepMemory

OUTER = "outer"


class Link(NamedTuple):
    """What one level hands to another."""

    source: str  # name of a level as in `levels`, or "gradient"
    target: str
    what: str  # "initial state", "gradient", or the part of its context: "key", "retain", ...


def of_mixer(mixer: Any, prefix: str, width: int) -> list[Link]:
    """The links of a mixer's levels: from "outer", among each other, to and from attention.

    They are direct: what passes through attention comes from attention. mixer: shapes are enough.
    prefix: its path. width: channels of its input.
    """
    full = lambda *path: starred(".".join(filter(None, (prefix, *map(str, path)))))
    modules: list[tuple[tuple, Any]] = list(nnx.iter_modules(mixer))
    attentions = [full(*path) for path, module in modules if isinstance(module, Attention)]
    found = [
        Link(OUTER, full(*path), "context")
        for path, module in modules
        if isinstance(module, Convolution)
    ]
    asks = _asks(mixer, width) if attentions else lambda path: []
    found += [Link(OUTER, name, part) for name in attentions for part in asks(())]
    for path, module in modules:
        if hasattr(module, "ticks"):
            found += _of_memories(module, path, full, attentions, width)
            starts = [(*path, *p, "layers") for p, m in nnx.iter_modules(module) if _is_deep(m)]
            for name in attentions:
                read = [part for start in starts for part in asks(start)]
                memories = [full(*path, level) for level in _firing(module.nest())]
                found += [Link(memory, name, part) for memory in memories for part in read]
    return list(dict.fromkeys(found))


def among(nest: Callable[[Any], Nest], params: dict[str, Any], context: Any, weights: Any):
    """The links of nest(weights), where its forward reads weights too."""
    return _among(lambda *given: told(nest, *given), params, context, weights)


def told(nest: Callable[[Any], Nest], params: dict[str, Any], context: Any, weights: Any):
    """What the levels are told at a tick."""
    return nest(weights).forward(params, context)[1]


def _among(tells: Callable, params: dict[str, Any], context: Any, weights: Any) -> list[Link]:
    found = []
    for name, own in params.items():
        others = {other: params[other] for other in params if other != name}

        def of(own, others, context, weights, name=name):
            return tells({**others, name: own}, context, weights)

        found += [Link(name, *part) for part in moved(of, own, others, context, weights)]
    return found


def _of_memories(module: Any, path: tuple, full, attentions: list[str], width: int) -> list[Link]:
    """The links of a module with `ticks`: to its levels.

    The level that answers for the mixer is called "memory", and its query is what the nest's
    forward gives.
    """
    nest = module.nest()
    graph, weights = nnx.split(module)
    x = jax.ShapeDtypeStruct((1, 3, width), jnp.float32)

    def one_head(weights, x) -> tuple[dict[str, Any], Any]:
        params, contexts = nnx.merge(graph, weights).ticks(x)
        first = jax.tree.map(lambda a: a[0], params)
        return first, jax.tree.map(lambda a: a[0, 2, 0], contexts)

    def starts(weights, x):
        return {name: Start(params) for name, params in one_head(weights, x)[0].items()}

    def of(weights) -> Nest:
        module: Any = nnx.merge(graph, weights)
        return module.nest()

    def asked(params, context, weights):
        query = of(weights).forward(params, context)[0]
        return {n: Asking(query) for n in nest.levels if n.split(".")[0] == "memory"}

    told_of = lambda *given: told(of, *given)
    params, context = jax.eval_shape(one_head, weights, x)
    found = _among(told_of, params, context, weights)
    found += [
        link
        for link in _among(asked, params, context, weights)
        if starred(link.source) != starred(link.target)
    ]
    found += [Link(OUTER, *part) for part in moved(starts, weights, x)]
    for tells in (told_of, asked):

        def by(weights, x, params, tells=tells):
            return tells(params, one_head(weights, x)[1], weights)

        found += [Link(OUTER, *part) for part in moved(by, weights, x, params)]
        for inner, convolution in nnx.iter_modules(module):
            if isinstance(convolution, Convolution):
                only, name = _under(weights, inner), full(*path, *inner)
                found += [Link(name, *p) for p in moved(by, weights, x, params, only=only)]
        for name in attentions:
            found += [Link(name, *part) for part in moved_by_attention(by, weights, x, params)]
    # What never fires is learned outside only: it is a part of "outer".
    fires, levels = _firing(nest), nest.levels
    place = lambda name: full(*path, name) if name in fires else OUTER if name in levels else name
    return [
        Link(place(link.source), full(*path, link.target), link.what)
        for link in found
        if link.target in fires
    ]


def _asks(mixer: Any, width: int) -> Callable[[tuple], list[str]]:
    """The parts of attention that read the weights under a path of the mixer."""
    graph, weights = nnx.split(mixer)
    x = jax.ShapeDtypeStruct((1, 3, width), jnp.float32)
    call = lambda weights, x: nnx.merge(graph, weights)(x)[0]
    return lambda path: read_by_attention(call, weights, x, only=_under(weights, path))


def _under(weights: Any, path: tuple) -> list[bool]:
    """Which leaves lie under a path."""
    start = tuple(map(str, path))
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    names = [[str(getattr(key, "key", key)) for key in keys] for keys, _ in leaves]
    return [tuple(name[: len(start)]) == start for name in names]


def _firing(nest: Nest) -> list[str]:
    return [name for name, level in nest.levels.items() if level.clock.period is not None]


def _is_deep(module: Any) -> bool:
    return isinstance(module, DeepMemory)
