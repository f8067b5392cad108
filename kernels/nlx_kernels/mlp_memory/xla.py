# SPDX-License-Identifier: Apache-2.0
"""mlp_memory in parallel inside each chunk: matrix products and one triangular solve a layer."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nlx_kernels import _chunk, _windows
from nlx_kernels._checks import resets
from nlx_kernels.mlp_memory.state import MLPMemoryState


class _Tokens(NamedTuple):
    q: Float[jnp.ndarray, "w b h c k"]
    k: Float[jnp.ndarray, "w b h c k"]
    v: Float[jnp.ndarray, "w b h c v"]
    rate: Float[jnp.ndarray, "w b h c"]
    retain: Float[jnp.ndarray, "w b h c"]
    momentum: Float[jnp.ndarray, "w b h c"] | None
    erase: Float[jnp.ndarray, "w b h c"] | None


def _write_piece(memory, tokens: _Tokens, piece, *, read, activation, residual, normalise, clip):
    """Writes the tokens of a piece to every layer and reads their outputs."""
    piece = piece._replace(**{name: mask[:, None] for name, mask in piece._asdict().items()})
    decay = _chunk.make_decay(tokens.retain, tokens.momentum, piece)
    form = dict(activation=activation, residual=residual, normalise=normalise)
    trace = _chunk.backward(memory.chunk_start, tokens.k, tokens.v, **form)
    buffers = memory.momentum or (None,) * len(memory.weights)
    hidden, weights, momentum = tokens.q, [], []
    for layer, (weight, buffer) in enumerate(zip(memory.weights, buffers, strict=True)):
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
        y = _chunk.mlp(memory.chunk_start, tokens.q, **form)
    else:
        y = hidden if normalise is None else normalise(hidden)
        y = tokens.q + y if residual else y
    written = memory._replace(weights=tuple(weights))
    return written._replace(momentum=None if memory.momentum is None else tuple(momentum)), y


def _fire(memory, fired, *, bound):
    """Bounds and publishes the working weights of the rows whose chunk ends here."""
    mask = fired[0][:, None, None, None]
    weights = memory.weights
    if bound is not None:
        weights = tuple(jnp.where(mask, _chunk.bound_norm(w, bound), w) for w in weights)
    pairs = zip(weights, memory.chunk_start, strict=True)
    published = tuple(jnp.where(mask, w, old) for w, old in pairs)
    return memory._replace(weights=weights, chunk_start=published)


def mlp_memory(
    q, k, v, *, weights, state, rate, retain, momentum, erase,
    chunk_size, read, activation, residual, norm, clip, bound, segment_ids,
):  # fmt: skip
    """The chunk-parallel form; arguments are checked."""
    b, t = q.shape[:2]
    initial = memory = None if state is None else _windows.Memory(*state)
    if weights is not None:
        rows = tuple(jnp.broadcast_to(w, (b, *w.shape)) for w in weights)
        zeros = None if momentum is None else tuple(jnp.zeros_like(w) for w in rows)
        initial = _windows.Memory(rows, rows, zeros, jnp.zeros(b, jnp.int32))
    memory = memory or initial
    assert memory is not None
    assert initial is not None
    dtype = memory.weights[0].dtype
    window = min(chunk_size, t)
    split = functools.partial(_windows.split_windows, window=window)
    tokens = (q, k, v, rate, retain, momentum, erase)
    tokens = jax.tree.map(lambda a: split(a.astype(dtype)), _Tokens(*tokens))
    memory, y = _windows.scan_windows(
        functools.partial(
            _write_piece,
            read=read,
            activation=_chunk.ACTIVATIONS[activation],
            residual=residual,
            normalise=_chunk.layer_norm if norm else None,
            clip=clip,
        ),
        functools.partial(_fire, bound=bound),
        memory,
        initial,
        tokens,
        length=t,
        periods=(chunk_size,),
        window=window,
        starts=resets(segment_ids),
        fresh=state is None,
    )
    return y, MLPMemoryState(*memory)
