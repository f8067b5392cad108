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
from nlx.inspect.rows import nests_of, reachable, stages, starred
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
    for own in _nests(thing, params):
        if own.context is None:
            sources = [*own.before, GRADIENT]
            found += [
                Link(source, own.full(level), "context")
                for source in sources
                for level in own.nest.levels
            ]
        else:
            found += _of_rule(own)[0]
    return list(dict.fromkeys(found))


def stored(thing: Any, params: Any) -> list[Stored]:
    """Keys and values of an optimizer's memories; arguments and errors as of `wiring`."""
    found = []
    for own in _nests(thing, params):
        if own.context is None:
            continue
        sources, told = _of_rule(own)
        for level, association in told.items():
            if isinstance(association, Association):
                of = {
                    part: [link.source for link in sources if link[1:] == (own.full(level), part)]
                    for part in ("key", "value")
                }
                words = lambda part, told=association, of=of, own=own: _words(
                    getattr(told, part), of[part], own.gradient
                )
                key = words("key") if of["key"] else "none"
                found.append(Stored(own.full(level), key, words("value")))
    return list(dict.fromkeys(found))


class Rule(NamedTuple):
    """The nest of an optimizer for a leaf, and what comes before it in the optimizer's chain."""

    name: str
    nest: Nest
    context: Callable | None
    before: list[str]  # levels of the stages before
    given: Callable[[Any, Any], Array]  # (gradients, states of those stages) -> what it is given
    gradients: Any
    states: Any
    gradient: Array  # of the leaf

    def full(self, level: str) -> str:
        """The level's name in the tables."""
        return _full(self.name, level)


def _nests(thing: Any, params: Any) -> list[Rule]:
    """The nests of an optimizer, leaf by leaf, each after the stages that it comes after."""
    if not isinstance(thing, optax.GradientTransformation) or params is None:
        raise TypeError(
            "`thing` must be a LanguageModel, or an optax transformation with its `params`."
        )
    gradients = _some(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params))
    leaves, found = jax.tree.leaves(params), []
    chain = stages(thing)
    for n, leaf in enumerate(leaves):
        within = [{id(function) for function in reachable(stage, leaf)} for stage in chain]
        before: dict[int, list[str]] = {}
        for name, nest, context, function in nests_of(thing, leaf):
            at = next((k for k, functions in enumerate(within) if id(function) in functions), 0)

            def given(gradients, states, at=at, n=n):
                for stage, state in zip(chain[:at], states, strict=True):
                    gradients, _ = stage.update(gradients, state, params)
                return jax.tree.leaves(gradients)[n]

            names = [level for k, levels in before.items() if k < at for level in levels]
            before.setdefault(at, []).extend(_full(name, level) for level in nest.levels)
            gradient = jax.tree.leaves(gradients)[n]
            states = _after_a_step(chain[:at], params)
            found.append(Rule(name, nest, context, names, given, gradients, states, gradient))
    return found


def _after_a_step(chain: list[Any], params: Any) -> list[Any]:
    """States of the stages of a chain after one gradient."""
    update, states = _some(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params), 4), []
    for stage in chain:
        update, state = stage.update(update, stage.init(params), params)
        states.append(state)
    return states


def _of_rule(own: Rule) -> tuple[list[Link], dict[str, Any]]:
    """The links of an optimizer's nest, and what its levels are told of a random gradient."""
    nest, context = own.nest, own.context
    assert context is not None
    params = _some(nest.init(jax.random.key(0)))

    def told(gradients, states):
        return nest.forward(params, _moment(context, own.given(gradients, states)))[1]

    now = told(own.gradients, own.states)
    found = links(nest, params, _moment(context, own.given(own.gradients, own.states)))
    reads_states = lambda states, gradients: told(gradients, states)
    earlier = moved(reads_states, own.states, own.gradients) if own.before else []
    found += [Link(GRADIENT, *part) for part in moved(told, own.gradients, own.states)]
    found += [Link(source, *part) for part in earlier for source in own.before]
    unread = [(name, "key") for name, of in now.items() if not _reads(nest, name, params, of)]
    place = lambda name: own.full(name) if name in nest.levels else name
    return [
        Link(place(link.source), own.full(link.target), link.what)
        for link in found
        if link[1:] not in unread
    ], now


def _reads(nest: Nest, name: str, params: dict[str, Any], association: Any) -> bool:
    """Whether a level's objective depends on the key."""
    if not isinstance(association, Association) or not jax.tree.leaves(association.key):
        return False
    loss: Any = nest.levels[name].loss
    told = lambda key: {name: loss(params[name], association._replace(key=key))}
    return bool(moved(told, association.key))


def _words(part: Any, of: list[str], gradient: Array) -> str:
    for words, same in ((GRADIENT, gradient), (f"{GRADIENT}^2", jnp.square(gradient))):
        if jnp.shape(part) == same.shape and bool(jnp.all(part == same)):
            return words
    short = [name.rpartition(".")[2] for name in dict.fromkeys(of)]
    return f"f({', '.join(short)})" if of else "constant"


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


def _moment(context: Callable, gradient: Array) -> Any:
    """What an optimizer tells the levels of a leaf."""
    some = dict(
        gradient=gradient, param=jnp.ones_like(gradient), tick=jnp.int32(3), scale=jnp.float32(0.5)
    )
    return context(*(some[name] for name in inspect.signature(context).parameters))


def _full(prefix: str, level: str) -> str:
    return starred(".".join(filter(None, (prefix, level))))
