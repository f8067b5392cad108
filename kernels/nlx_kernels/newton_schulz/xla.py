# SPDX-License-Identifier: Apache-2.0
"""newton_schulz with the Gram matrix of the shorter side, and no size of x that overflows."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def newton_schulz(x: Float[Array, "*n i o"], *, steps, coefficients) -> Float[Array, "*n i o"]:
    """Arguments checked; the derivation is in README.md."""
    a, b, c = coefficients
    x = _unit(x)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _unit(x: Float[Array, "*n i o"]) -> Float[Array, "*n i o"]:
    """x / ||x||_F, 0 where x is 0. Divided by its largest entry first, so no square overflows."""
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    present = largest >= jnp.finfo(x.dtype).tiny
    x = jnp.where(present, x / jnp.where(present, largest, 1), 0)
    square = jnp.sum(jnp.square(x), (-2, -1), keepdims=True)
    return x / jnp.sqrt(jnp.where(present, square, 1))
