# SPDX-License-Identifier: Apache-2.0
"""Nests: levels wired to each other; a nest is again a level."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Key, PyTree

from nlx import blocks
from nlx.clock import Clock, Tick
from nlx.level import Level, LevelState
from nlx.writes import Write, fire_if

Named = dict[str, Any]


class Nest:
    """Levels by name, and who reads whom, who makes whose context, who shares an objective.

    levels: at least one `Level` by name.
    forward(params_by_name, context) -> (output, contexts_by_name): the wiring, from the parameters
        that others see. Contexts are values to the inner gradients, differentiable to the outer.
    loss(params_by_name, context) -> scalar: one objective for every level without its own whose
        clock fires (knowledge transfer by backpropagation).
    read(working_by_name, output, context) -> output: an output from the working parameters after
        this tick's writes, before a firing publishes them.

    `step` is the specification; `scan` runs the same function in blocks. Hashed by identity, so
    `jax.jit(nest.scan)` compiles once. Raises ValueError for a level that its clock, objective and
    write leave incomplete.
    Source: Behrouz et al. (2025), Nested Learning, definitions 3-4, section 3.3,
    eqs. 24, 25, 27.
    """

    def __init__(  # noqa: D107
        self,
        levels: Mapping[str, Level],
        forward: Callable[[Named, Any], tuple[Any, Named]],
        loss: Callable[[Named, Any], Float[Array, ""]] | None = None,
        read: Callable[[Named, Any, Any], Any] | None = None,
    ):
        if not levels:
            raise ValueError("`levels` must name at least one level, got none.")
        for name, level in levels.items():
            blocks.check_level(name, level, loss is not None)
        self.levels, self.forward, self.loss, self.read = dict(levels), forward, loss, read
        self._wiring = blocks.Wiring(self.levels, forward, loss, read)

    def init(self, key: Key[Array, ""]) -> Named:
        """Initial parameters of every level by name."""
        keys = jax.random.split(key, len(self.levels))
        return {name: v.init(k) for k, (name, v) in zip(keys, self.levels.items(), strict=True)}

    def start(self, params: Named, tick: Tick = 0) -> dict[str, LevelState]:
        """States before the first tick, all at one tick; see `Level.start`.

        Raises ValueError where `params` are not of these levels.
        """
        blocks.check_names("params", params, self.levels)
        return {name: level.start(params[name], tick) for name, level in self.levels.items()}

    def step(self, states: Mapping[str, LevelState], context: Any) -> tuple[Named, Any]:
        """One tick: the specification of `scan`.

        Raises ValueError where states, levels and the contexts that `forward` makes don't fit.
        """
        wiring = self._wiring
        tick = blocks.tick_of(wiring, states)
        params = {name: state.params for name, state in states.items()}
        carries = {name: state.carry for name, state in states.items()}
        output, own = self.forward(params, context)
        blocks.check_contexts(wiring, own)
        for name, gradient in self._gradients(params, own, context).items():
            write = wiring.levels[name].write
            carries[name] = write.tick(params[name], carries[name], gradient, own.get(name))
        if self.read is not None:
            output = self.read(wiring.working(params, carries), output, context)
        for name, level in wiring.levels.items():
            if level.clock.period is not None:
                always = isinstance(level.clock.period, int) and level.clock.period == 1
                fires = always or level.clock.fires(tick)  # no conditional where it always fires
                params[name], carries[name] = fire_if(
                    level.write, fires, params[name], carries[name]
                )
        after = {name: LevelState(params[name], carries[name], tick + 1) for name in self.levels}
        return after, output

    def scan(self, states: Mapping[str, LevelState], contexts: Any) -> tuple[Named, Any]:
        """All ticks of a sequence, a block at a time: equal to `step` repeated.

        contexts: one per tick, stacked on a leading axis; so are the outputs. A Python-integer
        tick gives static loops, nested where the periods divide each other; outside jit it comes
        back as an integer. Errors as in `step`, and where leading axes disagree.
        """
        return blocks.scan(self._wiring, states, contexts)

    def _gradients(self, params: Named, own: Named, context: Any) -> Named:
        gradients = {
            name: jax.grad(self._wiring.levels[name].loss)(params[name], own[name])
            for name in self._wiring.own()
        }
        if (loss := self.loss) is not None:
            shared = {name: params[name] for name in self._wiring.shared()}
            gradients |= jax.grad(lambda p: loss({**params, **p}, context))(shared)
        return gradients


def as_level(
    nest: Nest,
    loss: Callable[[Named, Any, Any], Float[Array, ""]],
    write: Write,
    clock: Clock,
) -> Level:
    """A nest as one level, whose parameters are the nest's initial ones.

    One tick's context is a whole sequence of the nest's contexts, started at tick 0; its objective
    is loss(states, outputs, context), states the final ones. So this level learns initial states
    through all that the nest writes: pre-training, nested memories, learned optimizers, any depth.

    nest: the levels inside. loss: (states by name, outputs [t, ...], contexts [t, ...]) -> scalar.
    write, clock: of the outer level, as in `Level`.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 28, 72.
    """
    return Level(nest.init, functools.partial(_episode, nest, loss), write, clock)


def _episode(nest: Nest, loss, params: PyTree[Array], contexts: Any) -> Float[Array, ""]:
    states, outputs = nest.scan(nest.start(params), contexts)
    return loss(states, outputs, contexts)
