# SPDX-License-Identifier: Apache-2.0
"""generated_memory: an MLP memory whose tokens are made inside its loop."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nlx_kernels._checks import Checker
from nlx_kernels._chunk import Piece
from nlx_kernels._finite import quarantine
from nlx_kernels.mlp_memory import reference, xla
from nlx_kernels.mlp_memory.state import MLPMemoryState
from nlx_kernels.placement import on_each

Recall = Callable[[Float[Array, "b h c k"]], Float[Array, "b h c v"]]
Make = Callable[[Recall, Any, Int[Array, " b"], Any, Piece], xla.Made]


def generated_memory(
    make: Make,
    inputs: Any,
    kept: Any,
    *,
    weights: tuple[Float[Array, "h i o"], ...] | None = None,
    state: MLPMemoryState | None = None,
    momentum: bool,
    chunk_size: int,
    read: Literal["after_write", "chunk_start"] = "after_write",
    activation: Literal["gelu", "silu"] = "gelu",
    residual: bool = True,
    norm: bool = False,
    clip: float | None = None,
    bound: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b t h v"], MLPMemoryState, Any]:
    """`mlp_memory` where what is read and written depends on the memory at the chunk's start.

    make(recall, kept, count, inputs, piece) -> Made(tokens, output, kept) is called for pieces of
    the sequence, several tokens at once:

      recall: z [b, h, c, k] -> M(z) at the chunk's start.
      kept: [b, ...] of four axes, what earlier calls left of the running chunk; zeros where a chunk
        begins. None where every piece is a whole chunk: then nothing is there and nothing is asked.
      count: tokens of each row's running chunk before the piece.
      inputs: the c tokens of the piece's window, [b, h, c, ...] or [b, c].
      piece: which of them are meant: `piece.pair[b, t, j]` says that j <= t and both are, in one
        segment and chunk; `piece.last[b]` is the last one. The others may hold anything finite.
      tokens: a `MemoryTokens` of arrays [b, h, c, ...].
      output: [b, h, c, v], returned beside what is recalled.

    It must give every token the same from any piece: that makes the result independent of splits.
    What is not finite reaches all heads, from its token to the end of its segment.

    Args:
      make: as above; differentiable in all that it closes over.
      inputs: a pytree of arrays [b, t, h, ...] or [b, t], floats of the accumulator's dtype.
      kept: its zeros, or what an earlier call returned with `state`.
      weights: where the memory starts. Pass this or `state`; both only with `segment_ids`.
      state: the memory to go on from, as returned.
      momentum: whether tokens carry a momentum.
      chunk_size: tokens from one chunk's start to the next, counted per row and segment.
      read, activation, residual, norm, clip, bound, segment_ids: as of `mlp_memory`.

    Returns:
      What the memory recalled for tokens.q, the outputs, the state, and what is kept.

    Raises:
      ValueError, TypeError: one sentence that names the argument.
    """
    check = Checker("generated_memory")
    chunk_size = check.size("chunk_size", chunk_size)
    check.option("read", read, ("after_write", "chunk_start"))
    check.option("activation", activation, tuple(reference.ACTIVATIONS))
    clip, bound = check.limit("clip", clip), check.limit("bound", bound)
    segment_ids = check.segments(segment_ids)
    check.start("weights", weights, state, segment_ids)
    if state is not None:
        check.fields("state", state, MLPMemoryState)
        check.buffer(state.momentum, momentum)
    given, carried = _one_head(inputs, 3), _one_head((state, kept), 2)
    _, given, carried, mark = quarantine(given, given, carried, segment_ids)
    inputs, (state, kept) = _like(given, inputs), _like(carried, (state, kept))
    given = dict(inputs=inputs, kept=kept, weights=weights, state=state, segment_ids=segment_ids)

    def part(inputs, kept, **rest):
        return xla.scan(
            make, inputs, kept, **rest, momentum=momentum, chunk_size=chunk_size, read=read,
            activation=activation, residual=residual, norm=norm, clip=clip, bound=bound,
        )  # fmt: skip

    # `make` may mix heads, so all heads of a row are on one device: rows go over the whole mesh.
    parts = dict.fromkeys(given, "r") | {"weights": "."}
    rows = len(jax.tree.leaves(inputs)[0])
    recalled, output, *after = on_each(part, given, parts, ("r",) * 4, r=rows)
    recalled, (new_state, new_kept) = mark(recalled, tuple(after))
    return recalled, mark(output, ())[0], new_state, new_kept


def _one_head(tree: Any, axes: int) -> Any:
    """Arrays [.., h, ...] as [.., 1, n], for what reaches all heads; integers as they are."""
    floats = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    return jax.tree.map(lambda a: a.reshape(*a.shape[: axes - 1], 1, -1) if floats(a) else a, tree)


def _like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.reshape(b.shape), tree, like)
