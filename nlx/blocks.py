# SPDX-License-Identifier: Apache-2.0
"""Blocks: how clocks compile to loops.

A block ends where some clock fires, so inside it every visible parameter is frozen: the outputs
and gradients of all its ticks are taken in parallel, and carries advance in closed form or by a
short loop. Outer gradients rematerialise each block from its start. `scan` lays the blocks: as
loops nested slowest outermost where the periods divide each other and the tick is a Python integer,
else as masked blocks whose number is bounded at trace time.
"""

import functools
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nlx.clock import Clock
from nlx.writes import Write, fire_if


class Wiring(NamedTuple):
    """Levels by name and the functions that connect them; see `nlx.Nest`."""

    levels: Mapping[str, Any]
    forward: Callable[[dict, Any], tuple[Any, dict]]
    loss: Callable[[dict, Any], Any] | None = None
    read: Callable[[dict, Any, Any], Any] | None = None

    def own(self) -> list[str]:
        """Names of the levels that learn from an objective of their own."""
        return [name for name, level in self.levels.items() if level.loss is not None]

    def shared(self) -> list[str]:
        """Names of the levels that learn from the shared objective."""
        return [n for n, v in self.levels.items() if v.loss is None and v.clock.period is not None]

    def working(self, params: dict, carries: dict) -> dict:
        """The working parameters of every level: what `read` sees."""
        views = {n: v.write.view for n, v in self.levels.items() if v.write is not None}
        return {
            name: view(params[name], carries[name]) if (view := views.get(name)) else params[name]
            for name in params
        }


def check_parts(level: Any) -> None:
    """Raises TypeError for a level whose write or clock is none."""
    if level.write is not None and not isinstance(level.write, Write):
        raise TypeError(
            f"`write` must be an nlx.writes.Write, such as `writes.gated()` makes, got "
            f"{level.write!r}."
        )
    if not isinstance(level.clock, Clock):
        raise TypeError(f"`clock` must be an nlx.Clock, got {level.clock!r}.")


def check_level(name: str, level: Any, shared: bool) -> None:
    """Raises as `check_parts`, and ValueError for a level that can't do what its clock promises."""
    check_parts(level)
    learns = level.clock.period is not None or level.loss is not None
    if learns and level.loss is None and not shared:
        raise ValueError(
            f"`loss` of level {name!r} is None, but its clock has period {level.clock.period}: "
            "give it an objective, a nest with a shared `loss`, or Clock(None)."
        )
    if learns and level.write is None:
        raise ValueError(f"`write` of level {name!r} is None, but the level learns: give it one.")


def check_names(argument: str, given: Mapping[str, Any], levels: Mapping[str, Any]) -> None:
    """Raises ValueError where something by name is not of exactly these levels."""
    if set(given) != set(levels):
        raise ValueError(f"`{argument}` are of {list(given)}; they must be of {list(levels)}.")


def check_state(argument: str, state: Any) -> None:
    """Raises TypeError for what is no state of a level, such as its parameters."""
    if not hasattr(state, "tick"):
        raise TypeError(
            f"`{argument}` is of type {type(state).__name__}; it must be a state, as `start` makes "
            "of parameters."
        )


def check_contexts(wiring: Wiring, own: Mapping[str, Any]) -> None:
    """Raises ValueError where `forward` gives contexts to the wrong levels."""
    for name in wiring.own():
        if own.get(name) is None:
            raise ValueError(f"`forward` gave no context for level {name!r}, which has a `loss`.")
    if unknown := set(own) - set(wiring.levels):
        raise ValueError(
            f"`forward` gave contexts for {sorted(unknown)}, "
            f"but `levels` are {list(wiring.levels)}."
        )


def tick_of(wiring: Wiring, states: Mapping[str, Any]) -> Any:
    """The tick at which all states stand.

    Raises TypeError for what is no state, ValueError where they visibly don't agree.
    """
    check_names("states", states, wiring.levels)
    for name, state in states.items():
        check_state(f"states[{name!r}]", state)
    ticks = [state.tick for state in states.values()]
    if len({int(tick) for tick in ticks if isinstance(tick, Integral)}) > 1:
        raise ValueError(f"`states` must all stand at one tick, got {ticks}.")
    return ticks[0]


def scan(wiring: Wiring, states: Mapping[str, Any], contexts: Any) -> tuple[dict, Any]:
    """Runs all ticks of `contexts`, stacked on the leading axis, block by block.

    Raises ValueError where states, levels or the lengths of the contexts don't fit together.
    """
    for name, level in wiring.levels.items():
        check_level(name, level, wiring.loss is not None)
    tick, length = tick_of(wiring, states), length_of(contexts)
    params = {name: state.params for name, state in states.items()}
    carries = {name: state.carry for name, state in states.items()}
    groups = _groups(wiring)
    if length == 0:
        outputs, _ = jax.vmap(wiring.forward, (None, 0))(params, contexts)
        if wiring.read is not None:
            working = wiring.working(params, carries)
            outputs = jax.vmap(wiring.read, (None, 0, 0))(working, outputs, contexts)
    elif isinstance(tick, Integral) and _divide([clock for clock, _ in groups]):
        params, carries, outputs = _nested(wiring, groups, params, carries, contexts, int(tick))
    else:
        params, carries, outputs = _masked(wiring, params, carries, contexts, tick)
    after = {
        name: state._replace(params=params[name], carry=carries[name], tick=tick + length)
        for name, state in states.items()
    }
    return after, outputs


def _groups(wiring: Wiring) -> list[tuple[Any, list[str]]]:
    """The clocks that fire, slowest first, each with the names of its levels."""
    names: dict[Clock, list[str]] = {}
    for name, level in wiring.levels.items():
        if (period := level.clock.period) is not None:
            names.setdefault(Clock(period, level.clock.phase % period), []).append(name)
    return sorted(names.items(), key=lambda item: item[0].period or 0, reverse=True)


def _divide(clocks: list) -> bool:
    """Whether every clock, slowest first, fires only where the next faster one does."""
    return all(_implies(slow, fast) for slow, fast in zip(clocks[:-1], clocks[1:], strict=True))


def _implies(slow: Any, fast: Any) -> bool:
    return slow.period % fast.period == 0 and (slow.phase - fast.phase) % fast.period == 0


def _nested(wiring: Wiring, groups, params: dict, carries: dict, contexts, tick: int):
    """Plainly nested loops: whole periods of the slowest clock, each made of the faster ones.

    Slow parameters are constants of the inner loops, so they are not saved once per inner block.
    """
    if not groups:
        carries, outputs = _block(wiring, params, carries, contexts, None)
        return params, carries, outputs
    (clock, names), faster = groups[0], groups[1:]
    length = length_of(contexts)

    def part(params, carries, contexts, tick):
        """At most one period, up to and including its firing."""
        last = tick + length_of(contexts) - 1
        params, carries, outputs = _nested(wiring, faster, params, carries, contexts, tick)
        params, carries = _fire(wiring, names, clock.fires(last), params, carries)
        return params, carries, outputs

    lead = min(length, clock.until(tick) % clock.period)
    whole = (length - lead) // clock.period
    body = lead + whole * clock.period
    parts = []
    if lead:
        params, carries, outputs = part(params, carries, _cut(contexts, 0, lead), tick)
        parts.append(outputs)
    if whole:
        moving = [name for _, group in groups for name in group]

        def period(state, piece):
            moved, carries, outputs = part({**params, **state[0]}, state[1], piece, tick + lead)
            return ({name: moved[name] for name in moving}, carries), outputs

        pieces = jax.tree.map(
            lambda x: x.reshape(whole, clock.period, *x.shape[1:]), _cut(contexts, lead, body)
        )
        start = {name: params[name] for name in moving}
        (moved, carries), outputs = jax.lax.scan(period, (start, carries), pieces)
        params = {**params, **moved}
        parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs))
    if body < length:
        rest = _cut(contexts, body, length)
        params, carries, outputs = part(params, carries, rest, tick + body)
        parts.append(outputs)
    return params, carries, jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def _masked(wiring: Wiring, params: dict, carries: dict, contexts, tick):
    """A loop over as many blocks as the worst start tick needs, each padded to the longest.

    What pads a block is its own last tick: what comes after it, finite or not, counts nowhere.
    """
    groups = _groups(wiring)
    clocks = [clock for clock, _ in groups]
    length = length_of(contexts)
    size = min([length] + [clock.period for clock in clocks])
    padded = jax.tree.map(  # with the last tick, never zeros: a masked NaN is NaN in gradients
        lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], size, axis=0)]), contexts
    )
    moving = [name for _, group in groups for name in group]
    begin = {c: jnp.asarray(tick % c.period, jnp.int32) for c in clocks}  # whatever the tick

    def block(state, _):
        moved, carries, start = state
        ticks = length - start
        for clock in clocks:
            ticks = jnp.minimum(ticks, clock.until(begin[clock] + start))
        valid = jnp.arange(size) < ticks

        def cut(x):
            piece = jax.lax.dynamic_slice_in_dim(x, start, size)
            last = jax.lax.dynamic_slice_in_dim(piece, jnp.maximum(ticks - 1, 0), 1)
            return jnp.where(valid.reshape(size, *[1] * (x.ndim - 1)), piece, last)

        current = {**params, **moved}
        piece = jax.tree.map(cut, padded)
        written, outputs = _block(wiring, current, carries, piece, valid)
        any_tick = ticks > 0
        carries = jax.tree.map(lambda new, old: jnp.where(any_tick, new, old), written, carries)
        for clock, names in groups:
            firing = any_tick & clock.fires(begin[clock] + start + ticks - 1)
            current, carries = _fire(wiring, names, firing, current, carries)
        return ({name: current[name] for name in moving}, carries, start + ticks), (outputs, start)

    state = ({name: params[name] for name in moving}, carries, jnp.zeros((), jnp.int32))
    state, (outputs, starts) = jax.lax.scan(block, state, length=_most_blocks(clocks, length))
    ticks = jnp.arange(length, dtype=starts.dtype)
    at = jnp.searchsorted(starts, ticks, side="right") - 1
    outputs = jax.tree.map(lambda x: x[at, ticks - starts[at]], outputs)
    return {**params, **state[0]}, state[1], outputs


def _most_blocks(clocks: list, length: int) -> int:
    """Bounds the blocks of `length` ticks from any start: one more than the firings between them.

    A clock that fires only where a faster one does ends no block of its own.
    """
    ends = [c for i, c in enumerate(clocks) if not any(_implies(c, d) for d in clocks[i + 1 :])]
    return min(length, 1 + sum(-(-(length - 1) // clock.period) for clock in ends))


def _fire(wiring: Wiring, names, firing, params: dict, carries: dict) -> tuple[dict, dict]:
    """Publishes the named levels where `firing`."""
    params, carries = dict(params), dict(carries)
    for name in names:
        write = wiring.levels[name].write
        params[name], carries[name] = fire_if(write, firing, params[name], carries[name])
    return params, carries


def _block(wiring: Wiring, params: dict, carries: dict, contexts, mask) -> tuple[dict, Any]:
    """The ticks of one block that `mask` selects (None: all), before any firing.

    Rematerialised: what is saved for outer gradients is the block's start, not its inside.
    """
    inside = functools.partial(_inside, wiring)
    return jax.checkpoint(inside, prevent_cse=False)(params, carries, contexts, mask)


def _inside(wiring: Wiring, params: dict, carries: dict, contexts, mask) -> tuple[dict, Any]:
    outputs, own = jax.vmap(wiring.forward, (None, 0))(params, contexts)
    check_contexts(wiring, own)
    learning = wiring.own() + wiring.shared()
    looped = [name for name in learning if _needs_ticks(wiring, name)]
    pulls = _pulls(wiring, [n for n in learning if n not in looped], params, contexts, own)
    carries = dict(carries)
    every = jnp.ones(length_of(contexts), bool) if mask is None else mask
    for name, pull in pulls.items():
        write = wiring.levels[name].write
        carries[name] = write.block(params[name], carries[name], pull, own.get(name), every)
    if looped:
        gradients = _gradients(wiring, looped, params, contexts, own)
        ticks = (gradients, {name: own.get(name) for name in looped}, outputs, contexts, mask)
        return _loop(wiring, looped, params, carries, ticks)
    if wiring.read is not None:
        working = wiring.working(params, carries)
        outputs = jax.vmap(wiring.read, (None, 0, 0))(working, outputs, contexts)
    return carries, outputs


def _needs_ticks(wiring: Wiring, name: str) -> bool:
    """Whether a level has no closed form over a block, or its working weights are read in it."""
    write = wiring.levels[name].write
    return write.block is None or (wiring.read is not None and write.view is not None)


def _loop(wiring: Wiring, names: list[str], params: dict, carries: dict, ticks) -> tuple[dict, Any]:
    """The ticks of one block, one after another, for the levels that need it."""

    def tick(moving, context):
        gradients, own, output, context, valid = context
        new = {
            name: wiring.levels[name].write.tick(
                params[name], moving[name], gradients[name], own[name]
            )
            for name in names
        }
        if valid is not None:
            new = jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, moving)
        if wiring.read is not None:
            output = wiring.read(wiring.working(params, {**carries, **new}), output, context)
        return new, output

    moving = {name: carries[name] for name in names}
    single = jax.tree.leaves(ticks)[0].shape[0] == 1
    moving, outputs = jax.lax.scan(tick, moving, ticks, unroll=single)
    return {**carries, **moving}, outputs


def _pulls(wiring: Wiring, names: list[str], params: dict, contexts, own) -> dict[str, Callable]:
    """For each level a function from weights [t] to its weighted sum of the block's gradients."""
    pulls = {}
    for name in names:
        if (loss := wiring.levels[name].loss) is not None:
            pulls[name] = _pull(jax.vmap(loss, (None, 0)), params[name], own[name])
    if shared := {name: params[name] for name in names if name not in pulls}:
        pull = _pull(jax.vmap(_shared(wiring, params), (None, 0)), shared, contexts)
        pulls |= {name: lambda weights, name=name: pull(weights)[name] for name in shared}
    return pulls


def _pull(losses: Callable, params, contexts) -> Callable:
    """One backward pass per weights; levels that pull with one and the same array share it."""
    values, vjp = jax.vjp(lambda p: losses(p, contexts), params)
    passes = {}

    def pull(weights):
        if id(weights) not in passes:
            passes[id(weights)] = weights, vjp(weights.astype(values.dtype))[0]
        return passes[id(weights)][1]

    return pull


def _gradients(wiring: Wiring, names: list[str], params: dict, contexts, own) -> dict:
    """The gradients of every tick of the block, stacked, for the levels that loop over them."""
    gradients = {}
    for name in names:
        if (loss := wiring.levels[name].loss) is not None:
            gradients[name] = jax.vmap(jax.grad(loss), (None, 0))(params[name], own[name])
    if shared := {name: params[name] for name in names if name not in gradients}:
        gradients |= jax.vmap(jax.grad(_shared(wiring, params)), (None, 0))(shared, contexts)
    return gradients


def _shared(wiring: Wiring, params: dict) -> Callable:
    """The shared objective as a function of some levels' parameters; the others are constants."""
    loss: Any = wiring.loss
    return lambda learning, context: loss({**params, **learning}, context)


def length_of(contexts: Any) -> int:
    """The ticks on the leading axis. Raises ValueError where the arrays of `contexts` disagree."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(contexts)]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"`contexts` must be arrays with one leading tick axis, got {shapes}.")
    return shapes[0][0]


def _cut(contexts: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[start:stop], contexts)
