# SPDX-License-Identifier: Apache-2.0
"""Gradient memories: the rows of the table, to the bit where they are old acquaintances."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx.memories import constant, linear
from nlx.objectives import dot_product, l2
from nlx.optim import debiased, gradient_memory

PARAMS = {"w": (5, 3), "deep": [(4,), (), (2, 3, 2)], "nothing": None}


def stream(steps, dtype=jnp.float32, shapes=PARAMS):
    is_shape = lambda s: isinstance(s, tuple)
    draw = lambda s: 3 * np.random.default_rng(sum(s)).normal(size=(steps, *s))
    return jax.tree.map(lambda s: jnp.asarray(draw(s), dtype), shapes, is_leaf=is_shape)


def updates(tx, gradients, jit=True):
    state = tx.init(jax.tree.map(lambda g: g[0], gradients))
    update, out = jax.jit(tx.update) if jit else tx.update, []
    for t in range(len(jax.tree.leaves(gradients)[0])):
        step, state = update(jax.tree.map(lambda g: g[t], gradients), state)  # noqa: B023
        out.append(step)
    return out, state


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)


def momentum(decay, nesterov=False):
    look_ahead = lambda read, gradient: gradient + decay * read(gradient)
    return gradient_memory(
        constant, dot_product, retain=decay, readout=look_ahead if nesterov else None
    )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_constant_dot_is_trace_to_the_bit(nesterov, jit):
    gradients = stream(6)
    ours, state = updates(momentum(0.9, nesterov), gradients, jit)
    theirs, trace = updates(optax.trace(0.9, nesterov), gradients, jit)
    assert_same_bits(ours, theirs)
    held = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim or leaf.dtype == jnp.float32]
    assert_same_bits(held, jax.tree.leaves(trace))  # and it costs no more than optax.trace


@pytest.mark.parametrize("nesterov", [False, True])
def test_constant_dot_is_trace_in_float64(x64, nesterov):
    gradients = stream(6, jnp.float64)
    theirs = updates(optax.trace(0.9, nesterov), gradients)[0]
    assert_same_bits(updates(momentum(0.9, nesterov), gradients)[0], theirs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype):
    gradients = stream(6, dtype)
    ours, _ = updates(momentum(0.9), gradients)
    wide = optax.trace(0.9, accumulator_dtype=jnp.float32)
    theirs, _ = updates(wide, jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
    assert_same_bits(ours, jax.tree.map(lambda u: u.astype(dtype), theirs))


@pytest.mark.parametrize(("rate", "debias"), [(0.1, False), (debiased(0.9), True)])
def test_constant_l2_is_an_average(rate, debias):
    gradients = stream(6)
    ours, _ = updates(gradient_memory(constant, l2, rate=rate), gradients)
    theirs, _ = updates(optax.ema(0.9, debias=debias), gradients)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6)
    jax.tree.map(close, ours, theirs)


def test_preconditioned_momentum_is_a_chain():
    gradients = stream(5, shapes={"w": (3, 4)})
    p = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)), jnp.float32)
    ours, _ = updates(
        gradient_memory(constant, dot_product, target=lambda u: p @ u, retain=0.8), gradients
    )
    preconditioner = optax.stateless(lambda u, _: jax.tree.map(lambda g: p @ g, u))
    assert_same_bits(ours, updates(optax.chain(preconditioner, optax.trace(0.8)), gradients)[0])


def test_linear_memory_with_erase(x64):
    """W <- (retain I - erase k k^T) W - rate k (k W - v)^T, asked with another key."""
    gradients = stream(5, jnp.float64, (4, 3))
    tx = gradient_memory(
        lambda leaf: linear(4, 3),
        l2,
        features=lambda u: u[:, 0],
        target=lambda u: u[1],
        rate=0.2,
        retain=0.9,
        erase=0.3,
        readout=lambda read, u: u + read(u[:, 1])[None, :],
    )
    w = np.zeros((4, 3))
    for u, ours in zip(np.asarray(gradients), updates(tx, gradients)[0], strict=True):
        k, v = u[:, 0], u[1]
        w = 0.9 * w - 0.3 * np.outer(k, k @ w) - 0.2 * np.outer(k, k @ w - v)
        np.testing.assert_allclose(ours, u + u[:, 1] @ w, rtol=1e-9)


def test_delta_momentum_row(x64):
    """Key K = g^T, value P g-wise, asked with I: phi <- phi (a I - c g^T g) + c g (spec 2.3)."""
    gradients = stream(5, jnp.float64, (4, 3))
    c, a = 0.05, 0.9
    tx = gradient_memory(
        lambda leaf: linear(3, 4),
        l2,
        features=lambda u: u,
        target=lambda u: jnp.eye(4),
        rate=c,
        retain=a,
        readout=lambda read, u: read(jnp.eye(3)).T,
    )
    m = np.zeros((4, 3))
    for g, ours in zip(np.asarray(gradients), updates(tx, gradients)[0], strict=True):
        m = m @ (a * np.eye(3) - c * g.T @ g) + c * g
        np.testing.assert_allclose(ours, m, rtol=1e-9)


def test_hyperparameters_may_be_injected():
    factory = lambda retain: gradient_memory(constant, dot_product, retain=retain)
    schedule = optax.linear_schedule(0.9, 0.0, 3)
    ours, _ = updates(optax.inject_hyperparams(factory)(retain=schedule), {"w": jnp.ones((5, 2))})
    assert [float(u["w"][0]) for u in ours] == pytest.approx([1.0, 1.6, 1.48, 1.0, 1.0])


@pytest.mark.parametrize(("decay", "shares"), [(1.0, [1, 1 / 2, 1 / 3]), (0.0, [1, 1, 1])])
def test_debiased_at_its_ends(decay, shares):
    ours = [float(debiased(decay)(jnp.int32(tick))) for tick in range(3)]
    np.testing.assert_allclose(ours, shares, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rate": -0.1}, "`rate` must be >= 0, got -0.1"),
        ({"retain": 1.5}, r"`retain` must be in \[0, 1\], got 1.5"),
        ({"erase": -1}, "`erase` must be >= 0, got -1"),
    ],
)
def test_bad_gates(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        gradient_memory(constant, dot_product, **options)


def test_nothing_to_erase():
    with pytest.raises(ValueError, match="`erase` is 0.5, but this `memory` has no inputs"):
        gradient_memory(nlx.memories.constant, dot_product, erase=0.5).init(jnp.zeros(3))


def test_what_is_no_factory_or_readout_gets_a_sentence():
    made = constant(jnp.zeros(3))
    with pytest.raises(TypeError, match="`memory` is of type Memory; it must be a function"):
        gradient_memory(made, dot_product)
    with pytest.raises(TypeError, match=r"`readout` is .*; it must be .* arguments, \(read, u\)"):
        gradient_memory(constant, dot_product, readout=lambda read: read)
