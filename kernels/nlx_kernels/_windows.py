# SPDX-License-Identifier: Apache-2.0
"""Runs a chunked memory over a sequence, window by window.

A window is as long as the shortest chunk. Where the chunks of every row begin with a window, each
window is one piece (`_chunk.Piece`). Elsewhere (a state handed over inside a chunk, chunk sizes
that do not divide, segments) a window holds at most one piece more per chunk size, and one last
piece for all segments that begin inside it: these share their chunk-start weights, the initial
ones. Pieces that no row needs are skipped at run time. A window is rematerialised in the backward
pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from nlx_kernels._chunk import Piece, make_piece

Tokens = Any  # a pytree of windows


class Memory(NamedTuple):
    """The state of a chunked memory; the weights may be any pytree.

    Attributes:
      weights: the working weights, written by every token.
      chunk_start: the weights others see, at which gradients are taken.
      momentum: like weights, or None.
      position: tokens since the last reset, one number a row.
    """

    weights: Any
    chunk_start: Any
    momentum: Any
    position: Int[Array, " b"]


WritePiece = Callable[[Memory, Tokens, Piece], tuple[Memory, Float[Array, "b h c v"]]]
Fire = Callable[[Memory, tuple[Bool[Array, " b"], ...]], Memory]


def split_windows(array: Array, window: int) -> Array:
    """Cuts ``[b, t, h, ...]`` into ``[w, b, h, c, ...]``, and ``[b, t]`` into ``[w, b, c]``."""
    b, t = array.shape[:2]
    count = -(-t // window)
    padding = [(0, 0), (0, count * window - t)] + [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, padding).reshape(b, count, window, *array.shape[2:])
    array = jnp.moveaxis(array, 1, 0)
    return array if array.ndim == 3 else jnp.swapaxes(array, 2, 3)


def join_windows(windows: Array, t: int) -> Array:
    """Undoes `split_windows` for ``[w, b, h, c, v]`` -> ``[b, t, h, v]``."""
    w, b, h, c, v = windows.shape
    return jnp.transpose(windows, (1, 0, 3, 2, 4)).reshape(b, w * c, h, v)[:, :t]


def scan_windows(
    write_piece: WritePiece,
    fire: Fire,
    memory: Memory,
    initial: Memory,
    tokens: Tokens,
    *,
    length: int,
    periods: tuple[int, ...],
    window: int,
    starts: Bool[Array, "b t"] | None,
    fresh: bool,
) -> tuple[Memory, Float[Array, "b t h v"]]:
    """Writes and reads a whole sequence.

    Args:
      write_piece: (memory, tokens of a window, piece) -> (memory with new working weights, reads).
      fire: (memory, for every period whether its chunk ends here per row) -> memory.
      memory: the state before the first token.
      initial: the state a new segment begins with.
      tokens: a pytree of windows (`split_windows`).
      length: number of tokens t.
      periods: the chunk sizes.
      window: tokens per window, at most the smallest period.
      starts: tokens before which the state is reset, or None.
      fresh: every row starts at position 0, known at trace time.
    """
    b = memory.position.shape[0]
    if fresh and starts is None and length % window == 0 and set(periods) == {window}:
        return _scan_whole_chunks(write_piece, fire, memory, tokens, length, periods)
    aligned = fresh and starts is None and all(period % window == 0 for period in periods)
    pieces = 1 if aligned or window == 1 else 1 + len(set(periods))
    index = jnp.arange(window)

    def advance(memory: Memory, end, done) -> Memory:
        position = (memory.position + end - done).astype(jnp.int32)
        fired = tuple((position % period == 0) & (end > done) for period in periods)
        return fire(memory._replace(position=position), fired)

    def compute(memory, inputs, valid, segment):
        return write_piece(memory, inputs, make_piece(valid, segment))

    def continue_segment(memory, inputs, done, limit):
        """Writes from token `done` to the next chunk end or `limit`."""
        step = jnp.full_like(done, window)
        for period in periods:
            step = jnp.minimum(step, period - memory.position % period)
        end = jnp.minimum(done + step, limit)
        valid = (index[None] >= done[:, None]) & (index[None] < end[:, None])
        memory, y = compute(memory, inputs, valid, jnp.zeros_like(valid, jnp.int32))
        return advance(memory, end, done), y, valid, end

    def begin_segments(memory, inputs, started, limit):
        """Writes every segment that begins in this window, all from the initial weights."""
        segment = jnp.cumsum(started, -1, dtype=jnp.int32)
        valid = (segment > 0) & (index[None] < limit[:, None])
        any_start = valid.any(-1)
        begun = jax.tree.map(
            lambda new, old: jnp.where(_rows(any_start, new), new, old), initial, memory
        )
        written, y = compute(begun, inputs, valid, segment)
        last_start = jnp.max(jnp.where(started, index[None], 0), -1)
        count = jnp.where(any_start, limit - last_start, 0)
        position = jnp.where(any_start, 0, memory.position)
        done = jnp.zeros_like(count)
        return advance(written._replace(position=position), count, done), y, valid

    def body(memory: Memory, inputs):
        number, inputs, started = inputs
        count = jnp.full((b,), jnp.minimum(window, length - number * window))
        limit = count
        if started is not None:
            limit = jnp.min(jnp.where(started, index[None], count[:, None]), -1)
        done = jnp.zeros_like(count)
        memory, y, valid, done = continue_segment(memory, inputs, done, limit)
        for _ in range(pieces - 1):

            def more(memory, y, done, inputs=inputs, limit=limit):
                memory, new, valid, done = continue_segment(memory, inputs, done, limit)
                return memory, jnp.where(valid[:, None, :, None], new, y), done

            memory, y, done = jax.lax.cond(
                jnp.any(done < limit),
                more,
                lambda memory, y, done: (memory, y, done),
                memory,
                y,
                done,
            )
        if started is not None:

            def begin(memory, y, inputs=inputs, started=started, count=count):
                memory, new, valid = begin_segments(memory, inputs, started, count)
                return memory, jnp.where(valid[:, None, :, None], new, y)

            memory, y = jax.lax.cond(
                jnp.any(limit < count), begin, lambda memory, y: (memory, y), memory, y
            )
        return memory, y

    number = jnp.arange(-(-length // window), dtype=memory.position.dtype)
    started = None if starts is None else split_windows(starts, window)
    memory, y = jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False), memory, (number, tokens, started)
    )
    return memory, join_windows(y, length)


def _scan_whole_chunks(
    write_piece: WritePiece,
    fire: Fire,
    memory: Memory,
    tokens: Tokens,
    length: int,
    periods: tuple[int, ...],
) -> tuple[Memory, Float[Array, "b t h v"]]:
    """`scan_windows` where each window is one whole chunk of every row, as in training.

    No mask is needed, and the chunk-start weights are the working ones: they need not be carried.
    """
    b, window = memory.position.shape[0], periods[0]
    every = jnp.ones((b,), bool)
    piece = make_piece(jnp.ones((b, window), bool), jnp.zeros((b, window), jnp.int32))

    def body(carry, inputs):
        weights, momentum, position = carry
        memory = Memory(weights, weights, momentum, position + window)
        memory, y = write_piece(memory, inputs, piece)
        memory = fire(memory, (every,) * len(periods))
        return (memory.weights, memory.momentum, memory.position), y

    carry = (memory.weights, memory.momentum, memory.position)
    carry, y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, tokens)
    weights, momentum, position = carry
    return Memory(weights, weights, momentum, position), join_windows(y, length)


def _rows(mask: Bool[Array, " b"], like: Array) -> Array:
    """Shapes a row mask for weights ``[..., b, h, i, o]`` or positions ``[b]``."""
    if like.ndim == 1:
        return mask
    return mask.reshape((1,) * (like.ndim - 4) + (-1, 1, 1, 1))
