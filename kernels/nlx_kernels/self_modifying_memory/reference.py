# SPDX-License-Identifier: Apache-2.0
"""self_modifying_memory token by token: the specification, and the oracle of the other forms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nlx_kernels._checks import resets
from nlx_kernels.self_modifying_memory.state import SelfModifyingState

ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def self_modifying_memory(
    x, q, *, parameters, state, chunk_size, projection_chunk_size, read,
    momentum, erase, activation, clip, bound, segment_ids,
):  # fmt: skip
    """Every box makes its part of a token, then every box is written; arguments are checked."""
    periods = dict.fromkeys(parameters.memories, projection_chunk_size) | {"memory": chunk_size}
    if state is None:
        state = fresh(parameters.memories, len(q), momentum is not None)
    dtype = parameters.retain_bias.dtype
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1).astype(dtype), (x, q, momentum))

    def one(tokens, reset, position, parameters, leaves) -> Any:
        token = partial(
            _token, parameters, periods, ACTIVATIONS[activation], read, erase, clip, bound
        )
        (position, *leaves), y = jax.lax.scan(token, (position, *leaves), (tokens, reset))
        return y, position, leaves

    heads = jax.vmap(one, in_axes=(0, None, None, 0, 0), out_axes=(0, None, 0))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, None, 0))
    y, position, (written, seen, buffer) = rows(
        tokens, resets(segment_ids), state.position, parameters, state[:3]
    )
    return jnp.moveaxis(y, 1, 2), SelfModifyingState(written, seen, buffer, position)


def fresh(memories, rows, momentum):
    """The state of memories that have seen nothing."""
    weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (rows, *w.shape)), memories)
    zeros = jax.tree.map(jnp.zeros_like, weights) if momentum else None
    return SelfModifyingState(weights, weights, zeros, jnp.zeros(rows, jnp.int32))


def _token(parameters, periods, activation, read, erase, clip, bound, carry, now):
    """One token of one head: generate from the boundary weights, write every box, read, fire."""
    position, weights, boundary, momentum = carry
    (x, q, keep), reset = now
    if reset is not None:
        position = jnp.where(reset, 0, position)
        weights, boundary = (select(reset, parameters.memories, old) for old in (weights, boundary))
        momentum = jax.tree.map(lambda p: jnp.where(reset, 0, p), momentum)
    k, v, q, retain, rates = generate(parameters, periods, activation, boundary, x, q)
    steps = {
        box: inner_step(layers, k, v, rates[box], activation, clip)
        for box, layers in boundary.items()
    }
    if momentum is not None:
        momentum = steps = jax.tree.map(lambda p, step: keep * p + step, momentum, steps)
    strengths = rates if erase else dict.fromkeys(rates, 0.0)
    weights = {
        box: tuple(
            kept(w, z, retain, strengths[box]) + step
            for w, z, step in zip(
                layers, inputs(boundary[box], k, activation), steps[box], strict=True
            )
        )
        for box, layers in weights.items()
    }
    y = forward((weights if read == "after_write" else boundary)["memory"], q, activation)
    position = position + 1
    for box, period in periods.items():
        fires = position % period == 0
        bounded = tuple(shrink(w, bound) for w in weights[box])
        weights |= {box: select(fires, bounded, weights[box])}
        boundary = boundary | {box: select(fires, bounded, boundary[box])}
    return (position, weights, boundary, momentum), y


def generate(parameters, periods, activation, boundary, x, q):
    """Key, value, query, retention and the rate of each box, all from the boundary weights."""
    made = {
        box: forward(boundary[box], stream, activation)
        for box, stream in (
            ("key", x.key), ("value", x.value), ("rate", x.gate), ("retain", x.gate),
        )
    }  # fmt: skip
    if "query" in boundary:
        q = l2(forward(boundary["query"], q, activation))
    retain = jax.nn.sigmoid(parameters.retain_readout @ made["retain"] + parameters.retain_bias)
    rates = {}
    for box, period in periods.items():
        score = parameters.rate_readout[box] @ made["rate"] + parameters.rate_bias[box]
        top = (1 + retain) / 2 if period == 1 else 1 + retain
        rates[box] = top * jax.nn.sigmoid(score)
    return l2(made["key"]), made["value"], q, retain, rates


def inner_step(layers, k, v, rate, activation, clip):
    """-rate * clipped gradient of 1/2 |M(k) - M(v)|^2, where M(v) is a value, not a function."""
    target = forward(layers, v, activation)

    def loss(layers, target):
        return 0.5 * jnp.sum((forward(layers, k, activation) - target) ** 2)

    return jax.tree.map(lambda g: -rate * shrink(g, clip), jax.grad(loss)(layers, target))


def forward(layers, z, activation):
    """M(z) = z + s(z W_1) W_2."""
    _, hidden = inputs(layers, z, activation)
    return z + hidden @ layers[1]


def inputs(layers, z, activation):
    """The inputs of both layers: z and s(z W_1), s(p) = act(p) / sqrt(|act(p)|^2 + 1/4)."""
    hidden = activation(z @ layers[0])
    return z, hidden / jnp.sqrt(jnp.sum(hidden**2) + 0.25)


def kept(weight, z, retain, erase):
    """(retain I - erase u u^T) W, u being z at unit length (0 where z = 0)."""
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


def l2(z):
    """z / sqrt(|z|^2 + 1e-6)."""
    return z / jnp.sqrt(jnp.sum(z**2) + 1e-6)


def select(condition, new, old):
    """Leaf by leaf: `new` where the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
