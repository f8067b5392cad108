# SPDX-License-Identifier: Apache-2.0
"""What RetNet, DeltaNet, Gated DeltaNet and Mamba-2 share: a matrix memory per head."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from nlx import memories, objectives, ops, writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.nest import Nest
from nlx.nn.checks import check_call
from nlx.nn.linear import check_sizes
from nlx.nn.readout import ReadOut
from nlx.nn.recall import Asked, Ticks, recall
from nlx.nn.stream import Streams


class LinearMemoryState(NamedTuple):
    """What a mixer with a matrix memory carries from one call to the next."""

    before: PyTree[Array]  # what makes queries and keys needs of the tokens before
    memory: Float[Array, "b h k v"]  # at least float32


class LinearMemory(nnx.Module):
    """o_t = q_t S_t, S a matrix per head that stores (k_t, v_t), and a read-out of x and o.

        S_t = (retain_t I - erase_t k_t k_t^T) S_{t-1} + rate_t k_t v_t^T

    A mixer says what its tokens ask and store and how o is read out. Under the objective l2 the
    gradient itself erases: erase_t = rate_t.

    Source: Behrouz et al. (2025), Nested Learning, Eq. 64, 65.
    """

    objective = staticmethod(objectives.dot_product)
    erases = False  # whether associations bring a gate `erase`
    streams: Streams
    out: ReadOut

    def __init__(self, width: int, heads: int, key_dim: int, value_dim: int):
        """width: channels of x. heads, key_dim, value_dim: sizes of S [h, k, v]."""
        check_sizes(width=width, heads=heads, key_dim=key_dim, value_dim=value_dim)
        self.width = width
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim

    def ask(
        self,
        x: Float[Array, "b t d"],
        before: PyTree[Array] | None,
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[Asked, PyTree[Array]]:
        """What x asks and stores, and what the next call needs. before: None: nothing."""
        raise NotImplementedError

    def init_before(self, batch: int, dtype: DTypeLike | None) -> PyTree[Array]:
        """What `ask` takes before the first token. dtype: of x, None for the parameters'."""
        return self.streams.init_state(batch, dtype)

    def read_out(
        self, x: Float[Array, "b t d"], asked: Asked, o: Float[Array, "b t h v"]
    ) -> Float[Array, "b t d"]:
        """y, from what the memories recalled."""
        del asked
        return self.out(x, o)

    def nest(self) -> Nest:
        """One head as a level that fires at every token: what the op computes in parallel."""
        memory = memories.linear(self.key_dim, self.value_dim)
        write = writes.gated(memory.inputs if self.erases else None, momentum=False)
        return recall(memory, associative_memory(memory, self.objective, write, Clock(1)))

    def ticks(self, x: Float[Array, "b t d"]) -> Ticks:
        """What the nests of all heads are run on for a text that begins with x."""
        empty = self.init_state(1, dtype=x.dtype).memory[0]
        return Ticks({"memory": empty}, self.ask(x, None, None)[0])

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> LinearMemoryState:
        """Empty memories: their size does not depend on the capacity.

        batch: rows. dtype: of x, None for that of the parameters.
        """
        del capacity
        check_sizes(batch=batch)
        wide = jnp.promote_types(jnp.float32, dtype or jnp.zeros(()).dtype)
        memory = jnp.zeros((batch, self.heads, self.key_dim, self.value_dim), wide)
        return LinearMemoryState(self.init_before(batch, dtype), memory)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: LinearMemoryState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], LinearMemoryState]:
        """Mixes tokens with those before them.

        Args:
          x: inputs, normalised by the caller.
          state: as returned; None: nothing came before.
          segment_ids: a new segment starts with empty memories; see `nlx.nn.segments`.
        """
        check_call(self, self.width, x, state, segment_ids)
        asked, before = self.ask(x, None if state is None else state.before, segment_ids)
        o, memory = ops.linear_memory(
            asked.query,
            asked.stored.key,
            asked.stored.value,
            **self._gates(asked.stored),
            state=None if state is None else state.memory,
            segment_ids=segment_ids,
        )
        return self.read_out(x, asked, o), LinearMemoryState(before, memory)

    def _gates(self, stored: Association) -> dict[str, Any]:
        """The gates as the op takes them, neutral ones written out."""
        shape = stored.key.shape[:3]
        wide = jnp.promote_types(jnp.float32, stored.key.dtype)
        rate, retain = (
            jnp.ones(shape, wide) if gate is None else gate for gate in (stored.rate, stored.retain)
        )
        erase = rate if self.objective is objectives.l2 else stored.erase
        return dict(
            rate=rate, retain=retain, erase=jnp.zeros(shape, wide) if erase is None else erase
        )
