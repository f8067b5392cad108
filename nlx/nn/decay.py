# SPDX-License-Identifier: Apache-2.0
"""How fast a memory forgets: a step of time per token and head, and what it leaves."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nlx.nn.linear import check_sizes, normal, parameter
from nlx.parallel import by_heads, gathered

SPEEDS = (1.0, 16.0)
STEPS = (1e-3, 1e-1)


class Decay(nnx.Module):
    """step = softplus(x W + b) >= 0 and retain = exp(-A step) in [0, 1], A > 0; at least float32.

    At first A is uniform in [1, 16] and softplus(b) log-uniform in [0.001, 0.1].
    Source: Dao and Gu (2024), Transformers are SSMs, section 7.1; the authors' code for the start.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        """width: channels of x. heads: of step and retain."""
        check_sizes(width=width, heads=heads)
        self.kernel = normal(rngs, (width, heads), ("embed", "heads"), width**-0.5)
        speed = jax.random.uniform(rngs.params(), (heads,), minval=SPEEDS[0], maxval=SPEEDS[1])
        low, high = jnp.log(jnp.array(STEPS))
        step = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high))
        self.bias = parameter(step + jnp.log(-jnp.expm1(-step)), ("heads",))  # softplus inverted
        self.log_speed = parameter(jnp.log(speed), ("heads",))

    def __call__(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t h"], Float[Array, "b t h"]]:
        """step and retain of every token."""
        wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        logits = by_heads(wide @ gathered(self.kernel, wide.dtype))
        step = jax.nn.softplus(logits + self.bias[...][None, None])
        return step, jnp.exp(-jnp.exp(self.log_speed[...])[None, None] * step)
