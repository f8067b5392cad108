# SPDX-License-Identifier: Apache-2.0
"""mlp_memory token by token: the specification, and the oracle of the other forms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nlx_kernels._checks import resets
from nlx_kernels.mlp_memory.state import MLPMemoryState

ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def mlp_memory(
    q, k, v, *, weights, state, rate, retain, momentum, erase,
    chunk_size, read, activation, residual, norm, clip, bound, segment_ids,
):  # fmt: skip
    """One gradient step of the memory per token; arguments are checked."""
    memory = partial(forward, activation=activation, residual=residual, norm=norm)
    state = fresh(weights, len(q), momentum is not None) if state is None else state
    tokens = (q, k, v, rate, retain, momentum, erase)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1).astype(rate.dtype), tokens)

    def one(tokens, reset, position, start, leaves) -> Any:
        token = partial(_token, memory, start, chunk_size, read, clip, bound)
        (position, *leaves), y = jax.lax.scan(token, (position, *leaves), (tokens, reset))
        return y, position, leaves

    heads = jax.vmap(one, in_axes=(0, None, None, 0, 0), out_axes=(0, None, 0))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, None, 0))
    y, position, (written, seen, buffer) = rows(
        tokens, resets(segment_ids), state.position, weights, state[:3]
    )
    return jnp.moveaxis(y, 1, 2), MLPMemoryState(written, seen, buffer, position)


def fresh(weights, rows, momentum):
    """The state of a memory that has seen nothing."""
    weights = tuple(jnp.broadcast_to(w, (rows, *w.shape)) for w in weights)
    zeros = jax.tree.map(jnp.zeros_like, weights) if momentum else None
    return MLPMemoryState(weights, weights, zeros, jnp.zeros(rows, jnp.int32))


def _token(memory, start, chunk_size, read, clip, bound, carry, now):
    """Reads and writes the memory of one head once; `start` is what a new segment starts from."""
    position, weights, boundary, momentum = carry
    (q, k, v, rate, retain, keep, erase), reset = now
    if reset is not None:
        position = jnp.where(reset, 0, position)
        weights, boundary = (select(reset, start, old) for old in (weights, boundary))
        momentum = jax.tree.map(lambda p: jnp.where(reset, 0, p), momentum)

    def loss(boundary):
        return 0.5 * jnp.sum((memory(boundary, k)[0] - v) ** 2)

    steps = jax.tree.map(lambda g: -rate * shrink(g, clip), jax.grad(loss)(boundary))
    if momentum is not None:
        momentum = steps = jax.tree.map(lambda p, step: keep * p + step, momentum, steps)
    _, inputs = memory(boundary, k)
    weights = tuple(
        kept(w, z, retain, erase) + step for w, z, step in zip(weights, inputs, steps, strict=True)
    )
    y, _ = memory(weights if read == "after_write" else boundary, q)
    position = position + 1
    fires = position % chunk_size == 0
    weights = select(fires, jax.tree.map(lambda w: shrink(w, bound), weights), weights)
    boundary = select(fires, weights, boundary)
    return (position, weights, boundary, momentum), y


def forward(weights, z, *, activation, residual, norm):
    """M(z), and the input of each of its layers."""
    inputs, y = [], z
    for layer, weight in enumerate(weights):
        inputs.append(ACTIVATIONS[activation](y) if layer else y)
        y = inputs[-1] @ weight
    if norm:
        y = (y - y.mean()) / jnp.sqrt(y.var() + 1e-6)
    return (z + y if residual else y), inputs


def kept(weight, z, retain, erase):
    """(retain I - erase u u^T) W, u being z at unit length (0 where z = 0); erase None is 0."""
    if erase is None:
        return retain * weight
    square = jnp.sum(z**2)
    u = jnp.where(square > 0, z / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return retain * weight - erase * jnp.outer(u, u @ weight)


def shrink(matrix, limit):
    """The matrix, scaled back to Frobenius norm `limit` if it is above (None: as it is)."""
    if limit is None:
        return matrix
    square = jnp.sum(matrix**2)
    above = square > limit**2
    return jnp.where(above, matrix * limit / jnp.sqrt(jnp.where(above, square, 1)), matrix)


def select(condition, new, old):
    """Leaf by leaf: `new` where the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
