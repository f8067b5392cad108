# SPDX-License-Identifier: Apache-2.0
"""Titans: a neural memory alone, as a gate of attention, and as a layer before attention."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx.nn.attention import Attention, AttentionState
from nlx.nn.checks import check_call
from nlx.nn.linear import Linear
from nlx.nn.neural_memory import NeuralMemory, NeuralMemoryState, Read
from nlx.nn.norm import RMSNorm
from nlx.nn.readout import ReadOut
from nlx.parallel import by_tokens


class TitansLMM(nnx.Module):
    """A neural memory M and a read-out of M([P, x]), see `ReadOut`: long-term memory alone.

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
        self.out = ReadOut(width, heads, width // heads, rngs=rngs)

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
        check_call(self, self.out.output.kernel.shape[1], x, state, segment_ids)
        recalled, state = self.long_term(x, state, segment_ids)
        return self.out(x, recalled), state


class TitansState(NamedTuple):
    """What MAG and MAL carry from one call to the next."""

    attention: AttentionState | None  # None where the call began from no state
    long_term: NeuralMemoryState


class TitansMAG(nnx.Module):
    """o = (RMSNorm(Attn([P, x])) * silu(RMSNorm(M([P, x])))) W_o: memory as a gate.

    Attention is over a window of tokens, and P, which every token sees; M is a neural memory that
    reads P first.

    Source: Behrouz et al. (2024), Titans, Eq. 26-28; which of the two the nonlinearity is on is
    left open there.
    """

    def __init__(self, width: int, *, heads: int, window: int, rngs: nnx.Rngs, **memory: Any):
        """Draws attention, the memory and the maps after them.

        Args:
          width: channels of x and y, a multiple of 2 heads.
          heads: heads of attention and memories, over width / heads channels each.
          window: tokens that attention sees, the token itself included.
          rngs: `nnx.Rngs(seed)`.
          memory: `hidden`, `depth`, `chunk_size`, `persistent`, ...: as of `NeuralMemory`.

        Raises:
          ValueError: sizes out of range, or that do not divide.
        """
        self.attention = Attention(width, heads=heads, window=window, rngs=rngs)
        self.long_term = NeuralMemory(width, heads=heads, rngs=rngs, **memory)
        self.attention_norm, self.memory_norm = RMSNorm(width), RMSNorm(width)
        self.output = Linear(width, width, ("heads", "embed"), rngs=rngs)

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> TitansState:
        """The state before the first token: its size does not depend on the capacity.

        batch: rows. dtype: of x, None for that of the parameters.
        """
        return _init_state(self.attention, self.long_term, batch, dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: TitansState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], TitansState]:
        """Mixes tokens with those before them, and learns from them.

        Args:
          x: inputs, normalised by the caller.
          state: as `init_state` or an earlier call returned; None: nothing came before, and
            attention builds no cache.
          segment_ids: a new segment starts anew; see `nlx.nn.segments`.
        """
        check_call(self, self.output.kernel.shape[0], x, state, segment_ids)
        cache, long_term = state or (None, None)
        persistent = self.long_term.persistent
        prefix = None if persistent is None else persistent[...]
        attended, cache = self.attention(x, cache, segment_ids, prefix=prefix)
        recalled, long_term = self.long_term(x, long_term, segment_ids)
        recalled = by_tokens(recalled.reshape(x.shape), "heads")
        gate = jax.nn.silu(self.memory_norm(recalled))
        return self.output(self.attention_norm(attended) * gate), TitansState(cache, long_term)


class TitansMAL(nnx.Module):
    """o = Attn(RMSNorm(LMM([P, x]))): memory as a layer.

    Attention is over a window of tokens, and what the memory's layer says at P, which every token
    sees.

    Source: Behrouz et al. (2024), Titans, Eq. 29-31; the norm between the layers is not printed.
    """

    def __init__(self, width: int, *, heads: int, window: int, rngs: nnx.Rngs, **memory: Any):
        """Draws the memory's layer and attention; arguments and errors as of `TitansMAG`."""
        self.memory = TitansLMM(width, heads=heads, rngs=rngs, **memory)
        self.norm = RMSNorm(width)
        self.attention = Attention(width, heads=heads, window=window, rngs=rngs)

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> TitansState:
        """The state before the first token: its size does not depend on the capacity.

        batch: rows. dtype: of x, None for that of the parameters.
        """
        return _init_state(self.attention, self.memory.long_term, batch, dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: TitansState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], TitansState]:
        """Mixes tokens with those before them, and learns from them; arguments as `TitansMAG`."""
        check_call(self, self.memory.out.output.kernel.shape[1], x, state, segment_ids)
        cache, long_term = state or (None, None)
        recalled, weights = self.memory.long_term.begin()
        prefix, persistent = None, self.memory.long_term.persistent
        if recalled is not None and persistent is not None:
            prefix = self.norm(self.memory.out(persistent[...][None], recalled))[0]
        recalled, long_term = self.memory.long_term(x, long_term, segment_ids, weights)
        y = self.norm(self.memory.out(x, recalled))
        y, cache = self.attention(y, cache, segment_ids, prefix=prefix)
        return y, TitansState(cache, long_term)


def _init_state(attention: Attention, long_term: NeuralMemory, batch, dtype) -> TitansState:
    cache = attention.init_state(batch, 1, dtype)  # a window has the capacity it needs
    return TitansState(cache, long_term.init_state(batch, dtype))
