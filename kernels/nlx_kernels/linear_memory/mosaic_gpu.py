# SPDX-License-Identifier: Apache-2.0
"""linear_memory as Mosaic GPU kernels for Hopper: bfloat16 products, float32 sums and states.

Forward: `mosaic_prepare` (all chunks at once), then `mosaic_scan` (one after another), keeping
nothing but the arguments; backward both run again, then `mosaic_reverse`, then `mosaic_slopes` (all
chunks at once). The slopes of the gates are finished here, where they are vectors.

What is not finite makes something of what the kernels give not finite. Only then is the call done
again, with such tokens kept to their segment (`finite.guarded`): looking for them first took as
long as the kernels.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from nlx_kernels._checks import numbered, resets
from nlx_kernels._derivative import differentiable
from nlx_kernels._mosaic import SIDE, is_hopper
from nlx_kernels.linear_memory import xla
from nlx_kernels.linear_memory.finite import guarded
from nlx_kernels.linear_memory.mosaic_prepare import prepare
from nlx_kernels.linear_memory.mosaic_reverse import reverse
from nlx_kernels.linear_memory.mosaic_scan import scan
from nlx_kernels.linear_memory.mosaic_slopes import slopes

WIDEST = 128  # channels of one program's keys and values
FORGOTTEN = 256.0  # powers of two that nothing survives: 2^-256 is 0 in float32


class _Call(NamedTuple):
    """What of a call is no array with a gradient."""

    read: str
    interpret: object


class _Gates(NamedTuple):
    """The gates of the chunks, [b h, n, 64] each."""

    kept: jax.Array  # 0 where a segment begins
    retain: jax.Array  # 0 there too
    erase: jax.Array
    rate: jax.Array
    after: jax.Array  # log2 of the product of retain since the chunk's start
    before: jax.Array  # the same without the token's own; FORGOTTEN lower where a segment begins


def linear_memory(
    q, k, v, *, retain, erase, rate, state, read, segment_ids, block_size, interpret=False
):
    """Arguments checked; `block_size` is 64 or None.

    Values of more than 128 channels are scanned in parts of 128, all with the chunks that were
    prepared once: columns of a state do not touch each other.
    """
    del block_size
    call = _Call(read, plgpu.InterpretGPUParams() if interpret else False)
    run = differentiable(
        functools.partial(_forward, call),
        functools.partial(_backward, call),
        functools.partial(_guarded, xla.linear_memory, call),
    )
    return run(q, k, v, retain, erase, rate, state, numbered(segment_ids, retain))


def refusal(q, k, v, *, block_size, interpret, **_) -> str | None:
    """Why the kernels cannot take a call, as the end of a sentence; None if they can."""
    if not interpret and not is_hopper():
        return "is for Hopper GPUs (sm_90a); elsewhere it must be another form, or interpret=True"
    if q.dtype != jnp.bfloat16:
        return f"multiplies bfloat16; q, k and v must be bfloat16, not {q.dtype.name}"
    tiles, size = "has tiles of 64 and 128 channels; those of", k.shape[-1]
    if size not in (64, WIDEST):
        return f"{tiles} k must be 64 or 128, not {size}"
    if (size := v.shape[-1]) != 64 and size % WIDEST:
        return f"{tiles} v must be 64 or a multiple of 128, not {size}"
    if block_size not in (None, SIDE):
        return f"computes 64 tokens together; block_size must be 64 or None, not {block_size}"
    return None


def _forward(call: _Call, *arrays):
    y, last, spoiled = _fast_forward(call, *arrays)
    finite = jnp.all(spoiled == 0) & jnp.all(jnp.isfinite(last))
    again = lambda: _guarded(_fast, call, *arrays)
    return jax.lax.cond(finite, lambda: (y, last), again), finite.astype(jnp.float32)


def _backward(call: _Call, arrays, finite, cotangent):
    again = lambda: jax.vjp(functools.partial(_guarded, _fast, call), *arrays)[1](cotangent)
    return jax.lax.cond(finite > 0, lambda: _fast_backward(call, arrays, cotangent), again)


def _guarded(form, call: _Call, q, k, v, retain, erase, rate, state, segment_ids):
    """Another form, or the kernels, between what takes out what is not finite and its mark."""
    return guarded(form)(
        q, k, v, retain=retain, erase=erase, rate=rate, state=state, read=call.read,
        segment_ids=segment_ids, block_size=SIDE,
        **({"call": call} if form is _fast else {}),
    )  # fmt: skip


def _fast(q, k, v, *, retain, erase, rate, state, segment_ids, call, **_):
    """The kernels, for what is finite."""
    run = differentiable(
        lambda *arrays: (_fast_forward(call, *arrays)[:2], ()),
        lambda arrays, _, cotangent: _fast_backward(call, arrays, cotangent),
        functools.partial(_guarded, xla.linear_memory, call),
    )
    return run(q, k, v, retain, erase, rate, state, segment_ids)


def _fast_forward(call: _Call, q, k, v, retain, erase, rate, state, segment_ids):
    """y, the state, and for each head and value 0, or NaN where a read was not finite."""
    t, options = q.shape[1], dict(interpret=call.interpret)
    q, k, v, gates = _cut(segment_ids, q, k, v, retain, erase, rate)
    of_prepare, vectors = _of_prepare(gates), _stack(*_of_scan(call.read, gates))
    made = prepare(q, k, _stack(*of_prepare), read=call.read, inverse=False, **options)
    reads, states, spoiled = [], [], []
    for values, start in zip(_parts(v), _parts(state), strict=True):
        y, last, marks = scan(q, k, values, *made, vectors, _turn(start), reads=True, **options)
        reads.append(y[:, :t])
        states.append(_turn(last).reshape(start.shape))
        spoiled.append(marks)
    return jnp.concatenate(reads, -1), jnp.concatenate(states, -1), jnp.stack(spoiled)


def _fast_backward(call: _Call, arrays, cotangent):
    """The slope of every array."""
    q, k, v, retain, erase, rate, state, segment_ids = arrays
    dy, d_last = cotangent
    t, options = q.shape[1], dict(interpret=call.interpret)
    q, k, v, gates = _cut(segment_ids, q, k, v, retain, erase, rate)
    dy = _fill(dy, 0)
    of_prepare, of_scan = _of_prepare(gates), _of_scan(call.read, gates)
    vectors, both = _stack(*of_scan), _stack(*of_prepare, *of_scan[:2])
    *made, inverse = prepare(q, k, _stack(*of_prepare), read=call.read, inverse=True, **options)

    def part(v, state, dy, d_last):
        u, starts, _ = scan(q, k, v, *made, vectors, _turn(state), reads=False, **options)
        du, ends, first = reverse(q, k, dy, *made[1:], vectors, _turn(d_last), **options)
        found = slopes(q, k, v, u, dy, du, inverse, starts, ends, both, read=call.read, **options)
        return *found, _turn(first).reshape(state.shape)

    cut = zip(*map(_parts, (v, state, dy, d_last)), strict=True)
    dq, dk, dv, sums, first = zip(*(part(*columns) for columns in cut), strict=True)
    total = lambda parts: sum(x.astype(jnp.float32) for x in parts).astype(parts[0].dtype)
    along = lambda x: jnp.moveaxis(x.reshape(*retain.shape[::2], -1), 1, 2)
    of_gates = (along(x) for x in _gate_slopes(call.read, gates, total(sums)))
    answer = [total(dq), total(dk), jnp.concatenate(dv, -1), *of_gates]
    no_slope = jax.tree.map(jnp.zeros_like, segment_ids)
    return *(x[:, :t] for x in answer), jnp.concatenate(first, -1), no_slope


def _parts(x):
    """What has a column for each value, in parts that one program takes."""
    return jnp.split(x, -(-x.shape[-1] // WIDEST), -1)


def _cut(segment_ids, q, k, v, retain, erase, rate):
    """Whole chunks, the last one filled up with tokens that change nothing; and their gates."""
    reset = resets(segment_ids)
    kept = jnp.ones_like(retain[..., 0]) if reset is None else 1.0 - reset
    kept = jnp.broadcast_to(kept[..., None], retain.shape).astype(retain.dtype)
    kept, retain, erase, rate = (
        _chunks(x, neutral) for x, neutral in ((kept, 1), (retain, 1), (erase, 0), (rate, 0))
    )
    retain = retain * kept
    resets_all = retain < 2.0**-126
    logs = jnp.where(resets_all, -FORGOTTEN, jnp.log2(jnp.where(resets_all, 1, retain)))
    after = jnp.cumsum(logs, -1)
    before = jnp.pad(after[..., :-1], ((0, 0), (0, 0), (1, 0))) - FORGOTTEN * (1 - kept)
    gates = _Gates(kept, retain, erase, rate, after, before)
    return *(_fill(x, 0) for x in (q, k, v)), gates


def _of_prepare(gates: _Gates):
    since_start = gates.erase * jnp.exp2(gates.before)
    return gates.after, gates.before, gates.erase, gates.rate, since_start


def _of_scan(read: str, gates: _Gates):
    end = gates.after[..., -1:]
    reads = jnp.exp2(gates.after if read == "after_write" else gates.before)
    return reads, jnp.exp2(end - gates.after), jnp.broadcast_to(jnp.exp2(end), reads.shape)


def _gate_slopes(read: str, gates: _Gates, sums):
    """Slopes of retain, erase and rate [b h, n, 64], where retain may be 0.

    With B[t, j] the product of retain between tokens j and t, both left out, and B[t, 0] the one
    since the chunk's start: d(retain_i) = sum_{t > i > j} dB[t, j] B[t, i] B[i, j]. What the kernel
    knows of dB is summed there; here follow column 0 and the chunk's end.
    """
    d_rate, d_erase, d_retain, d_read, d_start, d_kept, d_carry = jnp.moveaxis(sums, -2, 0)
    d_carry = jnp.sum(d_carry, -1, keepdims=True)
    start, last = jnp.exp2(gates.before), gates.retain[..., -1:]
    lower = jnp.tri(SIDE, k=-1, dtype=bool)[None, None]
    between = jnp.where(
        lower, jnp.exp2(jnp.minimum(gates.before[..., None] - gates.after[..., None, :], 0)), 0
    )
    d_since = gates.erase * d_start + d_read * (gates.retain if read == "after_write" else 1)
    d_since = d_since.at[..., -1].add((last * d_carry)[..., 0])
    at_end = jnp.sum(between[..., -1, :] * d_kept, -1) + start[..., -1] * d_carry[..., 0]
    d_retain = d_retain.at[..., -1].add(at_end)
    if read == "after_write":
        d_retain = d_retain + d_read * start
    d_retain = d_retain + start * jnp.sum(between * d_since[..., None], -2)
    d_retain = d_retain + last * between[..., -1, :] * jnp.sum(between * d_kept[..., None, :], -1)
    return d_retain * gates.kept, d_erase + d_start * start, d_rate


def _fill(x, neutral: float):
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, -x.shape[1] % SIDE)
    return jnp.pad(x, pad, constant_values=neutral) if pad[1][1] else x


def _chunks(x, neutral: float):
    """[b, t, h] to [b h, n, 64]."""
    x = jnp.moveaxis(_fill(x, neutral), 2, 1)
    return x.reshape(x.shape[0] * x.shape[1], -1, SIDE)


def _stack(*vectors):
    return jnp.stack(vectors, -2)


def _turn(state):
    """A state of every head, transposed."""
    return state.reshape(-1, *state.shape[-2:]).mT
