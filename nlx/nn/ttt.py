# SPDX-License-Identifier: Apache-2.0
"""Test-time training: a model per head that learns to reconstruct, linear or an MLP."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx import memories, objectives, ops, writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.nest import Nest
from nlx.nn.checks import check_call
from nlx.nn.convolution import Convolution, Window
from nlx.nn.gate import Gate
from nlx.nn.linear import Linear, check_sizes, normal
from nlx.nn.readout import ReadOut
from nlx.nn.recall import Asked, Ticks, recall
from nlx.parallel import by_heads

STREAMS = ("query", "key", "value")
INITIAL_SCALE = 0.02
LINEAR_RATE, MLP_RATE = 1.0, 0.1
EXPANSION = 4


class TTTState(NamedTuple):
    """What TTT carries from one call to the next."""

    windows: dict[str, Window]  # of queries and keys
    memory: ops.MLPMemoryState


class TTT(nnx.Module):
    """o_t = M_t(q_t), M(z) = z + layernorm(f(z)), f written by every token; see `ReadOut` for y.

        W_t = W_{t-1} - eta_t grad 1/2 |M(k_t) - v_t|^2,    eta_t = eta_0 sigmoid(x W_eta + b) / d

    Gradients are taken at the start of the chunk. q, k = conv_4(x W), v = x W, d channels a head.
    Where f starts is learned through its writes.

    Readings: f has no biases, and the layer norm inside M neither scale nor shift (the authors'
    learn both outside of the loop; the read-out's scale stands in); eta is that of the paper's
    text, not multiplied by 1 / (place in the chunk), with which the authors' code averages; the
    read-out's norm is per head and by the root mean square, its gate silu.

    Source: Sun et al. (2024), Learning to (Learn at Test Time), Eq. 4-7, sections 2.4, 2.7;
    convolutions as of its Mamba backbone.
    """

    def __init__(
        self,
        width: int,
        expansion: int | None,
        rate: float,
        *,
        heads: int,
        chunk_size: int,
        rngs: nnx.Rngs,
    ):
        """Draws the maps and where f starts.

        Args:
          width: channels of x and y, a multiple of `heads`.
          expansion: hidden units of an MLP f, as a multiple of d; None: f is linear.
          rate: eta_0.
          heads: heads of width / heads channels, each with an f of its own.
          chunk_size: tokens that are written with gradients at the same weights.

        Raises:
          ValueError: sizes below 1, or that do not divide.
        """
        check_sizes(width=width, heads=heads, chunk_size=chunk_size)
        if width % heads:
            raise ValueError(f"`heads` is {heads}; it must be a divisor of width = {width}.")
        self.heads, self.head_dim, self.chunk_size = heads, width // heads, chunk_size
        self.rate = rate / self.head_dim
        hidden = [] if expansion is None else [expansion * self.head_dim]
        self.sizes = (self.head_dim, *hidden, self.head_dim)
        names = (None, *["memory"] * len(hidden), None)
        self.maps = nnx.Dict(
            {s: Linear(width, width, ("embed", "heads"), rngs=rngs) for s in STREAMS}
        )
        self.convolutions = nnx.Dict({s: Convolution(width, rngs=rngs) for s in STREAMS[:2]})
        self.eta = Gate(width, heads, 0.0, rngs=rngs)
        self.layers = nnx.List(
            [
                normal(
                    rngs,
                    (heads, *self.sizes[n : n + 2]),
                    ("heads", *names[n : n + 2]),
                    INITIAL_SCALE,
                )
                for n in range(len(hidden) + 1)
            ]
        )
        self.out = ReadOut(width, heads, self.head_dim, rngs=rngs)

    def nest(self) -> Nest:
        """One head as a level on its clock: what the op computes in parallel."""
        memory = memories.mlp(self.sizes, norm=True)
        write = writes.gated(momentum=False)
        clock = Clock(self.chunk_size)
        return recall(memory, associative_memory(memory, objectives.l2, write, clock))

    def ticks(self, x: Float[Array, "b t d"]) -> Ticks:
        """What the nests of all heads are run on for a text that begins with x."""
        return Ticks({"memory": self.weights()}, self.ask(x, None, None)[0])

    def weights(self) -> tuple[Float[Array, "h i o"], ...]:
        """Where f starts."""
        return tuple(layer[...] for layer in self.layers)

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> TTTState:
        """The state before the first token: its size does not depend on the capacity.

        batch: rows. dtype: of x, None for that of the parameters.
        """
        del capacity
        windows = {name: c.init_state(batch, dtype) for name, c in self.convolutions.items()}
        rows = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in self.weights())
        position = jnp.zeros(batch, jnp.int32)
        start = tuple(jnp.copy(w) for w in rows)  # a buffer of its own: the state may be donated
        return TTTState(windows, ops.MLPMemoryState(rows, start, None, position))

    def ask(
        self,
        x: Float[Array, "b t d"],
        before: dict[str, Window] | None,
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[Asked, dict[str, Window]]:
        """What x asks and stores. before: the convolutions' inputs; None: nothing came before."""
        split = (*x.shape[:2], self.heads, -1)
        mapped = lambda linear: by_heads(linear(x).reshape(split)).reshape(x.shape)
        made, windows = {name: mapped(linear) for name, linear in self.maps.items()}, {}
        for name, convolution in self.convolutions.items():
            past = None if before is None else before[name]
            made[name], windows[name] = convolution(made[name], past, segment_ids)
        query, key, value = (made[name].reshape(split) for name in STREAMS)
        return Asked(query, Association(key, value, rate=self.rate * self.eta(x))), windows

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: TTTState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], TTTState]:
        """Mixes tokens with those before them, and learns from them.

        Args:
          x: inputs, normalised by the caller.
          state: as returned; None: nothing came before.
          segment_ids: a new segment starts from the parameters; see `nlx.nn.segments`.
        """
        check_call(self, self.maps["value"].kernel.shape[0], x, state, segment_ids)
        windows, memory = state or (None, None)
        asked, windows = self.ask(x, windows, segment_ids)
        stored = asked.stored
        assert stored.rate is not None
        o, memory = ops.mlp_memory(
            asked.query,
            stored.key,
            stored.value,
            weights=self.weights() if memory is None or segment_ids is not None else None,
            state=memory,
            rate=stored.rate,
            retain=jnp.ones_like(stored.rate),
            chunk_size=self.chunk_size,
            norm=True,
            segment_ids=segment_ids,
        )
        return self.out(x, o), TTTState(windows, memory)


class TTTLinear(TTT):
    """TTT with f(z) = z W and eta_0 = 1."""

    def __init__(self, width: int, *, heads: int, chunk_size: int = 16, rngs: nnx.Rngs):
        """Arguments and errors as of `TTT`."""
        super().__init__(width, None, LINEAR_RATE, heads=heads, chunk_size=chunk_size, rngs=rngs)


class TTTMLP(TTT):
    """TTT with f(z) = gelu(z W_1) W_2, four times as wide inside, and eta_0 = 0.1."""

    def __init__(self, width: int, *, heads: int, chunk_size: int = 16, rngs: nnx.Rngs):
        """Arguments and errors as of `TTT`."""
        super().__init__(width, EXPANSION, MLP_RATE, heads=heads, chunk_size=chunk_size, rngs=rngs)
