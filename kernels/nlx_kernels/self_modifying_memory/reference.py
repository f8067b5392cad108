# SPDX-License-Identifier: Apache-2.0
"""self_modifying_memory token by token: the specification, and the oracle of the other forms.

Inside, the boxes are one axis n, in the order of the parameters.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nlx_kernels._checks import resets
from nlx_kernels.mlp_memory.reference import shrink
from nlx_kernels.self_modifying_memory.state import SelfModifyingState

ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def self_modifying_memory(
    x, q, *, parameters, state, chunk_size, projection_chunk_size, read,
    momentum, erase, activation, clip, bound, segment_ids,
):  # fmt: skip
    """Every box makes its part of a token, then every box is written; arguments are checked."""
    boxes = tuple(parameters.memories)
    periods = [chunk_size if box == "memory" else projection_chunk_size for box in boxes]
    if state is None:
        state = fresh(parameters.memories, len(q), momentum is not None)
    dtype = parameters.retain_bias.dtype
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1).astype(dtype), (x, q, momentum))
    settings = boxes, periods, ACTIVATIONS[activation], read, erase, clip, bound

    def one(tokens, reset, position, parameters, leaves) -> Any:
        memories, readouts, biases, *retain = parameters
        slow = (*(stack(boxes, table) for table in (memories, readouts, biases)), *retain)
        carry = (position, *(table and stack(boxes, table) for table in leaves))
        (position, *leaves), y = jax.lax.scan(
            partial(_token, settings, slow), carry, (tokens, reset)
        )
        return y, position, [table and unstack(boxes, table) for table in leaves]

    heads = jax.vmap(one, in_axes=(0, None, None, 0, 0), out_axes=(0, None, 0))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, None, 0))
    y, position, (written, seen, buffer) = rows(
        tokens, resets(segment_ids), state.position, parameters, state[:3]
    )
    return jnp.moveaxis(y, 1, 2), SelfModifyingState(written, seen, buffer, position)


def _token(settings, slow, carry, now):
    """One token of one head: generate from the boundary weights, write every box, read, fire."""
    boxes, periods, activation, read, erase, clip, bound = settings
    position, weights, boundary, momentum = carry
    (x, q, keep), reset = now
    if reset is not None:
        position = jnp.where(reset, 0, position)
        weights, boundary = (select(reset, slow[0], old) for old in (weights, boundary))
        momentum = jax.tree.map(lambda p: jnp.where(reset, 0, p), momentum)
    k, v, q, retain, rates = generate(settings, slow, boundary, x, q)
    step = partial(inner_step, k, v, activation, clip)
    steps = jax.vmap(step)(boundary, rates)
    if momentum is not None:
        momentum = steps = jax.tree.map(lambda p, step: keep * p + step, momentum, steps)
    directions = jax.vmap(lambda layers: inputs(layers, k, activation))(boundary)
    decay = jax.vmap(partial(kept, retain))
    weights = tuple(
        decay(w, z, rates if erase else 0 * rates) + step
        for w, z, step in zip(weights, directions, steps, strict=True)
    )
    seen = unstack(boxes, weights if read == "after_write" else boundary)
    y = forward(seen["memory"], q, activation)
    position = position + 1
    fires = position % jnp.asarray(periods, position.dtype) == 0
    bounded = jax.tree.map(jax.vmap(partial(shrink, limit=bound)), weights)
    weights, boundary = (jax.vmap(select)(fires, bounded, layers) for layers in (weights, boundary))
    return (position, weights, boundary, momentum), y


def generate(settings, slow, boundary, x, q):
    """Key, value, query, retention and the rates [n], all from the boundary weights."""
    boxes, periods, activation, *_ = settings
    _, rate_readout, rate_bias, retain_readout, retain_bias = slow
    streams = dict(key=x.key, value=x.value, rate=x.gate, retain=x.gate, query=q)
    made = {
        box: forward(layers, streams[box], activation)
        for box, layers in unstack(boxes, boundary).items()
        if box in streams
    }
    retain = jax.nn.sigmoid(retain_readout @ made["retain"] + retain_bias)
    top = jnp.stack([(1 + retain) / 2 if period == 1 else 1 + retain for period in periods])
    rates = top * jax.nn.sigmoid(rate_readout @ made["rate"] + rate_bias)
    q = l2(made["query"]) if "query" in made else q
    return l2(made["key"]), made["value"], q, retain, rates


def inner_step(k, v, activation, clip, layers, rate):
    """-rate * clipped gradient of 1/2 |M(k) - M(v)|^2, where M(v) is a value, not a function."""
    target = forward(layers, v, activation)

    def loss(layers):
        return 0.5 * jnp.sum((forward(layers, k, activation) - target) ** 2)

    return jax.tree.map(lambda g: -rate * shrink(g, clip), jax.grad(loss)(layers))


def forward(layers, z, activation):
    """M(z) = z + s(z W_1) W_2."""
    _, hidden = inputs(layers, z, activation)
    return z + hidden @ layers[1]


def inputs(layers, z, activation):
    """The inputs of both layers: z and s(z W_1), s(p) = act(p) / sqrt(|act(p)|^2 + 1/4)."""
    hidden = activation(z @ layers[0])
    return z, hidden / jnp.sqrt(jnp.sum(hidden**2) + 0.25)


def kept(retain, weight, z, erase):
    """(retain I - erase u u^T) W, u being z at unit length (0 where z = 0)."""
    square = jnp.sum(z**2)
    u = jnp.where(square > 0, z / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return retain * weight - erase * jnp.outer(u, u @ weight)


def l2(z):
    """z / sqrt(|z|^2 + 1e-6)."""
    return z / jnp.sqrt(jnp.sum(z**2) + 1e-6)


def select(condition, new, old):
    """Leaf by leaf: `new` where the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def fresh(memories, rows, momentum):
    """The state of memories that have seen nothing."""
    weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (rows, *w.shape)), memories)
    zeros = jax.tree.map(jnp.zeros_like, weights) if momentum else None
    return SelfModifyingState(weights, weights, zeros, jnp.zeros(rows, jnp.int32))


def stack(boxes, table):
    """box -> arrays, as arrays with a leading axis n."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(table[box] for box in boxes))


def unstack(boxes, table):
    """The other way round."""
    return {box: jax.tree.map(lambda x, n=n: x[n], table) for n, box in enumerate(boxes)}
