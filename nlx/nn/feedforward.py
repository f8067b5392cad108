# SPDX-License-Identifier: Apache-2.0
"""Position-wise multi-layer perceptrons."""

from typing import Literal

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nlx.nn.linear import Linear
from nlx.parallel import gathered


class MLP(nnx.Module):
    """y = gelu(x W_1) W_2, gelu in its tanh form: one block of a continuum memory system."""

    activation: Literal["gelu", "silu"] = "gelu"

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        """width: channels of x and y. hidden: hidden units."""
        self.up = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps every token alone."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))

    def weights(self, dtype: DTypeLike | None = None) -> dict[str, Float[Array, "i o"]]:
        """As `nlx.ops.ChainBlock` names them; dtype: None for that of the parameters."""
        return dict(up=gathered(self.up.kernel, dtype), down=gathered(self.down.kernel, dtype))


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * x W_up) W_down.

    Source: Shazeer (2020), GLU Variants Improve Transformer, Eq. 6.
    """

    activation: Literal["gelu", "silu"] = "silu"

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        """width: channels of x and y. hidden: hidden units."""
        self.gate = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.up = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps every token alone."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def weights(self, dtype: DTypeLike | None = None) -> dict[str, Float[Array, "i o"]]:
        """As `nlx.ops.ChainBlock` names them; dtype: None for that of the parameters."""
        parts = (self.gate, self.up, self.down)
        gate, up, down = (gathered(part.kernel, dtype) for part in parts)
        return dict(gate=gate, up=up, down=down)
