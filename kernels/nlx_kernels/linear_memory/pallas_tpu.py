# SPDX-License-Identifier: Apache-2.0
"""linear_memory as Pallas TPU kernels: blocks prepared and advanced where the state is, in VMEM.

The mathematics of a block is `xla.prepare` and `xla.advance`, traced inside the kernels, forward
and backward (`_chunk_scan_tpu`): between the tokens read and the reads written nothing leaves VMEM,
no inverse and no product of gates. Products of tokens and state are float32 for float32 inputs; for
bfloat16 their operands are rounded to bfloat16 on the way into the matrix unit, the sums float32.
The inverse, and the products of gates, are float32 for both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlx_kernels import _chunk_scan_tpu as chunk_scan
from nlx_kernels import _tpu
from nlx_kernels._checks import numbered, resets
from nlx_kernels._derivative import differentiable
from nlx_kernels._solve import interval_products_in_kernel
from nlx_kernels.linear_memory import xla

BLOCK = 64  # tokens
EVERY = 4  # blocks from one kept state to the next
# Arrays [c, c], [c, k] or [c, v] that a block's derivative was seen to hold in VMEM.
HELD, HELD_FLOAT32 = 24, 60
HEADS = 4  # heads whose blocks are computed side by side, so that one fills another's waiting


class _Tokens(NamedTuple):
    """Tokens as the kernels see them, in blocks of c."""

    q: jax.Array  # [b, h, n, c, k]
    k: jax.Array
    v: jax.Array
    gates: jax.Array  # [b, h, n, 3, c]: retain, erase, rate


def linear_memory(
    q, k, v, *, retain, erase, rate, state, read, segment_ids, block_size, interpret=False
):
    """Arguments checked and filled in; the result does not depend on `block_size`."""
    block_size = block_size or BLOCK
    plain = functools.partial(_plain, read=read, block_size=block_size)
    settings = read, block_size, interpret
    run = differentiable(
        functools.partial(_forward, settings), functools.partial(_backward, settings), plain
    )
    return run(q, k, v, retain, erase, rate, state, numbered(segment_ids, retain))


def refusal(q, k, v, *, retain, erase, rate, state, block_size, interpret, **_) -> str | None:
    """Why the kernels cannot take a call, as the end of a sentence; None if they can."""
    if not interpret and state.dtype != jnp.float32:
        return "is for float32 and bfloat16; float64 is for interpret=True, or another form"
    settings = "after_write", block_size or BLOCK, interpret
    return _tpu.too_large(*_plan(settings, q, k, v, retain, erase, rate, state, None))


def _plain(q, k, v, retain, erase, rate, state, segment_ids, **options):
    y, state = xla.linear_memory(
        q, k, v, retain=retain, erase=erase, rate=rate, state=state, segment_ids=segment_ids,
        **options,
    )  # fmt: skip
    return y.astype(q.dtype), state


def _forward(settings, *arrays):
    *tokens, state, segment_ids = arrays
    plan, *_ = _plan(settings, *arrays)
    t = tokens[0].shape[1]
    tokens, kept = _cut(segment_ids, settings[1], plan.every, *tokens)
    y, state, checkpoints = chunk_scan.forward(plan, (), state, tokens, kept)
    return (_join(y, t), state), checkpoints


def _backward(settings, arrays, checkpoints, slopes):
    *tokens, _, segment_ids = arrays
    plan, *_ = _plan(settings, *arrays)
    cut = functools.partial(_cut, segment_ids, settings[1], plan.every)
    (tokens, kept), pull = jax.vjp(cut, *tokens)
    by_y, by_state = slopes
    by_y = _blocks(by_y, tokens.q.shape[3], 0, plan.every)
    _, state, tokens = chunk_scan.backward(plan, (), checkpoints, tokens, kept, (by_y, by_state))
    no_slope = jax.tree.map(jnp.zeros_like, segment_ids)
    return *pull((tokens, jnp.zeros_like(kept))), state, no_slope


def _plan(settings, *arrays):
    """The plan for a call, and the shapes of what it works on, with one row."""
    read, block_size, interpret = settings
    *tokens, state = jax.eval_shape(lambda arrays: [x[:1] for x in arrays], arrays[:-1])
    t, heads = tokens[0].shape[1], tokens[0].shape[2]
    plan = chunk_scan.Plan(
        name="linear_memory",
        step=functools.partial(_step, read),
        every=min(EVERY, 1 << (-(-t // min(block_size, t)) - 1).bit_length()),
        heads=max(n for n in range(1, HEADS + 1) if heads % n == 0),
        precision="default" if tokens[0].dtype == jnp.bfloat16 else "highest",
        work=0,
        interpret=interpret,
    )
    parts = (), state, *jax.eval_shape(functools.partial(_cut, None, block_size, 1), *tokens)
    _, _, (q, _, v, _), _ = parts
    c, widest = q.shape[3], max(q.shape[3], q.shape[4], v.shape[4])
    held = HELD if q.dtype == jnp.bfloat16 else HELD_FLOAT32
    plan = plan._replace(work=held * plan.heads * _tpu.block_bytes((c, widest)))
    return _tpu.fit(plan, *parts), *parts


def _step(read, constants, state, tokens: _Tokens, kept):
    """One block of some heads: the state after it, and its reads."""
    del constants
    wide = lambda x: x.astype(state.dtype)
    retain, erase, rate = (tokens.gates[:, i] for i in range(3))
    block = xla.Tokens(
        wide(tokens.q), wide(tokens.k), wide(tokens.v), retain, erase, rate, kept[:, 0]
    )
    state, y = xla.advance(state, xla.prepare(block, read, interval_products_in_kernel))
    return state, y.astype(tokens.q.dtype)


def _cut(segment_ids, block_size: int, every: int, q, k, v, retain, erase, rate):
    """Blocks of tokens that change nothing where none are left, and where a segment begins."""
    b, t = q.shape[:2]
    c = min(block_size, t)
    reset = resets(segment_ids)
    kept = jnp.ones((b, t), retain.dtype) if reset is None else (~reset).astype(retain.dtype)
    cut = lambda x: _blocks(x, c, 0, every)
    gates = [
        _blocks(gate, c, neutral, every) for gate, neutral in ((retain, 1), (erase, 0), (rate, 0))
    ]
    tokens = _Tokens(cut(q), cut(k), cut(v), jnp.stack(gates, 3))
    return tokens, _blocks(kept[..., None], c, 1, every)[..., None, :]


def _blocks(x, c: int, neutral: float, every: int):
    """[b, t, h, ...] as [b, h, n, c, ...], n a multiple of `every`."""
    b, t, h = x.shape[:3]
    pad = [(0, 0), (0, -t % (c * every))] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=neutral).reshape(b, -1, c, h, *x.shape[3:])
    return jnp.moveaxis(x, 3, 1)


def _join(y, t: int):
    """[b, h, n, c, v] as [b, t, h, v]."""
    b, h, n, c, v = y.shape
    return jnp.moveaxis(y, 1, 3).reshape(b, n * c, h, v)[:, :t]
