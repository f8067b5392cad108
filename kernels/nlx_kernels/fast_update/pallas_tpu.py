# SPDX-License-Identifier: Apache-2.0
"""fast_update as a Pallas TPU kernel: one pass over each array of weights, in place.

Every array is taken as matrices [b, i, o], in tiles of whole rows; the numbers of the batch's rows
lie in scalar memory. Bound by memory, as is its XLA form, one fusion: what the kernel has over that
is that weights, sums and momentum are written where they were read. The gradient is the XLA form's.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nlx_kernels import _tpu
from nlx_kernels._derivative import differentiable
from nlx_kernels.fast_update import xla
from nlx_kernels.fast_update.carry import FastCarry
from nlx_kernels.placement import axes, on_each

TILE = 2**18  # numbers of a tile at most


def fast_update(weights, carry, gradient, *, ticks, fires, rate, momentum, decay, interpret=False):
    """Arguments are checked, and what `refusal` refuses does not come here."""
    count = carry.ticks + ticks
    after = jnp.where(fires, 0, count)
    leaves, tree = jax.tree.flatten(weights)
    flat = lambda part: [None] * len(leaves) if part is None else tree.flatten_up_to(part)
    parts = list(zip(leaves, flat(carry.total), flat(gradient), flat(carry.momentum), strict=True))
    gates = (rate, momentum, decay)

    def plain(parts, gates):
        zero, share, pull = gates
        lists = [list(part) for part in zip(*parts, strict=True)]
        moved = lists[3] if momentum is not None else None
        given = FastCarry(lists[1], carry.ticks, moved)
        made, new = xla.fast_update(
            lists[0], given, lists[2], ticks=ticks, fires=fires, rate=zero, momentum=share,
            decay=pull,
        )  # fmt: skip
        buffers = new.momentum or [None] * len(made)
        return list(zip(made, new.total, buffers, strict=True))

    def forward(parts, gates):
        one = functools.partial(_leaf, interpret)
        return [one(part, gates, count, fires) for part in parts], ()

    def backward(arrays, kept, slopes):
        del kept
        return jax.vjp(plain, *arrays)[1](slopes)

    made = differentiable(forward, backward, plain)(parts, gates)
    weights, total, buffer = (tree.unflatten(list(part)) for part in zip(*made, strict=True))
    return weights, FastCarry(total, after, None if momentum is None else buffer)


def refusal(weights, carry, gradient, *, rate, interpret, **_) -> str | None:
    """Why the kernel cannot take a call, as the end of a sentence; None if it can."""
    del carry, gradient, rate
    if not interpret and any(w.dtype == jnp.float64 for w in jax.tree.leaves(weights)):
        return "is for float32 and bfloat16; float64 is for interpret=True, or another form"
    if axes(("tensor",), 0):
        return "is for a mesh that does not split weights over an axis 'tensor'"
    if not all(_tile(*_matrix(w.shape)[1:]) for w in jax.tree.leaves(weights)):
        return "is for arrays whose rows can be cut into tiles of 16 rows or a multiple"
    return None


def _matrix(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """An array [b, ...] as matrices."""
    rows, *rest = shape
    columns = rest[-1] if rest else 1
    return rows, math.prod(rest[:-1]), columns


def _tile(rows: int, columns: int) -> int:
    """Rows of a tile: all, or the most that divide them; 0: there is no such number."""
    most = TILE // columns
    return (
        rows
        if rows <= most
        else max((n for n in range(16, most + 1, 16) if rows % n == 0), default=0)
    )


def _leaf(interpret: bool, part, gates, count, fires):
    """One array: its new weights, sum and momentum, each device of the mesh in context its rows."""
    given = dict(count=count, fires=fires, part=part, gates=gates)
    run = functools.partial(_one_device, interpret)
    return on_each(run, given, dict.fromkeys(given, "b"), "b", b=len(count))


def _one_device(interpret: bool, count, fires, part, gates):
    w, total, gradient, buffer = part
    b, rows, columns = _matrix(w.shape)
    matrix = lambda x: x.reshape(b, rows, columns)
    parts = [matrix(x) for x in (w, total, gradient, buffer) if x is not None]
    tile = _tile(rows, columns)
    numbers = [jnp.maximum(count, 1), fires, *(0 * count if g is None else g for g in gates)]
    numbers = jnp.stack([x.astype(total.dtype) for x in numbers])
    spec = pl.BlockSpec((None, tile, columns), lambda i, j: (i, j, 0))
    made = [parts[0], parts[1], *parts[3:]]
    out = pl.pallas_call(
        _kernel,
        name="fast_update",
        grid=(b, rows // tile),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] + [spec] * len(parts),
        out_specs=[spec] * len(made),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in made],
        input_output_aliases={1: 0, 2: 1} | ({4: 2} if buffer is not None else {}),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=_tpu.VMEM_LIMIT,
        ),
        interpret=_tpu.interpreter(parts) if interpret else False,
    )(numbers, *parts)
    moved = [x.reshape(w.shape) for x in out]
    return moved[0], moved[1], moved[2] if buffer is not None else None


def _kernel(numbers, w, total, gradient, *rest):
    """numbers [5, b]: ticks, whether the row fires, rate, momentum, decay."""
    row = pl.program_id(0)
    ticks, fires, rate, momentum, decay = (numbers[i, row] for i in range(5))
    buffer, outputs = (rest[0], rest[1:]) if len(rest) == 4 else (None, rest)
    summed = total[...] + gradient[...]
    step = summed / ticks
    if buffer is not None:
        step = momentum * buffer[...] + step
    wide = w[...].astype(step.dtype)
    moved = wide - rate * (step + decay * wide)
    outputs[0][...] = jnp.where(fires > 0, moved, wide).astype(w.dtype)
    outputs[1][...] = jnp.where(fires > 0, 0, summed)
    if buffer is not None:
        outputs[2][...] = jnp.where(fires > 0, step, buffer[...])
