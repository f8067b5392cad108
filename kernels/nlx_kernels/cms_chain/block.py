# SPDX-License-Identifier: Apache-2.0
"""The weights of one block of `cms_chain`."""

from typing import NamedTuple

from jaxtyping import Array, Float


class ChainBlock(NamedTuple):
    """One residual block; a leading axis b on all of its arrays makes it every row's own.

    Attributes:
      scale: [d] or [b, d], of the norm.
      up: [d, f] or [b, d, f].
      down: [f, d] or [b, f, d].
      gate: like up, or None: no gate.
    """

    scale: Float[Array, "*b d"]
    up: Float[Array, "*b d f"]
    down: Float[Array, "*b f d"]
    gate: Float[Array, "*b d f"] | None = None
