# SPDX-License-Identifier: Apache-2.0
"""The continuum memory system: MLP blocks that learn on their own clocks, in three variants."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx import ops
from nlx.clock import Clock
from nlx.nn.checks import check_clocks, check_option
from nlx.nn.feedforward import MLP, SwiGLU
from nlx.nn.linear import parameter
from nlx.nn.norm import RMSNorm
from nlx.parallel import gathered

Variant = Literal["sequential", "nested", "independent"]


class CMSBlock(nnx.Module):
    """One MLP with its norm: a level, or in the nested variant what a level adds to a block."""

    def __init__(self, width: int, mlp: MLP | SwiGLU, clock: Clock, rank: int):
        """Holds what it is given.

        width: channels. mlp: the memory. clock: in steps of the training that holds it, or in the
        chunks of a context. rank: of its level among all, 0 the fastest.
        """
        self.norm = RMSNorm(width)
        self.mlp = mlp
        self.clock = clock
        self.rank = rank

    def weights(self, dtype: DTypeLike | None = None) -> ops.ChainBlock:
        """As `nlx.ops.cms_chain` takes them; dtype: of the matrices, None for the parameters'."""
        return ops.ChainBlock(scale=gathered(self.norm.scale), **self.mlp.weights(dtype))


class NestedLevel(nnx.Module):
    """What one level of the nested variant learns: its own block, and where faster ones start."""

    def __init__(self, blocks: Sequence[CMSBlock], clock: Clock, rank: int):
        """blocks: what it adds to each block of rank <= rank. clock, rank: as in `CMSBlock`."""
        self.blocks = nnx.List(blocks)
        self.clock = clock
        self.rank = rank


class CMS(nnx.Module):
    """The continuum memory system: k MLP blocks M_l on clocks, M_1 the fastest.

        sequential    y = x_k,  x_l = x_{l-1} + M_l(RMSNorm_l(x_{l-1})),  x_0 = x
        nested        the same; M_l starts where the next slower level learned to start it, and
                      starts anew when that level's period is over
        independent   y = x + sum_l w_l M_l(RMSNorm_l(x))

    theta_l moves at the end of each period, by its rule on the gradients g of the task's loss in
    the period: theta_l <- theta_l + rule(mean_t g_t). In pre-training a tick is one step of the
    optimizer, and the blocks are parameters like others whose optimizer runs on their clock: see
    `nlx.nn.labels_by_level`. In context a tick is one chunk of tokens, and every row has blocks of
    its own: see `nlx.nn.in_context`. A Transformer's MLP is the case of one block.

    In the nested variant level m holds what it adds to every block l <= m, so the weights in use
    are theta_l = sum_{m >= l} theta_l^(m). The slowest level's share is the initial state that all
    start from; the shares of all others start at 0 and go back to 0, with a fresh rule, after
    ceil(C_{m+1} / C_m) firings (`nlx.nn.restarts_by_level`). So one gradient serves all levels, as
    if no gradient flowed through the faster writes; the task's loss through level m's share is the
    objective of Eq. 72. A rule that looks at its parameters sees the share: weight decay pulls a
    block back to where it started.

    Source: Behrouz et al. (2025), Nested Learning, Eq. 70-74, 97; Fig. 5 for the order.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        clocks: Sequence[Clock],
        *,
        mlp: type[MLP] | type[SwiGLU] = MLP,
        variant: Variant = "sequential",
        rngs: nnx.Rngs,
    ):
        """Draws the blocks.

        Args:
          width: channels of x and y.
          hidden: hidden units of each block.
          clocks: one per block, high to low frequency; a period of None is no level of its own: the
            block learns with everything else.
          mlp: what each block is made of.
          variant: how the blocks are put together.

        Raises:
          ValueError, TypeError: no clock, what is none, periods that fall, a nested level without a
            period, or an unknown variant.
        """
        check_option(Variant, variant=variant)
        check_clocks(clocks, variant)
        self.variant: Variant = variant
        self.activation: Literal["gelu", "silu"] = mlp.activation
        blocks = [
            CMSBlock(width, mlp(width, hidden, rngs=rngs), clock, rank)
            for rank, clock in enumerate(clocks)
        ]
        self.levels = nnx.List(_nested(blocks) if variant == "nested" else blocks)
        if variant == "independent":
            self.aggregate = parameter(jnp.ones(len(blocks)), (None,))

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> tuple[()]:
        """Nothing is carried from token to token."""
        del batch, capacity, dtype
        return ()

    def weights(self, dtype: DTypeLike | None = None) -> list[ops.ChainBlock]:
        """The blocks that are in use, as `nlx.ops.cms_chain` takes them.

        dtype: in which matrices that are used as they are may be given; None: the parameters'.
        """
        if self.variant == "nested":
            levels = [level for level in self.levels if isinstance(level, NestedLevel)]
            shares = [[block.weights() for block in level.blocks] for level in levels]
            return [
                jax.tree.map(lambda *parts: sum(parts), *[level[n] for level in shares[n:]])
                for n in range(len(shares))
            ]
        dtype = None if self._parallel() else dtype
        blocks = [level.weights(dtype) for level in self.levels if isinstance(level, CMSBlock)]
        return [_side_by_side(blocks, self.aggregate[...])] if self._parallel() else blocks

    def _parallel(self) -> bool:
        return self.variant == "independent"

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: tuple[()] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[()] | None]:
        """Maps every token alone; state and segments change nothing."""
        del segment_ids
        return ops.cms_chain(x, self.weights(x.dtype), activation=self.activation), state


def _nested(blocks: Sequence[CMSBlock]) -> list[NestedLevel]:
    """Each level's share of each block that is not slower: the slowest holds all, the others 0."""
    levels = []
    for rank, own in enumerate(blocks):
        shares = [nnx.clone(block) for block in blocks[: rank + 1]]
        if rank < len(blocks) - 1:
            for share in shares:
                nnx.update(share, jax.tree.map(jnp.zeros_like, nnx.state(share)))
        for share in shares:
            share.clock, share.rank = own.clock, rank
        levels.append(NestedLevel(shares, own.clock, rank))
    return levels


def _side_by_side(blocks: Sequence[ops.ChainBlock], weights: Float[Array, " n"]) -> ops.ChainBlock:
    """Blocks as one whose hidden units are all of theirs: sum_l w_l M_l(scale_l * z)."""
    scaled = lambda name: jnp.concatenate(
        [block.scale[:, None] * getattr(block, name) for block in blocks], axis=1
    )
    return ops.ChainBlock(
        scale=jnp.ones_like(blocks[0].scale),
        up=scaled("up"),
        down=jnp.concatenate([w * block.down for w, block in zip(weights, blocks, strict=True)]),
        gate=None if blocks[0].gate is None else scaled("gate"),
    )
