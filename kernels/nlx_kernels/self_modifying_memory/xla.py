# SPDX-License-Identifier: Apache-2.0
"""Hope's inner loop in parallel inside each chunk; the boxes are stacked along a leading axis."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from nlx_kernels import _chunk, _windows
from nlx_kernels._checks import resets
from nlx_kernels.self_modifying_memory.state import SelfModifyingState, Streams


class _Tokens(NamedTuple):
    streams: Streams  # three arrays [w, b, h, c, d]
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
    activation: object


def _normalise(z):
    return z * jax.lax.rsqrt(jnp.sum(z * z, -1, keepdims=True) + 1e-6)


class _Generated(NamedTuple):
    """What a piece's tokens generate from the boundary weights."""

    q: Float[Array, "b h c d"]
    k: Float[Array, "b h c d"]
    v: Float[Array, "b h c d"]
    retain: Float[Array, "b h c"]
    rate: Float[Array, "n b h c"]


def _generate(weights, tokens: _Tokens, readouts: _Readouts, form: _Form) -> _Generated:
    """Reads keys, values and gates from the boxes' boundary weights (Eq. 86)."""

    def box(name, z):
        index = form.boxes.index(name)
        return _chunk.mlp([w[index] for w in weights], z, form.activation)

    k = _normalise(box("key", tokens.streams.key))
    v = box("value", tokens.streams.value)
    q = _normalise(box("query", tokens.q)) if "query" in form.boxes else tokens.q
    retain = jnp.einsum("bhcd,hd->bhc", box("retain", tokens.streams.gate), readouts.retain)
    retain = jax.nn.sigmoid(retain + readouts.retain_bias[None, :, None])
    rate = jnp.einsum("bhcd,nhd->nbhc", box("rate", tokens.streams.gate), readouts.rate)
    rate = jax.nn.sigmoid(rate + readouts.rate_bias[:, None, :, None])
    rate = readouts.top[:, None, None, None] * (1.0 + retain)[None] * rate
    return _Generated(q, k, v, retain, rate)


def _write_piece(memory, tokens: _Tokens, piece, *, readouts: _Readouts, form: _Form):
    """Writes the tokens of a piece to every box and reads the box "memory"."""
    piece = piece._replace(**{name: mask[None, :, None] for name, mask in piece._asdict().items()})
    made = _generate(memory.chunk_start, tokens, readouts, form)
    gate = None if tokens.momentum is None else tokens.momentum[None]
    decay = _chunk.make_decay(made.retain[None], gate, piece)
    target = _chunk.mlp(memory.chunk_start, made.v[None], form.activation)
    trace = _chunk.backward(memory.chunk_start, made.k[None], target, form.activation)
    buffers = memory.momentum or (None, None)
    number = form.boxes.index("memory")
    own = functools.partial(jax.tree.map, lambda a: a[number if a.shape[0] > 1 else 0])
    hidden, weights, momentum = made.q, [], []
    for layer, (weight, buffer) in enumerate(zip(memory.weights, buffers, strict=True)):
        z, delta = _chunk.direction(trace.inputs[layer], trace.errors[layer], form.clip)
        erase = made.rate if form.erase else None
        write = _chunk.solve_write(weight, buffer, z, delta, made.rate, erase, piece, decay)
        if form.read == "after_write":
            hidden = form.activation(hidden) if layer else hidden
            hidden = _chunk.read_write(hidden, *own((weight, buffer, write, decay)))
        weight, buffer = _chunk.end_write(weight, buffer, write, piece, decay)
        weights.append(weight)
        momentum.append(buffer)
    if form.read == "after_write":
        y = made.q + hidden
    else:
        y = _chunk.mlp([w[number] for w in memory.chunk_start], made.q, form.activation)
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
    boxes = tuple(sorted(parameters.memories))
    chunks = [chunk_size if box == "memory" else projection_chunk_size for box in boxes]
    readouts = _Readouts(
        jnp.stack([parameters.rate_readout[box] for box in boxes]),
        jnp.stack([parameters.rate_bias[box] for box in boxes]),
        parameters.retain_readout,
        parameters.retain_bias,
        jnp.asarray([0.5 if chunk == 1 else 1.0 for chunk in chunks], dtype),
    )
    function = _chunk.ACTIVATIONS[activation]
    form = _Form(boxes, read, erase, clip, lambda z: _chunk.soft_unit(function(z)))
    rows = tuple(
        jnp.broadcast_to(w[:, None], (w.shape[0], b, *w.shape[1:]))
        for w in _stack(parameters.memories, boxes)
    )
    zeros = None if momentum is None else tuple(jnp.zeros_like(w) for w in rows)
    memory = initial = _windows.Memory(rows, rows, zeros, jnp.zeros(b, jnp.int32))
    if state is not None:
        stacked = (None if w is None else _stack(w, boxes) for w in state[:3])
        memory = _windows.Memory(*stacked, state.position)
    window = min(chunk_size, projection_chunk_size, t)
    split = functools.partial(_windows.split_windows, window=window)
    tokens = jax.tree.map(lambda a: split(a.astype(dtype)), _Tokens(x, q, momentum))
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
    leaves = (None if w is None else _unstack(w, boxes) for w in memory[:3])
    return y, SelfModifyingState(*leaves, memory.position)
