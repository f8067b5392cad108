# SPDX-License-Identifier: Apache-2.0
"""Levels as optax transformations: one level of the core for each leaf of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from nlx.level import Level, LevelState
from nlx.writes import Working


class LevelsState(NamedTuple):
    """State of `as_transformation`."""

    tick: Int[Array, ""]  # gradients seen
    levels: PyTree  # for each leaf a `LevelState`, without what can be told from the rest


def as_transformation(
    level: Callable[[Any], Level],
    readout: Callable[[Any, Float[Array, "..."]], Float[Array, "..."]],
    context: Callable[[Float[Array, "..."], Any], Any],
    key: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """A level as an optax transformation, leaf by leaf: one tick for each gradient.

    state <- level.step(state, context(u, w)) ;  update = readout(state.params, u)

    level: parameter -> `Level`; it may use the parameter's shape and dtype, and in `Level.init` its
        value. Where `update` is called without parameters it gets the gradient instead.
    readout: (level's visible parameters after the tick, gradient) -> update, shaped like u.
    context: (gradient, parameter or None) -> the level's context. Gradients arrive in at least
        float32; updates leave in the gradients' dtype.
    key: integer; seeds the levels' initial parameters, together with the leaf's position.

    A level with period 1 and a gated write stores its weights once: heavy-ball momentum costs what
    `optax.trace` costs. Leaves that are None or masked pass untouched.
    Source: Behrouz et al. (2025), Nested Learning, section 4.2: optimizers are memories.
    """

    def init(param, key):
        made = level(param)
        return (_pack(made, made.start(made.init(key))),)

    def step(entry, gradient, param, tick):
        made = level(gradient if param is None else param)
        state = made.step(_unpack(made, entry[0], tick), context(gradient, param))
        return (_pack(made, state),), readout(state.params, gradient)

    return leafwise(LevelsState, init, step, key)


def leafwise(
    state_type: Callable[..., Any],
    init: Callable[[Any, Key[Array, ""]], tuple],
    step: Callable[[tuple, Float[Array, "..."], Any, Int[Array, ""]], tuple[tuple, Any]],
    key: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that treats every leaf alike and on its own.

    state_type: NamedTuple of a tick and of trees, each with one entry for each leaf.
    init(param, key) -> the entries of one leaf. step(entries, gradient, param or None, tick) ->
    (entries, update), the gradient in at least float32. key: as in `as_transformation`.
    """
    fields = range(len(state_type._fields) - 1)  # pyright: ignore[reportFunctionMemberAccess]

    def assemble(tick, tree, entries):
        return state_type(tick, *(tree.unflatten([entry[i] for entry in entries]) for i in fields))

    def init_fn(params):
        leaves, tree = jax.tree.flatten(params, is_leaf=_is_none)
        keys = jax.random.split(jax.random.key(key), len(leaves))
        entries = [
            (None,) * len(fields) if leaf is None else init(leaf, leaf_key)
            for leaf, leaf_key in zip(leaves, keys, strict=True)
        ]
        return assemble(jnp.zeros((), jnp.int32), tree, entries)

    def update_fn(updates, state: Any, params=None, **extra_args):
        del extra_args
        gradients, tree = jax.tree.flatten(updates, is_leaf=_is_none)
        entries = list(zip(*(tree.flatten_up_to(column) for column in state[1:]), strict=True))
        weights = [None] * len(gradients) if params is None else tree.flatten_up_to(params)
        for i, (gradient, param) in enumerate(zip(gradients, weights, strict=True)):
            if gradient is not None:
                wide = gradient.astype(wide_dtype(gradient))
                entries[i], update = step(entries[i], wide, param, state.tick)
                gradients[i] = update.astype(gradient.dtype)
        after = assemble(increment(state.tick), tree, entries)
        return tree.unflatten(gradients), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def increment(tick: Int[Array, ""]) -> Int[Array, ""]:
    """The next tick; the largest one stays."""
    return jnp.asarray(optax.safe_increment(tick))


def wide_dtype(leaf: Any) -> Any:
    """The dtype of a leaf, or float32 where that is wider."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _once(level: Level, state: LevelState) -> bool:
    """Whether the visible parameters are the working weights, so that one copy is enough."""
    return level.clock.period == 1 and isinstance(state.carry, Working)


def _pack(level: Level, state: LevelState) -> LevelState:
    return state._replace(tick=None, params=None if _once(level, state) else state.params)


def _unpack(level: Level, state: LevelState, tick: Int[Array, ""]) -> LevelState:
    """The level's state again; with period 1 at a static tick, which needs no conditional."""
    params = state.carry.weights if _once(level, state) else state.params
    return LevelState(params, state.carry, 0 if level.clock.period == 1 else tick)
