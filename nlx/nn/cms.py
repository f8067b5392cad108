# SPDX-License-Identifier: Apache-2.0
"""The continuum memory system: a chain of MLP blocks, each on its own clock."""

from collections.abc import Sequence
from typing import Literal

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx import ops
from nlx.clock import Clock
from nlx.nn.feedforward import MLP, SwiGLU
from nlx.nn.norm import RMSNorm


class CMSBlock(nnx.Module):
    """y = x + MLP(RMSNorm(x)), whose parameters are replaced when the clock fires."""

    def __init__(self, width: int, mlp: MLP | SwiGLU, clock: Clock):
        """width: channels. mlp: the memory. clock: in steps of the training that holds it."""
        self.norm = RMSNorm(width)
        self.mlp = mlp
        self.clock = clock

    def weights(self) -> ops.ChainBlock:
        """As `nlx.ops.cms_chain` takes them."""
        return ops.ChainBlock(scale=self.norm.scale[...], **self.mlp.weights())


class CMS(nnx.Module):
    """y = block_k( ... block_1(x)), block_1 the fastest: the sequential continuum memory system.

    theta_l moves at the end of each period, by its rule on the gradients g of the task's loss in
    the period: theta_l <- theta_l + rule(mean_t g_t). In pre-training a tick is one step of the
    optimizer, and the blocks are parameters like others whose optimizer runs on their clock: see
    `nlx.nn.labels_by_level`. A Transformer's MLP is the case of one block.

    Source: Behrouz et al. (2025), Nested Learning, Eq. 70-71, 73; Fig. 5 for the order.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        clocks: Sequence[Clock],
        *,
        mlp: type[MLP] | type[SwiGLU] = MLP,
        rngs: nnx.Rngs,
    ):
        """Draws the blocks.

        Args:
          width: channels of x and y.
          hidden: hidden units of each block.
          clocks: one per block, high to low frequency; a period of None is no level of its own: the
            block learns with everything else.
          mlp: what each block is made of.

        Raises:
          ValueError: no clock, or periods that fall.
        """
        periods = [float("inf") if c.period is None else c.period for c in clocks]
        if not periods or periods != sorted(periods):
            raise ValueError(
                f"`clocks` have the periods {[c.period for c in clocks]}; there must be at least "
                "one, from the shortest to the longest."
            )
        self.activation: Literal["gelu", "silu"] = mlp.activation
        self.levels = nnx.List(
            [CMSBlock(width, mlp(width, hidden, rngs=rngs), clock) for clock in clocks]
        )

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> tuple[()]:
        """Nothing is carried from token to token."""
        del batch, capacity, dtype
        return ()

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: tuple[()] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[()] | None]:
        """Maps every token alone; state and segments change nothing."""
        del segment_ids
        weights = [level.weights() for level in self.levels]
        return ops.cms_chain(x, weights, activation=self.activation), state
