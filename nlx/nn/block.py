# SPDX-License-Identifier: Apache-2.0
"""One block of a sequence model: a mixer over tokens, then a feed-forward over channels."""

from typing import NamedTuple

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from nlx.nn.checks import check_state
from nlx.nn.cms import CMS
from nlx.nn.mixer import Mixer
from nlx.nn.norm import RMSNorm


class BlockState(NamedTuple):
    """What a block carries from one call to the next."""

    mixer: PyTree[Array]
    feed_forward: PyTree[Array]


class Block(nnx.Module):
    """h = x + mixer(RMSNorm(x));  y = feed_forward(h), which has its own norms and residuals."""

    def __init__(self, width: int, mixer: Mixer, feed_forward: CMS):
        """width: channels. mixer, feed_forward: (x, state, segment_ids) -> (y, state)."""
        self.norm = RMSNorm(width)
        self.mixer = mixer
        self.feed_forward = feed_forward

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike | None = None) -> BlockState:
        """The state before the first token; see the mixer's and the feed-forward's."""
        return BlockState(
            self.mixer.init_state(batch, capacity, dtype),
            self.feed_forward.init_state(batch, capacity, dtype),
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: BlockState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], BlockState]:
        """state: as returned; None: nothing came before."""
        mixer_state, feed_forward_state = state or (None, None)
        if state is not None and mixer_state is None:  # as attention returns it, begun from none
            check_state("state.mixer", self.mixer, mixer_state, len(x), x.dtype)
        y, mixer_state = self.mixer(self.norm(x), mixer_state, segment_ids)
        y, feed_forward_state = self.feed_forward(x + y, feed_forward_state, segment_ids)
        return y, BlockState(mixer_state, feed_forward_state)
