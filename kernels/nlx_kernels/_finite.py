# SPDX-License-Identifier: Apache-2.0
"""Keeps what is not finite where it belongs: in its own row, head and segment, and not before.

A parallel form multiplies by masks, and 0 * inf is no 0: one token that is not finite would reach
the tokens before it and other segments of its block. So such tokens are taken out before, and what
they reach in the recurrence is made NaN afterwards: every read from the token on, and the state,
until a segment resets the memory. A query reaches its own read only.
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
      segment_ids: as the op takes them.

    Returns:
      query, tokens and state with 0 in place of what is not finite, and mark(y, state), which makes
      NaN what would have been reached.
    """
    bad_query, bad = _bad(query, 3), _bad(tokens, 3)
    bad_state = _bad(state, 2) if state is not None else jnp.zeros_like(bad[:, 0])
    reached = _reached(bad, bad_state, resets(segment_ids))

    def mark(y: Float[Array, "b t h v"], after: Any):
        y = jnp.where((reached | bad_query)[..., None], jnp.nan, y)
        return y, _select(reached[:, -1], after, jnp.nan)

    return (
        _select(bad_query, query, 0),
        _select(bad, tokens, 0),
        _select(bad_state, state, 0),
        mark,
    )


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


def _select(bad: Bool[Array, "..."], tree: PyTree[Array], value: float) -> Any:
    """The arrays with `value` where bad; integers as they are."""

    def leaf(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(bad.reshape(*bad.shape, *[1] * (x.ndim - bad.ndim)), value, x)

    return jax.tree.map(leaf, tree)
