# SPDX-License-Identifier: Apache-2.0
"""cms_chain token by token: the specification, and the oracle of the other forms."""

from functools import partial

import jax
import jax.numpy as jnp

ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def cms_chain(x, weights, *, activation):
    """One token of one row after the other; arguments are checked."""
    act, dtype = ACTIVATIONS[activation], weights[0].up.dtype

    def row(now):
        x, own = now
        blocks = [b if o is None else o for b, o in zip(weights, own, strict=True)]
        return jax.lax.map(lambda y: _token(blocks, y, act), x)

    own = [block if block.up.ndim == 3 else None for block in weights]
    return jax.lax.map(row, (x.astype(dtype), own))


def _token(blocks, y, act):
    for scale, up, down, gate in blocks:
        z = scale * y / jnp.sqrt(jnp.mean(y**2) + 1e-6)
        hidden = act(z @ up) if gate is None else act(z @ gate) * (z @ up)
        y = y + hidden @ down
    return y
