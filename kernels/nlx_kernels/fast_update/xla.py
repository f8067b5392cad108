# SPDX-License-Identifier: Apache-2.0
"""fast_update for all rows at once."""

import jax
import jax.numpy as jnp

from nlx_kernels.fast_update.carry import FastCarry


def fast_update(weights, carry, gradient, *, ticks, fires, rate, momentum, decay):
    """Arguments are checked, scalars are [b]."""
    ticks = carry.ticks + ticks

    def one(w, total, gradient, buffer):
        total = total + gradient
        wide = lambda x: x.reshape(-1, *[1] * (w.ndim - 1)).astype(total.dtype)
        step = total / wide(jnp.maximum(ticks, 1))
        if momentum is not None:
            step = wide(momentum) * buffer + step
        moved = (w - wide(rate) * (step + wide(decay) * w)).astype(w.dtype)
        fired = fires.reshape(-1, *[1] * (w.ndim - 1))
        new = (moved, jnp.zeros_like(total), None if momentum is None else step)
        return jax.tree.map(lambda a, b: jnp.where(fired, a, b), new, (w, total, buffer))

    leaves, tree = jax.tree.flatten(weights)
    flat = lambda part: tree.flatten_up_to(part)
    buffers = [None] * len(leaves) if momentum is None else flat(carry.momentum)
    parts = zip(leaves, flat(carry.total), flat(gradient), buffers, strict=True)
    made = [one(*part) for part in parts]
    weights, total, buffer = (tree.unflatten(part) for part in zip(*made, strict=True))
    buffer = None if momentum is None else buffer
    return weights, FastCarry(total, jnp.where(fires, 0, ticks), buffer)
