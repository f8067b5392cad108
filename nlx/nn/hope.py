# SPDX-License-Identifier: Apache-2.0
"""Hope's mixer: self-modifying Titans between slow maps, convolutions and a gated read-out."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx import ops
from nlx.nest import Nest
from nlx.nn.checks import check_call, check_option
from nlx.nn.convolution import Window
from nlx.nn.gate import Gate
from nlx.nn.linear import Linear, check_sizes, normal, parameter
from nlx.nn.neural_memory import Read
from nlx.nn.norm import RMSNorm
from nlx.nn.recall import Ticks
from nlx.nn.stream import Streams, unit
from nlx.parallel import by_tokens
from nlx.self_modifying import BOXES, Readouts, Token, self_modifying_nest

STREAMS = ("query", "key", "value", "gate")
INITIAL_RATE = 0.2
INITIAL_RETAIN = 4.0
INITIAL_MOMENTUM = -2.0
SATURATED = 1e4  # a gate's logit that makes it exactly 1


class HopeState(NamedTuple):
    """What Hope's mixer carries from one call to the next."""

    windows: dict[str, Window]  # stream -> last inputs of its convolution
    memory: ops.SelfModifyingState


class Start(NamedTuple):
    """A `Box` as arrays."""

    w1: Float[Array, "h d f"]
    w2: Float[Array, "h f d"]
    rate_readout: Float[Array, "h d"]
    rate_bias: Float[Array, " h"]


class Box(nnx.Module):
    """One memory per head, M(z) = z + s(z W_1) W_2: where it starts, and its rate's read-out."""

    def __init__(self, heads: int, head_dim: int, hidden: int, bias: float, *, rngs: nnx.Rngs):
        """heads, head_dim, hidden: sizes of W_1 [h, d, f]. bias: rate_bias at first."""
        inner, outer = (heads, head_dim, hidden), (heads, hidden, head_dim)
        self.w1 = normal(rngs, inner, ("heads", None, "memory"), head_dim**-0.5)
        self.w2 = normal(rngs, outer, ("heads", "memory", None), 0.5 * hidden**-0.5)
        self.rate_readout = normal(rngs, (heads, head_dim), ("heads", None), head_dim**-0.5)
        self.rate_bias = parameter(jnp.full((heads,), bias), ("heads",))


class SelfModifying(nnx.Module):
    """y = (RMSNorm_h(o) * silu(x W_g)) W_o,  o = self_modifying_memory(x_key, x_value, x_gate; q).

    Streams x_key, x_value, x_gate and the query are `Stream`s of x; q has unit length. The memories
    make keys, values, rates and retention from the streams and are all written; see
    `nlx.ops.self_modifying_memory`. Where every memory starts is a parameter, learned through the
    writes; so are the read-outs of rates and retention, and the momentum sigmoid(x W_mu + b_mu).

    Source: Behrouz et al. (2025), Nested Learning, Eq. 83-96, section 8.3; Behrouz et al. (2024),
    Titans, section 4.4 (convolutions, norms and gate).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        hidden: int,
        chunk_size: int,
        projection_chunk_size: int,
        read: Read = "after_write",
        momentum: bool = True,
        erase: bool = True,
        retain: bool = True,
        adaptive_key: bool = True,
        adaptive_value: bool = True,
        adaptive_query: bool = False,
        rngs: nnx.Rngs,
    ):
        """Draws the slow maps and where the memories start.

        Args:
          width: channels of x and y, a multiple of `heads`.
          heads: heads, each with memories of its own over width / heads channels.
          hidden: hidden units of each memory.
          chunk_size: tokens in a chunk of the memory that is read.
          projection_chunk_size: tokens in a chunk of all other memories.
          read: read after the token's own write, or from the chunk's start (Eq. 90).
          momentum: whether writes carry momentum (Titans, Eq. 14).
          erase: whether writes erase along the layer's input (Eq. 57).
          retain: whether memories forget; False holds alpha at 1 (no weight decay).
          adaptive_key, adaptive_value, adaptive_query: whether a memory makes them of their
            streams; False leaves the stream itself, a slow map of x (Table 6).

        Raises:
          ValueError: sizes that do not divide, or another `read`.
        """
        check_sizes(width=width, heads=heads, hidden=hidden)
        check_sizes(chunk_size=chunk_size, projection_chunk_size=projection_chunk_size)
        check_option(Read, read=read)
        if width % heads:
            raise ValueError(f"`heads` is {heads}; it must be a divisor of width = {width}.")
        self.heads, self.head_dim, self.hidden = heads, width // heads, hidden
        self.chunk_size, self.projection_chunk_size = chunk_size, projection_chunk_size
        self.erase, self.retain = erase, retain
        self.read: Read = read
        self.adaptive_query = adaptive_query
        still = {"key": not adaptive_key, "value": not adaptive_value, "retain": not retain}
        self.still = tuple(box for box, stands in still.items() if stands)
        learning = [box for box in self._names() if box not in self.still]
        sizes = heads, (head_dim := self.head_dim)
        self.streams = Streams(width, dict.fromkeys(STREAMS, sizes), rngs=rngs)
        self.boxes = nnx.Dict(
            {box: Box(*sizes, hidden, self._rate_bias(box), rngs=rngs) for box in learning}
        )
        if retain:
            self.retain_readout = normal(rngs, (heads, head_dim), ("heads", None), head_dim**-0.5)
            self.retain_bias = parameter(jnp.full((heads,), INITIAL_RETAIN), ("heads",))
        self.momentum = Gate(width, heads, INITIAL_MOMENTUM, rngs=rngs) if momentum else None
        self.norm = RMSNorm(heads, head_dim, axes=("heads", None))
        self.gate = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.output = Linear(width, width, ("heads", "embed"), rngs=rngs)

    def _rate_bias(self, box: str) -> float:
        """The bias that makes the first rates about INITIAL_RATE of (1 + alpha) / 2."""
        size = self.chunk_size if box == "memory" else self.projection_chunk_size
        share = INITIAL_RATE if size == 1 else INITIAL_RATE / 2
        return math.log(share / (1 - share))

    def nest(self) -> Nest:
        """One head's inner loop as levels on their clocks: what the op computes in parallel."""
        return self_modifying_nest(
            self.head_dim,
            self.hidden,
            chunk_size=self.chunk_size,
            projection_chunk_size=self.projection_chunk_size,
            read=self.read,
            momentum=self.momentum is not None,
            erase=self.erase,
            adaptive_query=self.adaptive_query,
        )

    def ticks(self, x: Float[Array, "b t d"]) -> Ticks:
        """What the nests of all heads are run on for a text that begins with x."""
        (streams, query, momentum), _ = self._ask(x, None, None)
        start = self.parameters()
        slow = start.rate_readout, start.rate_bias, start.retain_readout, start.retain_bias
        return Ticks(
            start.memories | {"readouts": Readouts(*slow)},
            Token(streams.key, streams.value, streams.gate, query, momentum),
        )

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> HopeState:
        """The state before the first token: its size does not depend on the capacity.

        batch: rows. dtype: of x, None for that of the parameters.
        """
        del capacity
        memories = self.parameters().memories
        weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape)), memories)
        momentum = None if self.momentum is None else jax.tree.map(jnp.zeros_like, weights)
        position = jnp.zeros(batch, jnp.int32)
        start = jax.tree.map(jnp.copy, weights)  # a buffer of its own: the state may be donated
        memory = ops.SelfModifyingState(weights, start, momentum, position)
        return HopeState(self.streams.init_state(batch, dtype), memory)

    def parameters(self) -> ops.SelfModifyingParameters:
        """Where the memories start and the slow read-outs, as the op takes them.

        A memory that stands still is the identity, M(z) = z + s(z 0) 0: no gradient moves it.
        """
        dtype = self.boxes["memory"].w1[...].dtype
        zeros = functools.partial(jnp.zeros, dtype=dtype)
        rest = Start(
            zeros((self.heads, self.head_dim, self.hidden)),
            zeros((self.heads, self.hidden, self.head_dim)),
            zeros((self.heads, self.head_dim)),
            zeros(self.heads),
        )
        boxes = {
            name: rest
            if name in self.still
            else Start(*(getattr(self.boxes[name], field)[...] for field in Start._fields))
            for name in self._names()
        }
        return ops.SelfModifyingParameters(
            memories={name: (box.w1, box.w2) for name, box in boxes.items()},
            rate_readout={name: box.rate_readout for name, box in boxes.items()},
            rate_bias={name: box.rate_bias for name, box in boxes.items()},
            retain_readout=self.retain_readout[...] if self.retain else rest.rate_readout,
            retain_bias=self.retain_bias[...] if self.retain else rest.rate_bias + SATURATED,
        )

    def _names(self) -> tuple[str, ...]:
        return (*BOXES, "query") if self.adaptive_query else BOXES

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: HopeState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], HopeState]:
        """Mixes tokens with those before them, and learns from them.

        Args:
          x: inputs, normalised by the caller.
          state: as returned; None: nothing came before.
          segment_ids: a new segment starts from the parameters; see `nlx.nn.segments`.
        """
        check_call(self, self.gate.kernel.shape[0], x, state, segment_ids)
        windows = None if state is None else state.windows
        (streams, query, momentum), windows = self._ask(x, windows, segment_ids)
        y, memory = ops.self_modifying_memory(
            streams,
            query,
            parameters=self.parameters(),
            state=None if state is None else state.memory,
            chunk_size=self.chunk_size,
            projection_chunk_size=self.projection_chunk_size,
            read=self.read,
            momentum=momentum,
            erase=self.erase,
            segment_ids=segment_ids,
        )
        y = by_tokens(self.norm(y).reshape(x.shape), "heads") * jax.nn.silu(self.gate(x))
        return self.output(y), HopeState(windows, memory)

    def _ask(self, x: Float[Array, "b t d"], windows: dict[str, Window] | None, segment_ids):
        """Streams, queries and momentum as the op takes them, and the convolutions' inputs."""
        made, windows = self.streams(x, windows, segment_ids)
        query, key, value, gate = (made[name] for name in STREAMS)
        query = query if self.adaptive_query else unit(query)
        momentum = None if self.momentum is None else self.momentum(x)
        return (ops.Streams(key, value, gate), query, momentum), windows
