# SPDX-License-Identifier: Apache-2.0
"""Adam and AdaGrad as memories: minimisers of their objectives, and optax's Adam in the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx import optim

STREAM = {
    name: np.random.default_rng(len(name)).normal(size=(7, *shape))
    for name, shape in {"w": (4, 3), "wide": (2, 5), "b": (3,), "s": ()}.items()
}


def updates(tx, gradients=STREAM):
    gradients = jax.tree.map(jnp.asarray, gradients)

    def body(state, gradient):
        update, state = tx.update(gradient, state)
        return state, update

    start = tx.init(jax.tree.map(lambda g: g[0], gradients))
    return jax.jit(lambda s, g: jax.lax.scan(body, s, g)[1])(start, gradients)


def weights(decay, steps):
    """Of each gradient in a debiased average after `steps` of them."""
    powers = decay ** np.arange(steps)[::-1]
    return powers / powers.sum()


def test_adam_memory_is_adam_in_the_limit(x64):
    for b1, b2 in ((0.9, 0.999), (0.0, 0.5)):
        theirs = updates(optax.scale_by_adam(b1, b2, eps=0.0))
        for ridge in (0.0, 1e-30):
            ours = updates(optim.scale_by_adam_memory(b1, b2, ridge=ridge))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), ours, theirs)


def test_adam_memory_is_the_minimiser_over_the_history(x64):
    """Solved by least squares over the stored gradients, entry by entry, for each step."""
    b, ridge = 0.8, 0.3
    ours = updates(optim.scale_by_adam_memory(b, b, ridge=ridge))["w"]
    for steps in range(1, 8):
        u, w = STREAM["w"][:steps], weights(b, steps)[:, None, None]
        target = np.sqrt(np.sum(w * u**2, 0))
        for place in np.ndindex(4, 3):
            rows = np.append(np.sqrt(w[:, 0, 0]) * u[(slice(None), *place)], np.sqrt(ridge))
            values = np.append(np.sqrt(w[:, 0, 0]) * target[place], 0.0)
            m = np.linalg.lstsq(rows[:, None], values, rcond=None)[0][0]
            np.testing.assert_allclose(ours[steps - 1][place], m, rtol=1e-12, atol=1e-12)


def test_literal_adam_memory_is_the_printed_rule(x64):
    """Eqs. 101-103: sums; with both coefficients 1 their minimiser, in general eq. 105."""
    ridge = 0.3
    whole = updates(optim.scale_by_adam_memory(1.0, 1.0, ridge=ridge, literal=True))["w"]
    limit = updates(optim.scale_by_adam_memory(0.9, 0.6, ridge=0.0, literal=True))["w"]
    m = h = np.zeros((4, 3))
    for n, u in enumerate(STREAM["w"]):
        history = STREAM["w"][: n + 1]
        m, h = m + 0.9 * u, h + 0.6 * u**2
        np.testing.assert_allclose(limit[n], m / np.sqrt(0.6) / np.sqrt(h), rtol=1e-12)
        target = np.sqrt((history**2).sum(0))
        slope = (
            2 * ((np.asarray(whole[n]) * history - target) * history).sum(0) + 2 * ridge * whole[n]
        )
        np.testing.assert_allclose(slope, 0, atol=1e-12)  # of sum_i ||m u_i - P||^2 + ridge ||m||^2


def test_adam_memory_alias(x64):
    ours = updates(optim.adam_memory(optax.linear_schedule(0.5, 0.0, 5)))
    rates = np.maximum(0.5 - 0.1 * np.arange(7), 0)
    want = jax.tree.map(
        lambda u: -u * rates.reshape(-1, *[1] * (u.ndim - 1)), updates(optim.scale_by_adam_memory())
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), ours, want)


@pytest.mark.parametrize("name", ["w", "wide"])
def test_adagrad_memory_is_the_minimiser(x64, name):
    b1, b2, ridge = 0.7, 0.9, 0.2
    ours = updates(optim.scale_by_adagrad_memory(b1, b2, ridge=ridge))[name]
    for steps in range(1, 8):
        u = STREAM[name][:steps]
        u = u if name == "w" else u.swapaxes(1, 2)  # the shorter side is the last
        m = np.tensordot(weights(b1, steps), u, 1)
        h = np.tensordot(weights(b2, steps), u.swapaxes(1, 2) @ u, 1) / u.shape[1]
        values, vectors = np.linalg.eigh(h)
        p = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        best = ours[steps - 1] if name == "w" else ours[steps - 1].T
        gradient = best @ (h + ridge * values[-1] * np.eye(len(h))) - m @ p
        np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_literal_adagrad_memory_is_the_printed_rule(x64):
    ours = updates(optim.scale_by_adagrad_memory(0.9, 0.6, ridge=0.0, literal=True))["w"]
    m, h = np.zeros((4, 3)), np.zeros((3, 3))
    for n, u in enumerate(STREAM["w"]):
        m, h = m + 0.9 * u, h + 0.6 * u.T @ u
        values, vectors = np.linalg.eigh(h)
        root = (vectors / np.sqrt(values)) @ vectors.T
        np.testing.assert_allclose(ours[n], m @ root / np.sqrt(0.6), rtol=1e-12)


def test_adagrad_memory_on_a_slower_clock(x64):
    """Every third step the factor is new, between them it stays."""
    tx = optim.scale_by_adagrad_memory(0.0, 0.9, clock=nlx.Clock(3, phase=1))
    ours, every = updates(tx)["w"], updates(optim.scale_by_adagrad_memory(0.0, 0.9))["w"]
    for n in range(7):
        factor = np.linalg.lstsq(STREAM["w"][n - n % 3], every[n - n % 3], rcond=None)[0]
        np.testing.assert_allclose(ours[n], STREAM["w"][n] @ factor, rtol=1e-6)


def test_vectors_have_the_element_wise_memory(x64):
    vectors = {name: STREAM[name] for name in ("b", "s")}
    ours = updates(optim.scale_by_adagrad_memory(0.8, 0.9), vectors)
    jax.tree.map(np.testing.assert_array_equal, ours,
                 updates(optim.scale_by_adam_memory(0.8, 0.9), vectors))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: optim.adam_memory(0.1, 1.5), r"`b1` must be in \[0, 1\], got 1.5"),
        (lambda: optim.adam_memory(0.1, b2=-1), r"`b2` must be in \[0, 1\], got -1"),
        (lambda: optim.adam_memory(0.1, ridge=-1), "`ridge` must be >= 0, got -1"),
        (lambda: optim.adagrad_memory(0.1, ridge=-1), "`ridge` must be >= 0, got -1"),
        (lambda: optim.adagrad_memory(0.1, clock=3), "`clock` must be an nlx.Clock with a period"),
    ],
)
def test_bad_arguments(make, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()
