# SPDX-License-Identifier: Apache-2.0
"""Inputs, parameters and state of `self_modifying_memory`."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Streams(NamedTuple):
    """What the generators read, [b, t, h, d] each: slow maps of the token, or the token itself.

    Attributes:
      key: input of the box that makes keys.
      value: input of the box that makes values.
      gate: input of the boxes that make rates and retention.
    """

    key: Float[Array, "b t h d"]
    value: Float[Array, "b t h d"]
    gate: Float[Array, "b t h d"]


class SelfModifyingParameters(NamedTuple):
    """Outer parameters of `self_modifying_memory`.

    Attributes:
      memories: box -> (W_1 [h, d, f], W_2 [h, f, d]), where each memory starts. Boxes "key",
        "value", "rate", "retain" and "memory", and "query" if queries are made by a memory too.
      rate_readout: box -> [h, d], reads the rate of that box off M_rate's output.
      rate_bias: box -> [h].
      retain_readout: [h, d], reads the retention, shared by all boxes, off M_retain's output.
      retain_bias: [h].
    """

    memories: dict[str, tuple[Float[Array, "h d f"], Float[Array, "h f d"]]]
    rate_readout: dict[str, Float[Array, "h d"]]
    rate_bias: dict[str, Float[Array, " h"]]
    retain_readout: Float[Array, "h d"]
    retain_bias: Float[Array, " h"]


class SelfModifyingState(NamedTuple):
    """What `self_modifying_memory` carries from one call to the next, float32 or float64.

    Attributes:
      weights: box -> (W_1 [b, h, d, f], W_2 [b, h, f, d]), after the last token's write.
      chunk_start: the same at the start of the box's running chunk: what the others see.
      momentum: like weights; None without momentum.
      position: [b], int32: tokens seen since the start or the last reset.
    """

    weights: dict[str, tuple[Float[Array, "b h d f"], Float[Array, "b h f d"]]]
    chunk_start: dict[str, tuple[Float[Array, "b h d f"], Float[Array, "b h f d"]]]
    momentum: dict[str, tuple[Float[Array, "b h d f"], Float[Array, "b h f d"]]] | None
    position: Int[Array, " b"]
