# SPDX-License-Identifier: Apache-2.0
"""mlp_memory as Pallas TPU kernels: weights and momentum stay in VMEM from chunk to chunk.

A chunk's gradients, writes and reads are computed where the weights are, forward and backward
(`_chunk_scan_tpu`); the algebra of a chunk is `_chunk`'s, as in `xla.py`. Weights and momentum are
float32. Products are float32 for float32 inputs; for bfloat16 their operands are rounded to
bfloat16 on the way into the matrix unit. Gates and inverses are float32.

The kernels take whole chunks from the start of a sequence; the XLA form goes on from their state
with the tokens that are left. A call that goes on from a state may stand inside a chunk, each row
elsewhere, and a segment may begin anywhere: both are for the XLA form.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nlx_kernels import _chunk, _tpu
from nlx_kernels import _chunk_scan_tpu as chunk_scan
from nlx_kernels._derivative import differentiable
from nlx_kernels.mlp_memory import xla
from nlx_kernels.mlp_memory.state import MLPMemoryState

# What a chunk's derivative was seen to hold in VMEM: arrays [c, widest] (erasing: twice), states.
HELD, HELD_FLOAT32 = (40, 1), (80, 4)
EVERY = 4  # chunks from one kept state to the next


class _State(NamedTuple):
    """The layers [.., i, o]."""

    weights: tuple[jax.Array, ...]
    momentum: tuple[jax.Array, ...] | None


class _Form(NamedTuple):
    """What is known at trace time."""

    chunk_size: int
    read: str
    activation: Callable
    residual: bool
    normalise: Callable | None
    clip: float | None
    bound: float | None
    interpret: bool


def mlp_memory(
    q, k, v, *, weights, state, rate, retain, momentum, erase, segment_ids,
    activation, norm, interpret=False, **options,
):  # fmt: skip
    """Arguments are checked, and what `refusal` refuses does not come here."""
    del state
    form = _Form(
        activation=_chunk.ACTIVATIONS[activation],
        normalise=_chunk.layer_norm if norm else None,
        interpret=interpret,
        **options,
    )
    tokens = xla.MemoryTokens(q, k, v, rate, retain, momentum, erase)
    t = q.shape[1]
    whole = t - t % form.chunk_size
    rest = dict(options, activation=activation, norm=norm, segment_ids=segment_ids)

    def plain(tokens, weights):
        y, after = xla.mlp_memory(**tokens._asdict(), weights=weights, state=None, **rest)
        return y.astype(tokens.q.dtype), (after.weights, after.momentum)

    run = differentiable(
        functools.partial(_forward, form), functools.partial(_backward, form), plain
    )
    y, (layers, buffer) = run(jax.tree.map(lambda x: x[:, :whole], tokens), weights)
    after = MLPMemoryState(layers, layers, buffer, jnp.full(len(q), whole, jnp.int32))
    if whole == t:
        return y, after
    left = jax.tree.map(lambda x: x[:, whole:], tokens)
    y_left, after = xla.mlp_memory(**left._asdict(), weights=None, state=after, **rest)
    return jnp.concatenate([y, y_left.astype(y.dtype)], 1), after


def refusal(
    q, k, v, *, weights, state, rate, retain, momentum, erase, segment_ids, chunk_size, interpret,
    **_,
) -> str | None:  # fmt: skip
    """Why the kernels cannot take a call, as the end of a sentence; None if they can."""
    if state is not None or segment_ids is not None:
        return "begins at the start of a sequence, without state and segment_ids"
    if q.shape[1] < chunk_size:
        return "needs a whole chunk"
    if not interpret and rate.dtype != jnp.float32:
        return "is for float32 and bfloat16; float64 is for interpret=True, or another form"
    form = _Form(chunk_size, "", abs, True, None, None, None, interpret)
    tokens = xla.MemoryTokens(q, k, v, rate, retain, momentum, erase)
    tokens = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[:, :chunk_size], tree), tokens)
    return _tpu.too_large(*_plan(form, tokens, weights))


def _forward(form: _Form, tokens, weights):
    plan, *_ = _plan(form, tokens, weights)
    state, cut, marks = _cut(form, plan.every, tokens, weights)
    y, after, kept = chunk_scan.forward(plan, (), state, cut, marks)
    b, h, n, c, v = y.shape
    y = jnp.moveaxis(y, 1, 3).reshape(b, n * c, h, v)[:, : tokens.q.shape[1]]
    return (y, tuple(after)), kept


def _backward(form: _Form, arrays, kept, slopes):
    plan, *_ = _plan(form, *arrays)
    (_, tokens, marks), pull = jax.vjp(functools.partial(_cut, form, plan.every), *arrays)
    by_y, (weights, momentum) = slopes
    slopes = _chunks(by_y, form.chunk_size, plan.every), _State(weights, momentum)
    _, state, by_tokens = chunk_scan.backward(plan, (), kept, tokens, marks, slopes)
    return pull((state, by_tokens, jnp.zeros_like(marks)))


def _plan(form: _Form, tokens: xla.MemoryTokens, weights):
    """The plan for a call, and the shapes of what it works on."""
    c, wide = form.chunk_size, tokens.q.dtype != jnp.bfloat16
    widest = max(c, *(max(w.shape[1:]) for w in weights))
    plan = chunk_scan.Plan(
        name="mlp_memory",
        step=functools.partial(_step, form),
        every=min(EVERY, 1 << (tokens.q.shape[1] // c - 1).bit_length()),
        heads=1,
        precision="highest" if wide else "default",
        work=0,
        interpret=form.interpret,
    )
    parts = (), *jax.eval_shape(functools.partial(_cut, form, 1), tokens, weights)
    array = _tpu.block_bytes((c, widest)) * (1 if tokens.erase is None else 2)
    work = _tpu.held(HELD_FLOAT32 if wide else HELD, array, parts[1])
    plan = plan._replace(work=work)
    return _tpu.fit(plan, *parts), *parts


def _cut(form: _Form, every: int, tokens: xla.MemoryTokens, weights):
    """First state, tokens in chunks, and which chunks are there."""
    rows = len(tokens.q)
    layers = tuple(jnp.broadcast_to(w, (rows, *w.shape)) for w in weights)
    zeros = None if tokens.momentum is None else tuple(jnp.zeros_like(w) for w in layers)

    def cut(x):
        x = _chunks(x, form.chunk_size, every)
        return x if x.ndim == 5 else x[..., None, :]

    count = tokens.q.shape[1] // form.chunk_size
    there = jnp.arange(-(-count // every) * every) < count
    marks = there.astype(weights[0].dtype)[None, None, :, None, None]
    return _State(layers, zeros), jax.tree.map(cut, tokens), marks


def _chunks(x, c: int, every: int):
    """[b, t, h, ...] as [b, h, n, c, ...], filled up with zeros, n a multiple of `every`."""
    b, t, h = x.shape[:3]
    pad = [(0, 0), (0, -t % (c * every))] + [(0, 0)] * (x.ndim - 2)
    return jnp.moveaxis(jnp.pad(x, pad).reshape(b, -1, c, h, *x.shape[3:]), 3, 1)


def _step(form: _Form, constants, state: _State, tokens: xla.MemoryTokens, marks) -> Any:
    """One chunk of one head: gradients at its start, writes, reads; `marks` is 0 past the end."""
    del constants
    dtype, out = state.weights[0].dtype, tokens.q.dtype
    q, k, v, *gates = jax.tree.map(lambda x: x.astype(dtype), tuple(tokens))
    rate, retain, *gates = (None if gate is None else gate[:, 0] for gate in gates)
    momentum, erase = gates
    assert rate is not None
    assert retain is not None
    piece = _piece(q.shape[-2])
    decay = _chunk.make_decay(retain, momentum, piece, _chunk.IN_KERNEL)
    how: dict[str, Any] = dict(
        activation=form.activation, residual=form.residual, normalise=form.normalise
    )
    trace = _chunk.backward(state.weights, k, v, **how)
    buffers = state.momentum or (None,) * len(state.weights)
    hidden, weights, kept = q, [], []
    for layer, (weight, buffer) in enumerate(zip(state.weights, buffers, strict=True)):
        z, delta = trace.inputs[layer], trace.errors[layer]
        if erase is not None or form.clip is not None:
            z, delta = _chunk.direction(z, delta, form.clip)
        write = _chunk.solve_write(
            weight, buffer, z, delta, rate, erase, piece, decay, _chunk.IN_KERNEL
        )
        if form.read == "after_write":
            hidden = form.activation(hidden) if layer else hidden
            hidden = _chunk.read_write(hidden, weight, buffer, write, decay)
        weight, buffer = _chunk.end_write(weight, buffer, write, piece, decay)
        weights.append(_chunk.bound_norm(weight, form.bound))
        kept.append(buffer)
    if form.read == "chunk_start":
        y = _chunk.mlp(state.weights, q, **how)
    else:
        y = hidden if form.normalise is None else form.normalise(hidden)
        y = q + y if form.residual else y
    after = _State(tuple(weights), None if state.momentum is None else tuple(kept))
    there = marks > 0
    after = jax.tree.map(lambda new, old: jnp.where(there, new, old), after, state)
    return after, y.astype(out)


def _piece(c: int) -> _chunk.Piece:
    """A whole chunk; [1, c] and [1, c, c]."""
    token = jax.lax.broadcasted_iota(jnp.int32, (1, c), 1)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (1, c, c), axis) for axis in (1, 2))
    return _chunk.Piece(token >= 0, column <= row, token == 0, token == c - 1)
