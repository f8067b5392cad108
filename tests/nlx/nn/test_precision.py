# SPDX-License-Identifier: Apache-2.0
"""What bfloat16 leaves in float32, and what keeps a deep memory finite over a long stream."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from nlx import nn
from nlx.nn.attention import Part, attend
from nlx.nn.decay import Decay
from nlx.nn.gate import Gate
from nlx.nn.rotary import rotate

ROUNDED = 2.0**-8  # the relative error of one rounding to bfloat16


def narrow(*shape, scale=1.0, seed=0):
    """Random bfloat16 numbers, and the same in float64 for NumPy."""
    made = (scale * np.random.default_rng(seed).normal(size=shape)).astype(ml_dtypes.bfloat16)
    return jnp.asarray(made), made.astype(np.float64)


def wide(parameter):
    return np.asarray(parameter[...], np.float64)


def close(found, exact, dtype, tolerance):
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=1e-7)


def test_norm_rounds_once():
    x, exact = narrow(32, 50, scale=3.0)
    exact = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-6)
    close(nn.RMSNorm(50)(x), exact, jnp.bfloat16, ROUNDED * 1.01)


def test_gate_and_decay_do_not_round():
    """A retention of 0.9985 is 1 in bfloat16."""
    x, exact = narrow(2, 9, 16)
    gate, decay = Gate(16, 3, -4.0, rngs=nnx.Rngs(0)), Decay(16, 3, rngs=nnx.Rngs(0))
    logit = exact @ wide(gate.kernel) + wide(gate.bias)
    close(gate(x), 1 / (1 + np.exp(-logit)), jnp.float32, 1e-5)
    step = np.logaddexp(0, exact @ wide(decay.kernel) + wide(decay.bias))
    found = decay(x)
    close(found[0], step, jnp.float32, 1e-5)
    close(found[1], np.exp(-np.exp(wide(decay.log_speed)) * step), jnp.float32, 1e-5)


def test_rotation_knows_positions_that_bfloat16_does_not():
    x, exact = narrow(1, 20, 2, 8)
    position = 1001 + 37 * np.arange(20)
    angle = position[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = (exact[0, ..., :4] + 1j * exact[0, ..., 4:]) * np.exp(1j * angle)[:, None]
    turned = np.concatenate([turned.real, turned.imag], -1)
    found = rotate(x, jnp.asarray(position)[None], 10_000.0)
    assert found.dtype == jnp.bfloat16
    size = np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(found[0], np.float64), turned, atol=ROUNDED * size)


def test_softmax_does_not_round_its_scores():
    """Scores of up to 40, which bfloat16 knows to within 0.1."""
    query, q = narrow(1, 6, 2, 8, scale=6.0)
    key, k = narrow(1, 30, 2, 8, scale=6.0, seed=1)
    value, v = narrow(1, 30, 2, 8, seed=2)
    scores = np.einsum("bthd,bshd->bhts", q, k) / 8**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)
    found = attend([Part(query, key, value, jnp.ones((1, 6, 30), bool))])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float64), exact, atol=2 * ROUNDED * np.abs(v).max()
    )


@pytest.mark.parametrize("start", [1.0, 100.0])
def test_a_deep_memory_of_titans_is_kept_finite(start):
    """Four layers, equal tokens, rates at their bounds: the gradients' clip; the weights' bound."""
    mixer = nn.TitansLMM(16, heads=2, hidden=16, depth=4, chunk_size=16, rngs=nnx.Rngs(0))
    memory = mixer.long_term.memory
    for gate, sign in ((memory.rate, 1), (memory.forget, -1), (memory.momentum, -1)):
        gate.bias[...] += 8.0 * sign
    for layer in memory.layers:
        layer[...] *= start
    token = jax.random.normal(jax.random.key(1), (16,), jnp.bfloat16)
    y, state = jax.jit(mixer.__call__)(jnp.broadcast_to(token, (1, 256, 16)))
    assert np.all(np.isfinite(np.asarray(y, np.float32)))
    largest = max(float(jnp.linalg.norm(w[0, h])) for w in state.memory.weights for h in range(2))
    bound = 4 * 16**0.5
    assert largest < (0.5 if start == 1 else 1.001) * bound
