# SPDX-License-Identifier: Apache-2.0
"""Keeps what is not finite where it belongs: in its own row, head and segment, and not before.

A parallel form multiplies by masks, and 0 * inf is no 0: one token that is not finite would reach
the tokens before it and other segments of its block. So such tokens are taken out before, and NaN
is added afterwards to what they reach in the recurrence: every read from the token on, and the
state, until a segment resets the memory. A query reaches its own read only. It is added, not put in
place, so that the gradient of a loss that is NaN is NaN.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from nlx_kernels._checks import resets

Mark = Callable[[Float[Array, "b t h v"], Any], tuple[Float[Array, "b t h v"], Any]]


def quarantine(
    query: PyTree[Float[Array, "b t h *d"]],
    tokens: PyTree[Float[Array, "b t h *d"]],
    state: PyTree[Array],
    segment_ids: Array | None,
) -> tuple[Any, Any, Any, Mark]:
    """Takes out what is not finite.

    Args:
      query: what only the token's own read sees.
      tokens: what is written; gates among them.
      state: the state to go on from, or None; arrays [b, h, ...], and integers, which are left.
        Without segments nothing ends what a bad one reaches, so it is left as it is.
      segment_ids: as the op takes them.

    Returns:
      query, tokens and state with 0 in place of what is not finite, and mark(y, state), which adds
      NaN to what would have been reached.
    """
    bad_query, bad = _bad(query, 3), _bad(tokens, 3)
    resumed = state is not None and segment_ids is not None
    bad_state = _bad(state, 2) if resumed else jnp.zeros_like(bad[:, 0])
    reached = _reached(bad, bad_state, resets(segment_ids))

    def mark(y: Float[Array, "b t h v"], after: Any):
        return _mark(reached | bad_query, y), _mark(reached[:, -1], after)

    state = _clear(bad_state, state) if resumed else state
    return _clear(bad_query, query), _clear(bad, tokens), state, mark


def _reached(
    bad: Bool[Array, "b t h"], bad_state: Bool[Array, "b h"], reset: Bool[Array, "b t"] | None
) -> Bool[Array, "b t h"]:
    """The tokens of whose segment one up to here is bad, or that go on from a bad state."""
    ticks = jnp.arange(1, bad.shape[1] + 1)[None, :, None]
    last = jax.lax.cummax(jnp.where(bad, ticks, 0), axis=1)
    if reset is None:
        return (last > 0) | bad_state[:, None]
    start = jax.lax.cummax(jnp.where(reset[..., None], ticks, 0), axis=1)
    return jnp.where(start > 0, last >= start, (last > 0) | bad_state[:, None])


def _bad(tree: PyTree[Array], axes: int) -> Bool[Array, "..."]:
    """Where any of the arrays holds a number that is not finite, over all but the first axes."""
    found = [
        ~jnp.all(jnp.isfinite(x), axis=tuple(range(axes, x.ndim)))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    bad, *rest = found
    for other in rest:
        bad = bad | other
    return bad


def _clear(bad: Bool[Array, "..."], tree: PyTree[Array]) -> Any:
    """The arrays with 0 where bad; integers as they are."""
    return _floats(lambda bad, x: jnp.where(bad, 0, x), bad, tree)


def _mark(reached: Bool[Array, "..."], tree: PyTree[Array]) -> Any:
    """The arrays, NaN where reached; integers as they are."""
    nan = lambda x: jnp.asarray(jnp.nan, x.dtype)
    return _floats(lambda reached, x: x + jnp.where(reached, nan(x), 0), reached, tree)


def _floats(change: Callable, where: Bool[Array, "..."], tree: PyTree[Array]) -> Any:
    """change(where, x) for each float array, with trailing axes for `where` to have as many."""

    def leaf(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return change(where.reshape(*where.shape, *[1] * (x.ndim - where.ndim)), x)

    return jax.tree.map(leaf, tree)
