# SPDX-License-Identifier: Apache-2.0
"""M3: its algorithm transcribed, its clock, and Muon as the case without a slow memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx import optim

U = np.random.default_rng(0).normal(size=(9, 5, 3))
PARAMS = {
    "w": jnp.zeros((5, 3)),
    "k": jnp.zeros((2, 2, 3, 4)),
    "b": jnp.zeros(3),
    "s": jnp.zeros(()),
}


def run(tx, gradients):
    def body(state, gradient):
        update, state = tx.update(gradient, state)
        return state, (update, state)

    start = tx.init(jax.tree.map(lambda g: g[0], gradients))
    return jax.jit(lambda s, g: jax.lax.scan(body, s, g)[1])(start, gradients)


def newton_schulz(x, steps=5):
    x = x / (np.linalg.norm(x) or 1.0)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def algorithm_1(b1, b2, b3, alpha, f, eps):
    """As printed: plain sums; the slow memory at the start of a block, from the last block."""
    m1 = m2 = v = o2 = np.zeros((5, 3))
    for t, g in enumerate(U):
        if t % f == 0:
            m2 = m2 + b3 * U[max(t - f, 0) : t].sum(0)
            o2 = newton_schulz(m2)
        m1, v = m1 + b1 * g, v + b2 * g**2
        yield (newton_schulz(m1) + alpha * o2) / (np.sqrt(v) + eps)


def averages(b1, b2, b3, alpha, f, eps, second_moment):
    """The form that forgets."""
    m1 = m2 = v = o2 = np.zeros((5, 3))
    for t, g in enumerate(U):
        if t and t % f == 0:
            m2 = b3 * m2 + (1 - b3) * U[t - f : t].mean(0)
            o2 = newton_schulz(m2)
        m1, v = b1 * m1 + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        ahead = b1 * m1 / (1 - b1 ** (t + 2)) + (1 - b1) * g / (1 - b1 ** (t + 1))
        o = newton_schulz(ahead) + alpha * o2
        if second_moment:
            x = o / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
            o = x * np.linalg.norm(o) / np.linalg.norm(x)
        yield 0.2 * 5**0.5 * o


def test_literal_is_algorithm_1(x64):
    tx = optim.scale_by_m3(0.3, 0.6, 0.7, alpha=0.5, clock=nlx.Clock(3), eps=0.1, literal=True)
    ours, _ = run(tx, jnp.asarray(U))
    np.testing.assert_allclose(ours, list(algorithm_1(0.3, 0.6, 0.7, 0.5, 3, 0.1)), rtol=1e-12)


@pytest.mark.parametrize("second_moment", [True, False])
def test_default_is_its_transcription(x64, second_moment):
    tx = optim.scale_by_m3(
        0.8, 0.9, 0.6, alpha=0.5, clock=nlx.Clock(4), second_moment=second_moment
    )
    ours, _ = run(tx, jnp.asarray(U))
    want = list(averages(0.8, 0.9, 0.6, 0.5, 4, 1e-8, second_moment))
    np.testing.assert_allclose(ours, want, rtol=1e-12)


def test_without_slow_memory_and_second_moment_it_is_muon(x64):
    ours, _ = run(optim.m3(0.1, 0.8, alpha=0.0, second_moment=False), {"w": jnp.asarray(U)})
    muon = optax.contrib.muon(0.1, beta=0.8, consistent_rms=0.2, eps=0.0)
    muon = optax.with_extra_args_support(muon)
    state, update = muon.init({"w": jnp.zeros((5, 3))}), jax.jit(muon.update)
    for n, u in enumerate(U):
        theirs, state = update({"w": jnp.asarray(u)}, state, {"w": jnp.zeros((5, 3))})
        np.testing.assert_allclose(ours["w"][n], theirs["w"], rtol=1e-12, atol=1e-13)


def test_the_slow_memory_has_its_own_clock(x64):
    """What others see of it is 0 in the first block, then new once a block."""
    _, state = run(optim.scale_by_m3(clock=nlx.Clock(3)), {"w": jnp.asarray(U)})
    slow = state.inner_states["matrix"].inner_state.levels["slow"]
    shown = np.asarray(slow.params["w"])  # after each step
    assert not shown[:2].any()
    new = [n for n in range(1, 9) if not np.array_equal(shown[n], shown[n - 1])]
    assert new == [2, 5, 8]
    np.testing.assert_allclose(shown[2], newton_schulz(U[:3].mean(0)), rtol=1e-12, atol=1e-12)


def test_other_leaves_have_adam(x64):
    gradients = {
        n: jnp.stack([jnp.cos(np.zeros(p.shape) + t) for t in range(4)]) for n, p in PARAMS.items()
    }
    others = {n: g for n, g in gradients.items() if n != "w"}
    ours, _ = run(optim.scale_by_m3(0.8, 0.9), gradients)
    theirs, _ = run(optax.scale_by_adam(0.8, 0.9, eps=0.0), others)
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=1e-12)


def test_no_two_buffers_are_one():
    """Aliased zeros could not be donated."""
    tx = optim.m3(0.1)
    state = tx.init(PARAMS)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size > 1]
    assert len(set(places)) == len(places)
    updates, _ = jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


def test_state_is_five_times_the_parameters():
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.size > 1)
    w = {"w": PARAMS["w"]}
    assert size(optim.m3(0.1).init(w)) == 5 * size(w)
    assert size(optim.m3(0.1, second_moment=False).init(w)) == 4 * size(w)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"b1": 2}, r"`b1` must be in \[0, 1\], got 2"),
        ({"b3": -1}, r"`b3` must be in \[0, 1\], got -1"),
        ({"alpha": -0.1}, "`alpha` must be >= 0, got -0.1"),
        ({"eps": -1}, "`eps` must be >= 0, got -1"),
        ({"clock": 10}, "`clock` must be an nlx.Clock with a period, got 10"),
        ({"clock": nlx.Clock(None)}, "`clock` must be an nlx.Clock with a period"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        optim.m3(0.1, **options)
