# SPDX-License-Identifier: Apache-2.0
"""linear_memory over a sequence of which each device holds a piece.

The derivation, and what is exchanged, are in README.md.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nlx_kernels._checks import resets
from nlx_kernels._dispatch import Implementation
from nlx_kernels.linear_memory.api import checked, linear_memory


class _Map(NamedTuple):
    """What some pieces in a row do to the state S before them: carry S + made. Both are finite."""

    carry: Float[Array, "b h k k"]
    made: Float[Array, "b h k v"]
    bad: Bool[Array, "b h 1 v"]  # what is not finite reaches the end, in which columns
    cut: Bool[Array, "b 1 1 1"]  # a segment begins inside, nothing of S reaches the end: carry is 0


def linear_memory_split(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    *,
    axis_name: str,
    retain: Float[Array, "b t h"],
    erase: Float[Array, "b t h"],
    rate: Float[Array, "b t h"],
    state: Float[Array, "b h k v"] | None = None,
    read: Literal["after_write", "chunk_start"] = "after_write",
    segment_ids: Int[Array, "b t"] | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """`linear_memory` of a sequence split over devices, called inside `jax.shard_map`.

        piece n of p:  S_out = A_n S_in + B_n          A_n = prod_t (retain_t I - erase_t k_t k_t^T)
        S before piece n = A_{n-1} ( ... (A_0 S + B_0) ... ) + B_{n-1}

    Device n of the axis holds tokens n t to (n + 1) t - 1 of p t. It finds A and B of its piece
    (the op from the identity with values 0, and from 0), ceil(log2 p) exchanges make of them the
    states between the pieces, and the op reads the piece from its own. Equal to the op on the
    whole, gradients included; 2 to 3 times its arithmetic, over p devices.

    Args:
      q, k, v, retain, erase, rate, segment_ids: of this device's piece, as of `linear_memory`.
        Pieces are equally long: fill the last one up with retain 1, erase 0, rate 0 and the last
        token's segment id. A segment goes on over the edge of a piece where its id does.
      axis_name: the mesh axis that splits the sequence.
      state: the memory before the first piece, the same on all devices; None starts at 0.
      read, block_size, implementation, interpret: as of `linear_memory`. Kernels need
        `jax.shard_map(..., check_vma=False)`; else None takes "xla".

    Returns:
      y of this piece, and the memory after the last piece, the same on all devices.

    Raises:
      ValueError, TypeError: one sentence that names the argument.

    References:
      Martin & Cundy (2018), Parallelizing Linear Recurrent Neural Nets Over Sequence Length,
      section 2 (the scan of affine maps); Yang et al. (2024), Parallelizing Linear Transformers
      with the Delta Rule (the maps).
    """
    size = _size(axis_name)
    given = checked(
        "linear_memory_split", q, k, v, retain=retain, erase=erase, rate=rate, state=state,
        read=read, segment_ids=segment_ids, block_size=block_size,
    )  # fmt: skip
    given |= dict(implementation=implementation, interpret=interpret)
    q, k, v, first = (given.pop(name) for name in ("q", "k", "v", "state"))
    first = _varying(first, q, k, v, retain, erase, rate)
    if size == 1:
        y, after = linear_memory(q, k, v, state=first, **given)
        return y, jax.lax.psum(after, axis_name)  # itself, and known to be the same everywhere
    line = _Line(axis_name, size, jax.lax.axis_index(axis_name))
    since = _since(line, segment_ids, k)
    own = _summary(k, v, first, since[:, -1], given)
    # As in the op: without segments a bad number of `state` stays in its column.
    bad = _bad(first, whole=segment_ids is not None)
    before, bad = _before(own, first, bad, line)
    y, after = linear_memory(q, k, v, state=jnp.where(since[:, :1, None, None], 0, before), **given)
    y = _spoilt(jnp.swapaxes(bad, 1, 2) & ~since[..., None, None], y)
    after = _spoilt(bad & ~own.cut, after)
    return y, jax.lax.psum(jnp.where(line.rank == size - 1, after, 0), axis_name)


class _Line(NamedTuple):
    """The devices along the axis, and the place of this one."""

    axis_name: str
    size: int
    rank: Int[Array, ""]

    def from_before(self, tree: Any, shift: int) -> Any:
        """What the device `shift` places before holds; 0 where there is none."""
        moves = [(n, (n + shift) % self.size) for n in range(self.size)]
        moved = jax.lax.ppermute(tree, self.axis_name, moves)
        there = self.rank >= shift
        return jax.tree.map(lambda x: jnp.where(there, x, jnp.zeros_like(x)), moved)


def _since(line: _Line, segment_ids, k) -> Bool[Array, "b t"]:
    """Whether a segment has begun in this device's piece; the very first token goes on."""
    inside = resets(segment_ids)
    if inside is None:
        return _varying(jnp.zeros(k.shape[:2], bool), k)
    last = line.from_before(segment_ids[:, -1], 1)
    begins = (line.rank > 0) & (segment_ids[:, 0] != last)
    return jax.lax.cummax(inside.at[:, 0].set(begins).astype(jnp.int32), axis=1) > 0


def _summary(k, v, first, cut, given) -> _Map:
    """The map of this device's piece. What it reads is of no use: any queries will do."""
    identity = jnp.eye(k.shape[-1], dtype=first.dtype)[None, None]
    identity = jnp.broadcast_to(identity, (*first.shape[:2], *identity.shape[2:]))
    identity, none = (_varying(x, first) for x in (identity, jnp.zeros_like(first)))
    _, carry = linear_memory(k, k, jnp.zeros_like(k), state=identity, **given)
    _, made = linear_memory(k, k, v, state=none, **given)
    cut, bad = cut[:, None, None, None], _bad(carry)[..., :1] | _bad(made)
    return _Map(jnp.where(bad[..., :1] | cut, 0, carry), jnp.where(bad, 0, made), bad, cut)


def _before(own: _Map, first, bad, line: _Line):
    """The state before this device's piece, and where it is bad: [b, h, k, v] and [b, h, 1, v].

    After the round of `shift`, a device holds the map of its piece and up to 2 shift - 1 before it.
    Where those reach back to the first piece the map is done: it is a state, with carry 0, which
    the zeros that come from before the first piece leave as it is.
    """
    start = _Map(jnp.zeros_like(own.carry), jnp.where(bad, 0, first), bad, own.cut)
    own = jax.tree.map(lambda x, y: jnp.where(line.rank == 0, x, y), _then(own, start), own)
    shift = 1
    while shift < line.size:
        own = _then(own, line.from_before(own, shift))
        shift *= 2
    made, bad = line.from_before((own.made, own.bad), 1)
    return jnp.where(line.rank == 0, start.made, made), jnp.where(line.rank == 0, start.bad, bad)


def _then(own: _Map, before: _Map) -> _Map:
    """Both maps as one."""
    through = lambda x: jnp.matmul(own.carry, x, precision="highest")
    bad = own.bad | (before.bad & ~own.cut)
    return _Map(through(before.carry), through(before.made) + own.made, bad, own.cut | before.cut)


def _bad(x: Float[Array, "b h i o"], whole: bool = True) -> Bool[Array, "b h 1 o"]:
    """Where a head's matrix is not finite: all of its columns, or those that are not."""
    bad = ~jnp.all(jnp.isfinite(x), axis=2, keepdims=True)
    return jnp.broadcast_to(jnp.any(bad, axis=3, keepdims=True), bad.shape) if whole else bad


def _spoilt(bad: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, and NaN where bad."""
    return x + jnp.where(bad, jnp.asarray(jnp.nan, x.dtype), 0)


def _size(axis_name: str) -> int:
    """Devices along the axis."""
    try:
        return jax.lax.axis_size(axis_name)
    except (NameError, TypeError, ValueError):
        known = jax.sharding.get_abstract_mesh().manual_axes
        raise ValueError(
            f"linear_memory_split: axis_name is {axis_name!r}; it must be an axis over which "
            f"jax.shard_map splits ({', '.join(map(repr, known)) or 'here none'})."
        ) from None


def _varying(x: Array, *like: Array) -> Array:
    """x, which for `shard_map` differs along the mesh axes along which any of `like` does."""
    for y in like:
        x = jnp.where(jnp.isnan(jnp.ravel(y)[0]) & False, jnp.zeros_like(x), x)
    return x
