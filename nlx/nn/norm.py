# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nlx.nn.linear import check_sizes, parameter
from nlx.parallel import gathered


class RMSNorm(nnx.Module):
    """y = scale x / sqrt(mean(x^2) + 1e-6), over the last axis; at least float32 inside.

    Source: Zhang and Sennrich (2019), Root Mean Square Layer Normalization, Eq. 4.
    """

    def __init__(self, *shape: int, axes: tuple[str | None, ...] = ("embed",)):
        """shape: of the learned scale, the last axis the one normalised: [d], or [h, d] for a scale
        per head. axes: its logical names."""
        check_sizes(**{f"shape[{n}]": size for n, size in enumerate(shape)})
        self.scale = parameter(jnp.ones(shape), axes)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """In x's dtype."""
        wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        square = jnp.mean(jnp.square(wide), -1, keepdims=True)
        scale = gathered(self.scale)
        scale = jnp.expand_dims(scale, range(x.ndim - scale.ndim))
        return (wide * jax.lax.rsqrt(square + 1e-6) * scale).astype(x.dtype)
