# SPDX-License-Identifier: Apache-2.0
"""Clocks for rules: the level of a parameter under the task's loss, against optax.MultiSteps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlx import Clock
from nlx.optim import dmgd, on_clock

PARAMS = {"w": np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]]), "b": np.array([1.0, -1.0])}


def trajectory(tx, steps=8, params=PARAMS, jit=True, **extra):
    """Updates and parameters, stacked, of descent on a fixed stream of gradients."""
    keys = jax.random.split(jax.random.key(0), steps)
    params = jax.tree.map(jnp.asarray, params)  # in the default precision

    def body(carry, key):
        params, state = carry
        gradients = jax.tree.map(lambda p: p + jax.random.normal(key, p.shape, p.dtype), params)
        updates, state = tx.update(gradients, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (gradients, updates, params, state)

    start = (params, tx.init(params))
    if jit:
        return jax.jit(lambda c: jax.lax.scan(body, c, keys)[1])(start)
    seen = []
    for key in keys:
        start, out = body(start, key)
        seen.append(out)
    return jax.tree.map(lambda *x: jnp.stack(x), *seen)


@pytest.mark.parametrize(
    ("period", "rule"),
    [
        (1, lambda: optax.adamw(0.1)),
        (3, lambda: optax.adamw(0.1)),
        (2, lambda: dmgd(0.1, weight_decay=0.1)),
    ],
)
def test_mean_is_multi_steps(x64, period, rule):
    _, updates, params, _ = trajectory(on_clock(rule(), Clock(period)))
    multi = optax.MultiSteps(rule(), period, accumulator_dtype=jnp.float64)
    _, wanted, ends, _ = trajectory(multi)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
    jax.tree.map(close, (updates, params), (wanted, ends))


def test_sum_with_phase(x64):
    """Fires after ticks 1, 4, 7: two gradients, then three and three."""
    gradients, updates, _, _ = trajectory(on_clock(optax.sgd(0.1), Clock(3, phase=2), reduce="sum"))
    g = np.asarray(gradients["w"])
    wanted = np.zeros_like(g)
    wanted[1], wanted[4], wanted[7] = (-0.1 * g[a:b].sum(0) for a, b in ((0, 2), (2, 5), (5, 8)))
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-12)


def test_between_firings_nothing_moves():
    _, updates, params, state = trajectory(on_clock(optax.adam(0.1), Clock(4)))
    still = [t for t in range(8) if t not in (3, 7)]
    assert all(bool(jnp.all(leaf[jnp.array(still)] == 0)) for leaf in jax.tree.leaves(updates))
    assert [int(n) for n in state.pending.rule[0].count] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert [int(n) for n in state.pending.ticks] == [1, 2, 3, 0, 1, 2, 3, 0]
    assert bool(jnp.all(params["w"][3] != params["w"][2]))


def test_restart_takes_parameters_to_zero_and_the_rule_to_its_start():
    tx = on_clock(optax.adam(0.1), Clock(2), restart=2)
    _, _, params, state = trajectory(tx)
    zero = [all(not np.any(leaf[t]) for leaf in jax.tree.leaves(params)) for t in range(8)]
    assert zero == [False, False, False, True, True, False, False, True]
    assert [int(n) for n in state.pending.firings] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert [int(n) for n in state.pending.carry.rule[0].count] == [0, 1, 1, 0, 0, 1, 1, 0]


def test_never():
    tx = on_clock(optax.sgd(1.0), Clock(None))
    _, updates, params, _ = trajectory(tx, value=1.0)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert jax.tree.leaves(tx.init(params)) == []


def test_jit_is_no_jit():
    tx = on_clock(optax.sgd(0.1, momentum=0.5), Clock(2))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        trajectory(tx, 5),
        trajectory(tx, 5, jit=False),
    )


def test_extra_arguments_reach_the_rule():
    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return optax.tree.scale(value, updates), state

    rule = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    gradients, updates, _, _ = trajectory(on_clock(rule, Clock(2)), 2, value=-0.5, unknown=1)
    np.testing.assert_allclose(updates["w"][1], -0.5 * gradients["w"].mean(0), rtol=1e-6)


def test_one_clock_for_each_label():
    """What a continuum memory needs: each block by its own clock, in one optimizer."""
    clocks = {"fast": Clock(1), "slow": Clock(3), "frozen": Clock(None)}
    rules = {name: on_clock(optax.sgd(0.1), clock) for name, clock in clocks.items()}
    params = {"fast": jnp.ones(2), "slow": jnp.ones(2), "frozen": jnp.ones(2)}
    _, updates, _, _ = trajectory(optax.partition(rules, {n: n for n in params}), 6, params)
    moved = {name: np.flatnonzero(np.any(u != 0, -1)).tolist() for name, u in updates.items()}
    assert moved == {"fast": [0, 1, 2, 3, 4, 5], "slow": [2, 5], "frozen": []}


def test_hyperparameters_inside_and_outside():
    decay = optax.linear_schedule(0.4, 0.0, 2)
    inside = on_clock(optax.inject_hyperparams(optax.sgd)(decay), Clock(2))
    gradients, updates, _, _ = trajectory(inside, 4)
    pairs = gradients["b"].reshape(2, 2, -1).mean(1)
    np.testing.assert_allclose(updates["b"][1], -0.4 * pairs[0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"][3], -0.2 * pairs[1], rtol=1e-6)
    factory = lambda learning_rate: on_clock(optax.sgd(learning_rate), Clock(2))
    _, outside, _, _ = trajectory(optax.inject_hyperparams(factory)(decay), 4)
    np.testing.assert_allclose(outside["b"][1], -0.2 * pairs[0], rtol=1e-6)


def test_half_precision_is_collected_in_float32():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    tx = on_clock(optax.sgd(1.0), Clock(256))
    small = {"w": jnp.full((2, 2), 1e-3, jnp.bfloat16)}
    state, (updates, _) = jax.lax.scan(
        lambda s, _: (lambda u, s: (s, (u, 0)))(*tx.update(small, s, params)),
        tx.init(params),
        length=256,
    )
    assert updates["w"].dtype == jnp.bfloat16
    assert state.pending.total["w"].dtype == jnp.float32
    np.testing.assert_allclose(updates["w"][-1].astype(float), -1e-3, rtol=1e-2)


def test_bad_arguments():
    with pytest.raises(TypeError, match="`clock` must be an nlx.Clock, got 4"):
        on_clock(optax.sgd(0.1), 4)
    with pytest.raises(ValueError, match='`reduce` must be "mean" or "sum", got \'max\''):
        on_clock(optax.sgd(0.1), Clock(4), reduce="max")
    with pytest.raises(ValueError, match="`firings` must be an integer >= 1, got 0"):
        on_clock(optax.sgd(0.1), Clock(4), restart=0)
    tx, ones = on_clock(optax.sgd(0.1), Clock(4), restart=2), jnp.ones(2)
    with pytest.raises(ValueError, match="`params` is None; with `restart` it must be the"):
        tx.update(ones, tx.init(ones))
