# SPDX-License-Identifier: Apache-2.0
"""mlp_memory as Pallas TPU kernels: weights and momentum stay in VMEM from chunk to chunk.

A chunk's gradients, writes and reads are computed where the weights are, forward and backward
(`_chunk_scan_tpu`); the algebra of a chunk is `_chunk`'s, as in `xla.py`. Weights and momentum are
float32. Products are float32 for float32 inputs; for bfloat16 their operands are rounded to
bfloat16 on the way into the matrix unit. Gates and inverses are float32.

Without a state the kernels take whole chunks, and the XLA form goes on with the tokens that are
left. With one they take all, wherever in a chunk each row stands (`_windows_tpu`), and the weights
of the chunk's start are one more part of what stays in VMEM. Segments are for the XLA form: each
begins chunks of its own, in any row anywhere, so that a window would have to be written in as many
pieces as chunks end and begin inside it, at different tokens in every row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nlx_kernels import _chunk, _tpu
from nlx_kernels import _chunk_scan_tpu as chunk_scan
from nlx_kernels import _windows_tpu as windows
from nlx_kernels._derivative import differentiable
from nlx_kernels.mlp_memory import xla
from nlx_kernels.mlp_memory.state import MLPMemoryState

# What a chunk's derivative was seen to hold in VMEM: arrays [c, widest] (erasing: twice), states.
HELD, HELD_FLOAT32 = (40, 1), (80, 4)
EVERY = 4  # chunks from one kept state to the next


class _State(NamedTuple):
    """The layers [.., i, o]; start None: every window begins a chunk, so that it is the weights."""

    weights: tuple[jax.Array, ...]
    start: tuple[jax.Array, ...] | None
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
    form = _Form(
        activation=_chunk.ACTIVATIONS[activation],
        normalise=_chunk.layer_norm if norm else None,
        interpret=interpret,
        **options,
    )
    tokens = xla.MemoryTokens(q, k, v, rate, retain, momentum, erase)
    b, t = q.shape[:2]
    whole = t - t % form.chunk_size if state is None else t
    rest = dict(options, activation=activation, norm=norm, segment_ids=segment_ids)

    def plain(tokens, begin):
        weights, state = begin, None
        if isinstance(begin, MLPMemoryState):
            weights, state = None, begin._replace(position=begin.position.astype(jnp.int32))
        y, after = xla.mlp_memory(**tokens._asdict(), weights=weights, state=state, **rest)
        return y.astype(tokens.q.dtype), tuple(after[:3])

    run = differentiable(
        functools.partial(_forward, form), functools.partial(_backward, form), plain
    )
    position = jnp.zeros(b, jnp.int32) if state is None else state.position
    y, (layers, start, buffer) = run(
        jax.tree.map(lambda x: x[:, :whole], tokens), _begin(form, weights, state)
    )
    after = MLPMemoryState(layers, start, buffer, position + whole)
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
    if segment_ids is not None:
        return "is without segment_ids, which begin chunks inside chunks, in every row elsewhere"
    if q.shape[1] < chunk_size:
        return "needs a whole chunk"
    if not interpret and rate.dtype != jnp.float32:
        return "is for float32 and bfloat16; float64 is for interpret=True, or another form"
    form = _Form(chunk_size, "", abs, True, None, None, None, interpret)
    tokens = xla.MemoryTokens(q, k, v, rate, retain, momentum, erase)
    tokens = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[:, :chunk_size], tree), tokens)
    return _tpu.too_large(*_plan(form, tokens, _begin(form, weights, state)))


def _begin(form: _Form, weights, state):
    """Weights [h, i, o], or a state; its position, a number like others, inside the chunk."""
    if state is None:
        return weights
    position = (state.position % form.chunk_size).astype(state.weights[0].dtype)
    return state._replace(position=position)


def _forward(form: _Form, tokens, begin):
    plan, *_ = _plan(form, tokens, begin)
    state, cut = _cut(form, plan.every, tokens, begin)
    marks = _marks(form, plan.every, tokens, begin)
    y, after, kept = chunk_scan.forward(plan, (), state, cut, marks)
    start = after.weights if after.start is None else after.start
    y = windows.join(y, tokens.q.shape[1], _position(begin))
    return (y, (after.weights, start, after.momentum)), kept


def _backward(form: _Form, arrays, kept, slopes):
    plan, *_ = _plan(form, *arrays)
    (state, tokens), pull = jax.vjp(functools.partial(_cut, form, plan.every), *arrays)
    marks = _marks(form, plan.every, *arrays)
    by_y, (weights, start, momentum) = slopes
    if state.start is None:
        weights, start = jax.tree.map(jnp.add, weights, start), None
    by_y = windows.cut(by_y, form.chunk_size, plan.every, _position(arrays[1]))
    slopes = by_y, _State(weights, start, momentum)
    _, state, by_tokens = chunk_scan.backward(plan, (), kept, tokens, marks, slopes)
    return pull((state, by_tokens))


def _plan(form: _Form, tokens: xla.MemoryTokens, begin):
    """The plan for a call, and the shapes of what it works on."""
    c, wide = form.chunk_size, tokens.q.dtype != jnp.bfloat16
    state, cut = jax.eval_shape(functools.partial(_cut, form, 1), tokens, begin)
    marks = jax.eval_shape(functools.partial(_marks, form, 1), tokens, begin)
    parts = (), state, cut, marks
    widest = max(c, *(max(w.shape[2:]) for w in state.weights))
    plan = chunk_scan.Plan(
        name="mlp_memory",
        step=functools.partial(_step, form),
        every=min(EVERY, 1 << (marks.shape[2] - 1).bit_length()),
        heads=1,
        precision="highest" if wide else "default",
        work=0,
        interpret=form.interpret,
        holds=windows.holds,
    )
    array = _tpu.block_bytes((c, widest)) * (1 if tokens.erase is None else 2)
    work = _tpu.held(HELD_FLOAT32 if wide else HELD, array, state)
    plan = plan._replace(work=work)
    return _tpu.fit(plan, *parts), *parts


def _cut(form: _Form, every: int, tokens: xla.MemoryTokens, begin):
    """First state, and tokens in chunks."""
    if isinstance(begin, MLPMemoryState):
        state = _State(begin.weights, begin.chunk_start, begin.momentum)
    else:
        layers = tuple(jnp.broadcast_to(w, (len(tokens.q), *w.shape)) for w in begin)
        zeros = None if tokens.momentum is None else tuple(jnp.zeros_like(w) for w in layers)
        state = _State(layers, None, zeros)

    def cut(x):
        x = windows.cut(x, form.chunk_size, every, _position(begin))
        return x if x.ndim == 5 else x[..., None, :]

    return state, jax.tree.map(cut, tokens)


def _marks(form: _Form, every: int, tokens: xla.MemoryTokens, begin):
    t, c, dtype = tokens.q.shape[1], form.chunk_size, jax.tree.leaves(begin)[0].dtype
    return windows.marks(t, c, every, (c,), _position(begin), dtype)


def _position(begin):
    return begin.position if isinstance(begin, MLPMemoryState) else None


def _step(form: _Form, constants, state: _State, tokens: xla.MemoryTokens, marks) -> Any:
    """One window of one head: gradients at the chunk's start, writes, reads, firing."""
    del constants
    dtype, out = state.weights[0].dtype, tokens.q.dtype
    q, k, v, *gates = jax.tree.map(lambda x: x.astype(dtype), tuple(tokens))
    rate, retain, *gates = (None if gate is None else gate[:, 0] for gate in gates)
    momentum, erase = gates
    assert rate is not None
    assert retain is not None
    piece, start = windows.piece(marks[0]), state.start or state.weights
    decay = _chunk.make_decay(retain, momentum, piece, _chunk.IN_KERNEL)
    how: dict[str, Any] = dict(
        activation=form.activation, residual=form.residual, normalise=form.normalise
    )
    trace = _chunk.backward(start, k, v, **how)
    buffers = state.momentum or (None,) * len(state.weights)
    fires = marks[:, 3:, :1] > 0
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
        weights.append(jnp.where(fires, _chunk.bound_norm(weight, form.bound), weight))
        kept.append(buffer)
    if form.read == "chunk_start":
        y = _chunk.mlp(start, q, **how)
    else:
        y = hidden if form.normalise is None else form.normalise(hidden)
        y = q + y if form.residual else y
    if state.start is not None:
        pairs = zip(weights, state.start, strict=True)
        start = tuple(jnp.where(fires, weight, old) for weight, old in pairs)
    after = _State(
        tuple(weights),
        None if state.start is None else start,
        None if state.momentum is None else tuple(kept),
    )
    return after, y.astype(out)
