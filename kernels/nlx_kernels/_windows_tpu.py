# SPDX-License-Identifier: Apache-2.0
"""Tokens in windows for the TPU kernels of chunked memories, each row where its own chunks end.

A window is as long as the shortest chunk, and every chunk ends with a window. A row that goes on
from a state inside a chunk begins inside a window: its tokens are moved later by position % c, the
places before them are marked as empty, and one window more than the tokens need is laid out.
Windows without tokens are left out when the kernel runs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nlx_kernels import _chunk


def cut(x: jax.Array, c: int, every: int, position: jax.Array | None = None) -> jax.Array:
    """[b, t, h, ...] as [b, h, n, c, ...], filled up with zeros, n a multiple of `every`.

    The position is that of each row's first token, [b], a whole number; None: 0 in all.
    """
    b, t, h = x.shape[:3]
    length, before = _length(t, c, every, position), 0 if position is None else c - 1
    pad = [(0, 0), (before, length - t)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad)
    if position is not None:
        x = _part(x, c - 1 - _offset(position, c), length)
    return jnp.moveaxis(x.reshape(b, -1, c, h, *x.shape[3:]), 3, 1)


def join(y: jax.Array, t: int, position: jax.Array | None = None) -> jax.Array:
    """[b, h, n, c, d] as the [b, t, h, d] of which `cut` makes it."""
    b, h, n, c, d = y.shape
    y = jnp.moveaxis(y, 1, 3).reshape(b, n * c, h, d)
    return y[:, :t] if position is None else _part(y, _offset(position, c), t)


def marks(
    t: int, c: int, every: int, periods: tuple[int, ...], position: jax.Array | None, dtype: Any
) -> jax.Array:
    """[b or 1, 1, n, 3 + periods, c]: which tokens are there, and the first and last of a window.

    Then for each period a row of ones in the windows with which a chunk of so many tokens ends.
    """
    place = jnp.arange(_length(t, c, every, position)).reshape(1, -1, c)
    at = jnp.zeros(1, jnp.int32) if position is None else position.astype(jnp.int32)
    at = at[:, None, None]
    token = place - at % c
    there = (token >= 0) & (token < t)
    first = there & ((token == 0) | (place % c == 0))
    last = there & ((token == t - 1) | (place % c == c - 1))
    ends = [(last & ((at + token + 1) % n == 0)).any(-1, keepdims=True) for n in periods]
    rows = [there, first, last, *(jnp.broadcast_to(end, there.shape) for end in ends)]
    return jnp.stack(rows, 2).astype(dtype)[:, None]


def holds(marks: jax.Array) -> jax.Array:
    """Whether a window [1, 3 + periods, c] has tokens."""
    return jnp.max(marks[:, :1]) > 0


def piece(marks: jax.Array) -> _chunk.Piece:
    """The tokens of a window, from its marks [3 + periods, c]; [1, c] and [1, c, c]."""
    there, first, last = (marks[n : n + 1] > 0 for n in range(3))
    c = marks.shape[-1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (1, c, c), axis) for axis in (1, 2))
    # What the places after the last token would read is nowhere used, so their rows may hold on.
    return _chunk.Piece(there, (column <= row) & (marks[:1, None] > 0), first, last)


def _offset(position: jax.Array, c: int) -> jax.Array:
    return position.astype(jnp.int32) % c


def _length(t: int, c: int, every: int, position: jax.Array | None) -> int:
    """Places for t tokens, wherever in a window they begin."""
    most = t if position is None else t + c - 1
    return -(-most // (c * every)) * c * every


def _part(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """`length` tokens of each row [t, ...] from its own start."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length))(x, start)
