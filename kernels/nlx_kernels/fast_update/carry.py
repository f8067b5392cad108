# SPDX-License-Identifier: Apache-2.0
"""What `fast_update` carries from tick to tick."""

from typing import NamedTuple

from jaxtyping import Array, Int, PyTree


class FastCarry(NamedTuple):
    """At least float32.

    Attributes:
      total: like the weights: the gradients since the last firing, summed.
      ticks: [b], int32: how many.
      momentum: like the weights; None without momentum.
    """

    total: PyTree[Array]
    ticks: Int[Array, " b"]
    momentum: PyTree[Array] | None
