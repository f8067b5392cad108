# SPDX-License-Identifier: Apache-2.0
"""Hope's inner loop in parallel inside each chunk; the boxes are stacked along a leading axis."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from nlx_kernels import _chunk, _windows
from nlx_kernels._checks import resets
from nlx_kernels.self_modifying_memory.state import SelfModifyingState

# The boxes in the order in which they are stacked; the first four make what a token is written as.
ORDER = ("key", "value", "rate", "retain", "memory", "query")
MEMORY, QUERY = 4, 5


class _Tokens(NamedTuple):
    streams: Float[Array, "w 4 b h c d"]  # what the first four boxes read
    q: Float[Array, "w b h c d"]
    momentum: Float[Array, "w b h c"] | None


class _Readouts(NamedTuple):
    """The slow read-outs of the gates, one row a box."""

    rate: Float[Array, "n h d"]
    rate_bias: Float[Array, "n h"]
    retain: Float[Array, "h d"]
    retain_bias: Float[Array, " h"]
    top: Float[Array, " n"]  # 1/2 where a box writes with chunks of one token, else 1


class _Form(NamedTuple):
    """What is known at trace time."""

    boxes: tuple[str, ...]
    read: str
    erase: bool
    clip: float | None
    activation: Callable[[Array], Array]


keep = _chunk.materialise


def _activate(function: Callable[[Array], Array], z: Array) -> Array:
    """s(z), and no slope of it inside the loop over a matrix that is made of it."""
    return keep(_chunk.soft_unit(function(keep(z))))


def normalise(z):
    """z / sqrt(|z|^2 + 1e-6), which makes keys and queries."""
    return z / jnp.sqrt(jnp.sum(z * z, -1, keepdims=True) + 1e-6)


def _generate(weights, tokens: _Tokens, readouts: _Readouts, form: _Form):
    """Makes queries, keys, values, retention and rates from the boundary weights (Eq. 86)."""
    makers = [w[:4] for w in weights]
    key, v, for_rate, for_retain = keep(_chunk.mlp(makers, tokens.streams, form.activation))
    q = tokens.q
    if len(form.boxes) > QUERY:
        q = normalise(_chunk.mlp([w[QUERY] for w in weights], q, form.activation))
    retain = jnp.einsum("bhcd,hd->bhc", for_retain, readouts.retain)
    retain = jax.nn.sigmoid(retain + readouts.retain_bias[None, :, None])
    rate = jnp.einsum("bhcd,nhd->nbhc", for_rate, readouts.rate)
    rate = jax.nn.sigmoid(rate + readouts.rate_bias[:, None, :, None])
    rate = readouts.top[:, None, None, None] * (1.0 + retain)[None] * rate
    return q, normalise(key), v, retain, rate


def _write_piece(memory, tokens: _Tokens, piece, *, readouts: _Readouts, form: _Form):
    """Writes the tokens of a piece to every box and reads the box "memory"."""
    piece = piece._replace(**{name: mask[None, :, None] for name, mask in piece._asdict().items()})
    made = _generate(memory.chunk_start, tokens, readouts, form)
    q, k, v, retain, rate = keep(made)
    gate = None if tokens.momentum is None else tokens.momentum[None]
    decay = _chunk.make_decay(retain[None], gate, piece)
    target = keep(_chunk.mlp(memory.chunk_start, v[None], form.activation))
    trace = _chunk.backward(memory.chunk_start, k[None], target, form.activation)
    buffers = memory.momentum or (None, None)
    own = functools.partial(jax.tree.map, lambda a: a[MEMORY if a.shape[0] > 1 else 0])
    hidden, weights, momentum = q, [], []
    for layer, (weight, buffer) in enumerate(zip(memory.weights, buffers, strict=True)):
        z, delta = _chunk.direction(trace.inputs[layer], trace.errors[layer], form.clip)
        z, delta = keep((z, delta))
        erase = rate if form.erase else None
        write = _chunk.solve_write(weight, buffer, z, delta, rate, erase, piece, decay)
        if form.read == "after_write":
            hidden = form.activation(hidden) if layer else hidden
            hidden = _chunk.read_write(hidden, *own((weight, buffer, write, decay)))
        weight, buffer = _chunk.end_write(weight, buffer, write, piece, decay)
        weights.append(weight)
        momentum.append(buffer)
    if form.read == "after_write":
        y = q + hidden
    else:
        y = _chunk.mlp([w[MEMORY] for w in memory.chunk_start], q, form.activation)
    written = memory._replace(weights=tuple(weights))
    return written._replace(momentum=None if memory.momentum is None else tuple(momentum)), y


def _fire(memory, fired, *, form: _Form, bound: float | None):
    """Bounds and publishes the working weights of the boxes and rows whose chunk ends here."""
    of_memory, of_others = fired
    mask = jnp.stack([of_memory if box == "memory" else of_others for box in form.boxes])
    mask = mask[:, :, None, None, None]
    weights = tuple(jnp.where(mask, _chunk.bound_norm(w, bound), w) for w in memory.weights)
    pairs = zip(weights, memory.chunk_start, strict=True)
    return memory._replace(
        weights=weights, chunk_start=tuple(jnp.where(mask, w, old) for w, old in pairs)
    )


def _stack(boxes: dict[str, tuple], order: tuple[str, ...]) -> tuple[Array, ...]:
    return tuple(jnp.stack(layer) for layer in zip(*(boxes[box] for box in order), strict=True))


def _unstack(layers: tuple[Array, ...], order: tuple[str, ...]) -> dict[str, tuple]:
    return {box: tuple(layer[n] for layer in layers) for n, box in enumerate(order)}


def self_modifying_memory(
    x, q, *, parameters, state, chunk_size, projection_chunk_size, read,
    momentum, erase, activation, clip, bound, segment_ids,
):  # fmt: skip
    """The chunk-parallel form; arguments are checked."""
    b, t = q.shape[:2]
    dtype = parameters.retain_bias.dtype
    boxes = ORDER[: len(parameters.memories)]
    chunks = [chunk_size if box == "memory" else projection_chunk_size for box in boxes]
    readouts = _Readouts(
        jnp.stack([parameters.rate_readout[box] for box in boxes]),
        jnp.stack([parameters.rate_bias[box] for box in boxes]),
        parameters.retain_readout,
        parameters.retain_bias,
        jnp.asarray([0.5 if chunk == 1 else 1.0 for chunk in chunks], dtype),
    )
    function = _chunk.ACTIVATIONS[activation]
    form = _Form(boxes, read, erase, clip, lambda z: _activate(function, z))
    rows = tuple(
        jnp.broadcast_to(w[:, None], (w.shape[0], b, *w.shape[1:]))
        for w in _stack(parameters.memories, boxes)
    )
    zeros = None if momentum is None else tuple(jnp.zeros_like(w) for w in rows)
    memory = initial = _windows.Memory(rows, rows, zeros, jnp.zeros(b, jnp.int32))
    if state is not None:
        seen, boundary, buffer = (None if w is None else _stack(w, boxes) for w in state[:3])
        memory = _windows.Memory(seen, boundary, buffer, state.position)
    window = min(chunk_size, projection_chunk_size, t)
    split = functools.partial(_windows.split_windows, window=window)
    cut = jax.tree.map(lambda a: split(a.astype(dtype)), (x, q, momentum))
    streams = jnp.stack([cut[0].key, cut[0].value, cut[0].gate, cut[0].gate], 1)
    tokens = _Tokens(streams, *cut[1:])
    memory, y = _windows.scan_windows(
        functools.partial(_write_piece, readouts=readouts, form=form),
        functools.partial(_fire, form=form, bound=bound),
        memory,
        initial,
        tokens,
        length=t,
        periods=(chunk_size, projection_chunk_size),
        window=window,
        starts=resets(segment_ids),
        fresh=state is None,
    )
    leaves = [None if w is None else _unstack(w, boxes) for w in memory[:3]]
    return y, SelfModifyingState._make([*leaves, memory.position])
