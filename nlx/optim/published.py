# SPDX-License-Identifier: Apache-2.0
"""Writes that show others a function of what they wrote: roots, eigenbases, orthogonal matrices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nlx.writes import Write


class Published(NamedTuple):
    """Carry of `published`."""

    weights: PyTree[Array] | None  # W at the last firing; None where the write carries them
    carry: Any  # of the write


def published(write: Write, readout: Callable[[Any], Any]) -> Write:
    """A write after whose firings others see readout(W), not the weights W themselves.

    write: what changes W; W starts at 0. readout: W -> visible parameters, shaped like W. It runs
    at a firing only, so what is dear, a root or a Newton-Schulz iteration, has the level's clock.
    The level's gradient must not depend on its parameters: a value-less memory's dot product.
    """

    def weights(state: Published):
        return write.view(None, state.carry) if write.view is not None else state.weights

    def keep(new, carry):
        return Published(None if write.view is not None else new, carry)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return keep(zeros, write.init(zeros))

    def tick(params, state: Published, gradient, context):
        del params
        carry = write.tick(weights(state), state.carry, gradient, context)
        return state._replace(carry=carry)

    def fire(params, state: Published):
        new, carry = write.fire(weights(state), state.carry)
        shown = jax.tree.map(lambda x, p: x.astype(p.dtype), readout(new), params)
        return shown, keep(new, carry)

    return Write(init, tick, fire)
