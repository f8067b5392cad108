# SPDX-License-Identifier: Apache-2.0
"""What optimizers of matrices share: which leaves are some, outer products, roots, sharding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

LARGEST = 2048  # a longer side has no statistic: an eigendecomposition costs its cube


def is_matrix(leaf: Any) -> bool:
    """Whether a leaf has just two axes, neither empty: what Muon and M3 orthogonalise."""
    return len(leaf.shape) == 2 and leaf.size > 0


def like_adam(leaf: Any) -> float:
    """The factor 0.2 sqrt(max(i, o)) that gives an orthogonal matrix the usual size of Adam's step.

    Source: Liu et al. (2025), Muon is Scalable for LLM Training.
    """
    return 0.2 * max(leaf.shape) ** 0.5


def sides(leaf: Any) -> tuple[int, ...]:
    """The axes, of -2 and -1, along which a leaf's outer products are kept; () for a vector."""
    if len(leaf.shape) < 2 or leaf.size == 0:
        return ()
    return tuple(axis for axis in (-2, -1) if 2 <= leaf.shape[axis] <= LARGEST)


def outer(u: Float[Array, "*n i o"], axis: int) -> Float[Array, "*n d d"]:
    """u u^T / o for axis -2, u^T u / i for axis -1: the mean over the vectors along the axis."""
    u = gathered(u if axis == -2 else u.mT)
    return u @ (u / u.shape[-1]).mT


def outer_like(leaf: Any, axis: int) -> jax.ShapeDtypeStruct:
    """The shape of `outer`."""
    d = leaf.shape[axis]
    return jax.ShapeDtypeStruct((*leaf.shape[:-2], d, d), leaf.dtype)


def of_eigenvalues(
    function: Callable[[Float[Array, "*n d"], Float[Array, "*n 1"]], Float[Array, "*n d"]],
    symmetric: Float[Array, "*n d d"],
) -> Float[Array, "*n d d"]:
    """V f(w, largest w) V^T for symmetric V w V^T >= 0, rounding errors below 0 taken as 0."""

    def made(symmetric):
        values, vectors = jnp.linalg.eigh(symmetric)
        values = jnp.maximum(values, 0)
        return (vectors * function(values, values[..., -1:])[..., None, :]) @ vectors.mT

    return across(made, symmetric)


def eigenvectors(symmetric: Float[Array, "*n d d"]) -> Float[Array, "*n d d"]:
    """V, as columns by growing eigenvalue."""
    return across(lambda x: jnp.linalg.eigh(x)[1], symmetric)


def unit(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """Each matrix, vector or scalar over its Euclidean norm, 0 where it is 0, at any size of u."""
    if u.size == 0:
        return u
    axes = tuple(range(u.ndim))[-2:]
    largest = jnp.max(jnp.abs(u), axes, keepdims=True)
    present = largest >= jnp.finfo(u.dtype).tiny
    u = jnp.where(present, u / jnp.where(present, largest, 1), 0)
    square = jnp.sum(jnp.square(u), axes, keepdims=True)
    return u / jnp.sqrt(jnp.where(present, square, 1))


def resized(x: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """x with the Euclidean norm of `like`, matrix by matrix."""
    axes = tuple(range(x.ndim))[-2:]
    return unit(x) * jnp.sqrt(jnp.sum(jnp.square(like), axes, keepdims=True))


def gathered(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x whole on every device, where its type says that it is split (explicit sharding)."""
    split = jax.typeof(x).sharding
    whole = NamedSharding(split.mesh, PartitionSpec(*[None] * x.ndim))
    return jax.sharding.reshard(x, whole) if any(split.spec) else x


def split_like(x: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """x split over devices as `like` is, where that is split by its type."""
    split = jax.typeof(like).sharding
    return jax.sharding.reshard(x, split) if any(split.spec) else x


def across(
    function: Callable[[Float[Array, "..."]], Float[Array, "..."]], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """function(x) of the whole x, split like x."""
    return split_like(function(gathered(x)), x)
