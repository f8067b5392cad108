# SPDX-License-Identifier: Apache-2.0
"""The state of `mlp_memory`."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class MLPMemoryState(NamedTuple):
    """What `mlp_memory` carries from one call to the next, float32 or float64.

    Attributes:
      weights: one [b, h, in, out] per layer, after the last token's write.
      chunk_start: the same at the start of the running chunk, where gradients are taken.
      momentum: like weights; None without momentum.
      position: [b], int32: tokens seen since the start or the last reset.
    """

    weights: tuple[Float[Array, "b h i o"], ...]
    chunk_start: tuple[Float[Array, "b h i o"], ...]
    momentum: tuple[Float[Array, "b h i o"], ...] | None
    position: Int[Array, " b"]
