# SPDX-License-Identifier: Apache-2.0
"""Mamba-2: a selective state space as a linear memory that forgets as fast as it is told."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nlx.level import Association
from nlx.nn.convolution import Window
from nlx.nn.decay import Decay
from nlx.nn.linear import Linear, check_sizes, parameter
from nlx.nn.linear_memory import LinearMemory
from nlx.nn.norm import RMSNorm
from nlx.nn.recall import Asked
from nlx.nn.stream import Streams
from nlx.parallel import by_tokens

EXPANSION = 2


class Mamba2(LinearMemory):
    """S_t = exp(-A dt_t) S_{t-1} + dt_t B_t v_t^T;  o_t = C_t S_t + D v_t, A and D a number a head.

    v, B, C = silu(conv_4(x W)): v in heads, together twice as wide as x; B, the keys, and C, the
    queries, the same for all heads. dt = softplus(x W_dt + b), see `Decay`. The read-out is
    RMSNorm(o * silu(x W_z)) W_o over all channels. As the paper's, without biases of convolutions.

    Source: Dao and Gu (2024), Transformers are SSMs, Eq. 1, section 7; Ren et al. (2024), Samba,
    alternates its like with sliding windows.
    """

    def __init__(self, width: int, *, heads: int, state_dim: int = 128, rngs: nnx.Rngs):
        """Draws the maps.

        Args:
          width: channels of x and y; twice as many are a multiple of `heads`.
          heads: heads, with values of 2 width / heads channels each.
          state_dim: channels of B and C.

        Raises:
          ValueError: sizes that do not divide.
        """
        check_sizes(width=width, heads=heads, state_dim=state_dim)
        inner = EXPANSION * width
        if inner % heads:
            raise ValueError(f"`heads` is {heads}; it must be a divisor of 2 width = {inner}.")
        super().__init__(width, heads, state_dim, inner // heads)
        sizes = {"value": (heads, self.value_dim), "key": (1, state_dim), "query": (1, state_dim)}
        self.streams = Streams(width, sizes, rngs=rngs)
        self.decay = Decay(width, heads, rngs=rngs)
        self.skip = parameter(jnp.ones(heads), ("heads",))
        self.gate = Linear(width, inner, ("embed", "heads"), rngs=rngs)
        self.norm = RMSNorm(inner, axes=("heads",))
        self.output = Linear(inner, width, ("heads", "embed"), rngs=rngs)

    def ask(
        self,
        x: Float[Array, "b t d"],
        before: dict[str, Window] | None,
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[Asked, dict[str, Window]]:
        """before: the convolutions' inputs."""
        made, windows = self.streams(x, before, segment_ids)
        step, retain = self.decay(x)
        shared = (*x.shape[:2], self.heads, self.key_dim)
        query, key = (jnp.broadcast_to(made[name], shared) for name in ("query", "key"))
        return Asked(query, Association(key, made["value"], rate=step, retain=retain)), windows

    def read_out(
        self, x: Float[Array, "b t d"], asked: Asked, o: Float[Array, "b t h v"]
    ) -> Float[Array, "b t d"]:
        """With the skip; gated before it is normalised."""
        skip = self.skip[...].astype(x.dtype)[None, None, :, None]
        y = by_tokens((o + skip * asked.stored.value).reshape(*x.shape[:2], -1), "heads")
        return self.output(self.norm(y * jax.nn.silu(self.gate(x))))
