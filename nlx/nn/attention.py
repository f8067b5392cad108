# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention: rotary positions, grouped queries, a window, a prefix, a cache."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nlx import memories, writes
from nlx.clock import Clock
from nlx.level import Level
from nlx.nn.checks import check_call
from nlx.nn.linear import Linear, check_sizes
from nlx.nn.rotary import rotate
from nlx.nn.segments import positions, segment_index
from nlx.parallel import by_heads, by_tokens

READ, GIVEN = ("attention.query", "attention.key", "attention.value"), "attention.given"


class AttentionState(NamedTuple):
    """The tokens of the running segment, as attention keeps them, the p-th in slot p.

    With a window p is taken modulo its length: a ring, whose oldest token is written over.
    """

    key: Float[Array, "b n k d"]  # as projected: rotated only when it is looked at
    value: Float[Array, "b n k d"]
    position: Int[Array, " b"]  # tokens of the running segment so far


class Lookup(NamedTuple):
    """One tick's context of a head: its query, and the keys and values it sees, rotated if at all.

    A prefix's keys are rotated to the query's own position, so that no rotation is left.
    """

    query: Float[Array, " d"]
    keys: Float[Array, "n d"]
    values: Float[Array, "n d"]


def softmax_l2(value: Float[Array, " d"], lookup: Lookup) -> Float[Array, ""]:
    """sum_s softmax_s(q . k_s / sqrt(d)) 1/2 ||value - v_s||^2: what attention's output minimises.

    Source: Behrouz et al. (2025), Nested Learning, Eq. 62; with a window, Eq. 63.
    """
    weights = jax.nn.softmax(lookup.keys @ lookup.query * len(lookup.query) ** -0.5)
    return 0.5 * jnp.sum(weights[:, None] * jnp.square(value[None] - lookup.values))


class Part(NamedTuple):
    """Keys and values that lie together, what is asked of them, and who sees them."""

    query: Float[Array, "b t h d"]
    key: Float[Array, "b n k d"]
    value: Float[Array, "b n k d"]
    seen: Bool[Array, "b t n"]


class Attention(nnx.Module):
    """y_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over t - window < s <= t, then an output map.

    Per head. q and k are rotated by their positions within the segment, if at all; groups of
    heads / kv_heads query heads share one key and value head. Tokens of a prefix are seen by all:
    q_t . k_p is taken of both unrotated, so it is the same wherever the token stands.

    Source: Vaswani et al. (2017), Eq. 1; Su et al. (2021), RoFormer, Eq. 34; Ainslie et al. (2023);
    Behrouz et al. (2024), Titans, Eq. 1, 2, 27 (window and prefix).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        window: int | None = None,
        theta: float | None = 10_000.0,
        rngs: nnx.Rngs,
    ):
        """Draws the four maps.

        Args:
          width: channels of x and y, a multiple of 2 heads.
          heads: query heads, each of width / heads channels.
          kv_heads: key and value heads, a divisor of `heads`; None: `heads`.
          window: tokens that each one sees, itself included; None: all before it.
          theta: wavelength of the slowest rotation is about 2 pi theta tokens; None: no rotation,
            so that order is seen only through who sees whom.

        Raises:
          ValueError: sizes below 1, or that do not divide.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        check_sizes(width=width, heads=heads, kv_heads=kv_heads)
        if window is not None:
            check_sizes(window=window)
        if width % (2 * heads):
            raise ValueError(f"`width` is {width}; it must be a multiple of 2 heads = {2 * heads}.")
        if heads % kv_heads:
            raise ValueError(f"`kv_heads` is {kv_heads}; it must be a divisor of heads = {heads}.")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.window, self.theta = window, theta
        self.query = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.key = Linear(width, kv_heads * self.head_dim, ("embed", "heads"), rngs=rngs)
        self.value = Linear(width, kv_heads * self.head_dim, ("embed", "heads"), rngs=rngs)
        self.output = Linear(width, width, ("heads", "embed"), rngs=rngs)

    def level(self) -> Level:
        """One head as a level: a value-less memory under `softmax_l2`, one `Lookup` per token.

        One gradient step of rate 1 solves it exactly from wherever it stands, so every query is
        answered anew from the context: non-parametric, of infinite frequency.
        """
        output = jax.ShapeDtypeStruct((self.head_dim,), self.key.kernel.dtype)
        return Level(
            memories.constant(output).init, softmax_l2, writes.gated(momentum=False), Clock(1)
        )

    def init_state(
        self, batch: int, capacity: int, dtype: DTypeLike | None = None
    ) -> AttentionState:
        """An empty cache.

        batch: rows. capacity: tokens a row's running segment may grow to; with a window it changes
        nothing, since the window's tokens are all that is kept. dtype: of x, None for that of the
        parameters.
        """
        slots = capacity if self.window is None else self.window
        check_sizes(batch=batch, capacity=slots)
        dtype = self.key.kernel.dtype if dtype is None else dtype
        empty = lambda: jnp.zeros((batch, slots, self.kv_heads, self.head_dim), dtype)
        return AttentionState(empty(), empty(), jnp.zeros(batch, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: AttentionState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        prefix: Float[Array, "n d"] | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionState | None]:
        """Mixes tokens with those before them.

        Args:
          x: inputs, normalised by the caller.
          state: the cache to go on from; None: nothing came before, and none is built.
          segment_ids: tokens see only their own segment; see `nlx.nn.segments`.
          prefix: tokens that every token sees, made like x; no part of the state.

        Raises:
          ValueError: a prefix of another width; or, without a window, tokens that do not fit the
            capacity, where that is known: outside jit, or longer than the whole cache. Inside jit
            y is NaN where something should have been kept and was not.
        """
        check_call(self, self.query.kernel.shape[0], x, state, segment_ids, capacity_of(state))
        b, t, _ = x.shape
        index = None if segment_ids is None else segment_index(segment_ids)
        start = jnp.zeros(b, jnp.int32) if state is None else state.position
        where = positions(start, t, segment_ids)
        # Scores depend on distances alone: the call's first token stands at 0, however late it is.
        place = positions(jnp.zeros_like(start), t, segment_ids)
        turn = functools.partial(rotate, theta=self.theta)
        query, key, value = self._heads(self.query, x), *self.key_value(x)
        q = turn(query, place)
        parts = [Part(q, turn(key, place), value, _causal(t, index, self.window))]
        if state is not None:
            held = self._held(state)
            k = turn(state.key, held - start[:, None])
            seen = _kept(held, start, where, index, self.window)
            parts.insert(0, Part(q, k, state.value, seen))
            state = self._append(state, key, value, where, index)
        if prefix is not None:
            parts.insert(0, self.prefix_part(query, prefix))
        y = self.output(by_tokens(attend(parts).reshape(b, t, -1), "heads"))
        if state is not None and self.window is None:
            lost = _lost(state.key.shape[1], start, where, index)
            y = jnp.where(lost[:, :, None], jnp.nan, y)
        return y, state

    def _heads(self, linear: Linear, x: Float[Array, "b t d"]) -> Float[Array, "b t h d"]:
        return by_heads(linear(x).reshape(*x.shape[:2], -1, self.head_dim))

    def key_value(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t k d"], Float[Array, "b t k d"]]:
        """Keys and values in heads, not rotated."""
        return self._heads(self.key, x), self._heads(self.value, x)

    def prefix_part(self, query: Float[Array, "b t h d"], prefix: Float[Array, "n d"]) -> Part:
        """A prefix as every token sees it. query: not rotated. Raises as the call does."""
        width = self.query.kernel.shape[0]
        if prefix.ndim != 2 or prefix.shape[1] != width:
            raise ValueError(f"`prefix` has shape {prefix.shape}; it must be [n, {width}].")
        b, t = query.shape[:2]
        rows = lambda z: jnp.broadcast_to(z, (b, *z.shape[1:]))
        key, value = map(rows, self.key_value(prefix[None].astype(query.dtype)))
        return Part(query, key, value, jnp.ones((b, t, len(prefix)), bool))

    def _held(self, state: AttentionState) -> Int[Array, "b n"]:
        """The position of the token in every slot; below 0 or not yet reached: none."""
        slots = jnp.arange(state.key.shape[1], dtype=jnp.int32)[None]
        last = state.position[:, None] - 1
        if self.window is None:
            return jnp.broadcast_to(slots, state.key.shape[:2])
        return last - (last - slots) % self.window

    def _append(self, state: AttentionState, key, value, where, index) -> AttentionState:
        """The cache with the last segment's tokens written to their slots."""
        slots, t = state.key.shape[1], key.shape[1]
        slot = where
        if self.window is not None:
            slot = jnp.where(where > where[:, -1:] - slots, where % slots, slots)
        elif index is None:
            check_room(state.position, t, slots)
        if index is not None:
            slot = jnp.where(index == index[:, -1:], slot, slots)
        rows = jnp.arange(len(slot))[:, None]
        keep = lambda cache, new: cache.at[rows, slot].set(new.astype(cache.dtype), mode="drop")
        return AttentionState(keep(state.key, key), keep(state.value, value), where[:, -1] + 1)


def _causal(t: int, index: Int[Array, "b t"] | None, window: int | None) -> Bool[Array, "b t t"]:
    """Which of the call's own tokens each one sees."""
    age = jnp.arange(t)[None, :, None] - jnp.arange(t)[None, None]
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    return seen if index is None else seen & (index[:, :, None] == index[:, None, :])


def _kept(
    held: Int[Array, "b n"],
    start: Int[Array, " b"],
    where: Int[Array, "b t"],
    index: Int[Array, "b t"] | None,
    window: int | None,
) -> Bool[Array, "b t n"]:
    """Which slots of the cache each token sees: filled ones, while the first segment lasts."""
    filled = (held >= 0) & (held < start[:, None])
    seen = jnp.broadcast_to(filled[:, None], (*where.shape, held.shape[1]))
    if window is not None:
        seen &= where[:, :, None] - held[:, None] < window
    return seen if index is None else seen & (index == 0)[:, :, None]


def attend(parts: list[Part]) -> Float[Array, "b t h d"]:
    """One softmax over all parts, in the queries' dtype; at least float32 inside.

    What it reads and gives is named, so that `nlx.inspect.wiring` finds it in a trace.
    """
    parts = [
        Part(
            checkpoint_name(part.query, READ[0]),
            checkpoint_name(part.key, READ[1]),
            checkpoint_name(part.value, READ[2]),
            part.seen,
        )
        for part in parts
    ]
    b, t, heads, d = parts[0].query.shape
    dtype = parts[0].query.dtype
    wide = jnp.promote_types(jnp.float32, dtype)
    scores = [
        jnp.where(
            part.seen[:, None, None],
            jnp.einsum(
                "btkgd,bskd->bkgts",
                part.query.reshape(b, t, part.key.shape[2], -1, d),
                part.key,
                preferred_element_type=wide,
            )
            * d**-0.5,
            -jnp.inf,
        )
        for part in parts
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(dtype)
    ends = list(itertools.accumulate(part.key.shape[1] for part in parts))[:-1]
    reads = [
        jnp.einsum("bkgts,bskd->btkgd", weight, part.value)
        for weight, part in zip(jnp.split(weights, ends, axis=-1), parts, strict=True)
    ]
    return checkpoint_name(functools.reduce(jnp.add, reads).reshape(b, t, heads, d), GIVEN)


def _lost(
    capacity: int,
    start: Int[Array, " b"],
    where: Int[Array, "b t"],
    index: Int[Array, "b t"] | None,
) -> Bool[Array, "b t"]:
    """Tokens that the cache should hold and can't, and those that look for such ones."""
    late = where >= capacity
    if index is None:
        return late
    return late & ((index == index[:, -1:]) | (index == 0) & (start > capacity)[:, None])


def capacity_of(state: Any) -> int:
    """Tokens that a cache holds; 1 for any other state."""
    return jnp.shape(state.key)[1] if isinstance(state, AttentionState) else 1


def check_room(position: Int[Array, " b"], t: int, capacity: int) -> None:
    """Raises ValueError where a call's tokens are known not to fit."""
    known = not isinstance(position, Tracer)
    used = int(position.max()) if known else 0
    if used + t > capacity:
        raise ValueError(
            f"`capacity` is {capacity}; it must be at least {used + t} to hold the {used} tokens "
            f"in attention's cache and {t} more."
        )
