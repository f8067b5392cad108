# SPDX-License-Identifier: Apache-2.0
"""linear_memory, parallel inside blocks: one triangular solve a block, and a loop over blocks.

The derivation is in README.md. Axes: n blocks, c tokens of one block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlx_kernels import _tuned
from nlx_kernels._checks import resets
from nlx_kernels._solve import (
    columns_by_columns,
    interval_products,
    rows_by_rows,
    unit_lower_inverse,
)


class Tokens(NamedTuple):
    """The tokens of some blocks."""

    q: Float[Array, "n b h c k"]
    k: Float[Array, "n b h c k"]
    v: Float[Array, "n b h c v"]
    retain: Float[Array, "n b h c"]
    erase: Float[Array, "n b h c"]
    rate: Float[Array, "n b h c"]
    kept: Float[Array, "n b h c"]  # 0 where a segment begins, else 1


class Block(NamedTuple):
    """A block as an affine map of the state S it starts from.

    Attributes:
      written, taken: token j writes k_j^T u_j with u = written - taken S.
      query, scores: the reads are query S + scores u.
      carry, key: the state after the block is carry S + key^T u.
    """

    written: Float[Array, "n b h c v"]
    taken: Float[Array, "n b h c k"]
    query: Float[Array, "n b h c k"]
    scores: Float[Array, "n b h c c"]
    carry: Float[Array, "n b h"]
    key: Float[Array, "n b h c k"]


def linear_memory(q, k, v, *, retain, erase, rate, state, read, segment_ids, block_size):
    """Arguments checked and filled in; the result does not depend on `block_size`."""
    b, t, h, _ = q.shape
    c = min(block_size or _tuned.block_size("linear_memory", q, k, v), t)
    reset = resets(segment_ids)
    kept = jnp.ones((b, t), retain.dtype) if reset is None else (~reset).astype(retain.dtype)
    tokens = Tokens(
        *(_blocks(x.astype(state.dtype), c, 0) for x in (q, k, v)),
        retain=_blocks(retain, c, 1),
        erase=_blocks(erase, c, 0),
        rate=_blocks(rate, c, 0),
        kept=_blocks(jnp.broadcast_to(kept[..., None], (b, t, h)), c, 1),
    )
    blocks = jax.checkpoint(prepare, static_argnums=1)(tokens, read)
    state, y = jax.lax.scan(jax.checkpoint(advance), state, blocks)
    y = jnp.moveaxis(y, (0, 2), (1, 3))
    return y.reshape(b, -1, h, y.shape[-1])[:, :t], state


def _blocks(x: Float[Array, "b t h *d"], c: int, neutral: float) -> Float[Array, "n b h c *d"]:
    """Cuts the tokens into blocks, the last one filled up with tokens that change nothing."""
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, -x.shape[1] % c)
    x = jnp.pad(x, pad, constant_values=neutral)
    x = x.reshape(x.shape[0], -1, c, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def prepare(tokens: Tokens, read: str, products_of: Callable = interval_products) -> Block:
    """All that can be known of the blocks without the states they start from."""
    q, k, v, retain, erase, rate, kept = tokens
    products = products_of(jnp.where(kept > 0, retain, 0))
    before = jnp.where(kept[..., None] > 0, products[..., :-1, :], 0)
    after = products[..., 1:, :]
    system = erase[..., None] * before[..., 1:] * rows_by_rows(k, k)
    right = jnp.concatenate([rate[..., None] * v, (erase * before[..., 0])[..., None] * k], -1)
    solved = unit_lower_inverse(system) @ right
    decay = after if read == "after_write" else before
    return Block(
        written=solved[..., : v.shape[-1]],
        taken=solved[..., v.shape[-1] :],
        query=decay[..., :1] * q,
        scores=decay[..., 1:] * rows_by_rows(q, k),
        carry=after[..., -1, 0],
        key=after[..., -1:, 1:].mT * k,
    )


def advance(state: Float[Array, "b h k v"], block: Block):
    """One block: the state after it, and its reads."""
    u = block.written - block.taken @ state
    y = block.query @ state + block.scores @ u
    return block.carry[..., None, None] * state + columns_by_columns(block.key, u), y
