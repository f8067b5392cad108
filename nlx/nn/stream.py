# SPDX-License-Identifier: Apache-2.0
"""What a memory reads and stores of a token: projected, convolved, split into heads."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx.nn.convolution import Convolution, Window
from nlx.nn.linear import Linear
from nlx.parallel import by_heads


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
        split = (*x.shape[:2], self.heads, -1)
        mapped = by_heads(self.map(x).reshape(split)).reshape(*x.shape[:2], -1)
        y, window = self.convolution(mapped, window, segment_ids)
        return by_heads(jax.nn.silu(y).reshape(split)), window


class Streams(nnx.Dict):
    """Streams of the same tokens by name, and what their convolutions carry."""

    def __init__(self, width: int, sizes: Mapping[str, tuple[int, int]], *, rngs: nnx.Rngs):
        """width: channels of x. sizes: (heads, channels of a head) of each stream."""
        super().__init__({name: Stream(width, *size, rngs=rngs) for name, size in sizes.items()})

    def init_state(self, batch: int, dtype: DTypeLike | None = None) -> dict[str, Window]:
        """No past. batch: rows. dtype: of x, None for that of the parameters."""
        return {name: s.convolution.init_state(batch, dtype) for name, s in self.items()}

    def __call__(
        self,
        x: Float[Array, "b t d"],
        windows: dict[str, Window] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[dict[str, Float[Array, "b t h d"]], dict[str, Window]]:
        """windows: as returned; None: nothing came before. segment_ids: see `segments`."""
        before = windows or {}
        made = {name: s(x, before.get(name), segment_ids) for name, s in self.items()}
        return {n: y for n, (y, _) in made.items()}, {n: window for n, (_, window) in made.items()}


def unit(z: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
    """z / sqrt(|z|^2 + 1e-6), in z's dtype; at least float32 inside."""
    wide = z.astype(jnp.promote_types(jnp.float32, z.dtype))
    square = jnp.sum(jnp.square(wide), -1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + 1e-6)).astype(z.dtype)
