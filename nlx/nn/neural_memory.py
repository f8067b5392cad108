# SPDX-License-Identifier: Apache-2.0
"""Titans' neural memory: an MLP per head that learns from the tokens it reads."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx import memories, objectives, ops, writes
from nlx.clock import Clock
from nlx.level import Association, Level, associative_memory
from nlx.nest import Nest
from nlx.nn.checks import check_option
from nlx.nn.convolution import Window
from nlx.nn.gate import Gate
from nlx.nn.linear import check_sizes, normal
from nlx.nn.recall import Asked, Ticks, recall
from nlx.nn.stream import Streams, unit

Read = Literal["after_write", "chunk_start"]

STREAMS = ("query", "key", "value")
MAX_DEPTH = 4
INITIAL_FORGET = -4.0
LARGEST_WEIGHTS = 4.0


class NeuralMemoryState(NamedTuple):
    """What a neural memory carries from one call to the next."""

    windows: dict[str, Window]  # stream -> last inputs of its convolution
    memory: ops.MLPMemoryState


class DeepMemory(nnx.Module):
    """One memory per head, M(z) = z + gelu(.. z W_1 ..) W_L: where it starts and how it is written.

        retain = 1 - alpha,    alpha = sigmoid(x W_alpha + b_alpha)
        eta = sigmoid(x W_eta + b_eta)
        theta = (1 + retain) (1 - eta) / C sigmoid(x W_theta + b_theta)

    S_t = eta_t S_{t-1} - theta_t grad 1/2 |M(k_t) - v_t|^2 and M_t = retain_t M_{t-1} + S_t, the
    gradients taken at the start of the chunk of C tokens. The range of theta is where a linear
    memory is stable even if all keys of a chunk are equal: then it is on the edge at sigmoid = 1,
    and at sigmoid = 1/2, where it starts, the chunk stores their value exactly. A deeper memory
    needs more: a token's gradient of a layer is scaled back to Frobenius norm sqrt(d) (the error of
    a value of unit variance), a layer at a chunk's end to 4 sqrt(f) (four times its start).

    Source: Behrouz et al. (2024), Titans, Eq. 11-16, section 3.1; the papers leave the maps of the
    gates, the range of theta and every limit open.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        hidden: int,
        depth: int,
        chunk_size: int,
        momentum: bool,
        read: Read,
        rngs: nnx.Rngs,
    ):
        """Draws gates and initial weights; arguments as of `NeuralMemory`."""
        check_sizes(width=width, heads=heads, hidden=hidden, depth=depth, chunk_size=chunk_size)
        check_option(Read, read=read)
        if width % heads:
            raise ValueError(f"`heads` is {heads}; it must be a divisor of width = {width}.")
        if depth > MAX_DEPTH:
            raise ValueError(f"`depth` is {depth}; it must be an integer from 1 to {MAX_DEPTH}.")
        self.heads, self.head_dim, self.chunk_size = heads, width // heads, chunk_size
        self.read: Read = read
        self.sizes = (self.head_dim, *[hidden] * (depth - 1), self.head_dim)
        self.clip = self.head_dim**0.5
        self.bound = LARGEST_WEIGHTS * max(self.sizes) ** 0.5
        axes = (None, *["memory"] * (depth - 1), None)
        self.layers = nnx.List(
            [
                normal(
                    rngs,
                    (heads, self.sizes[n], self.sizes[n + 1]),
                    ("heads", axes[n], axes[n + 1]),
                    (0.5 if n == depth - 1 else 1.0) * self.sizes[n] ** -0.5,
                )
                for n in range(depth)
            ]
        )
        self.forget = Gate(width, heads, INITIAL_FORGET, rngs=rngs)
        self.rate = Gate(width, heads, 0.0, rngs=rngs)
        self.momentum = Gate(width, heads, 0.0, rngs=rngs) if momentum else None

    def weights(self) -> tuple[Float[Array, "h i o"], ...]:
        """Where the memory starts, learned through its writes."""
        return tuple(layer[...] for layer in self.layers)

    def gates(self, x: Float[Array, "*b d"]) -> dict[str, Float[Array, "*b h"] | None]:
        """Rate, retention and momentum of every token, at least float32, as the op takes them."""
        retain = 1 - self.forget(x)
        momentum = None if self.momentum is None else self.momentum(x)
        rate = (1 + retain) / self.chunk_size * self.rate(x)
        rate = rate if momentum is None else (1 - momentum) * rate
        return dict(rate=rate, retain=retain, momentum=momentum)

    def options(self) -> dict[str, Any]:
        """How the op writes and reads."""
        names = ("chunk_size", "read", "clip", "bound")
        return {name: getattr(self, name) for name in names}

    def of_one_head(self) -> tuple[memories.Memory, Level]:
        """The memory of a head, and the level that writes it; its contexts are `Association`s."""
        memory = memories.mlp(self.sizes)
        write = writes.gated(None, self.momentum is not None, self.clip, self.bound)
        return memory, associative_memory(memory, objectives.l2, write, Clock(self.chunk_size))

    def init_state(self, batch: int, weights: tuple[Array, ...]) -> ops.MLPMemoryState:
        """The state before the first token, at these weights [h, i, o] in every row."""
        rows = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in weights)
        momentum = None if self.momentum is None else jax.tree.map(jnp.zeros_like, rows)
        start = jax.tree.map(jnp.copy, rows)  # a buffer of its own: the state may be donated
        return ops.MLPMemoryState(rows, start, momentum, jnp.zeros(batch, jnp.int32))


class NeuralMemory(nnx.Module):
    """y_t = M_t(q_t): what a deep memory recalls of the persistent tokens P and all tokens so far.

    q, k, v are `Stream`s of x, q and k of unit length; see `DeepMemory` for the write.

    Every sequence and every packed segment reads P first. P is the same for all, so it is read once
    per call: in chunks of its own, the convolutions starting anew before and after it. What it
    leaves are the weights from which everything starts, at position 0 and with no momentum. The
    gradient flows through its writes to where the memory starts before it.

    Source: Behrouz et al. (2024), Titans, Eq. 8-19, section 4.4 (convolutions, unit length).
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
        """Draws the slow maps, the persistent tokens and where the memory starts.

        Args:
          width: channels of x, a multiple of `heads`.
          heads: heads, each with a memory of its own over width / heads channels.
          hidden: units of each hidden layer of a memory.
          depth: layers of a memory, 1 (linear) to 4.
          chunk_size: tokens that are written with gradients at the same weights.
          persistent: number of persistent tokens, >= 0.
          momentum: whether past surprise carries on (Eq. 10).
          read: read after the token's own write, or from the chunk's start.

        Raises:
          ValueError: sizes out of range, or that do not divide.
        """
        self.memory = DeepMemory(
            width,
            heads=heads,
            hidden=hidden,
            depth=depth,
            chunk_size=chunk_size,
            momentum=momentum,
            read=read,
            rngs=rngs,
        )
        self.heads, head_dim = heads, self.memory.head_dim
        self.streams = Streams(width, dict.fromkeys(STREAMS, (heads, head_dim)), rngs=rngs)
        self.persistent = persistent_tokens(persistent, width, rngs=rngs)

    def nest(self) -> Nest:
        """One head as a level on its clock: what the op computes in parallel."""
        memory, level = self.memory.of_one_head()
        return recall(memory, level, after_write=self.memory.read == "after_write")

    def ticks(self, x: Float[Array, "b t d"]) -> Ticks:
        """What the nests of all heads are run on for a text that begins with x, after P."""
        return Ticks({"memory": self.begin()[1]}, self.ask(x, None, None)[0])

    def ask(
        self,
        x: Float[Array, "b t d"],
        windows: dict[str, Window] | None,
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[Asked, dict[str, Window]]:
        """What x asks and stores. windows: the convolutions' inputs; None: nothing came before."""
        made, windows = self.streams(x, windows, segment_ids)
        query, key, value = (made[name] for name in STREAMS)
        return Asked(unit(query), Association(unit(key), value, **self.memory.gates(x))), windows

    def begin(
        self,
    ) -> tuple[Float[Array, "1 n h d"] | None, tuple[Float[Array, "h i o"], ...]]:
        """What is recalled while the persistent tokens are read, and the weights after them."""
        weights = self.memory.weights()
        if self.persistent is None:
            return None, weights
        recalled, state = self._read(self.persistent[...][None], None, None, weights)
        return recalled, tuple(w[0] for w in state.memory.weights)

    def init_state(self, batch: int, dtype: DTypeLike | None = None) -> NeuralMemoryState:
        """The state before the first token. batch: rows. dtype: of x, None for the parameters'."""
        windows = self.streams.init_state(batch, dtype)
        return NeuralMemoryState(windows, self.memory.init_state(batch, self.begin()[1]))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: NeuralMemoryState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        weights: tuple[Float[Array, "h i o"], ...] | None = None,
    ) -> tuple[Float[Array, "b t h d"], NeuralMemoryState]:
        """Writes every token, and reads the memory for it.

        Args:
          x: inputs, normalised by the caller.
          state: as returned; None: nothing but the persistent tokens came before.
          segment_ids: a new segment starts from where the memory starts; see `nlx.nn.segments`.
          weights: those of `begin`, if the caller has them.
        """
        if state is not None and segment_ids is None:
            weights = None
        elif weights is None:
            _, weights = self.begin()
        return self._read(x, state, segment_ids, weights)

    def _read(self, x, state: NeuralMemoryState | None, segment_ids, weights):
        windows, memory = state or (None, None)
        (query, stored), windows = self.ask(x, windows, segment_ids)
        assert stored.rate is not None
        assert stored.retain is not None
        recalled, memory = ops.mlp_memory(
            query,
            stored.key,
            stored.value,
            weights=weights,
            state=memory,
            rate=stored.rate,
            retain=stored.retain,
            momentum=stored.momentum,
            segment_ids=segment_ids,
            **self.memory.options(),
        )
        return recalled, NeuralMemoryState(windows, memory)


def persistent_tokens(number: int, width: int, *, rngs: nnx.Rngs) -> nnx.Param | None:
    """Learned tokens that come before every sequence, [n, d] drawn from N(0, 1); None for none.

    Source: Behrouz et al. (2024), Titans, Eq. 19.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"`persistent` is {number!r}; it must be an integer >= 0.")
    return normal(rngs, (number, width), (None, "embed"), 1.0) if number else None
