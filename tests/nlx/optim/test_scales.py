"""What gradients are measured by: averaged scales of delta momentum, robust ones of DMGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlx import optim


def stream(shape, count=6):
    keys = jax.random.split(jax.random.key(0), count)
    sizes = jnp.array([3.0, 1.0, 10.0, 0.3, 0.3, 0.1])[:count]
    return [s * jax.random.normal(k, shape, jnp.float64) for s, k in zip(sizes, keys, strict=True)]


def updates(tx, gradients):
    state, found = tx.init(gradients[0]), []
    for gradient in gradients:
        update, state = tx.update(gradient, state)
        found.append(np.asarray(update))
    return found


@pytest.mark.parametrize("shape", [(2,), (), (4, 3), (2, 4, 3)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_delta_momentum_erases_by_an_averaged_scale(x64, shape, nesterov):
    b, a, erase = 0.7, 0.9, 0.8
    gradients = stream(shape)
    tx = optim.scale_by_delta_momentum(a, erase=erase, scale_decay=b, nesterov=nesterov)
    m, mean = np.zeros(shape), 0.0
    for t, (g, ours) in enumerate(zip(gradients, updates(tx, gradients), strict=True), 1):
        g = np.asarray(g)
        axes = tuple(range(g.ndim))[-2:]
        mean = b * mean + (1 - b) * np.sum(g**2, axes, keepdims=True)
        c = erase / (mean / (1 - b**t))
        along = g @ (np.swapaxes(g, -1, -2) @ m) if g.ndim > 1 else np.sum(g**2) * m
        m = a * m - c * along + g
        np.testing.assert_allclose(ours, g + a * m if nesterov else m, rtol=1e-12)


def test_delta_momentum_with_scale_decay_0_is_the_normalised_one(x64):
    gradients = stream((4, 3))
    plain = updates(optim.scale_by_delta_momentum(0.9), gradients)
    traced = updates(optim.scale_by_delta_momentum(0.9, scale_decay=jnp.zeros(())), gradients)
    for one, two in zip(plain, traced, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_delta_momentum_of_nothing_is_nothing():
    tx = optim.scale_by_delta_momentum(scale_decay=0.9)
    for zero in updates(tx, [jnp.zeros((3, 2))] * 3):
        np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("memory", ["rows", "coordinates"])
def test_robust_memories_store_shortened_rows(x64, memory):
    """Without a deep memory: the average of rows that are at most `robust` scales long."""
    robust, b, slow = 1.5, 0.9, 0.99
    gradients = stream((4, 5))
    tx = optim.scale_by_deep_momentum(
        b, memory=memory, inner_lr=0.0, nesterov=False, scale_decay=slow, robust=robust
    )
    mu, square = np.zeros((4, 5)), 0.0
    for t, (g, ours) in enumerate(zip(gradients, updates(tx, gradients), strict=True), 1):
        g = np.asarray(g)
        size = np.mean(g**2, 0, keepdims=True) if memory == "rows" else g**2
        usual = np.median(size) if t == 1 else square
        g = g * np.sqrt(np.minimum(1, robust**2 * usual / size))
        square += (1 - slow) / (1 - slow**t) * (np.mean(g**2) - square)
        mu += (1 - b) / (1 - b**t) * (g - mu)
        np.testing.assert_allclose(ours, mu, rtol=1e-12)


def test_one_outlier_hardly_moves_a_robust_memory():
    gradients = [jnp.ones((4, 6)) for _ in range(8)]
    gradients[4] = gradients[4].at[:, 2].set(1e6)
    for robust, most in ((1.5, 1.6), (None, 1e7)):
        tx = optim.scale_by_deep_momentum(robust=robust, hidden=())
        largest = max(np.max(u) for u in updates(tx, gradients))
        assert most / 100 < largest < most


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (4, 3), (2, 4, 3)])
def test_robust_memories_take_any_leaf(shape):
    tx = optim.dmgd(0.1, robust=1.5)
    params = {"w": jnp.ones(shape)}
    state = tx.init(params)
    for size in (1.0, 0.0, 1e30, 1e-30):
        gradient = jax.tree.map(lambda w, size=size: w * size, params)
        update, state = tx.update(gradient, state, params)
        assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(jnp.isfinite(u))), update))


def test_bad_scales_are_refused():
    with pytest.raises(ValueError, match="`robust` must be >= 1 or None, got 0.5"):
        optim.dmgd(0.1, robust=0.5)
    with pytest.raises(ValueError, match="`scale_decay` must be in"):
        optim.delta_momentum(0.1, scale_decay=1.5)


def test_scales_may_be_injected():
    make = lambda robust: optim.dmgd(0.1, robust=robust)
    tx = optax.inject_hyperparams(make)(robust=1.5)
    state = tx.init(jnp.ones((3, 2)))
    update, _ = tx.update(jnp.ones((3, 2)), state, jnp.ones((3, 2)))
    assert bool(jnp.all(jnp.isfinite(update)))
