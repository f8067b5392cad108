# SPDX-License-Identifier: Apache-2.0
"""Parameters with logical axes, and the linear map."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nlx.parallel import gathered


def parameter(value: Float[Array, "..."], axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter whose every axis has a logical name, or None: never sharded.

    value: what it starts from, its dtype never weak: a step would compile twice. axes: one name per
    axis, the left column of `nlx.parallel.RULES`.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"`axes` is {axes}; it must name the {value.ndim} axes of the value.")
    strong = jax.lax.convert_element_type(value, value.dtype)
    return nnx.Param(strong, axes=axes)


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float
) -> nnx.Param:
    """A parameter drawn from N(0, scale^2), in jax's default float (float64 under x64)."""
    return parameter(scale * jax.random.normal(rngs.params(), shape), axes)


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size that is not an integer >= 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`{name}` is {size!r}; it must be an integer >= 1.")


class Linear(nnx.Module):
    """y = x W, W [i, o] drawn from N(0, 1/i); no bias. Computes in x's dtype."""

    def __init__(
        self, size_in: int, size_out: int, axes: tuple[str | None, str | None], *, rngs: nnx.Rngs
    ):
        """size_in, size_out: channels, >= 1. axes: logical names of both."""
        check_sizes(size_in=size_in, size_out=size_out)
        self.kernel = normal(rngs, (size_in, size_out), axes, size_in**-0.5)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Maps the last axis."""
        return x @ gathered(self.kernel, x.dtype)


class Embedding(nnx.Module):
    """One vector of length about sqrt(width) per token: sqrt(d) E[token], E from N(0, 1/d)."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs):
        """vocabulary: number of tokens, >= 1. width: channels, >= 1."""
        check_sizes(vocabulary=vocabulary, width=width)
        self.table = normal(rngs, (vocabulary, width), ("vocabulary", "embed"), width**-0.5)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """tokens [b, t]: integers in [0, vocabulary); others are clipped by the look-up."""
        table = gathered(self.table)
        tokens = tokens.astype(jnp.int32)  # XLA can't split a look-up of bytes over devices
        return table.shape[1] ** 0.5 * jnp.take(table, tokens, axis=0, mode="clip")

    def scores(self, x: Float[Array, "b t d"]) -> Float[Array, "b t s"]:
        """x E^T: the tied read-out."""
        return x @ gathered(self.table, x.dtype).T
