# SPDX-License-Identifier: Apache-2.0
"""The loop over chunks backwards: the slope of the state stays in registers, as in mosaic_scan."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from nlx_kernels._mosaic import (
    MATRIX,
    PER_COLUMN,
    SIDE,
    TRANSPOSED,
    Products,
    columns,
    narrow,
    store_transposed,
    stream,
    tiles,
)
from nlx_kernels.linear_memory.mosaic_scan import CARRY, KEPT, READ, SQUARE, STAGES


@narrow
@functools.partial(jax.jit, static_argnames=("interpret",))
def reverse(q, k, dy, taken, scores, gates, slope, *, interpret):
    """dU [b, t, h, v], dS^T after every chunk [b h, n, v, k], dS^T before the first, float32.

        dU = scores^T dY + diag(gates[1]) K dS'
        dS = gates[2] dS' + Q^T diag(gates[0]) dY - K^T taken^T dU

    Args:
      q, k: [b, t, h, k] bfloat16.
      dy: [b, t, h, v] bfloat16.
      taken, scores, gates: as `scan` takes them.
      slope: dS^T after the last chunk, [b h, v, k] float32.
      interpret: how the kernel runs on a CPU, or False.
    """
    b, t, h, dk = k.shape
    dv, n = dy.shape[-1], t // SIDE
    stages = min(STAGES, n)
    cores = Products(bool(interpret))
    low = lambda x: x.astype(jnp.bfloat16)

    def body(q, k, dy, taken, scores, gates, slope, du, ends, first, *buffers):
        q_s, k_s, dy_s, taken_s, scores_s, gates_s, out_s, save_s, full, free = buffers
        head, block, part = (jax.lax.axis_index(x) for x in ("head", "block", "part"))
        row, column = jax.lax.div(head, jnp.int32(h)), jax.lax.rem(head, jnp.int32(h))
        own = pl.ds(block * SIDE, SIDE)

        def fetch(step, slot):
            i = n - 1 - step
            tokens = pl.ds(i * SIDE, SIDE)
            for source, target in [
                (k.at[row, tokens, column], k_s),
                (dy.at[row, tokens, column, own], dy_s),
                (scores.at[head, i], scores_s),
                (taken.at[head, i], taken_s),
                (gates.at[head, i], gates_s),
                (q.at[row, tokens, column], q_s),
            ]:
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        @pl.when(part == 1)
        def _fetch():
            stream(n, stages, fetch, free)

        def chunk(step, ds):
            i, slot = n - 1 - step, jax.lax.rem(step, jnp.int32(stages))
            after = low(ds)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            save_s[...] = after
            plgpu.barrier_wait(full.at[slot])
            gate = lambda which: columns(
                plgpu.load(gates_s.at[slot, which], layout=PER_COLUMN, optimized=False), SQUARE
            )
            slopes = plgpu.layout_cast(plgpu.load(dy_s.at[slot].T, layout=TRANSPOSED), MATRIX)
            slopes = low(slopes.astype(jnp.float32) * gate(READ))

            def update(ds):
                def products(later, here, back):
                    cores.multiply(later, after, k_s.at[slot].T)
                    cores.multiply(here, dy_s.at[slot].T, scores_s.at[slot])
                    cores.multiply(ds, slopes, q_s.at[slot])
                    u = low(cores.read(later, 2) * gate(KEPT) + cores.read(here, 1))
                    cores.multiply(back, u, taken_s.at[slot])
                    store_transposed(out_s, u)
                    cores.multiply(ds, low(-cores.read(back)), k_s.at[slot])

                cores.sums(products, SQUARE, SQUARE, SQUARE)

            ds = cores.update(gates_s[slot, CARRY, 0] * ds, update)
            plgpu.barrier_arrive(free.at[slot])
            plgpu.commit_smem()
            tokens = pl.ds(i * SIDE, SIDE)
            plgpu.copy_smem_to_gmem(out_s, du.at[row, tokens, column, own])
            plgpu.copy_smem_to_gmem(save_s, ends.at[head, i, own])
            return ds

        @pl.when(part == 0)
        def _compute():
            ds = plgpu.load(slope.at[head, own], layout=MATRIX, optimized=False)
            first[head, own] = jax.lax.fori_loop(jnp.int32(0), jnp.int32(n), chunk, ds)
            plgpu.wait_smem_to_gmem(0)

    ring = functools.partial(tiles, stages)
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((b, t, h, dv), jnp.bfloat16),
            jax.ShapeDtypeStruct((b * h, n, dv, dk), jnp.bfloat16),
            jax.ShapeDtypeStruct((b * h, dv, dk), jnp.float32),
        ],
        scratch_types=[
            ring(SIDE, dk),
            ring(SIDE, dk),
            ring(SIDE, SIDE),
            ring(SIDE, SIDE),
            ring(SIDE, SIDE),
            plgpu.SMEM((stages, 3, SIDE), jnp.float32),
            tiles(SIDE, SIDE),
            tiles(SIDE, dk),
            plgpu.Barrier(num_arrivals=6, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(b * h, dv // SIDE),
        grid_names=("head", "block"),
        num_threads=2,
        thread_name="part",
        kernel_name="linear_memory_reverse",
        interpret=interpret,
    )(q, k, dy, taken, scores, gates, slope)
