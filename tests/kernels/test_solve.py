# SPDX-License-Identifier: Apache-2.0
"""The inverse and the products of gates that every blocked op stands on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from nlx_kernels._solve import interval_products, unit_lower_inverse


@pytest.mark.parametrize("c", [1, 2, 7, 32, 33, 100])
def test_inverse(c, draw, x64, agree):
    a = draw.normal(3, c, c) / c**0.5
    want = np.linalg.inv(np.eye(c) + np.tril(a, -1))
    agree(jax.jit(unit_lower_inverse)(a), want, 1e-10)


def test_inverse_under_vmap(draw, agree):
    """XLA on CPUs (jax 0.11.2) aborts where halves are stacked before the mapped axis."""
    a = jnp.asarray(draw.normal(3, 65, 65) / 65**0.5, jnp.float32)
    want = np.linalg.inv(np.eye(65) + np.tril(a, -1))
    agree(jax.jit(jax.vmap(unit_lower_inverse))(a), want, 1e-5)


def test_inverse_of_correlated_keys_keeps_float32(draw):
    for correlation, strength in ((0.9, 1.0), (0.9, 1.9), (1.0, 1.0), (1.0, 1.9)):
        keys = np.asarray(draw.keys(1, 64, 4, 64, correlation), np.float64)[0].swapaxes(0, 1)
        a = strength * np.tril(keys @ keys.mT, -1)
        got = np.asarray(unit_lower_inverse(jnp.asarray(a, jnp.float32)))
        want = np.linalg.inv(np.eye(64) + a)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 3e-6


def test_derivatives(draw, x64):
    check_grads(unit_lower_inverse, (draw.normal(2, 5, 5),), order=2)
    gate = draw.gate(2, 5).at[0, 2].set(0).at[1, 0].set(0).at[1, 3:].set(0)
    check_grads(interval_products, (gate,), order=2)


def test_products(draw, x64):
    gate = draw.gate(4).at[2].set(0)
    products = interval_products(gate)
    for t in range(5):
        for j in range(5):
            want = np.prod(gate[j:t]) if j <= t else 0
            np.testing.assert_allclose(products[t, j], want, rtol=1e-15)
