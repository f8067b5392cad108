# SPDX-License-Identifier: Apache-2.0
"""What storing an association means: the objective whose gradient a memory writes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def dot_product(output: PyTree[Array], value: PyTree[Array]) -> Float[Array, ""]:
    """Hebbian storing: -<output, value>, summed over all entries of all leaves.

    output: what the memory recalls; value: what it should, of the same structure and shapes.
    Raises ValueError where the shapes differ: nothing is broadcast.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 13, 17.
    """
    return -_total(lambda o, v: o * v, output, value)


def l2(output: PyTree[Array], value: PyTree[Array]) -> Float[Array, ""]:
    """Delta-rule storing: 1/2 ||output - value||^2, summed over all entries of all leaves.

    output: what the memory recalls; value: what it should, of the same structure and shapes.
    Raises ValueError where the shapes differ: nothing is broadcast.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 88, 93 (the convention with 1/2).
    """
    return 0.5 * _total(lambda o, v: jnp.square(o - v), output, value)


def _total(entries, output: PyTree[Array], value: PyTree[Array]) -> Float[Array, ""]:
    """The sum of entries(output, value) over all leaves, whose shapes must agree."""

    def leaf(output, value):
        if jnp.shape(output) != jnp.shape(value):
            raise ValueError(
                f"`value` has shape {jnp.shape(value)}; it must be {jnp.shape(output)}, as what "
                "the memory recalls."
            )
        return jnp.sum(entries(output, value))

    return sum(jax.tree.leaves(jax.tree.map(leaf, output, value)))  # pyright: ignore[reportReturnType]
