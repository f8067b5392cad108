# SPDX-License-Identifier: Apache-2.0
"""Levels: one optimisation problem with its own context flow and clock."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key, PyTree

from nlx import blocks
from nlx.clock import Clock, Tick
from nlx.memories import Memory
from nlx.writes import Write, fire_if


class Association(NamedTuple):
    """One tick's context of an associative memory: what to store, and how strongly.

    Gates are scalars, at least float32; None is neutral. On a sequence every field has a leading
    tick axis.
    """

    key: Any  # what to store under
    value: Any  # what to store
    rate: Float[Array, ""] | None = None  # >= 0, inner learning rate; None: 1
    retain: Float[Array, ""] | None = None  # in [0, 1], 0 forgets all, None: 1
    momentum: Float[Array, ""] | None = None  # in [0, 1], None: 0
    erase: Float[Array, ""] | None = None  # >= 0, strength of forgetting along the key; None: 0


class LevelState(NamedTuple):
    """Where a level stands between two ticks."""

    params: PyTree[Array]  # what others see, frozen between firings; gradients are taken there
    carry: Any  # of the write: pending gradients, or working weights and momentum
    tick: Tick  # the next tick, 0-based; an integer outside jit gives static loops


class Level(NamedTuple):
    """One optimisation problem: parameters, an objective over contexts, a write, a clock.

    init(key) -> params.
    loss(params, context) -> scalar: the objective of one tick. None: the nest's shared loss, or,
        for a clock that never fires, no objective at all: a frozen part.
    write: what gradients do; None only for a frozen part.
    clock: when the parameters that others see are replaced.

    A context is any pytree: arrays without a tick axis in `step`, with a leading one in `scan`.
    Source: Behrouz et al. (2025), Nested Learning, definitions 2-4, eqs. 19, 20.
    """

    init: Callable[[Key[Array, ""]], Any]
    loss: Callable[[Any, Any], Float[Array, ""]] | None = None
    write: Write | None = None
    clock: Clock = Clock(None)

    def start(self, params: PyTree[Array], tick: Tick = 0) -> LevelState:
        """The state before the first tick, with these parameters visible.

        tick: where the clock starts; an array (`jnp.int32(0)`) for states that are mapped over.
        """
        return LevelState(params, () if self.write is None else self.write.init(params), tick)

    def step(self, state: LevelState, context: Any) -> LevelState:
        """One tick: the specification of `scan`.

        Raises ValueError for a clock that fires without an objective or a write, TypeError for
        parameters instead of a state.
        """
        blocks.check_level("level", self, shared=False)
        blocks.check_state("state", state)
        params, carry, tick = state
        if self.loss is not None and self.write is not None:
            gradient = jax.grad(self.loss)(params, context)
            carry = self.write.tick(params, carry, gradient, context)
            params, carry = fire_if(self.write, self.clock.fires(tick), params, carry)
        return LevelState(params, carry, tick + 1)

    def scan(self, state: LevelState, contexts: Any) -> LevelState:
        """All ticks of a sequence, a block at a time: equal to `step` repeated.

        contexts: one context per tick, stacked on a leading axis. Errors as in `step`.
        """
        blocks.check_state("state", state)
        alone = blocks.Wiring({"level": self}, lambda params, context: ((), {"level": context}))
        states, _ = blocks.scan(alone, {"level": state}, contexts)
        return states["level"]


def associative_memory(
    memory: Memory,
    objective: Callable[[Any, Any], Float[Array, ""]],
    write: Write,
    clock: Clock,
) -> Level:
    """A level that stores associations: min_W objective(M_W(key), value), one per tick.

    memory: what is stored (`nlx.memories`). objective: (output, value) -> scalar, what storing
    means (`nlx.objectives`). write, clock: as in `Level`. Its contexts are `Association`s.
    Raises TypeError for a write or clock that is none, such as `writes.gated` uncalled.
    Source: Behrouz et al. (2025), Nested Learning, definition 1, eq. 6.
    """
    level = Level(memory.init, functools.partial(_recall, memory, objective), write, clock)
    blocks.check_parts(level)
    return level


def _recall(memory: Memory, objective, params, association: Association) -> Float[Array, ""]:
    return objective(memory.read(params, association.key), association.value)
