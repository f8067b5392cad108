# SPDX-License-Identifier: Apache-2.0
"""What makes a kernel differentiable: its own backward kernel once, the XLA form beyond."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Arrays = tuple[jax.Array, ...]


def differentiable(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[[Arrays, Any, Any], Sequence[jax.Array]],
    plain: Callable[..., Any],
) -> Callable[..., Any]:
    """A function of arrays that runs kernels, with first and higher derivatives.

    Its value is the first part of `forward`; its gradient is `backward`; the gradient of that
    gradient is that of `plain`, the same mathematics in XLA. Reverse mode only: `jax.jvp` and
    `jax.linearize` need the XLA implementation.

    Args:
      forward: arrays -> (result, what the backward kernel wants kept).
      backward: (arrays, kept, cotangents of the result) -> a gradient for each array.
      plain: arrays -> result, differentiable as often as one likes.
    """

    @jax.custom_vjp
    def gradient(arrays, kept, cotangent):
        return tuple(backward(arrays, kept, cotangent))

    def gradient_forward(arrays, kept, cotangent):
        return gradient(arrays, kept, cotangent), (arrays, kept, cotangent)

    def gradient_backward(saved, slopes):
        arrays, kept, cotangent = saved
        again = lambda arrays, cotangent: jax.vjp(plain, *arrays)[1](cotangent)
        _, pull = jax.vjp(again, arrays, cotangent)
        to_arrays, to_cotangent = pull(slopes)
        return to_arrays, jax.tree.map(jnp.zeros_like, kept), to_cotangent

    gradient.defvjp(gradient_forward, gradient_backward)

    @jax.custom_vjp
    def both(*arrays):
        return forward(*arrays)

    def both_forward(*arrays):
        result, kept = both(*arrays)  # itself, so that an outer derivative does not enter `forward`
        return (result, kept), (arrays, kept)

    def both_backward(saved, cotangents):
        arrays, kept = saved
        return gradient(arrays, kept, cotangents[0])  # which answers for `kept` as well

    both.defvjp(both_forward, both_backward)
    return lambda *arrays: both(*arrays)[0]
