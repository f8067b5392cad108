# SPDX-License-Identifier: Apache-2.0
"""What a memory reads and stores of a token: projected, convolved, split into heads."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nlx.nn.convolution import Convolution, Window
from nlx.nn.linear import Linear


class Stream(nnx.Module):
    """s_t = silu(conv_4(x W)_t), split into heads: the slow part of one projection."""

    def __init__(self, width: int, heads: int, head_dim: int, *, rngs: nnx.Rngs):
        """width: channels of x. heads, head_dim: of s."""
        self.heads = heads
        self.map = Linear(width, heads * head_dim, ("embed", "heads"), rngs=rngs)
        self.convolution = Convolution(heads * head_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t i"], window: Window | None, segment_ids
    ) -> tuple[Float[Array, "b t h d"], Window]:
        """window: the convolution's state."""
        y, window = self.convolution(self.map(x), window, segment_ids)
        return jax.nn.silu(y).reshape(*x.shape[:2], self.heads, -1), window


def unit(z: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
    """z / sqrt(|z|^2 + 1e-6), in z's dtype; at least float32 inside."""
    wide = z.astype(jnp.promote_types(jnp.float32, z.dtype))
    square = jnp.sum(jnp.square(wide), -1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + 1e-6)).astype(z.dtype)
