# SPDX-License-Identifier: Apache-2.0
"""RetNet: rotary linear attention that forgets at a fixed speed per head."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx.level import Association
from nlx.nn.linear import Linear, check_sizes
from nlx.nn.linear_memory import LinearMemory
from nlx.nn.readout import ReadOut
from nlx.nn.recall import Asked
from nlx.nn.rotary import speeds, turn
from nlx.nn.segments import positions, segment_index
from nlx.parallel import by_heads

VALUE_EXPANSION = 2
THETA = 10_000.0

Phase = Float[Array, "b f"]


class RetNet(LinearMemory):
    """S_t = gamma_h S_{t-1} + k_t v_t^T / sqrt(d), gamma_h = 1 - 2^(-5 - h); o_t = q_t S_t.

    q and k are rotated by the position in the segment, values are twice as wide as keys, the
    read-out is normalised per head and gated; see `ReadOut`. The state keeps the angle of the next
    token in place of its position: as precise after a billion tokens as after one.

    Readings: rotary positions without xPos' growing and shrinking lengths, since gamma already
    decays; the norm of a head is by its root mean square, as in the authors' code, where the paper
    has GroupNorm.

    Source: Sun et al. (2023), Retentive Network, Eq. 5-8, sections 2.1-2.3.
    """

    def __init__(self, width: int, *, heads: int, rngs: nnx.Rngs):
        """Draws the maps.

        Args:
          width: channels of x and y, a multiple of 2 heads.
          heads: heads, with keys of width / heads channels each.

        Raises:
          ValueError: sizes that do not divide.
        """
        check_sizes(width=width, heads=heads)
        if width % (2 * heads):
            raise ValueError(f"`width` is {width}; it must be a multiple of 2 heads = {2 * heads}.")
        super().__init__(width, heads, width // heads, VALUE_EXPANSION * width // heads)
        self.query = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.key = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.value = Linear(width, VALUE_EXPANSION * width, ("embed", "heads"), rngs=rngs)
        self.out = ReadOut(width, heads, self.value_dim, rngs=rngs)

    def init_before(self, batch: int, dtype: DTypeLike | None) -> Phase:
        """Angle 0."""
        wide = jnp.promote_types(jnp.float32, dtype or self.key.kernel.dtype)
        return jnp.zeros((batch, self.key_dim // 2), wide)

    def ask(
        self,
        x: Float[Array, "b t d"],
        before: Phase | None,
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[Asked, Phase]:
        """before: the first token's angle; None: 0."""
        b, t, _ = x.shape
        wide = jnp.promote_types(jnp.float32, x.dtype)
        speed = speeds(self.key_dim, THETA, wide)[None]
        place = positions(jnp.zeros(b, jnp.int32), t, segment_ids)
        angle = place.astype(wide)[..., None] * speed[None]
        if before is not None:
            first = True if segment_ids is None else segment_index(segment_ids)[..., None] == 0
            angle += jnp.where(first, before[:, None], 0)
        heads = lambda z: by_heads(z.reshape(b, t, self.heads, -1))
        key = turn(heads(self.key(x)), angle) * self.key_dim**-0.5
        gamma = 1 - 2.0 ** (-5 - jnp.arange(self.heads, dtype=wide))
        retain = jnp.broadcast_to(gamma, (b, t, self.heads))
        stored = Association(key, heads(self.value(x)), retain=retain)
        asked = Asked(turn(heads(self.query(x)), angle), stored)
        return asked, (angle[:, -1] + speed) % (2 * jnp.pi)
