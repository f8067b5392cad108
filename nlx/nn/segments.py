# SPDX-License-Identifier: Apache-2.0
"""Segments packed into one row: which tokens belong together, and where each one stands.

In a call the first token goes on from the state whatever its id; a new segment begins where the id
differs from the previous token's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def segment_index(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Number of segments that began before or at each token; 0 goes on from the state."""
    return jnp.cumsum(_begins(segment_ids), axis=1, dtype=jnp.int32)


def positions(
    start: Int[Array, " b"], length: int, segment_ids: Int[Array, "b t"] | None
) -> Int[Array, "b t"]:
    """Tokens of its own segment before each token, `start` of them in earlier calls.

    start: [b], >= 0. length: t. segment_ids: None for one segment per row.
    """
    ticks = jnp.arange(length, dtype=jnp.int32)[None]
    running = start[:, None] + ticks
    if segment_ids is None:
        return running
    began = jax.lax.cummax(jnp.where(_begins(segment_ids), ticks, -1), axis=1)
    return jnp.where(began < 0, running, ticks - began)


def _begins(segment_ids):
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
