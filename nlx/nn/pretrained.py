# SPDX-License-Identifier: Apache-2.0
"""Ad-hoc level stacking: the MLPs of a trained model as levels, each on its own clock."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from nlx.clock import Clock
from nlx.nn.checks import periods
from nlx.nn.cms import CMS, CMSBlock
from nlx.nn.linear import Linear, parameter
from nlx.nn.model import LanguageModel


def from_pretrained_mlps(
    model: LanguageModel, clocks: Sequence[Clock], *, split: bool = False
) -> LanguageModel:
    """A trained model whose MLPs are levels: with rates of 0 it is the model that was given.

    To the bit, called like it. In context (`in_context`) every row has weights of its own: with
    rates of 0 they stay the given ones to the bit, and scores equal those of the model up to the
    order in which a device sums one row's products or many rows'.

    split=False: layers are dealt to the levels in their order, as evenly as can be, the first to
        the fastest. Nothing is computed differently: the same scores to the bit.
    split=True: the hidden units of every layer are cut into one group per level, in their order, as
        evenly as can be: independent blocks with weights of 1, since an MLP is a sum over its
        hidden units. Each group gets the norm's scale as its own, so that scores are the same up to
        rounding (the scale meets the weights before the token, not after).

    Args:
      model: with one MLP in each layer, such as "transformer++". It is left as it is; its
        `config` stays that of the model given.
      clocks: of the levels, high to low frequency; a period of None is no level: those MLPs learn
        with everything else, so not in context.
      split: which of the two.

    Raises:
      ValueError, TypeError: a layer of several blocks; more clocks than layers, or than hidden
        units; no clock, periods that fall, or what are no clocks.

    References:
      Behrouz et al. (2025), Nested Learning, section 7.3; that a layer's one MLP stands for k of
      them is left open there.
    """
    stacked = nnx.clone(model)
    systems = [block.feed_forward for block in stacked.blocks]
    if any(len(cms.levels) > 1 or cms.variant != "sequential" for cms in systems):
        raise ValueError("`model` has layers of several blocks; each must hold one MLP.")
    units, what = len(systems), "layers"
    if split:
        units, what = _only(systems[0]).mlp.up.kernel.shape[1], "hidden units"
    lengths = periods(clocks)
    if not 1 <= len(clocks) <= units or lengths != sorted(lengths):
        raise ValueError(
            f"`clocks` have the periods {[c.period for c in clocks]}; there must be 1 to {units}, "
            f"no more than the model has {what}, from the shortest to the longest."
        )
    for n, cms in enumerate(systems):
        rank = n * len(clocks) // len(systems)
        if split:
            _split(cms, clocks)
        else:
            cms.levels[0].clock, cms.levels[0].rank = clocks[rank], rank
    return stacked


def _only(cms: CMS) -> CMSBlock:
    block = cms.levels[0]
    assert isinstance(block, CMSBlock)  # the variant is sequential
    return block


def _split(cms: CMS, clocks: Sequence[Clock]) -> None:
    """The hidden units of a system's only block as independent blocks."""
    given = _only(cms)
    hidden = given.mlp.up.kernel.shape[1]
    ends = [n * hidden // len(clocks) for n in range(len(clocks) + 1)]
    cms.variant, blocks = "independent", []
    for rank, clock in enumerate(clocks):
        block, mine = nnx.clone(given), slice(ends[rank], ends[rank + 1])
        block.clock, block.rank = clock, rank
        for name, linear in vars(block.mlp).items():
            if isinstance(linear, Linear):
                at = (mine, slice(None)) if name == "down" else (slice(None), mine)
                axes = linear.kernel.get_metadata("axes")
                linear.kernel = parameter(linear.kernel[...][at], axes)
        blocks.append(block)
    cms.levels = nnx.List(blocks)
    cms.aggregate = parameter(jnp.ones(len(blocks), given.norm.scale.dtype), (None,))
