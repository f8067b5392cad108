# SPDX-License-Identifier: Apache-2.0
"""The laws of levels, nests, ops and optax transformations, for anyone who writes one.

Every checker raises AssertionError with a sentence that begins with the law's name, and ValueError
for contexts without a tick axis. Levels and nests are checked in float64, whatever the precision of
what they are given.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlx import blocks
from nlx.level import Level
from nlx.nest import Nest

# Learning rates with which each optimizer of `nlx.optim` passes optax's own suite of tests; not
# `dgd`, whose `update` needs the inputs of layers.
SUITE_LEARNING_RATES: dict[str, float] = {
    "momentum": 3e-4,
    "preconditioned_momentum": 1e-3,
    "delta_momentum": 1e-3,
    "feature_momentum": 1e-3,
    "orthogonal_momentum": 1e-2,
    "dmgd": 1e-2,
    "adam_memory": 1e-2,
    "adagrad_memory": 1e-2,
    "m3": 1e-2,
    "shampoo": 1e-2,
    "soap": 1e-2,
}


def check_level(
    level: Level,
    contexts: Any,
    *,
    params: Any = None,
    splits: Sequence[int] | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Checks the laws of one level on one sequence; the level's output is its visible parameters.

    Pure; state in == state out; scan == repeated step in values and gradients; jit == no jit; one
    compilation; vmap == loop, each row at its own tick; split; clock; causality; gradients finite
    and equal to finite differences through the writes, for every initial parameter and every float
    of the contexts.

    contexts: one per tick, stacked on a leading axis, at least 2 ticks; a few suffice.
    params: initial parameters; default level.init of a fixed key.
    splits: where to cut the sequence; default its middle. With an even length that compiles once.
    tolerance: largest error, relative to the largest entry of an array or to 1.
    """

    alone = Nest({"level": level}, lambda params, context: (params["level"], {"level": context}))

    def step(states, context):
        state = states["level"]
        return {"level": level.step(state, context)}, state.params

    def scan(states, contexts):
        return {"level": level.scan(states["level"], contexts)}, alone.scan(states, contexts)[1]

    start = {"level": level.init(jax.random.key(0)) if params is None else params}
    _check(_Subject(alone.start, step, scan, alone.levels), start, contexts, splits, tolerance)


def check_nest(
    nest: Nest,
    contexts: Any,
    *,
    params: Any = None,
    splits: Sequence[int] | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Checks the laws of a nest on one sequence: those of `check_level`, for all levels at once.

    Arguments as in `check_level`; params by name.
    """
    start = nest.init(jax.random.key(0)) if params is None else params
    subject = _Subject(nest.start, nest.step, nest.scan, nest.levels)
    _check(subject, start, contexts, splits, tolerance)


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    sequence: Sequence[str] = (),
    splits: Sequence[int] = (),
    state: str = "state",
    initial: str = "",
    tolerance: float = 1e-9,
) -> None:
    """Checks that two functions agree, in values and in the gradient of every float argument.

    op, reference: called with `args` as keywords; any pytree of arrays comes back.
    args: keyword arguments; what isn't a float array is passed as it is.
    sequence: names of the array arguments laid out [b, t, ...]. If given, both functions return
        (y [b, t, ...], state), and op must be causal and must not leak from row to row.
    splits: ticks at which to cut the sequence: op on the first part, then op on the second with the
        argument named `state` set to what the first returned and without the one named `initial`,
        must equal op on the whole.
    tolerance: largest error, relative to the largest entry of an array or to 1.
    """
    floats, merge = _floats(dict(args))

    def gradient(function, weigh):
        def total(floats):
            outputs = function(**merge(floats))
            return weigh(outputs), outputs

        return jax.jit(jax.grad(total, has_aux=True))(floats)

    slopes, whole = gradient(op, _weighed)
    expected_slopes, expected = gradient(reference, _weighed)
    _same("op law, values", whole, expected, tolerance)
    _same("op law, gradients", slopes, expected_slopes, tolerance)
    for at in splits:
        first, carried = op(**{n: x[:, :at] if n in sequence else x for n, x in args.items()})
        later = {n: x[:, at:] if n in sequence else x for n, x in args.items() if n != initial}
        second, carried = op(**(later | {state: carried}))
        joined = jnp.concatenate([first, second], axis=1), carried
        _same(f"split law at {at}", joined, whole, tolerance)
    if sequence:
        half = args[sequence[0]].shape[1] // 2
        early = merge(gradient(op, lambda outputs: _weighed(outputs[0][:, :half]))[0])
        alone = merge(gradient(op, lambda outputs: _weighed(outputs[0][:1]))[0])
        for name in sequence:
            _zero(f"causality in `{name}`", early[name][:, half:])
            _zero(f"no leak across the batch in `{name}`", alone[name][1:])


def check_transform(
    tx: optax.GradientTransformation, params: Any, *, tolerance: float = 1e-6
) -> None:
    """Checks what optax asks of a transformation, on random gradients.

    Updates like the parameters; state in == state out in structure, shape and dtype; pure; jit ==
    no jit and one compilation; init under eval_shape; unknown extra arguments accepted; subtrees
    without leaves and zero gradients passed through, finite.

    params: a pytree of float arrays. tolerance: as in `check_level`.
    """
    tx = optax.with_extra_args_support(tx)
    params = {"params": params, "empty": (), "none": None}
    gradients = _random_like(params, 7)
    state = tx.init(params)
    _alike("init under eval_shape", jax.eval_shape(tx.init, params), state)
    updates, after = tx.update(gradients, state, params)
    _alike("updates are like the parameters", updates, params)
    _alike("state in == state out", after, state)
    _same_bits("pure", tx.update(gradients, state, params), (updates, after))
    try:
        ignored = tx.update(gradients, state, params, an_argument_nobody_knows=1)
    except TypeError as error:
        raise AssertionError(f"unknown extra arguments are ignored: {error}") from error
    _same_bits("unknown extra arguments are ignored", ignored, (updates, after))
    traces = []

    def update(gradients, state, params):
        traces.append(None)
        return tx.update(gradients, state, params)

    jitted = jax.jit(update)
    _same("jit == no jit", jitted(gradients, state, params), (updates, after), tolerance)
    jitted(gradients, after, params)
    _demand(len(traces) == 1, "one compilation", "the second call of `update` compiled again")
    for name, start in (("first", state), ("later", after)):
        zeros = jax.tree.map(jnp.zeros_like, gradients)
        _finite(f"zero gradient, {name} step", tx.update(zeros, start, params))
        _finite(f"random gradient, {name} step", tx.update(gradients, start, params))


class _Subject(NamedTuple):
    """What a level and a nest have in common; states are dicts of `LevelState`."""

    start: Callable[[Any, Any], Any]
    step: Callable[[Any, Any], tuple[Any, Any]]
    scan: Callable[[Any, Any], tuple[Any, Any]]
    levels: Mapping[str, Level]


def _check(subject: _Subject, params, contexts, splits, tolerance: float) -> None:
    blocks.length_of(contexts)
    _check_state(subject, params, contexts)
    with jax.enable_x64(True):
        params, contexts = _double(params), _double(contexts)
        _check_state(subject, params, contexts)
        _check_pure(subject, params, contexts)
        run = _check_runs(subject, params, contexts, splits, tolerance)
        _check_scan(subject, run, params, contexts, tolerance)


def _check_state(subject: _Subject, params, contexts) -> None:
    """A state comes back with the structure, shapes and dtypes it had."""
    states = subject.start(params, jnp.int32(0))
    for name, function, argument in (
        ("step", subject.step, _at(contexts, 0)),
        ("scan", subject.scan, contexts),
    ):
        after, _ = jax.eval_shape(function, states, argument)
        _alike(f"state in == state out of {name}", after, states)


def _check_pure(subject: _Subject, params, contexts) -> None:
    """The same step of the same state gives the same bits."""
    states, context = subject.start(params, 1), _at(contexts, 0)
    _same_bits("pure", subject.step(states, context), subject.step(states, context))


def _check_runs(subject: _Subject, params, contexts, splits, tolerance: float):
    """One compilation; split law; rows of a batch are strangers; the future is unseen."""
    traces, ticks = [], _ticks(contexts)

    def scan(states, contexts):
        traces.append(None)
        return subject.scan(states, contexts)

    compiled = jax.jit(scan)
    states = subject.start(params, jnp.int32(1))
    whole = compiled(states, contexts)
    compiled(whole[0], contexts)
    _demand(len(traces) == 1, "one compilation", "the second call of `scan` compiled again")
    for at in [ticks // 2] if splits is None else splits:
        middle, first = compiled(states, jax.tree.map(lambda x, s=at: x[:s], contexts))
        end, second = compiled(middle, jax.tree.map(lambda x, s=at: x[s:], contexts))
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
        _same(f"split law at {at}", (end, joined), whole, tolerance)
    other = jax.tree.map(lambda x: x[::-1], contexts)
    rows = jax.tree.map(lambda a, b: jnp.stack([a, b]), contexts, other)
    run = lambda tick, contexts: subject.scan(subject.start(params, tick), contexts)
    batch = jax.jit(jax.vmap(run))(jnp.arange(1, 3, dtype=jnp.int32), rows)
    _same("vmap == loop, row 0", _at(batch, 0), whole, tolerance)
    second = compiled(subject.start(params, jnp.int32(2)), other)
    _same("vmap == loop, row 1", _at(batch, 1), second, tolerance)
    for tick in range(ticks - 1):
        blind = jax.tree.map(lambda x, t=tick: _replaced(x, t + 1), contexts)
        seen = jax.tree.map(lambda x, t=tick: x[: t + 1], (compiled(states, blind)[1], whole[1]))
        _same(f"causality, outputs up to {tick}", *seen, tolerance=1e-14)
    return compiled


def _replaced(x: Any, start: int) -> Any:
    """An array whose floats from `start` on are others, of the same range."""
    return x.at[start:].set(x[start:][::-1] * 0.9) if _is_float(x) else x


def _check_scan(subject: _Subject, scan, params, contexts, tolerance: float) -> None:
    """Blocks equal ticks, which keep the clocks and have the slopes of finite differences."""
    floats, merge = _floats((params, contexts))

    def run(scan, tick, floats):
        start, sequence = merge(floats)
        states, outputs, *rest = scan(subject.start(start, tick), sequence)
        return _weighed((states, outputs)), (states, outputs, *rest)

    def step(states, context):
        after, output = subject.step(states, context)
        return after, (output, {name: state.params for name, state in states.items()})

    def stepped(states, sequence):
        states, (outputs, visible) = jax.lax.scan(step, states, sequence)
        return states, outputs, visible

    def gradient(scan, tick):
        return jax.jit(jax.grad(functools.partial(run, scan, tick), has_aux=True))(floats)

    slopes, (*values, visible) = gradient(stepped, jnp.int32(1))
    _check_clocks(subject, visible)
    got_slopes, got = gradient(subject.scan, jnp.int32(1))
    _same("scan == repeated step, values", list(got), values, tolerance)
    _same("scan == repeated step, gradients", got_slopes, slopes, tolerance)
    _, got = jax.jit(functools.partial(run, subject.scan, 1))(floats)
    _same("scan == repeated step, integer tick", list(got), values, tolerance)
    states = subject.start(params, 1)
    for tick in range(2):
        states, output = subject.step(states, _at(contexts, tick))
        _same("jit == no jit", output, _at(values[1], tick), tolerance)
    _check_differences(lambda x: run(scan, jnp.int32(1), x)[0], floats, slopes)


def _check_clocks(subject: _Subject, visible) -> None:
    """Off-tick the visible parameters, seen before each tick from tick 1 on, keep every bit."""
    for name, level in subject.levels.items():
        for tick in range(1, _ticks(visible[name])):
            if not level.clock.fires(tick):
                law = f"clock law of level {name!r} after tick {tick}"
                _same_bits(law, _at(visible[name], tick), _at(visible[name], tick - 1))


def _check_differences(function, floats: dict[str, Any], slopes: dict[str, Any]) -> None:
    """Each array's gradient along a random direction equals a central difference."""
    step, directions = 1e-5, _random_like(floats, 11)
    for name, x in floats.items():
        ends = [function(floats | {name: x + h * directions[name]}) for h in (step, -step)]
        slope = jnp.sum(slopes[name] * directions[name])
        difference = (ends[0] - ends[1]) / (2 * step)
        _same(f"gradient == finite difference in {name}", slope, difference, 1e-6)


def _floats(tree: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """The float arrays of a tree by path, and a function that puts others in their place."""
    paths, treedef = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    floats = {n: jnp.asarray(x) for n, x in zip(names, leaves, strict=True) if _is_float(x)}

    def merge(others: dict[str, Any]) -> Any:
        mixed = [others.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        return jax.tree.unflatten(treedef, mixed)

    return floats, merge


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _double(tree: Any) -> Any:
    """Every float array in float64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if _is_float(x) else x, tree)


def _random_like(tree: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), tree)


def _weighed(tree: Any) -> Any:
    """A scalar in which every float entry has a random weight of its own."""
    floats, _ = _floats(tree)
    weights = _random_like(floats, 5)
    return sum(jnp.sum(weights[name] * x) for name, x in floats.items())


def _ticks(contexts: Any) -> int:
    return jax.tree.leaves(contexts)[0].shape[0]


def _at(tree: Any, tick: Any) -> Any:
    return jax.tree.map(lambda x: x[tick], tree)


def _demand(holds: bool, law: str, why: str) -> None:
    if not holds:
        raise AssertionError(f"{law}: {why}.")


def _alike(law: str, got: Any, expected: Any) -> None:
    shapes = [
        jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), t) for t in (got, expected)
    ]
    _demand(shapes[0] == shapes[1], law, f"got {shapes[0]}, expected {shapes[1]}")


def _same(law: str, got: Any, expected: Any, tolerance: float) -> None:
    """Every entry within tolerance of the larger of 1 and the array's largest entry."""
    _demand(jax.tree.structure(got) == jax.tree.structure(expected), law, "structures differ")
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, value), other in pairs:
        value, other = np.asarray(value), np.asarray(other)
        where = f"{law}, at {jax.tree_util.keystr(path) or 'the result'}"
        _demand(value.shape == other.shape, where, f"shapes {value.shape}, {other.shape}")
        if value.size:
            error = np.max(np.abs(value - other)) / max(1, np.max(np.abs(other)))
            _demand(error <= tolerance, where, f"differs by {error:.3g}, more than {tolerance:g}")


def _same_bits(law: str, got: Any, expected: Any) -> None:
    _same(law, got, expected, 0)


def _zero(law: str, slope: Any) -> None:
    _demand(not np.any(np.asarray(slope)), law, "a gradient that must be 0 is not")


def _finite(law: str, tree: Any) -> None:
    floats, _ = _floats(tree)
    for name, x in floats.items():
        _demand(bool(jnp.all(jnp.isfinite(x))), law, f"{name} is not finite")
