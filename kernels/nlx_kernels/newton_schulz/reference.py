# SPDX-License-Identifier: Apache-2.0
"""newton_schulz matrix by matrix, term by term: the specification."""

import functools

import jax
import jax.numpy as jnp


def newton_schulz(x, *, steps, coefficients):
    """X <- a X + b (X X^T) X + c (X X^T)^2 X from x / ||x||_F. Arguments checked."""
    a, b, c = coefficients

    def one(x):
        x = x / jnp.linalg.norm(x)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        return x

    leading = x.ndim - 2
    return functools.reduce(lambda f, _: jax.vmap(f), range(leading), one)(x)
