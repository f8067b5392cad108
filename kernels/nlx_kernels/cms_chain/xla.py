# SPDX-License-Identifier: Apache-2.0
"""cms_chain as matrix products over all tokens, of each row where the weights are its own."""

import jax
import jax.numpy as jnp

from nlx_kernels.cms_chain.reference import ACTIVATIONS


def cms_chain(x, weights, *, activation):
    """Products in x's dtype, norms in the weights'; arguments are checked."""
    act = ACTIVATIONS[activation]
    for scale, up, down, gate in weights:
        up, down = up.astype(x.dtype), down.astype(x.dtype)
        z = _norm(x, scale)
        hidden = act(z @ up) if gate is None else act(z @ gate.astype(x.dtype)) * (z @ up)
        x = x + hidden @ down
    return x


def _norm(x, scale):
    wide = x.astype(scale.dtype)
    square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    scale = scale[None, None] if scale.ndim == 1 else scale[:, None]
    return (wide * jax.lax.rsqrt(square + 1e-6) * scale).astype(x.dtype)
