# SPDX-License-Identifier: Apache-2.0
"""linear_memory token by token: the specification, and the oracle of the other forms."""

import jax
import jax.numpy as jnp

from nlx_kernels._checks import resets


def linear_memory(q, k, v, *, retain, erase, rate, state, read, segment_ids, block_size):
    """S <- retain S - erase k (k^T S) + rate k v^T; y = q S. Arguments checked and filled in."""
    del block_size  # speed only
    q, k, v = (jnp.moveaxis(x, 2, 1).astype(state.dtype) for x in (q, k, v))
    reset = resets(segment_ids)
    retain, erase, rate = (jnp.moveaxis(x, 2, 1) for x in (retain, erase, rate))

    def token(s, now):
        q, k, v, retain, erase, rate, reset = now
        before = s if reset is None else jnp.where(reset, 0, s)
        s = retain * before - erase * jnp.outer(k, k @ before) + rate * jnp.outer(k, v)
        return s, q @ (s if read == "after_write" else before)

    def one(s, *tokens):
        return jax.lax.scan(token, s, tokens)

    heads = jax.vmap(one, in_axes=(0,) * 7 + (None,))
    state, y = jax.vmap(heads)(state, q, k, v, retain, erase, rate, reset)
    return jnp.moveaxis(y, 1, 2), state
