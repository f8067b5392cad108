# SPDX-License-Identifier: Apache-2.0
"""The inverse of I + A for strictly lower triangular A: what a block of erasing writes needs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def unit_lower_inverse(a: Float[Array, "*n c c"]) -> Float[Array, "*n c c"]:
    """(I + A)^-1, where A is what `a` holds below its diagonal; the rest of `a` is not read.

    Doubles the size of solved blocks on the diagonal until one is left:

        [[1 + A_1, 0], [B, 1 + A_2]]^-1 = [[X_1, 0], [-X_2 B X_1, X_2]]

    No power of A is ever formed, so that it is as exact as substitution row by row: the Neumann
    series by repeated squaring loses every digit for correlated keys (float32, 64 tokens,
    correlation 0.9: relative error 1e8 against 1e-7). On a CPU it is several times faster than
    the batched triangular solve, backwards too: d(X) = -X d(A) X.

    Args:
      a: stacked square matrices of any size.
    """
    c = a.shape[-1]
    m, size = 1, 1 << (c - 1).bit_length()
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, size - c)] * 2)
    x = jnp.ones((*a.shape[:-1], 1, 1), a.dtype)
    while m < size:
        first, second = x[..., ::2, :, :], x[..., 1::2, :, :]
        below = _diagonal_blocks(a, 2 * m)[..., m:, :m]
        left = jnp.concatenate([first, -second @ (below @ first)], -2)
        right = jnp.concatenate([jnp.zeros_like(first), second], -2)
        x, m = jnp.concatenate([left, right], -1), 2 * m
    return x[..., 0, :c, :c]


@unit_lower_inverse.defjvp
def _(primals, tangents):
    """d(X) = -X d(A) X, with the part of d(A) that is read."""
    (a,), (da,) = primals, tangents
    x = unit_lower_inverse(a)
    return x, -x @ (jnp.tril(da, -1) @ x)


def _diagonal_blocks(a: Float[Array, "*n c c"], m: int) -> Float[Array, "*n s m m"]:
    """The blocks of size m on the diagonal."""
    s = a.shape[-1] // m
    blocks = a.reshape(*a.shape[:-2], s, m, s, m)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
