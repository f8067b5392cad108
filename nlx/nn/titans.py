# SPDX-License-Identifier: Apache-2.0
"""Titans: a neural memory alone."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx.nn.linear import Linear
from nlx.nn.neural_memory import NeuralMemory, NeuralMemoryState, Read
from nlx.nn.norm import RMSNorm


class TitansLMM(nnx.Module):
    """y = (RMSNorm_h(M([P, x])) * silu(x W_g)) W_o, M a neural memory: long-term memory alone.

    Source: Behrouz et al. (2024), Titans, section 4.3 (LMM), section 4.4 (norm and gate).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        hidden: int,
        depth: int = 2,
        chunk_size: int,
        persistent: int = 0,
        momentum: bool = True,
        read: Read = "after_write",
        rngs: nnx.Rngs,
    ):
        """Draws the memory and the maps around it; arguments and errors as of `NeuralMemory`."""
        self.long_term = NeuralMemory(
            width,
            heads=heads,
            hidden=hidden,
            depth=depth,
            chunk_size=chunk_size,
            persistent=persistent,
            momentum=momentum,
            read=read,
            rngs=rngs,
        )
        self.norm = RMSNorm(heads, width // heads, axes=("heads", None))
        self.gate = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.output = Linear(width, width, ("heads", "embed"), rngs=rngs)

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> NeuralMemoryState:
        """The state before the first token: its size does not depend on the capacity.

        batch: rows. dtype: of x, None for that of the parameters.
        """
        del capacity
        return self.long_term.init_state(batch, dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: NeuralMemoryState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], NeuralMemoryState]:
        """Mixes tokens with those before them, and learns from them.

        Args:
          x: inputs, normalised by the caller.
          state: as returned; None: nothing came before.
          segment_ids: a new segment starts anew; see `nlx.nn.segments`.
        """
        recalled, state = self.long_term(x, state, segment_ids)
        return self._read_out(x, recalled), state

    def _read_out(self, x: Float[Array, "b t d"], recalled: Float[Array, "b t h d"]):
        normed = self.norm(recalled).reshape(x.shape)
        return self.output(normed * jax.nn.silu(self.gate(x)))
