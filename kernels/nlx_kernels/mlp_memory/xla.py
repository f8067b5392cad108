# SPDX-License-Identifier: Apache-2.0
"""mlp_memory in parallel inside each chunk: matrix products and one triangular solve a layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from nlx_kernels import _chunk, _windows
from nlx_kernels._checks import resets
from nlx_kernels.mlp_memory.state import MLPMemoryState


class MemoryTokens(NamedTuple):
    """What a piece of a window reads and writes."""

    q: Float[Array, "b h c k"]
    k: Float[Array, "b h c k"]
    v: Float[Array, "b h c v"]
    rate: Float[Array, "b h c"]
    retain: Float[Array, "b h c"]
    momentum: Float[Array, "b h c"] | None = None
    erase: Float[Array, "b h c"] | None = None


class Made(NamedTuple):
    """What `generated_memory` makes of a piece.

    Attributes:
      tokens: read and written.
      output: returned beside what is read, of its shape; None: nothing.
      kept: what later tokens of the chunk need of these.
    """

    tokens: MemoryTokens
    output: Float[Array, "b h c v"] | None = None
    kept: Any = None


class _Carried(NamedTuple):
    """The working state: layers of weights, and what the running chunk keeps."""

    layers: tuple[Float[Array, "b h i o"], ...]
    kept: Any


def _write_piece(
    memory, inputs, piece, *, make, chunk_size, read, activation, residual, normalise, clip
):
    """Makes the tokens of a piece, writes them to every layer and reads their outputs."""
    form = dict(activation=activation, residual=residual, normalise=normalise)
    start = memory.chunk_start.layers
    recall = functools.partial(_chunk.mlp, start, **form)
    count = memory.position % chunk_size
    tokens, output, kept = make(recall, memory.weights.kept, count, inputs, piece)
    piece = piece._replace(**{name: mask[:, None] for name, mask in piece._asdict().items()})
    decay = _chunk.make_decay(tokens.retain, tokens.momentum, piece)
    trace = _chunk.backward(start, tokens.k, tokens.v, **form)
    buffers = memory.momentum or (None,) * len(start)
    hidden, weights, momentum = tokens.q, [], []
    for layer, (weight, buffer) in enumerate(zip(memory.weights.layers, buffers, strict=True)):
        z, delta = trace.inputs[layer], trace.errors[layer]
        if tokens.erase is not None or clip is not None:
            z, delta = _chunk.direction(z, delta, clip)
        write = _chunk.solve_write(
            weight, buffer, z, delta, tokens.rate, tokens.erase, piece, decay
        )
        if read == "after_write":
            hidden = activation(hidden) if layer else hidden
            hidden = _chunk.read_write(hidden, weight, buffer, write, decay)
        weight, buffer = _chunk.end_write(weight, buffer, write, piece, decay)
        weights.append(weight)
        momentum.append(buffer)
    if read == "chunk_start":
        y = recall(tokens.q)
    else:
        y = hidden if normalise is None else normalise(hidden)
        y = tokens.q + y if residual else y
    y = y if output is None else jnp.concatenate([y, output], 1)
    momentum = None if memory.momentum is None else tuple(momentum)
    return memory._replace(weights=_Carried(tuple(weights), kept), momentum=momentum), y


def _fire(memory, fired, *, bound):
    """Bounds and publishes the layers of the rows whose chunk ends here; forgets what it kept."""
    mask = fired[0][:, None, None, None]
    layers, kept = memory.weights
    if bound is not None:
        layers = tuple(jnp.where(mask, _chunk.bound_norm(w, bound), w) for w in layers)
    kept = jax.tree.map(lambda a: jnp.where(mask, 0, a), kept)
    pairs = zip(layers, memory.chunk_start.layers, strict=True)
    published = tuple(jnp.where(mask, w, old) for w, old in pairs)
    start = memory.chunk_start._replace(layers=published)
    return memory._replace(weights=_Carried(layers, kept), chunk_start=start)


def mlp_memory(q, k, v, *, weights, state, rate, retain, momentum, erase, **options):
    """The chunk-parallel form; arguments are checked."""
    tokens = MemoryTokens(q, k, v, rate, retain, momentum, erase)
    tokens = jax.tree.map(lambda a: a.astype(rate.dtype), tokens)

    def make(recall, kept, count, tokens, piece):
        del recall, kept, count, piece
        return Made(tokens)

    y, _, state, _ = scan(
        make, tokens, None, weights=weights, state=state, momentum=momentum is not None, **options
    )
    return y, state


def scan(
    make, inputs, kept, *, weights, state, momentum,
    chunk_size, read, activation, residual, norm, clip, bound, segment_ids,
):  # fmt: skip
    """`generated_memory`; arguments are checked."""
    b, t = jax.tree.leaves(inputs)[0].shape[:2]
    none = jax.tree.map(jnp.zeros_like, kept)
    whole = state is None and segment_ids is None and t % chunk_size == 0
    kept, empty = (None, None) if whole else (kept, none)
    initial = memory = None
    if state is not None:
        memory = _carry(state, kept)
    if weights is not None:
        rows = tuple(jnp.broadcast_to(w, (b, *w.shape)) for w in weights)
        zeros = tuple(jnp.zeros_like(w) for w in rows) if momentum else None
        initial = _carry(MLPMemoryState(rows, rows, zeros, jnp.zeros(b, jnp.int32)), empty)
    memory, initial = memory or initial, initial or memory
    assert memory is not None
    assert initial is not None
    window = min(chunk_size, t)
    memory, y = _windows.scan_windows(
        functools.partial(
            _write_piece,
            make=make,
            chunk_size=chunk_size,
            read=read,
            activation=_chunk.ACTIVATIONS[activation],
            residual=residual,
            normalise=_chunk.layer_norm if norm else None,
            clip=clip,
        ),
        functools.partial(_fire, bound=bound),
        memory,
        initial,
        jax.tree.map(functools.partial(_windows.split_windows, window=window), inputs),
        length=t,
        periods=(chunk_size,),
        window=window,
        starts=resets(segment_ids),
        fresh=state is None,
    )
    heads = memory.weights.layers[0].shape[1]
    layers = memory.weights.layers, memory.chunk_start.layers, memory.momentum, memory.position
    kept = none if whole else memory.weights.kept
    return y[:, :, :heads], y[:, :, heads:], MLPMemoryState(*layers), kept


def _carry(state: MLPMemoryState, kept: Any) -> _windows.Memory:
    """The state with what the running chunk keeps; nobody reads what chunks before it kept."""
    carried = _Carried(state.weights, kept), _Carried(state.chunk_start, None)
    return _windows.Memory(*carried, state.momentum, state.position)
