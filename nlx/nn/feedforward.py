# SPDX-License-Identifier: Apache-2.0
"""Position-wise multi-layer perceptrons."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from nlx.nn.linear import Linear


class MLP(nnx.Module):
    """y = gelu(x W_1) W_2, gelu in its tanh form: one block of a continuum memory system."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        """width: channels of x and y. hidden: hidden units."""
        self.up = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps every token alone."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * x W_up) W_down.

    Source: Shazeer (2020), GLU Variants Improve Transformer, Eq. 6.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        """width: channels of x and y. hidden: hidden units."""
        self.gate = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.up = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps every token alone."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
