# SPDX-License-Identifier: Apache-2.0
"""A small MLP for every parameter, on the features of Adafactor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from nlx.learned.rule import Rule, last
from nlx.optim.level import leafwise

DECAYS = (0.9, 0.99, 0.999)
HORIZONS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)  # of the time features


class MLPState(NamedTuple):
    """State of `mlp_rule`'s transformation; averages by decay, on a last axis."""

    tick: Int[Array, ""]  # gradients seen
    momentum: PyTree[Float[Array, "... 3"]]
    square: PyTree[Float[Array, "..."]]  # average of squared gradients, of the slowest decay
    rows: PyTree[Float[Array, "... 3"]]  # averaged squares, their mean over the last axis if >= 2
    columns: PyTree[Float[Array, "... 3"]]  # the same over the axis before it


def mlp_rule(
    hidden: int = 4, layers: int = 2, *, step: float = 1e-3, exponent: float = 1e-3
) -> Rule:
    """An MLP that reads, for each parameter, what Adafactor and momentum know of it.

    a, b = mlp(features) ;  u = -step a exp(exponent b)

    Features, each divided by its root mean square over the tensor: the gradient, the parameter,
    momenta of three decays, the averaged square and its inverse root, momenta over that root,
    Adafactor's row and column averages, their inverse roots, gradient and momenta scaled by the
    factored root; and tanh(t / h) for eleven horizons h (in their code tanh(t / h - 1)).

    hidden: units of a layer, >= 1. layers: hidden ones, >= 1. step, exponent: > 0.
    Raises ValueError for other sizes.
    Source: Metz et al. (2020), Tasks, stability, architecture, and compute; Metz et al. (2022),
    Practical tradeoffs between memory, compute, and performance in learned optimizers (its small
    per-parameter MLP on Adafactor's features).
    """
    for name, value in (("hidden", hidden), ("layers", layers)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be an integer >= 1.")
    for name, value in (("step", step), ("exponent", exponent)):
        if not value > 0:
            raise ValueError(f"`{name}` is {value}; it must be > 0.")
    count = len(DECAYS)
    inputs = 4 + 8 * count + len(HORIZONS)

    def init(key) -> dict[str, Any]:
        sizes = [inputs, *[hidden] * layers, 2]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        keys = jax.random.split(key, len(sizes) - 1)
        return {
            f"layer_{n}": {
                "kernel": jax.random.normal(k, (i, o)) / i**0.5,
                "bias": jnp.zeros(o),
            }
            for n, (k, (i, o)) in enumerate(zip(keys, pairs, strict=True))
        }

    def make(theta):
        def begin(param, position):
            del position
            dtype = jnp.promote_types(param.dtype, jnp.float32)
            zeros = jnp.zeros_like(param, dtype)
            rows, columns = (zeros, zeros) if param.ndim < 2 else (zeros.sum(-1), zeros.sum(-2))
            decays = lambda x: x[..., None] + last(jnp.zeros(count, dtype), x.ndim + 1)
            return decays(zeros), zeros, decays(rows), decays(columns)

        def advance(fields, gradient, param, tick):
            momentum, square, rows, columns = fields
            decays = jnp.asarray(DECAYS, gradient.dtype)
            kept = lambda axes: last(decays, axes)
            mixed = lambda old, new: kept(old.ndim) * old + (1 - kept(old.ndim)) * new[..., None]
            squared = jnp.square(gradient)
            momentum = mixed(momentum, gradient)
            square = DECAYS[-1] * square + (1 - DECAYS[-1]) * squared
            by_row, by_column = squared, squared
            if gradient.ndim >= 2:
                by_row, by_column = squared.mean(-1), squared.mean(-2)
            rows, columns = mixed(rows, by_row), mixed(columns, by_column)
            where = jnp.zeros_like(gradient) if param is None else param.astype(gradient.dtype)
            x = _features(gradient, where, momentum, square, rows, columns, tick)
            for n in range(layers + 1):
                layer: Any = optax.tree.cast(theta[f"layer_{n}"], x.dtype)
                x = x @ layer["kernel"] + last(layer["bias"], x.ndim)
                x = jax.nn.relu(x) if n < layers else x
            update = -step * x[..., 0] * jnp.exp(exponent * x[..., 1])
            return (momentum, square, rows, columns), update

        return leafwise(MLPState, begin, advance)

    return Rule(init, make)


def _features(gradient, param, momentum, square, rows, columns, tick) -> Float[Array, "... f"]:
    """Of every entry; those of the tensor are divided by their root mean square over it."""
    root = lambda x: jax.lax.rsqrt(x + 1e-8)
    wide = lambda x: x[..., None]
    if gradient.ndim >= 2:
        mean = rows.mean(-2, keepdims=True)  # over the rows: of the whole matrix
        factored = root(rows / (mean + 1e-30))[..., None, :] * root(columns)[..., None, :, :]
        ones = jnp.ones_like(gradient)[..., None]  # split over devices as the gradient is
        rows, columns = rows[..., None, :] * ones, columns[..., None, :, :] * ones
    else:
        factored = root(rows)
    parts = [
        wide(gradient), wide(param), momentum, wide(square), wide(root(square)),
        momentum * wide(root(square)), rows, columns, root(rows), root(columns),
        wide(gradient) * factored, momentum * factored,
    ]  # fmt: skip
    x = jnp.concatenate(parts, -1)
    axes = tuple(range(gradient.ndim))
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + 1e-5) if gradient.size else x
    clock = jnp.tanh((tick + 1) / jnp.asarray(HORIZONS, x.dtype)).astype(x.dtype)
    everywhere = jnp.ones_like(gradient)[..., None] * last(clock, gradient.ndim + 1)
    return jnp.concatenate([x, everywhere], -1)
