# SPDX-License-Identifier: Apache-2.0
"""Meta-training: a level above whole runs, whose parameters are a rule's theta."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from nlx import writes
from nlx.clock import Clock
from nlx.learned.estimators import Estimator, Run
from nlx.learned.rule import Rule
from nlx.level import Level, LevelState


class MetaState(NamedTuple):
    """Where meta-training stands: all it needs to go on, to the bit."""

    level: LevelState  # of theta
    runs: Any  # of the estimator: training runs under way
    key: Key[Array, ""]
    step: Int[Array, ""]  # pieces seen


def meta_level(rule: Rule, outer: optax.GradientTransformation, clock: Clock = Clock(1)) -> Level:
    """The second storey as a level: theta, a context of runs, an optax rule, a clock.

    loss(theta, run) = run.loss + <theta - sg(theta), run.gradient>

    whose gradient is the one that an estimator found. With period C theta moves by the mean of C
    pieces.

    rule: of `nlx.learned`. outer: what moves theta. clock: in pieces.
    Source: Behrouz et al. (2025), Nested Learning, section 1: optimizers are levels; Andrychowicz
    et al. (2016), eq. 3.
    """

    def loss(theta, run: Run):
        still = jax.lax.stop_gradient(theta)
        along = jax.tree.map(lambda t, s, g: jnp.sum((t - s) * g), theta, still, run.gradient)
        return run.loss + sum(jax.tree.leaves(along), jnp.zeros(()))

    return Level(rule.init, loss, writes.summed(outer), clock)


def meta_start(
    level: Level, estimator: Estimator, key: Key[Array, ""], theta: Any = None
) -> MetaState:
    """Before the first piece. theta: where it begins; None: `rule.init`."""
    first, second, third = jax.random.split(key, 3)
    theta = level.init(first) if theta is None else theta
    state = level.start(theta, jnp.int32(0))
    return MetaState(state, estimator.begin(theta, second), third, jnp.int32(0))


def meta_step(
    level: Level, estimator: Estimator
) -> Callable[[MetaState], tuple[MetaState, Float[Array, ""]]]:
    """(state) -> (state, loss): one piece of all runs, and one tick of theta's level."""

    def step(state: MetaState) -> tuple[MetaState, Float[Array, ""]]:
        key = jax.random.fold_in(state.key, state.step)
        runs, run = estimator.step(state.level.params, state.runs, key)
        after = level.step(state.level, run)
        return MetaState(after, runs, state.key, state.step + 1), run.loss

    return step


def meta_train(
    level: Level,
    estimator: Estimator,
    key: Key[Array, ""],
    steps: int,
    *,
    state: MetaState | None = None,
    theta: Any = None,
) -> tuple[MetaState, Float[Array, " t"]]:
    """Some pieces one after the other, compiled as one; state.level.params is theta.

    steps: pieces, >= 1. state: to go on from, as if it had not been left; None: `meta_start`, with
    theta. Raises ValueError for fewer steps, or a state and a theta.
    """
    if steps < 1:
        raise ValueError(f"`steps` is {steps}; it must be an integer >= 1.")
    if state is not None and theta is not None:
        raise ValueError("`theta` is given; it must be None where a state is: that holds its own.")
    state = meta_start(level, estimator, key, theta) if state is None else state
    step = meta_step(level, estimator)
    return jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s), s, None, steps))(state)
