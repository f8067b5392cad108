# SPDX-License-Identifier: Apache-2.0
"""newton_schulz: against singular values, its level, and every form against the reference."""

import functools
import re

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from nlx_kernels.newton_schulz import shapes
from nlx_kernels.newton_schulz.api import QUINTIC

import nlx

newton_schulz = jax.jit(
    nlx_kernels.newton_schulz, static_argnames=("steps", "coefficients", "implementation")
)


def polynomial(x, steps, coefficients):
    """U p(... p(S / |S|)) V^T in NumPy."""
    a, b, c = coefficients
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vt


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", shapes.TESTS.values(), ids=shapes.TESTS)
def test_acts_on_singular_values(draw, x64, shape, implementation):
    x = draw.normal(*shape)
    for steps, coefficients in ((5, QUINTIC), (3, (1.5, -0.5, 0.0)), (0, QUINTIC)):
        got = newton_schulz(
            x, steps=steps, coefficients=coefficients, implementation=implementation
        )
        np.testing.assert_allclose(got, polynomial(x, steps, coefficients), atol=1e-12)


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_xla_is_the_reference_in_gradients(draw, x64, gradients, agree, shape):
    x = draw.normal(*shapes.TESTS[shape])
    run = lambda form: gradients(lambda x: nlx_kernels.newton_schulz(x, implementation=form))(x)
    agree(run("xla"), run("reference"), 1e-12)


def test_gradients_are_finite_differences(draw, x64):
    check_grads(functools.partial(newton_schulz, steps=3), (draw.normal(3, 4),), 1, rtol=1e-6)


def test_the_cubic_converges_to_orthogonal(draw, x64):
    x = newton_schulz(draw.normal(2, 3, 6), steps=40, coefficients=(1.5, -0.5, 0.0))
    np.testing.assert_allclose(x @ x.mT, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-12)


def test_the_quintic_brings_singular_values_near_1(draw):
    s = np.linalg.svd(newton_schulz(draw.normal(8, 40).astype(jnp.float32)), compute_uv=False)
    assert 0.65 < s.min() < s.max() < 1.25


def test_it_is_a_level_that_descends(draw, x64):
    """Eq. 43: gradient descent at rate z on 1/2 ||X^T X - I||^2, one tick a step."""
    z, start = 0.2, draw.normal(5, 3)
    start = start / jnp.linalg.norm(start)
    loss = lambda x, _: nlx.objectives.l2(x.T @ x, jnp.eye(3))
    level = nlx.Level(lambda key: start, loss, nlx.writes.summed(optax.sgd(z)), nlx.Clock(1))
    state = level.scan(level.start(start), jnp.zeros(6))
    got = newton_schulz(7 * start, steps=6, coefficients=(1 + 2 * z, -2 * z, 0.0))
    np.testing.assert_allclose(got, state.params, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_scale_does_not_matter(draw, dtype):
    x = draw.normal(2, 4, 3).astype(jnp.float32)
    want = newton_schulz(x)
    for size in (1e-30, 1e30) if dtype != "float16" else (1e-3, 1e3):
        got = newton_schulz((size * x).astype(dtype))
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(float), want, atol=1e-4 if dtype == "float32" else 0.05
        )


def test_zero_stays_zero_and_empty_stays_empty():
    x = jnp.zeros((2, 3, 4)).at[1].set(1)
    got = newton_schulz(x)
    assert not np.any(got[0])
    assert np.any(got[1])
    slope = jax.jit(jax.grad(lambda x: jnp.sum(nlx_kernels.newton_schulz(x))))(x[0])
    assert np.all(np.isfinite(slope))
    assert newton_schulz(jnp.zeros((0, 3))).shape == (0, 3)


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (dict(x=jnp.ones(3)), "x is an array of shape (3,); it must be matrices [..., i, o]."),
        (dict(x=None), "x is None; it must be matrices [..., i, o]."),
        (dict(x=jnp.ones((2, 2), int)), "x has dtype int32; it must be float64, float32, bfloat16"),
        (dict(x=X, steps=-1), "steps is -1; it must be an integer >= 0."),
        (dict(x=X, steps=1.5), "steps is 1.5; it must be an integer >= 0."),
        (dict(x=X, coefficients=(1, 2)), "coefficients is (1, 2); it must be three numbers"),
        (dict(x=X, implementation="mosaic_gpu"), "implementation='mosaic_gpu' does not exist"),
        (dict(x=X, interpret=True), "interpret=True runs a kernel on the CPU, but 'xla' is no"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(f"newton_schulz: {sentence}")):
        nlx_kernels.newton_schulz(**call)
