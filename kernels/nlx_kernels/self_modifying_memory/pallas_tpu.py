# SPDX-License-Identifier: Apache-2.0
"""Hope's inner loop as Pallas TPU kernels: all boxes and their momentum stay in VMEM.

A window of tokens is made, written to every box and read without leaving VMEM, forward and backward
(`_chunk_scan_tpu`); the algebra of a window is `_chunk`'s, as in `xla.py`, one head at a time.
Weights and momentum are float32. Products are float32 for float32 inputs; for bfloat16 their
operands are rounded to bfloat16 on the way into the matrix unit. Gates and inverses are float32.

A call that goes on from a state may stand inside a chunk, each row elsewhere (`_windows_tpu`).
Segments are for the XLA form: each begins chunks of its own, in any row anywhere, so that a window
would have to be written in as many pieces as chunks end and begin inside it.
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
from nlx_kernels._solve import exact_product
from nlx_kernels.self_modifying_memory import xla
from nlx_kernels.self_modifying_memory.state import SelfModifyingState

# What a window's derivative was seen to hold in VMEM: arrays [n, c, d or f], and states.
HELD, HELD_FLOAT32 = (80, 2), (30, 15)
EVERY = 4  # windows from one kept state to the next


class _State(NamedTuple):
    """The boxes, stacked; each is (W_1 [.., n, d, f], W_2 [.., n, f, d])."""

    weights: tuple[jax.Array, ...]
    start: tuple[jax.Array, ...]
    momentum: tuple[jax.Array, ...] | None


class _Readouts(NamedTuple):
    """The slow read-outs of the gates, a row for each box."""

    rate: jax.Array  # [h, n, d]
    rate_bias: jax.Array  # [h, n, 1]
    retain: jax.Array  # [h, 1, d]
    retain_bias: jax.Array  # [h, 1, 1]


class _Tokens(NamedTuple):
    """Tokens in windows of c."""

    key: jax.Array  # [b, h, n, c, d]
    value: jax.Array
    gate: jax.Array
    q: jax.Array
    momentum: jax.Array | None  # [b, h, n, 1, c]


class _Form(NamedTuple):
    """What is known at trace time."""

    boxes: tuple[str, ...]
    periods: tuple[int, int]  # of the box "memory", of all others
    read: str
    erase: bool
    activation: Callable
    clip: float | None
    bound: float | None


def self_modifying_memory(
    x, q, *, parameters, state, chunk_size, projection_chunk_size, read,
    momentum, erase, activation, clip, bound, segment_ids, interpret=False,
):  # fmt: skip
    """Arguments are checked, and what `refusal` refuses does not come here."""
    del segment_ids
    function = _chunk.ACTIVATIONS[activation]
    form = _Form(
        xla.ORDER[: len(parameters.memories)], (chunk_size, projection_chunk_size), read, erase,
        lambda z: _chunk.soft_unit(function(z)), clip, bound,
    )  # fmt: skip

    def plain(x, q, momentum, parameters, begin):
        if begin is not None:
            begin = begin._replace(position=begin.position.astype(jnp.int32))
        y, after = xla.self_modifying_memory(
            x, q, parameters=parameters, state=begin, chunk_size=chunk_size,
            projection_chunk_size=projection_chunk_size, read=read, momentum=momentum, erase=erase,
            activation=activation, clip=clip, bound=bound, segment_ids=None,
        )  # fmt: skip
        return y.astype(q.dtype), after[:3]

    run = differentiable(
        functools.partial(_forward, form, interpret),
        functools.partial(_backward, form, interpret),
        plain,
    )
    b, t = q.shape[:2]
    y, leaves = run(x, q, momentum, parameters, _begin(form, state))
    position = jnp.zeros(b, jnp.int32) if state is None else state.position
    return y, SelfModifyingState._make([*leaves, position + t])


def refusal(
    x, q, *, parameters, state, chunk_size, projection_chunk_size, momentum, segment_ids,
    interpret, **_,
) -> str | None:  # fmt: skip
    """Why the kernels cannot take a call, as the end of a sentence; None if they can."""
    t, periods = q.shape[1], (chunk_size, projection_chunk_size)
    if segment_ids is not None:
        return "is without segment_ids, which begin chunks inside chunks, in every row elsewhere"
    if state is not None and t < min(periods):
        return "needs as many tokens as the shorter chunk to go on from a state"
    longest = t if state is None else max(periods)
    if any(period % _window(t, periods) and period <= longest for period in periods):
        return "needs chunk sizes of which one divides the other"
    if not interpret and parameters.retain_bias.dtype != jnp.float32:
        return "is for float32 and bfloat16; float64 is for interpret=True, or another form"
    form = _Form(xla.ORDER[: len(parameters.memories)], periods, "", True, abs, None, None)
    arrays = x, q, momentum, parameters, _begin(form, state)
    return _tpu.too_large(*_plan(form, interpret, *arrays))


def _begin(form: _Form, state):
    """The state; its position, a number like others, inside the longer chunk."""
    if state is None:
        return None
    dtype = jax.tree.leaves(state.weights)[0].dtype
    return state._replace(position=(state.position % max(form.periods)).astype(dtype))


def _forward(form, interpret, *arrays):
    plan, *_ = _plan(form, interpret, *arrays)
    q, begin = arrays[1], arrays[4]
    parts = _cut(form, plan.every, *arrays)
    y, state, kept = chunk_scan.forward(plan, *parts, _marks(form, plan.every, q, begin))
    return (windows.join(y, q.shape[1], _position(begin)), _unstack(form, state)), kept


def _backward(form, interpret, arrays, kept, slopes):
    q, begin = arrays[1], arrays[4]
    plan, *_ = _plan(form, interpret, *arrays)
    cut = functools.partial(_cut, form, plan.every)
    (constants, _, tokens), pull = jax.vjp(cut, *arrays)
    by_y, by_leaves = slopes
    by_state = _State._make(_stack(form, leaf) for leaf in by_leaves)
    by_y = windows.cut(by_y, tokens.q.shape[3], plan.every, _position(begin))
    marks = _marks(form, plan.every, q, begin)
    return pull(chunk_scan.backward(plan, constants, kept, tokens, marks, (by_y, by_state)))


def _window(t: int, periods: tuple[int, int]) -> int:
    return min(*periods, t)


def _plan(form: _Form, interpret: bool, *arrays):
    """The plan for a call, and the shapes of what it works on, with one row."""
    _, q, _, parameters, begin = arrays
    t, wide = q.shape[1], q.dtype != jnp.bfloat16
    parts = jax.eval_shape(functools.partial(_cut, form, 1), *arrays)
    parts = (*parts, jax.eval_shape(functools.partial(_marks, form, 1), q, begin))
    plan = chunk_scan.Plan(
        name="self_modifying_memory",
        step=functools.partial(_step, form),
        every=min(EVERY, 1 << (parts[3].shape[2] - 1).bit_length()),
        heads=1,
        precision="highest" if wide else "default",
        work=0,
        interpret=interpret,
        holds=windows.holds,
    )
    widths = parameters.memories["memory"][0].shape[1:]
    window = sum(_tpu.block_bytes((_window(t, form.periods), width)) for width in widths)
    plan = plan._replace(
        work=_tpu.held(HELD_FLOAT32 if wide else HELD, len(form.boxes) * window // 2, parts[1])
    )
    return _tpu.fit(plan, *parts), *parts


def _cut(form: _Form, every: int, x, q, momentum, parameters, begin):
    """Read-outs, first state and tokens as the kernels take them."""
    rows, dtype = len(q), parameters.retain_bias.dtype
    if begin is None:
        broadcast = lambda w: jnp.broadcast_to(w, (rows, *w.shape))
        layers = tuple(broadcast(w) for w in _stacked(form, parameters.memories, 1))
        zeros = None if momentum is None else jax.tree.map(jnp.zeros_like, layers)
        state = _State(layers, layers, zeros)
    else:
        state = _State._make(_stack(form, leaf) for leaf in begin[:3])
    table = lambda part: jnp.stack([part[box] for box in form.boxes], 1)
    readouts = _Readouts(
        table(parameters.rate_readout),
        table(parameters.rate_bias)[..., None],
        parameters.retain_readout[:, None],
        parameters.retain_bias[:, None, None],
    )
    c = _window(q.shape[1], form.periods)
    cut = functools.partial(windows.cut, c=c, every=every, position=_position(begin))
    momentum = None if momentum is None else cut(momentum.astype(dtype))[..., None, :]
    tokens = _Tokens(cut(x.key), cut(x.value), cut(x.gate), cut(q), momentum)
    return readouts, state, tokens


def _marks(form: _Form, every: int, q, begin):
    t, dtype = q.shape[1], jnp.promote_types(jnp.float32, q.dtype)
    c = _window(t, form.periods)
    return windows.marks(t, c, every, form.periods, _position(begin), dtype)


def _position(begin):
    return None if begin is None else begin.position


def _step(form: _Form, readouts: _Readouts, state: _State, tokens: _Tokens, marks):
    """One window of one head: makes the tokens, writes every box, reads, fires."""
    out = tokens.q.dtype
    readouts, state, tokens, marks = jax.tree.map(lambda a: a[0], (readouts, state, tokens, marks))
    dtype = state.start[0].dtype
    tokens = jax.tree.map(lambda a: a.astype(dtype), tokens)
    piece = windows.piece(marks)
    q, k, v, retain, rate = _generate(form, readouts, state.start, tokens)
    decay = _chunk.make_decay(retain, tokens.momentum, piece, _chunk.IN_KERNEL)
    n = len(form.boxes)
    spread = lambda z: jnp.broadcast_to(z, (n, *z.shape))
    target = _chunk.mlp(state.start, spread(v), form.activation)
    trace = _chunk.backward(state.start, spread(k), target, form.activation)
    own = functools.partial(jax.tree.map, lambda a: a[xla.MEMORY :][:1] if len(a) > 1 else a)
    hidden, weights, momentum = q[None], [], []
    for layer, weight in enumerate(state.weights):
        buffer = None if state.momentum is None else state.momentum[layer]
        z, delta = _chunk.direction(trace.inputs[layer], trace.errors[layer], form.clip)
        erase = rate if form.erase else None
        write = _chunk.solve_write(
            weight, buffer, z, delta, rate, erase, piece, decay, _chunk.IN_KERNEL
        )
        if form.read == "after_write":
            hidden = form.activation(hidden) if layer else hidden
            hidden = _chunk.read_write(hidden, *own((weight, buffer, write, decay)))
        weight, buffer = _chunk.end_write(weight, buffer, write, piece, decay)
        weights.append(weight)
        momentum.append(buffer)
    if form.read == "after_write":
        y = q + hidden[0]
    else:
        y = _chunk.mlp(own(state.start), q[None], form.activation)[0]
    fires = _by_box(n, marks[3:4, :1], marks[4:5, :1])[..., None] > 0
    weights = tuple(jnp.where(fires, _chunk.bound_norm(w, form.bound), w) for w in weights)
    pairs = zip(weights, state.start, strict=True)
    start = tuple(jnp.where(fires, w, old) for w, old in pairs)
    after = _State(weights, start, None if state.momentum is None else tuple(momentum))
    return jax.tree.map(lambda a: a[None], after), y[None].astype(out)


def _generate(form: _Form, readouts: _Readouts, start, tokens: _Tokens):
    """Query, key and value [c, d], retention [1, c] and rates [n, c], from the boundary weights."""
    streams = jnp.stack([tokens.key, tokens.value, tokens.gate, tokens.gate])
    made = _chunk.mlp([w[:4] for w in start], streams, form.activation)
    q = tokens.q
    if len(form.boxes) > xla.QUERY:
        box = [w[xla.QUERY :] for w in start]
        q = xla.normalise(_chunk.mlp(box, q[None], form.activation)[0])
    retain = exact_product(readouts.retain, made[3].T) + readouts.retain_bias
    rate = exact_product(readouts.rate, made[2].T) + readouts.rate_bias
    retain, rate = jax.nn.sigmoid(retain), jax.nn.sigmoid(rate)
    half = [0.5 if period == 1 else 1.0 for period in form.periods]
    top = _by_box(len(form.boxes), *half).astype(rate.dtype) * (1.0 + retain)
    return q, xla.normalise(made[0]), made[1], retain, top * rate


def _by_box(n: int, of_memory, of_others):
    """[n, 1]: one value for the box "memory", another for all others."""
    box = jax.lax.broadcasted_iota(jnp.int32, (n, 1), 0)
    return jnp.where(box == xla.MEMORY, of_memory, of_others)


def _stacked(form: _Form, table, axis: int):
    return tuple(jnp.stack([table[box][i] for box in form.boxes], axis) for i in range(2))


def _stack(form: _Form, table) -> Any:
    return None if table is None else _stacked(form, table, 2)


def _unstack(form: _Form, state: _State):
    """The leaves of a state: weights, chunk_start and momentum, box by box."""
    one = lambda pair: {box: tuple(w[:, :, n] for w in pair) for n, box in enumerate(form.boxes)}
    return tuple(None if pair is None else one(pair) for pair in state)
