# SPDX-License-Identifier: Apache-2.0
"""A number in (0, 1) per token and head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nlx.nn.linear import check_sizes, normal, parameter
from nlx.parallel import by_heads, gathered


class Gate(nnx.Module):
    """g = sigmoid(x W + b), W [d, h] drawn from N(0, 1/d); at least float32."""

    def __init__(self, width: int, heads: int, bias: float, *, rngs: nnx.Rngs):
        """width: channels of x. heads: of g. bias: b at first."""
        check_sizes(width=width, heads=heads)
        self.kernel = normal(rngs, (width, heads), ("embed", "heads"), width**-0.5)
        self.bias = parameter(jnp.full((heads,), bias), ("heads",))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b h"]:
        """A number below 1 that bfloat16 can't hold, such as 0.9985, is not rounded up to 1."""
        wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        bias = jnp.expand_dims(self.bias[...], range(x.ndim - 1))
        logits = wide @ gathered(self.kernel, wide.dtype) + bias
        return jax.nn.sigmoid(by_heads(logits) if x.ndim == 3 else logits)
