# SPDX-License-Identifier: Apache-2.0
"""fast_update row by row: the specification, and the oracle of the other forms."""

import jax
import jax.numpy as jnp

from nlx_kernels.fast_update.carry import FastCarry


def fast_update(weights, carry, gradient, *, ticks, fires, rate, momentum, decay):
    """One row after the other, each firing or not; arguments are checked, scalars are [b]."""

    def row(now):
        weights, carry, gradient, ticks, fires, *gates = now
        total = jax.tree.map(lambda t, g: t + g, carry.total, gradient)
        carry = FastCarry(total, carry.ticks + ticks, carry.momentum)
        return jax.lax.cond(fires, _fire, lambda w, c, *gates: (w, c), weights, carry, *gates)

    return jax.lax.map(row, (weights, carry, gradient, ticks, fires, rate, momentum, decay))


def _fire(weights, carry, rate, momentum, decay):
    step = jax.tree.map(lambda t: t / jnp.maximum(carry.ticks, 1), carry.total)
    if momentum is not None:
        step = jax.tree.map(lambda p, g: momentum.astype(p.dtype) * p + g, carry.momentum, step)
    weights = jax.tree.map(lambda w, p: _descend(w, p, rate, decay), weights, step)
    zeros = jax.tree.map(jnp.zeros_like, carry.total)
    buffer = None if momentum is None else step
    return weights, FastCarry(zeros, jnp.zeros_like(carry.ticks), buffer)


def _descend(w, p, rate, decay):
    rate, decay = rate.astype(p.dtype), decay.astype(p.dtype)
    return (w - rate * (p + decay * w)).astype(w.dtype)
