# SPDX-License-Identifier: Apache-2.0
"""What storing an association means: the objective whose gradient a memory writes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def dot_product(output: PyTree[Array], value: PyTree[Array]) -> Float[Array, ""]:
    """Hebbian storing: -<output, value>, summed over all entries of all leaves.

    output: what the memory recalls; value: what it should, of the same structure and shapes.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 13, 17.
    """
    return -_total(jax.tree.map(lambda o, v: jnp.sum(o * v), output, value))


def l2(output: PyTree[Array], value: PyTree[Array]) -> Float[Array, ""]:
    """Delta-rule storing: 1/2 ||output - value||^2, summed over all entries of all leaves.

    output: what the memory recalls; value: what it should, of the same structure and shapes.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 88, 93 (the convention with 1/2).
    """
    return 0.5 * _total(jax.tree.map(lambda o, v: jnp.sum(jnp.square(o - v)), output, value))


def _total(tree: PyTree[Array]) -> Float[Array, ""]:
    return sum(jax.tree.leaves(tree))  # pyright: ignore[reportReturnType]
