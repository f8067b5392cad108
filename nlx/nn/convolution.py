# SPDX-License-Identifier: Apache-2.0
"""Causal depthwise convolution with the past it needs as its state."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx import memories, objectives, writes
from nlx.clock import Clock
from nlx.level import Level, associative_memory
from nlx.nn.linear import check_sizes, normal
from nlx.nn.segments import segment_index

Window = Float[Array, "b past d"]


class Convolution(nnx.Module):
    """y_t = sum_{j=0}^{3} w_j * x_{t-3+j}, channel by channel, within the segment.

    The state is a constant memory that keeps the last three inputs: [b, 3, d], zeros at first.
    Source: Behrouz et al. (2025), Nested Learning, section 8.3 (window 4).
    """

    def __init__(self, channels: int, *, taps: int = 4, rngs: nnx.Rngs):
        """channels: of x and y. taps: tokens seen, this one included."""
        check_sizes(channels=channels, taps=taps)
        self.kernel = normal(rngs, (taps, channels), (None, "heads"), taps**-0.5)

    def level(self) -> Level:
        """The window as a level: a constant memory given the next window with rate 1, retain 0."""
        taps, channels = self.kernel.shape
        window = jax.ShapeDtypeStruct((taps - 1, channels), self.kernel.dtype)
        return associative_memory(
            memories.constant(window),
            objectives.dot_product,
            writes.gated(momentum=False),
            Clock(1),
        )

    def init_state(self, batch: int, dtype: DTypeLike | None = None) -> Window:
        """No past. batch: rows. dtype: of x, None for that of the parameters."""
        check_sizes(batch=batch)
        taps, channels = self.kernel.shape
        return jnp.zeros((batch, taps - 1, channels), dtype or self.kernel.dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: Window | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Window]:
        """state: the last inputs of the call before; None: zeros. segment_ids: see `segments`."""
        kernel = self.kernel[...].astype(x.dtype)
        past, t = len(kernel) - 1, x.shape[1]
        state = jnp.zeros((len(x), past, x.shape[2]), x.dtype) if state is None else state
        inputs = jnp.concatenate([state, x], axis=1)
        # TPUs' compiler (libtpu 0.0.48) aborts where it pads inside the product that made x, and,
        # on a tensor axis, where each tap of the kernel has a gradient of its own.
        inputs = jax.lax.optimization_barrier(inputs)
        if segment_ids is None:
            taps = [inputs[:, j : j + t] for j in range(past + 1)]
            window = inputs[:, t:]
        else:
            index = jnp.pad(segment_index(segment_ids), ((0, 0), (past, 0)))[..., None]
            own = index[:, past:]
            taps = [
                jnp.where(index[:, j : j + t] == own, inputs[:, j : j + t], 0)
                for j in range(past + 1)
            ]
            window = jnp.where(index[:, t:] == own[:, -1:], inputs[:, t:], 0)
        return jnp.sum(kernel[:, None, None] * jnp.stack(taps), axis=0), window
