# SPDX-License-Identifier: Apache-2.0
"""From what the heads recall to the channels of the model."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from nlx.nn.linear import Linear
from nlx.nn.norm import RMSNorm
from nlx.parallel import by_tokens


class ReadOut(nnx.Module):
    """y = (RMSNorm_h(o) * silu(x W_g)) W_o, o what each head recalled; without a gate no silu(..).

    Source: Sun et al. (2023), RetNet, Eq. 8; Behrouz et al. (2024), Titans, section 4.4.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, gated: bool = True, rngs: nnx.Rngs
    ):
        """width: channels of x and y. heads, head_dim: of o. gated: whether x gates o."""
        self.norm = RMSNorm(heads, head_dim, axes=("heads", None))
        self.gate = (
            Linear(width, heads * head_dim, ("embed", "heads"), rngs=rngs) if gated else None
        )
        self.output = Linear(heads * head_dim, width, ("heads", "embed"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t d"], o: Float[Array, "b t h v"]
    ) -> Float[Array, "b t d"]:
        """x: the mixer's input."""
        y = by_tokens(self.norm(o).reshape(*x.shape[:2], -1), "heads")
        return self.output(y if self.gate is None else y * jax.nn.silu(self.gate(x)))
