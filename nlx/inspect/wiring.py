# SPDX-License-Identifier: Apache-2.0
"""Who reads whom: knowledge transfer between levels, found by tracing their wiring."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from nlx.inspect.mixers import Link, among, of_mixer
from nlx.inspect.rows import nests_of, starred
from nlx.inspect.tracing import is_float, moved
from nlx.level import Association
from nlx.nest import Nest
from nlx.nn.model import LanguageModel, pretraining, restarts_by_level

GRADIENT = "gradient"  # the source that is no level: what an optimizer is given


class Stored(NamedTuple):
    """What a memory of an optimizer stores for a gradient, in words."""

    level: str
    key: str  # "none", "gradient", "gradient^2", or what it is a function of
    value: str


def links(nest: Nest, params: dict[str, Any], context: Any) -> list[Link]:
    """Which level's visible parameters stand in which part of which level's context.

    There is a link where the part is computed from the parameters. Levels under the nest's shared
    loss hand each other gradients.

    nest: `Nest`. params: of every level by name. context: one tick's. Shapes are enough.
    Source: Behrouz et al. (2025), Nested Learning, section 3.3 (knowledge transfer).
    """
    found = among(lambda _: nest, params, context, ())
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

    thing, params: as of `levels`. Raises TypeError for anything else.
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
    found += [Link(GRADIENT, *part) for part in moved(given, gradient)]
    unread = [(name, "key") for name, own in told.items() if not _reads(nest, name, params, own)]
    return [link for link in found if link[1:] not in unread], told


def _reads(nest: Nest, name: str, params: dict[str, Any], association: Any) -> bool:
    """Whether a level's objective depends on the key."""
    if not isinstance(association, Association) or not jax.tree.leaves(association.key):
        return False
    loss: Any = nest.levels[name].loss
    told = lambda key: {name: loss(params[name], association._replace(key=key))}
    return bool(moved(told, association.key))


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
    seen: set[type] = set()  # blocks alike are wired alike
    for n, block in enumerate(model.blocks):
        if type(block.mixer) not in seen:
            seen.add(type(block.mixer))
            found += of_mixer(block.mixer, f"blocks.{n}.mixer", model.config.width)
    return list(dict.fromkeys(found))


def _some(tree: PyTree[Array], seed: int = 3) -> PyTree[Array]:
    """Numbers in general position in the place of all floats."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
    drawn = [
        0.5 * jax.random.normal(key, leaf.shape, leaf.dtype) if is_float(leaf) else leaf
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
