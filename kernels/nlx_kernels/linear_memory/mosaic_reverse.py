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
    store_transposed,
    tiles,
)
from nlx_kernels.linear_memory.mosaic_scan import CARRY, KEPT, READ


def reverse(q, k, dy, taken, scores, gates, slope, *, blocks, stages, interpret):
    """dU, dS after every chunk, and dS before the first.

        dU = scores^T dY + diag(gates[1]) K dS'
        dS = gates[2] dS' + Q^T diag(gates[0]) dY - K^T taken^T dU

    Args:
      q, k: [b, t, h, k] bfloat16.
      dy: [b, t, h, v] bfloat16.
      taken, scores, gates: as `scan` takes them.
      slope: dS^T after the last chunk, [b h, v, k] float32.
      blocks, stages, interpret: as `scan` takes them.
    """
    b, t, h, dk = k.shape
    dv, n = dy.shape[-1], t // SIDE
    stages = min(stages, n)
    width = blocks * SIDE
    cores = Products(bool(interpret))

    def body(q, k, dy, taken, scores, gates, slope, *refs):
        (du, ends, first), buffers = refs[:3], refs[3:]
        q_s, k_s, dy_s, taken_s, scores_s, gates_s, out_s, save_s, full, free = buffers
        head, block, part = (jax.lax.axis_index(x) for x in ("head", "block", "part"))
        row, column = jax.lax.div(head, jnp.int32(h)), jax.lax.rem(head, jnp.int32(h))
        values = pl.ds(block * width, width)
        own = pl.ds(block * width + part * SIDE, SIDE)
        mine = pl.ds(part * SIDE, SIDE)

        def fetch(step, slot):
            i = n - 1 - step
            tokens = pl.ds(i * SIDE, SIDE)
            for source, target in [
                (k.at[row, tokens, column], k_s),
                (dy.at[row, tokens, column, values], dy_s),
                (scores.at[head, i], scores_s),
                (taken.at[head, i], taken_s),
                (gates.at[head, i], gates_s),
                (q.at[row, tokens, column], q_s),
            ]:
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        @pl.when(part == blocks)
        def _fetch():
            if blocks > 1:
                plgpu.set_max_registers(40, action="decrease")
            for i in range(stages):
                fetch(i, i)

            @pl.loop(0, n - stages)
            def _(i):
                slot = jax.lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(free.at[slot])
                fetch(i + stages, slot)

            for i in range(n - stages, n):  # a program ends when its last barrier was seen
                plgpu.barrier_wait(free.at[i % stages])

        @pl.when(part < blocks)
        def _compute():
            if blocks > 1:
                plgpu.set_max_registers(232, action="increase")
            ds = plgpu.load(slope.at[head, own], layout=MATRIX, optimized=False)

            def chunk(step, ds):
                i, slot = n - 1 - step, jax.lax.rem(step, jnp.int32(stages))
                tokens = pl.ds(i * SIDE, SIDE)
                low = ds.astype(jnp.bfloat16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                save_s[part] = low
                plgpu.barrier_wait(full.at[slot])
                gate = lambda which: columns(
                    plgpu.load(gates_s.at[slot, which], layout=PER_COLUMN, optimized=False),
                    (SIDE, SIDE),
                )
                slopes = dy_s.at[slot, :, mine]
                u = cores.product((low, k_s.at[slot].T)) * gate(KEPT)
                u = cores.add(u, (slopes.T, scores_s.at[slot])).astype(jnp.bfloat16)
                back = cores.product((u, taken_s.at[slot]))
                read = plgpu.load(slopes.T, layout=TRANSPOSED)
                read = plgpu.layout_cast(read, MATRIX).astype(jnp.float32) * gate(READ)
                ds = cores.add(
                    gates_s[slot, CARRY, 0] * ds,
                    (read.astype(jnp.bfloat16), q_s.at[slot]),
                    ((-back).astype(jnp.bfloat16), k_s.at[slot]),
                )
                plgpu.barrier_arrive(free.at[slot])
                store_transposed(out_s.at[part], u)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[part], du.at[row, tokens, column, own])
                plgpu.copy_smem_to_gmem(save_s.at[part], ends.at[head, i, own])
                return ds

            first[head, own] = jax.lax.fori_loop(0, n, chunk, ds)
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
            ring(SIDE, width),
            ring(SIDE, SIDE),
            ring(SIDE, SIDE),
            plgpu.SMEM((stages, 3, SIDE), jnp.float32),
            tiles(blocks, SIDE, SIDE),
            tiles(blocks, SIDE, dk),
            plgpu.Barrier(num_arrivals=6, num_barriers=stages),
            plgpu.Barrier(num_arrivals=blocks, num_barriers=stages),
        ],
        grid=(b * h, dv // width),
        grid_names=("head", "block"),
        num_threads=blocks + 1,
        thread_name="part",
        interpret=interpret,
    )(q, k, dy, taken, scores, gates, slope)
