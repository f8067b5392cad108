# SPDX-License-Identifier: Apache-2.0
"""Clocks for optax rules: parameters that move once every so many steps."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from nlx import writes
from nlx.clock import Clock
from nlx.level import Level, LevelState
from nlx.memories import constant
from nlx.optim.level import increment
from nlx.writes import Pending, Restarted


class OnClockState(NamedTuple):
    """State of `on_clock`."""

    tick: Int[Array, ""]  # gradients seen
    pending: Pending | Restarted  # gradients since the last firing, and the state of the rule


def on_clock(
    rule: optax.GradientTransformation,
    clock: Clock,
    reduce: Literal["mean", "sum"] = "mean",
    restart: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives a rule the gradients of a whole period at once: parameters with a clock of their own.

    update_t = rule(reduce_{s in (last firing, t]} u_s) where the clock fires after tick t, else 0

    rule: any optax transformation; on a firing it sees the parameters and extra arguments of that
        step, between firings its state doesn't move.
    clock: in ticks of one `update` call; Clock(None) gives zeros for ever.
    reduce: "mean", as `optax.MultiSteps`, or "sum". Gradients are collected in at least float32.
    restart: firings after which parameters go back to 0 and the rule to its start, for what is
        added to a meta-learned initial state (`nlx.nn.restarts_by_level`); None: never.

    It is the level of a parameter under the task's loss with a summed write. Raises ValueError for
    any other `reduce` or `restart`, TypeError for a clock that is none.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 71 (there the sum), 72.
    """
    if not isinstance(clock, Clock):
        raise TypeError(f"`clock` must be an nlx.Clock, got {clock!r}.")

    def collected(rule, origin=None):
        write = writes.summed(rule, reduce)
        return write if restart is None else writes.restarted(write, restart, origin)

    pending = collected(rule)  # raises before anything is made
    if clock.period is None:
        return optax.with_extra_args_support(optax.set_to_zero())
    rule = optax.with_extra_args_support(rule)

    def level(weights, extra_args):
        """The step taken since the last tick, as a level: its loss is the task's, linearised."""

        def update(updates, state, params=None):
            del params
            return rule.update(updates, state, weights, **extra_args)

        back = lambda step: jax.tree.map(lambda s, w: -w.astype(s.dtype), step, weights)
        write = collected(optax.GradientTransformation(rule.init, update), back)
        return Level(constant(weights).init, _inner_product, write, clock)

    def init_fn(params):
        return OnClockState(jnp.zeros((), jnp.int32), pending.init(params))

    def update_fn(updates, state: Any, params=None, **extra_args):
        if restart is not None and params is None:
            raise ValueError("`params` is None; with `restart` it must be the parameters.")
        tick = 0 if clock.period == 1 else state.tick
        still = LevelState(optax.tree.zeros_like(updates), state.pending, tick)
        moved = level(params, extra_args).step(still, updates)
        return moved.params, OnClockState(increment(state.tick), moved.carry)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _inner_product(step: PyTree[Array], gradient: PyTree[Array]) -> Float[Array, ""]:
    products = jax.tree.map(lambda s, g: jnp.sum(s * g), step, gradient)
    return sum(jax.tree.leaves(products), jnp.zeros(()))
