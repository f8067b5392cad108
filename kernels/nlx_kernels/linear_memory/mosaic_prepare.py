# SPDX-License-Identifier: Apache-2.0
"""What the loop over chunks needs of each chunk, as a kernel: one program for a chunk and head.

The inverse X = (I + L)^-1 is built as in `nlx_kernels._solve`, by joining solved blocks, on the
tensor cores in bfloat16, and then corrected once, X + X (I - (I + L) X), with L in two parts of
bfloat16: its error, up to 4e-2 for keys of correlation 0.95 and erase 1.9, falls below 2e-3, which
is what rounding X costs.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from nlx_kernels._mosaic import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    SIDE,
    Products,
    columns,
    narrow,
    rows,
    tiles,
)

AFTER, BEFORE, ERASE, RATE, START = range(5)  # rows of `gates`
SQUARE = (SIDE, SIDE)


@narrow
@functools.partial(jax.jit, static_argnames=("read", "inverse", "interpret"))
def prepare(q, k, gates, *, read, inverse, interpret):
    """X diag(rate), X diag(start), scores, and X if wanted, each [b h, n, 64, 64] bfloat16.

        L[t, j] = erase_t 2^(before_t - after_j) k_t . k_j      j < t
        scores[t, j] = 2^(after_t - after_j) q_t . k_j          j <= t   (read="after_write")
                       2^(before_t - after_j) q_t . k_j         j < t    (read="chunk_start")

    Args:
      q, k: [b, t, h, k] bfloat16, t a multiple of 64.
      gates: [b h, n, 5, 64] float32: logarithms to base 2 of the products of retain since the
        chunk's start, with and without the token's own; erase; rate; erase 2^before.
      read: as `linear_memory` takes it.
      inverse: whether X is wanted.
      interpret: how the kernel runs on a CPU, or False.
    """
    b, t, h, dk = k.shape
    n = t // SIDE
    cores = Products(bool(interpret))

    def body(q, k, gates, *refs):
        outputs, (q_s, k_s, x_s, y_s, out_s, gates_s, ready) = (
            refs[: 3 + inverse],
            refs[3 + inverse :],
        )
        head, i = jax.lax.axis_index("head"), jax.lax.axis_index("chunk")
        row, column = jax.lax.div(head, jnp.int32(h)), jax.lax.rem(head, jnp.int32(h))
        tokens = pl.ds(i * SIDE, SIDE)
        plgpu.copy_gmem_to_smem(gates.at[head, i], gates_s, ready)
        plgpu.copy_gmem_to_smem(k.at[row, tokens, column], k_s, ready)
        plgpu.copy_gmem_to_smem(q.at[row, tokens, column], q_s, ready)
        plgpu.barrier_wait(ready)
        down = lambda which: rows(
            plgpu.load(gates_s.at[which], layout=PER_ROW, optimized=False), SQUARE
        )
        across = lambda which: columns(
            plgpu.load(gates_s.at[which], layout=PER_COLUMN, optimized=False), SQUARE
        )
        lower, _, diagonal, apart = masks()
        since = across(AFTER)
        decay = lambda which: jnp.exp2(jnp.minimum(down(which) - since, 0.0))

        scores = cores.product((q_s, k_s.T))
        if read == "after_write":
            scores = jnp.where(lower | diagonal, scores * decay(AFTER), 0.0)
        else:
            scores = jnp.where(lower, scores * decay(BEFORE), 0.0)
        store(outputs[2].at[head, i], out_s.at[2], scores)

        keys = plgpu.load(k_s, layout=MATRIX)
        system = cores.product((keys, k_s.T)) * (decay(BEFORE) * down(ERASE))
        x = invert(cores, jnp.where(lower, system, 0.0), diagonal, apart, x_s, y_s)
        store(outputs[0].at[head, i], out_s.at[0], x * across(RATE))
        store(outputs[1].at[head, i], out_s.at[1], x * across(START))
        if inverse:
            store(outputs[3].at[head, i], out_s.at[3], x)
        plgpu.wait_smem_to_gmem(0)

    square = jax.ShapeDtypeStruct((b * h, n, SIDE, SIDE), jnp.bfloat16)
    return plgpu.kernel(
        body,
        out_type=[square] * (3 + inverse),
        scratch_types=[
            tiles(SIDE, dk),
            tiles(SIDE, dk),
            tiles(SIDE, SIDE),
            tiles(SIDE, SIDE),
            tiles(3 + inverse, SIDE, SIDE),
            plgpu.SMEM((5, SIDE), jnp.float32),
            plgpu.Barrier(num_arrivals=3),
        ],
        grid=(b * h, n),
        grid_names=("head", "chunk"),
        kernel_name="linear_memory_prepare",
        interpret=interpret,
    )(q, k, gates)


def masks():
    """Below the diagonal, above it, on it, and the exclusive or of row and column."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=MATRIX) for axis in (0, 1)
    )
    return row > column, row < column, row == column, row ^ column


def invert(cores: Products, system, diagonal, apart, x_s, y_s):
    """(I + system)^-1, with two buffers in shared memory; `system` is 0 but below its diagonal."""
    low = lambda x: x.astype(jnp.bfloat16)
    eye = jnp.where(diagonal, 1.0, 0.0)
    x = eye - jnp.where(apart == 1, system, 0.0)
    for size in (2, 4, 8, 16, 32):
        joins = jnp.where((apart >= size) & (apart < 2 * size), system, 0.0)
        put(x_s, low(x))
        put(y_s, low(cores.product((low(joins), x_s))))
        x = x - cores.product((low(x), y_s))
    rounded = low(x)
    put(x_s, rounded)
    wide, high = rounded.astype(jnp.float32), low(system)
    rest = low(system - high.astype(jnp.float32))
    put(y_s, low(eye - wide - cores.product((high, x_s), (rest, x_s))))
    return wide + cores.product((rounded, y_s))


def put(target, matrix) -> None:
    """Writes a matrix where the tensor cores will read it."""
    target[...] = matrix
    plgpu.commit_smem()


def store(target, buffer, matrix) -> None:
    """Starts to write a matrix to global memory, rounded."""
    buffer[...] = matrix.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)
