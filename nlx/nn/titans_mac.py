# SPDX-License-Identifier: Apache-2.0
"""Titans, memory as a context: attention asks the memory, the memory learns what it says."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nlx import ops
from nlx.level import Association
from nlx.nest import Nest
from nlx.nn.attention import Attention, Part, attend
from nlx.nn.checks import check_call
from nlx.nn.linear import Linear, check_sizes
from nlx.nn.neural_memory import STREAMS, DeepMemory, Read, persistent_tokens
from nlx.nn.norm import RMSNorm
from nlx.nn.recall import Ticks
from nlx.nn.rotary import rotate
from nlx.nn.segments import positions
from nlx.nn.stream import unit
from nlx.parallel import by_tokens


class Kept(NamedTuple):
    """The running chunk as attention keeps it, in slots; the heads of what the memory recalled come
    before those of the tokens."""

    key: Float[Array, "b c h+h d"]  # rotated
    value: Float[Array, "b c h+h d"]


class MACState(NamedTuple):
    """What MAC carries from one call to the next: slots from position mod C on are zeros."""

    kept: Kept
    memory: ops.MLPMemoryState


class Projected(NamedTuple):
    """What is made of the tokens before the loop, in heads."""

    query: Float[Array, "b h c d"]  # of attention; not rotated
    key: Float[Array, "b h c d"]
    value: Float[Array, "b h c d"]
    recall: Float[Array, "b h c d"]  # of the memory, of unit length
    slot: Int[Array, "b c"]  # tokens of the running chunk before this one


class TitansMAC(nnx.Module):
    """o_i = (y_i * silu(RMSNorm(M_i(q(y_i))))) W_o, where y_i is what attention says of chunk and
    memory:

        h_j = RMSNorm(M_0(q(x_j)))                                M_0: M at the chunk's start
        y_i = RMSNorm(Attn(x_i; P, h_1 .. h_i, x_1 .. x_i))       of its own chunk
        M_i = M_{i-1} written with k(y_i), v(y_i) and the gates of y_i, gradients at M_0

    A sequence is cut into chunks of C tokens, which are also the memory's: attention sees no other
    chunk, so all that comes from further back comes through M. q, k, v(z) = silu(z W), q and k of
    unit length; see `DeepMemory` for the gates. Attention is rotary, h and x at the positions of
    [h_1 .. h_C, x_1 .. x_C], and sees P as a prefix, see `Attention`.

    Readings: token i sees no h_j and no write of a later token (Fig. 3a and Eq. 25 would let it);
    the first chunk asks the memory like others, since where M starts is learned; P belongs to
    attention alone; the product is that of section 4.2, normalised and gated; nothing is convolved,
    since attention sees the last tokens anyway.

    Source: Behrouz et al. (2024), Titans, Eq. 21-25, section 4.4.
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
        """Draws attention, the memory and the maps between them.

        Args:
          width: channels of x and y, a multiple of 2 heads.
          heads: heads of attention and memories, over width / heads channels each.
          hidden: units of each hidden layer of a memory.
          depth: layers of a memory, 1 (linear) to 4.
          chunk_size: C.
          persistent: number of persistent tokens, >= 0.
          momentum: whether past surprise carries on (Eq. 10).
          read: M_i after the token's own write, or M_0.

        Raises:
          ValueError: sizes out of range, or that do not divide.
        """
        self.attention = Attention(width, heads=heads, rngs=rngs)
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
        maps = {s: Linear(width, width, ("embed", "heads"), rngs=rngs) for s in STREAMS}
        self.maps = nnx.Dict(maps)
        self.persistent = persistent_tokens(persistent, width, rngs=rngs)
        norms = {name: RMSNorm(width) for name in ("recalled", "attended", "learned")}
        self.norms = nnx.Dict(norms)
        self.output = Linear(width, width, ("heads", "embed"), rngs=rngs)

    def nest(self) -> Nest:
        """The memories of all heads as levels on one clock: what the loop computes in parallel.

        They belong together, since attention mixes heads. A tick's context is (x [C, d], i): the
        running chunk, of which the token is the i-th and later ones don't matter. Its output is
        o [d]. What attention learns from is the chunk itself: see `Attention.level`.
        """
        names = [f"memory.{n}" for n in range(self.memory.heads)]
        memory, level = self.memory.of_one_head()
        after_write = self.memory.read == "after_write"

        def recall(params, z: Float[Array, "1 h c d"]):
            read = jax.vmap(memory.read, (None, 0))
            return jnp.stack([read(params[name], z[0, n]) for n, name in enumerate(names)])[None]

        def forward(params, context):
            x, i = context
            asked = self._project(x[None], jnp.arange(len(x))[None])
            asked = Projected._make([*map(_swap, asked[:4]), asked.slot])
            seen = jnp.tril(jnp.ones((1, len(x), len(x)), bool))
            chunk, _ = self._attend(functools.partial(recall, params), asked, seen, None, None)
            attended = chunk[:, i][:, None]
            tokens = self._tokens(attended)
            one = lambda array, n: None if array is None else array[0, n, 0]
            contexts = {
                name: Association(
                    one(tokens.k, n),
                    one(tokens.v, n),
                    one(tokens.rate, n),
                    one(tokens.retain, n),
                    one(tokens.momentum, n),
                )
                for n, name in enumerate(names)
            }
            recalled = tokens.q if after_write else recall(params, tokens.q)
            return (attended, recalled), contexts

        def read(working, output, context):
            del context
            attended, recalled = output
            recalled = recall(working, recalled) if after_write else recalled
            return self._read_out(attended, _join(_swap(recalled)))[0, 0]

        return Nest(dict.fromkeys(names, level), forward, read=read)

    def ticks(self, x: Float[Array, "b t d"]) -> Ticks:
        """What the nest, one for all heads, is run on for a text that begins with x."""
        t, size = x.shape[1], self.memory.chunk_size
        padded = jnp.pad(x, ((0, 0), (0, -t % size), (0, 0)))
        chunks = padded.reshape(len(x), -1, size, x.shape[2])
        place = jnp.broadcast_to(jnp.arange(t) % size, (len(x), t))
        weights = self.memory.weights()
        params = {
            f"memory.{n}": tuple(w[n][None] for w in weights) for n in range(self.memory.heads)
        }
        return Ticks(params, (chunks[:, jnp.arange(t) // size, None], place[..., None]))

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> MACState:
        """The state before the first token: of one size for any capacity and dtype of x.

        batch: rows.
        """
        del capacity, dtype
        check_sizes(batch=batch)
        memory = self.memory.init_state(batch, self.memory.weights())
        return MACState(self._nothing_kept(batch, memory.weights[0].dtype), memory)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: MACState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], MACState]:
        """Mixes tokens with those before them, and learns from them.

        Args:
          x: inputs, normalised by the caller.
          state: as returned; None: nothing came before.
          segment_ids: a new segment starts anew, in a chunk of its own; see `nlx.nn.segments`.
        """
        check_call(self, self.output.kernel.shape[0], x, state, segment_ids)
        b, t, _ = x.shape
        wide = jnp.promote_types(jnp.float32, x.dtype)
        start = jnp.zeros(b, jnp.int32) if state is None else state.memory.position
        where = positions(start, t, segment_ids) % self.memory.chunk_size
        asked = self._project(x, where)
        anew = state is None or segment_ids is not None

        def make(recall, kept, count, asked: Projected, piece: ops.Piece) -> ops.Made:
            itself = jnp.eye(piece.pair.shape[-1], dtype=bool)[None]
            attended, new = self._attend(recall, asked, piece.pair | itself, kept, count)
            kept = None if kept is None else _keep(kept, new, asked.slot, piece)
            return ops.Made(self._tokens(attended), _swap(self._split(attended)), kept)

        recalled, attended, memory, kept = ops.generated_memory(
            make,
            jax.tree.map(lambda a: a.astype(wide) if a.ndim == 4 else a, asked),
            self._nothing_kept(b, wide) if state is None else state.kept,
            weights=self.memory.weights() if anew else None,
            state=None if state is None else state.memory,
            momentum=self.memory.momentum is not None,
            segment_ids=segment_ids,
            **self.memory.options(),
        )
        y = self._read_out(_join(attended).astype(x.dtype), _join(recalled).astype(x.dtype))
        return y, MACState(kept, memory)

    def _project(self, x: Float[Array, "b t d"], slot: Int[Array, "b t"]) -> Projected:
        """What needs no memory, laid out [b, t, h, d]."""
        key, value = self.attention.key_value(x)
        return Projected(
            query=self._split(self.attention.query(x)),
            key=key,
            value=value,
            recall=unit(self._split(jax.nn.silu(self.maps["query"](x)))),
            slot=slot,
        )

    def _attend(
        self, recall, asked: Projected, seen: Bool[Array, "b c c"], kept: Kept | None, count
    ):
        """Asks the memory, then attends: y [b, c, d], and what later tokens of the chunk need.

        seen: tokens of the piece that each one sees. kept, count: the chunk before it; None: none.
        """
        query, key, value = map(_swap, asked[:3])
        size, turn = self.memory.chunk_size, functools.partial(rotate, theta=self.attention.theta)
        recalled = self.norms["recalled"](_join(_swap(recall(asked.recall))))
        recalled_key, recalled_value = self.attention.key_value(recalled)
        keys = turn(recalled_key, asked.slot - size), turn(key, asked.slot)
        new = Kept(jnp.concatenate(keys, 2), jnp.concatenate([recalled_value, value], 2))
        turned = turn(query, asked.slot)
        parts = _parts(turned, new, seen)
        if kept is not None:
            filled = jnp.arange(size)[None] < count[:, None]
            filled = jnp.broadcast_to(filled[:, None], (*seen.shape[:2], size))
            parts += _parts(turned, kept, filled)
        if self.persistent is not None:
            parts.append(self.attention.prefix_part(query, self.persistent[...]))
        attended = self.attention.output(_join(attend(parts)))
        return self.norms["attended"](attended), new

    def _tokens(self, y: Float[Array, "b c d"]) -> ops.MemoryTokens:
        """What the memory reads and writes of attention's output."""
        q, k, v = (_swap(self._split(jax.nn.silu(self.maps[name](y)))) for name in STREAMS)
        gates = jax.tree.map(_swap, self.memory.gates(y))
        return ops.MemoryTokens(unit(q), unit(k), v, **gates)

    def _read_out(self, attended: Float[Array, "b t d"], recalled: Float[Array, "b t d"]):
        attended, recalled = by_tokens(attended), by_tokens(recalled)
        return self.output(attended * jax.nn.silu(self.norms["learned"](recalled)))

    def _split(self, z: Float[Array, "b t d"]) -> Float[Array, "b t h d"]:
        return z.reshape(*z.shape[:2], self.memory.heads, self.memory.head_dim)

    def _nothing_kept(self, batch: int, dtype: DTypeLike) -> Kept:
        heads, head_dim = self.memory.heads, self.memory.head_dim
        empty = lambda: jnp.zeros((batch, self.memory.chunk_size, 2 * heads, head_dim), dtype)
        return Kept(empty(), empty())


def _parts(query: Float[Array, "b c h d"], kept: Kept, seen: Bool[Array, "b c s"]) -> list[Part]:
    """What was recalled, and the tokens, as attention sees them."""
    keys, values = (jnp.split(a, 2, axis=2) for a in kept)
    return [Part(query, key, value, seen) for key, value in zip(keys, values, strict=True)]


def _keep(kept: Kept, new: Kept, slot: Int[Array, "b c"], piece: ops.Piece) -> Kept:
    """The slots with the piece's last segment written to them."""
    running = jnp.any(piece.last[:, :, None] & piece.pair, axis=1)
    slots = jnp.arange(kept.key.shape[1])[None, None]
    at = running[:, :, None] & (slot[:, :, None] == slots)
    written = at.any(1)[:, :, None, None]
    place = lambda a, old: jnp.where(
        written, jnp.einsum("bcs,bchd->bshd", at.astype(a.dtype), a), old
    )
    return jax.tree.map(place, new, kept)


def _swap(a: Array) -> Array:
    """[b, t, h, ...] from [b, h, t, ...], and back."""
    return jnp.swapaxes(a, 1, 2)


def _join(a: Float[Array, "b t h d"]) -> Float[Array, "b t d"]:
    return a.reshape(*a.shape[:2], -1)
