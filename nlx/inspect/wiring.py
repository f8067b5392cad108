# SPDX-License-Identifier: Apache-2.0
"""Who reads whom: knowledge transfer between levels, found by differentiating their wiring."""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from nlx.inspect.rows import nests_of, starred
from nlx.level import Association
from nlx.nest import Nest
from nlx.nn.model import LanguageModel, pretraining, restarts_by_level
from nlx.nn.recall import Ticks

GRADIENT = "gradient"  # the source that is no level: what an optimizer is given


class Link(NamedTuple):
    """What one level hands to another."""

    source: str  # name of a level as in `levels`, or "gradient"
    target: str
    what: str  # "initial state", "gradient", or the part of its context: "key", "retain", ...


class Stored(NamedTuple):
    """What a memory of an optimizer stores for a gradient, in words."""

    level: str
    key: str  # "none", "gradient", "gradient^2", or what it is a function of
    value: str


def links(nest: Nest, params: dict[str, Any], context: Any) -> list[Link]:
    """Which level's visible parameters stand in which part of which level's context.

    There is a link where the derivative of the part along random parameters is not 0, so numbers
    should be in general position. Levels under the nest's shared loss hand each other gradients.

    nest: `Nest`. params: of every level by name. context: one tick's.
    Source: Behrouz et al. (2025), Nested Learning, section 3.3 (knowledge transfer).
    """
    found = []
    for name in nest.levels:
        told = lambda own, name=name: nest.forward({**params, name: own}, context)[1]
        found += [Link(name, *end) for end in _moved(told, params[name])]
    if nest.loss is not None:
        shared = [name for name, level in nest.levels.items() if level.loss is None]
        found += [Link(*pair, "gradient") for pair in itertools.permutations(shared, 2)]
    return found


def wiring(thing: Any, params: Any = None) -> list[Link]:
    """The links between the levels of a model or an optimizer; names are those of `levels`.

    A model: inside pre-training and inside every nest of a mixer; from "outer", whose parameters
    are the slow maps, to what each memory starts from and is told; in nested continuum memory
    systems from each level to the next faster one's initial state. An optimizer: inside its nests,
    and from the gradient.

    thing, params: as of `levels`; a model must hold numbers, not shapes; neither they nor its size
    matter. Raises TypeError for anything else.
    """
    if isinstance(thing, LanguageModel):
        return _of_model(thing)
    found = []
    for leaf, name, nest, context in _nests(thing, params):
        if context is None:
            found += [Link(GRADIENT, _full(name, level), "context") for level in nest.levels]
        else:
            found += [_named(link, name, nest) for link in _of_rule(nest, context, leaf)[0]]
    return list(dict.fromkeys(found))


def stored(thing: Any, params: Any) -> list[Stored]:
    """Keys and values of an optimizer's memories; arguments and errors as of `wiring`."""
    found = []
    for leaf, name, nest, context in _nests(thing, params):
        if context is None:
            continue
        sources, told = _of_rule(nest, context, leaf)
        for level, association in told.items():
            if isinstance(association, Association):
                of = [
                    [link.source for link in sources if link[1:] == (level, part)]
                    for part in ("key", "value")
                ]
                key = _words(association.key, of[0], leaf) if of[0] else "none"
                found.append(
                    Stored(_full(name, level), key, _words(association.value, of[1], leaf))
                )
    return list(dict.fromkeys(found))


def _nests(thing: Any, params: Any):
    """(leaf, factory, nest, context) of an optimizer."""
    if not isinstance(thing, optax.GradientTransformation) or params is None:
        raise TypeError(
            "`thing` must be a LanguageModel, or an optax transformation with its `params`."
        )
    return [(leaf, *found) for leaf in jax.tree.leaves(params) for found in nests_of(thing, leaf)]


def _of_rule(nest: Nest, context: Callable, leaf: Any) -> tuple[list[Link], dict[str, Any]]:
    """The links of an optimizer's nest, and what its levels are told of a random gradient."""
    params, gradient = _some(nest.init(jax.random.key(0))), _gradient(leaf)
    given = lambda gradient: nest.forward(params, _moment(context, gradient))[1]
    told = given(gradient)
    found = links(nest, params, _moment(context, gradient))
    found += [Link(GRADIENT, *end) for end in _moved(given, gradient)]
    unread = [(name, "key") for name, own in told.items() if not _reads(nest, name, params, own)]
    return [link for link in found if link[1:] not in unread], told


def _reads(nest: Nest, name: str, params: dict[str, Any], association: Any) -> bool:
    """Whether a level's objective depends on the key."""
    if not isinstance(association, Association) or not jax.tree.leaves(association.key):
        return False
    loss: Any = nest.levels[name].loss
    of = lambda key: {name: loss(params[name], association._replace(key=key))}
    return bool(_moved(of, association.key))


def _words(part: Any, of: list[str], leaf: Any) -> str:
    gradient = _gradient(leaf)
    for words, same in ((GRADIENT, gradient), (f"{GRADIENT}^2", jnp.square(gradient))):
        if jnp.shape(part) == same.shape and bool(jnp.all(part == same)):
            return words
    return f"f({', '.join(dict.fromkeys(of))})" if of else "constant"


def _of_model(model: LanguageModel) -> list[Link]:
    found = [
        Link(*pair, "gradient")
        for pair in itertools.permutations(pretraining(model, optax.identity()).levels, 2)
    ]
    for fast in restarts_by_level(model):
        found.append(Link(f"cms_{int(fast.removeprefix('cms_')) + 1}", fast, "initial state"))
    seen: set[str] = set()  # blocks alike are wired alike
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if starred(name) in seen:
            continue
        seen.add(starred(name))
        if hasattr(module, "ticks"):
            width = model.config.width
            found += [_named(link, name, module.nest()) for link in _of_mixer(module, width)]
        elif hasattr(module, "level"):
            found.append(Link("outer", starred(name), "context"))
    return list(dict.fromkeys(found))


def _of_mixer(module: Any, width: int) -> list[Link]:
    """The links of a module with `ticks`: among its levels, and from "outer" to them."""
    nest = module.nest()
    graph, weights = nnx.split(module)
    of = lambda weights: nnx.merge(graph, weights)
    x = jax.random.normal(jax.random.key(1), (1, 3, width))

    def one_head(weights) -> Ticks:
        params, contexts = of(weights).ticks(x)
        return Ticks(
            jax.tree.map(lambda a: a[0], params), jax.tree.map(lambda a: a[0, 2, 0], contexts)
        )

    weights = _some(weights)
    params, context = one_head(weights)
    generic = _some(params)
    starts = lambda weights: {name: Start(p) for name, p in one_head(weights).params.items()}
    told = lambda weights: of(weights).nest().forward(generic, one_head(weights).contexts)[1]
    found = links(nest, generic, context)
    for function in (starts, told):
        found += [Link("outer", *end) for end in _moved(function, weights)]
    # What never fires is learned outside only: it is a part of "outer".
    fires = [name for name, level in nest.levels.items() if level.clock.period is not None]
    outside = lambda link: link if link.source in fires else link._replace(source="outer")
    return [outside(link) for link in found if link.target in fires]


class Start(NamedTuple):
    """Where a level starts, as a part of what it is told."""

    initial_state: Any


def _moved(function: Callable[[Any], dict[str, Any]], at: PyTree[Array]) -> list[tuple[str, str]]:
    """(level, part) of every part of what `function` tells levels that moves with its argument."""
    leaves, tree = jax.tree.flatten(at)
    moving = [n for n, leaf in enumerate(leaves) if _is_float(leaf)]

    def of(numbers):
        whole = list(leaves)
        for n, number in zip(moving, numbers, strict=True):
            whole[n] = number
        return function(tree.unflatten(whole))

    here = [leaves[n] for n in moving]
    if not here:
        return []

    def moves(part):
        floats = [leaf for leaf in jax.tree.leaves(part) if _is_float(leaf)]
        return functools.reduce(jnp.logical_or, [jnp.any(leaf != 0) for leaf in floats], False)

    @jax.jit
    def by_part(here, step):
        _, tangents = jax.jvp(of, (here,), (step,))
        return {
            level: {part: moves(tangent) for part, tangent in _parts(told)}
            for level, told in tangents.items()
        }

    found = by_part(here, _some(here, seed=2))
    return [
        (level, part.replace("_", " "))
        for level, parts in found.items()
        for part, moved in parts.items()
        if moved
    ]


def _parts(told: Any) -> list[tuple[str, Any]]:
    """A context by field."""
    known = isinstance(told, Association | Start)
    return list(told._asdict().items()) if known else [("context", told)]


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _some(tree: PyTree[Array], seed: int = 3) -> PyTree[Array]:
    """Numbers in general position in the place of all floats."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
    drawn = [
        0.5 * jax.random.normal(key, leaf.shape, leaf.dtype) if _is_float(leaf) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(drawn)


def _gradient(leaf: Any) -> Array:
    return _some(jnp.zeros(leaf.shape))


def _moment(context: Callable, gradient: Array) -> Any:
    """What an optimizer tells the levels of a leaf."""
    some = dict(
        gradient=gradient, param=jnp.ones_like(gradient), tick=jnp.int32(3), scale=jnp.float32(0.5)
    )
    return context(*(some[name] for name in inspect.signature(context).parameters))


def _full(prefix: str, level: str) -> str:
    return starred(".".join(filter(None, (prefix, level))))


def _named(link: Link, prefix: str, nest: Nest) -> Link:
    """With the names of levels in full."""
    source = _full(prefix, link.source) if link.source in nest.levels else link.source
    return Link(source, _full(prefix, link.target), link.what)
