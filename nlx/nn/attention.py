# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention with rotary positions, grouped queries and a cache."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nlx import memories, writes
from nlx.clock import Clock
from nlx.level import Level
from nlx.nn.linear import Linear, check_sizes
from nlx.nn.segments import positions, segment_index


class AttentionState(NamedTuple):
    """The tokens of the running segment, as attention keeps them."""

    key: Float[Array, "b capacity k d"]  # rotated to their positions
    value: Float[Array, "b capacity k d"]
    position: Int[Array, " b"]  # tokens kept: slots from here on are not looked at


class Lookup(NamedTuple):
    """One tick's context of a head: its query, and all keys and values so far, rotated."""

    query: Float[Array, " d"]
    keys: Float[Array, "n d"]
    values: Float[Array, "n d"]


def softmax_l2(value: Float[Array, " d"], lookup: Lookup) -> Float[Array, ""]:
    """sum_s softmax_s(q . k_s / sqrt(d)) 1/2 ||value - v_s||^2: what attention's output minimises.

    Source: Behrouz et al. (2025), Nested Learning, Eq. 62.
    """
    weights = jax.nn.softmax(lookup.keys @ lookup.query * len(lookup.query) ** -0.5)
    return 0.5 * jnp.sum(weights[:, None] * jnp.square(value[None] - lookup.values))


class Attention(nnx.Module):
    """y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s, per head, then an output map.

    q and k are rotated by their positions within the segment. Groups of heads / kv_heads query
    heads share one key and value head.

    Source: Vaswani et al. (2017), Eq. 1; Su et al. (2021), RoFormer, Eq. 34; Ainslie et al. (2023).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        theta: float = 10_000.0,
        rngs: nnx.Rngs,
    ):
        """Draws the four maps.

        Args:
          width: channels of x and y, a multiple of 2 heads.
          heads: query heads, each of width / heads channels.
          kv_heads: key and value heads, a divisor of `heads`; None: `heads`.
          theta: wavelength of the slowest rotation is about 2 pi theta tokens.

        Raises:
          ValueError: sizes that do not divide.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        check_sizes(width=width, heads=heads, kv_heads=kv_heads)
        if width % (2 * heads):
            raise ValueError(f"`width` is {width}; it must be a multiple of 2 heads = {2 * heads}.")
        if heads % kv_heads:
            raise ValueError(f"`kv_heads` is {kv_heads}; it must be a divisor of heads = {heads}.")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.theta = theta
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

        batch: rows. capacity: tokens a row's running segment may grow to. dtype: of x, None for
        that of the parameters.
        """
        check_sizes(batch=batch, capacity=capacity)
        dtype = self.key.kernel.dtype if dtype is None else dtype
        empty = jnp.zeros((batch, capacity, self.kv_heads, self.head_dim), dtype)
        return AttentionState(empty, empty, jnp.zeros(batch, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: AttentionState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionState | None]:
        """Mixes tokens with those before them.

        Args:
          x: inputs, normalised by the caller.
          state: the cache to go on from; None: nothing came before, and none is built.
          segment_ids: tokens see only their own segment; see `nlx.nn.segments`.

        Raises:
          ValueError: the tokens do not fit the capacity, where that is known: outside jit, or
            longer than the whole cache. Inside jit what does not fit is not kept.
        """
        b, t, _ = x.shape
        index = None if segment_ids is None else segment_index(segment_ids)
        start = jnp.zeros(b, jnp.int32) if state is None else state.position
        where = positions(start, t, segment_ids)
        q = rotate(self.query(x).reshape(b, t, self.heads, -1), where, self.theta)
        k = rotate(self.key(x).reshape(b, t, self.kv_heads, -1), where, self.theta)
        v = self.value(x).reshape(b, t, self.kv_heads, -1)
        parts = [(k, v, _causal(t, index))]
        if state is not None:
            parts.insert(0, (state.key, state.value, _kept(state, t, index)))
            state = _append(state, k, v, where, index)
        y = attend(q, parts)
        return self.output(y.reshape(b, t, -1)), state


def rotate(
    x: Float[Array, "b t h d"], position: Int[Array, "b t"], theta: float
) -> Float[Array, "b t h d"]:
    """Rotates channel pairs (i, i + d/2) by position / theta^(2 i / d); at least float32 inside."""
    wide = jnp.promote_types(jnp.float32, x.dtype)
    half = x.shape[-1] // 2
    speed = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = jnp.einsum("bt,f->btf", position.astype(wide), speed)[:, :, None]
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _causal(t: int, index: Int[Array, "b t"] | None) -> Bool[Array, "b t t"]:
    """Which of the call's own tokens each one sees."""
    mask = jnp.tril(jnp.ones((1, t, t), bool))
    return mask if index is None else mask & (index[:, :, None] == index[:, None, :])


def _kept(
    state: AttentionState, t: int, index: Int[Array, "b t"] | None
) -> Bool[Array, "b t capacity"]:
    """Which slots of the cache each token sees: all filled ones, while the first segment lasts."""
    slots = jnp.arange(state.key.shape[1])
    filled = (slots[None] < state.position[:, None])[:, None, :]
    if index is None:
        return jnp.broadcast_to(filled, (filled.shape[0], t, filled.shape[2]))
    return filled & (index == 0)[:, :, None]


def attend(q, parts):
    """One softmax over all parts, each a (key, value, mask); at least float32 inside."""
    b, t, heads, d = q.shape
    wide = jnp.promote_types(jnp.float32, q.dtype)
    q = q.reshape(b, t, parts[0][0].shape[2], -1, d)
    scores = [
        jnp.where(
            mask[:, None, None],
            jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide) * d**-0.5,
            -jnp.inf,
        )
        for k, _, mask in parts
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    ends = list(itertools.accumulate(score.shape[-1] for score in scores))[:-1]
    reads = [
        jnp.einsum("bkgts,bskd->btkgd", weight, v)
        for weight, (_, v, _) in zip(jnp.split(weights, ends, axis=-1), parts, strict=True)
    ]
    return functools.reduce(jnp.add, reads).reshape(b, t, heads, d)


def _append(state, k, v, where, index):
    """The cache with the last segment's tokens written to their positions."""
    capacity, t = state.key.shape[1], k.shape[1]
    if index is None:
        _check_room(state.position, t, capacity)
    else:
        where = jnp.where(index == index[:, -1:], where, capacity)
    rows = jnp.arange(len(where))[:, None]
    keep = lambda cache, new: cache.at[rows, where].set(new.astype(cache.dtype), mode="drop")
    return AttentionState(keep(state.key, k), keep(state.value, v), where[:, -1] + 1)


def _check_room(position, t, capacity):
    """Says so where a call's tokens are known not to fit."""
    known = not isinstance(position, Tracer)
    used = int(position.max()) if known else 0
    if used + t > capacity:
        raise ValueError(
            f"`capacity` is {capacity}; it must be at least {used + t} to hold the {used} tokens "
            f"in attention's cache and {t} more."
        )
