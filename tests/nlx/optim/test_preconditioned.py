# SPDX-License-Identifier: Apache-2.0
"""A memory of the gradients read out through a preconditioner that learns from the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlx import optim

SHAPE, B1, B2 = (4, 3), 0.8, 0.9


def stream(count=6):
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(k, SHAPE, jnp.float64) for k in keys]


def updates(tx, gradients):
    state, found, step = tx.init(jnp.zeros_like(gradients[0])), [], jax.jit(tx.update)
    for gradient in gradients:
        update, state = step(gradient, state)
        found.append(np.asarray(update))
    return found


def test_is_the_equation(x64):
    """The average before the gradient goes in is what divides; only gradients go in."""
    tx = optim.preconditioned(
        optax.trace(B1),
        optax.GradientTransformation(
            lambda u: jnp.ones_like(u),
            lambda u, v, params=None: (u / jnp.sqrt(v), B2 * v + (1 - B2) * u**2),
        ),
    )
    m, v = np.zeros(SHAPE), np.ones(SHAPE)
    for u, ours in zip(stream(), updates(tx, stream()), strict=True):
        u = np.asarray(u)
        m = B1 * m + u
        np.testing.assert_allclose(ours, m / np.sqrt(v), rtol=1e-12)
        v = B2 * v + (1 - B2) * u**2


@pytest.mark.parametrize("by", [optim.scale_by_soap(0.0), optim.scale_by_second_moment()])
def test_without_memory_it_is_the_preconditioner(x64, by):
    found, plain = (updates(t, stream()) for t in (optim.preconditioned(optax.identity(), by), by))
    np.testing.assert_array_equal(found, plain)


def test_without_preconditioner_it_is_the_memory(x64):
    memory = optim.scale_by_deep_momentum(B1, hidden=())
    tx = optim.preconditioned(memory, optax.identity())
    np.testing.assert_array_equal(updates(tx, stream()), updates(memory, stream()))


def test_soap_sees_the_gradients_and_not_the_memory(x64):
    """Its state is what it would be alone: neither chain has that and the memory's update too."""
    memory, soap = optim.scale_by_deep_momentum(B1), optim.scale_by_soap(0.0)
    tx, gradient = optim.preconditioned(memory, soap), stream()
    state, alone = tx.init(gradient[0]), soap.init(gradient[0])
    for u in gradient:
        _, state = tx.update(u, state)
        _, alone = soap.update(u, alone)
    jax.tree.map(np.testing.assert_array_equal, state.preconditioner, alone)


def test_passes_extra_arguments_on():
    taken = lambda u, s, params=None, *, factor: (u * factor, s)
    tx = optim.preconditioned(
        optax.GradientTransformationExtraArgs(lambda p: (), taken), optax.identity()
    )
    np.testing.assert_array_equal(tx.update(jnp.ones(3), tx.init(jnp.ones(3)), factor=3.0)[0], 3)
