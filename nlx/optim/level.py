# SPDX-License-Identifier: Apache-2.0
"""Levels as optax transformations: one level of the core for each leaf of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from nlx import writes
from nlx.level import Level, LevelState
from nlx.nest import Nest
from nlx.writes import Working

as_write = writes.summed  # an optax transformation as a level's write: the bridge's other way


class LevelsState(NamedTuple):
    """State of `as_transformation`, and of the optimizers that are a nest for each leaf."""

    tick: Int[Array, ""]  # gradients seen
    levels: PyTree  # a `LevelState` of trees like the parameters, without what the rest tells;
    # of a nest: {name: such a `LevelState`}


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
    `optax.trace` costs. The levels of all leaves must have states of one structure. Leaves that are
    None or masked pass untouched.
    Source: Behrouz et al. (2025), Nested Learning, section 4.2: optimizers are memories.
    """
    return levelwise(level, readout, lambda gradient, param, tick: context(gradient, param), key)


def levelwise(
    level: Callable[[Any], Level],
    readout: Callable[[Any, Float[Array, "..."]], Float[Array, "..."]],
    context: Callable[[Float[Array, "..."], Any, Int[Array, ""]], Any],
    key: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`as_transformation` whose context also sees the tick: (gradient, parameter, tick)."""

    def init(param, position):
        made = level(param)
        params = made.init(jax.random.fold_in(jax.random.key(key), position))
        return (_pack(made, made.start(params)),)

    def step(entry, gradient, param, tick):
        made = level(gradient if param is None else param)
        state = made.step(_unpack(made, entry[0], tick), context(gradient, param, tick))
        return (_pack(made, state),), readout(state.params, gradient)

    return leafwise(LevelsState, init, step)


def nestwise(
    nest: Callable[[Any], Nest],
    readout: Callable[[Any, Any, Any], Float[Array, "..."]],
    context: Callable[[Float[Array, "..."], Any, Int[Array, ""]], Any],
) -> optax.GradientTransformationExtraArgs:
    """A nest of levels for each leaf, one tick for each gradient.

    states <- nest.step(states, c) ;  c = context(gradient, parameter or None, tick)
    update = readout(visible parameters before, and after, {level name: parameters}, c)

    nest: leaf -> `Nest`, of levels whose states have one structure for all leaves; shapes and dtype
    of the leaf may be used. Levels start at parameters that need no chance.
    """

    def init(param, position):
        del position
        made = nest(param)
        states = made.start(made.init(jax.random.key(0)))
        return ({name: _pack(made.levels[name], state) for name, state in states.items()},)

    def step(entry, gradient, param, tick):
        made = nest(gradient if param is None else param)
        still = all(level.clock.period == 1 for level in made.levels.values())
        states = {
            name: _unpack(made.levels[name], state, tick)._replace(tick=0 if still else tick)
            for name, state in entry[0].items()
        }
        moment = context(gradient, param, tick)
        after, _ = made.step(states, moment)
        before, seen = ({n: s.params for n, s in d.items()} for d in (states, after))
        packed = {name: _pack(made.levels[name], state) for name, state in after.items()}
        return (packed,), readout(before, seen, moment)

    return leafwise(LevelsState, init, step)


def leafwise(
    state_type: Callable[..., Any],
    init: Callable[[Any, int], tuple],
    step: Callable[[tuple, Float[Array, "..."], Any, Int[Array, ""]], tuple[tuple, Any]],
) -> optax.GradientTransformationExtraArgs:
    """A transformation that treats every leaf alike and on its own.

    state_type: NamedTuple of a tick and fields. As optax and Flax expect of a state, a field is a
        tree like the parameters, or several such trees in some structure.
    init(param, position) -> the fields of one leaf, in a structure that all leaves share; position:
        the leaf's number. A tree without leaves is given the structure of a matrix.
    step(fields, gradient, param or None, tick) -> (fields, update): one leaf, one gradient, which
        comes in at least float32.
    """

    def structure(leaf):
        return jax.tree.structure(jax.eval_shape(init, leaf, 0))

    def assemble(tick, tree, inner, entries):
        rows = [inner.flatten_up_to(entry) for entry in entries]
        fields = [tree.unflatten([row[i] for row in rows]) for i in range(inner.num_leaves)]
        return state_type(tick, *inner.unflatten(fields))

    def init_fn(params):
        leaves, tree = jax.tree.flatten(params, is_leaf=_is_none)
        made = [None if leaf is None else init(leaf, i) for i, leaf in enumerate(leaves)]
        inners = [jax.tree.structure(entry) for entry in made if entry is not None]
        inner = inners[0] if inners else structure(jax.ShapeDtypeStruct((2, 2), jnp.float32))
        if any(other != inner for other in inners):
            raise ValueError(
                f"`level` must give every leaf a state of one structure, got {inners}."
            )
        nothing = inner.unflatten([None] * inner.num_leaves)
        entries = [nothing if entry is None else entry for entry in made]
        return assemble(jnp.zeros((), jnp.int32), tree, inner, entries)

    def update_fn(updates, state: Any, params=None, **extra_args):
        del extra_args
        gradients, tree = jax.tree.flatten(updates, is_leaf=_is_none)
        tick, first = increment(state.tick), next((g for g in gradients if g is not None), None)
        if first is None:
            return updates, state._replace(tick=tick)
        inner = structure(first)
        columns = [tree.flatten_up_to(field) for field in inner.flatten_up_to(tuple(state[1:]))]
        entries = [inner.unflatten(row) for row in zip(*columns, strict=True)]
        weights = [None] * len(gradients) if params is None else tree.flatten_up_to(params)
        for i, (gradient, param) in enumerate(zip(gradients, weights, strict=True)):
            if gradient is not None:
                wide = gradient.astype(wide_dtype(gradient))
                entries[i], update = step(entries[i], wide, param, state.tick)
                gradients[i] = update.astype(gradient.dtype)
        return tree.unflatten(gradients), assemble(tick, tree, inner, entries)

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
