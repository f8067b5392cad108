# SPDX-License-Identifier: Apache-2.0
"""The coordinate-wise LSTM that learns to learn by gradient descent by gradient descent."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from nlx.learned.rule import Rule, last
from nlx.optim.level import leafwise


class LSTMState(NamedTuple):
    """State of `lstm_rule`'s transformation."""

    tick: Int[Array, ""]  # gradients seen
    hidden: tuple[PyTree[Float[Array, "... h"]], ...]  # of each layer, for every coordinate
    cell: tuple[PyTree[Float[Array, "... h"]], ...]


def log_and_sign(gradient: Float[Array, "..."], p: float = 10.0) -> Float[Array, "... 2"]:
    """Gradients of all sizes as two inputs of the size 1.

    (log|g| / p, sign g) where |g| >= e^-p ;  (-1, e^p g) elsewhere

    gradient: of any shape. p: > 0. Source: Andrychowicz et al. (2016), appendix A.
    """
    large = jnp.abs(gradient) >= jnp.exp(-p)
    size = jnp.log(jnp.where(large, jnp.abs(gradient), 1)) / p
    return jnp.stack(
        [jnp.where(large, size, -1), jnp.where(large, jnp.sign(gradient), jnp.exp(p) * gradient)],
        -1,
    )


def lstm_rule(
    hidden: int = 20, layers: int = 2, *, scale: float = 0.1, p: float | None = 10.0
) -> Rule:
    """One small LSTM for every coordinate, each with a state of its own.

    x = log_and_sign(g) ;  i, f, o, z = x A_l + h_l B_l + b_l
    c_l <- sigmoid(f) c_l + sigmoid(i) tanh(z) ;  h_l <- sigmoid(o) tanh(c_l) ;  x = h_l
    u = scale (h_L C + d)

    hidden: units of a layer, >= 1. layers: >= 1. scale: of the updates, > 0. p: of `log_and_sign`;
    None: gradients as they are. Forget gates begin open (bias 1), updates at 0.
    Raises ValueError for other sizes.
    Source: Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent.
    """
    for name, value in (("hidden", hidden), ("layers", layers)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be an integer >= 1.")
    if not scale > 0:
        raise ValueError(f"`scale` is {scale}; it must be > 0.")
    inputs = 1 if p is None else 2

    def init(key) -> dict[str, Any]:
        theta: dict[str, Any] = {}
        sizes = [inputs, *[hidden] * layers]
        keys = jax.random.split(key, 2 * layers)
        for n, (size, units) in enumerate(itertools.pairwise(sizes)):
            drawn = [
                jax.random.normal(k, (m, 4 * units)) / m**0.5
                for k, m in ((keys[2 * n], size), (keys[2 * n + 1], units))
            ]
            bias = jnp.zeros(4 * units).at[units : 2 * units].set(1)
            theta[f"layer_{n}"] = {"input": drawn[0], "recurrent": drawn[1], "bias": bias}
        theta["output"] = {"kernel": jnp.zeros((hidden, 1)), "bias": jnp.zeros(1)}
        return theta

    def make(theta):
        def begin(param, position):
            del position
            dtype = jnp.promote_types(param.dtype, jnp.float32)
            units = last(jnp.zeros(hidden, dtype), param.ndim + 1)
            zeros = jnp.zeros_like(param, dtype)[..., None] + units
            return (zeros,) * layers, (zeros,) * layers

        def step(fields, gradient, param, tick):
            del param, tick
            x = gradient[..., None] if p is None else log_and_sign(gradient, p)
            before, after = list(zip(*fields, strict=True)), []
            for n, (h, c) in enumerate(before):
                layer: Any = optax.tree.cast(theta[f"layer_{n}"], x.dtype)
                gates = x @ layer["input"] + h @ layer["recurrent"] + last(layer["bias"], x.ndim)
                i, f, o, z = jnp.split(gates, 4, -1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(z)
                x = jax.nn.sigmoid(o) * jnp.tanh(c)
                after.append((x, c))
            read: Any = optax.tree.cast(theta["output"], x.dtype)
            update = scale * (x @ read["kernel"] + last(read["bias"], x.ndim))
            return tuple(zip(*after, strict=True)), update[..., 0]

        return leafwise(LSTMState, begin, step)

    return Rule(init, make)
