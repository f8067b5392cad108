# SPDX-License-Identifier: Apache-2.0
"""The loop over chunks as a kernel: the state stays in registers, tokens stream past it.

A program owns one head and up to two blocks of 64 values, a warpgroup each; one more warpgroup
fetches. All matrices are transposed (values are rows), so that what a product needs on its left is
what the last one left in registers: S^T [64, k], U^T and Y^T [64, 64].
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from nlx_kernels._mosaic import (
    MATRIX,
    PER_COLUMN,
    SIDE,
    Products,
    columns,
    store_transposed,
    tiles,
)

READ, KEPT, CARRY = range(3)  # rows of `gates`


def scan(q, k, v, written, taken, scores, gates, state, *, reads, blocks, stages, interpret):
    """y, S after the last chunk (reads=True), or U, S before every chunk, S after the last.

        U   = written V - taken K S        Y = diag(gates[0]) Q S + scores U
        S' = gates[2] S + K^T diag(gates[1]) U

    Args:
      q, k: [b, t, h, k] bfloat16, t a multiple of 64.
      v: [b, t, h, v] bfloat16.
      written, taken, scores: [b h, n, 64, 64] bfloat16, n = t / 64.
      gates: [b h, n, 3, 64] float32.
      state: S^T [b h, v, k] float32.
      reads: whether Y is wanted, or what a backward pass needs.
      blocks: blocks of 64 values in one program, 1 or 2.
      stages: chunks in flight.
      interpret: how the kernel runs on a CPU, or False.
    """
    b, t, h, dk = k.shape
    dv, n = v.shape[-1], t // SIDE
    stages = min(stages, n)
    width = blocks * SIDE
    cores = Products(bool(interpret))

    def body(q, k, v, written, taken, scores, gates, state, *refs):
        (*outputs, last), buffers = refs[: 2 + (not reads)], refs[2 + (not reads) :]
        q_s, k_s, v_s, written_s, taken_s, scores_s, gates_s, out_s, save_s, full, free = buffers
        head, block, part = (jax.lax.axis_index(x) for x in ("head", "block", "part"))
        row, column = jax.lax.div(head, jnp.int32(h)), jax.lax.rem(head, jnp.int32(h))
        values = pl.ds(block * width, width)
        own = pl.ds(block * width + part * SIDE, SIDE)
        mine = pl.ds(part * SIDE, SIDE)

        def fetch(i, slot):
            tokens = pl.ds(i * SIDE, SIDE)
            pairs = [
                (k.at[row, tokens, column], k_s),
                (v.at[row, tokens, column, values], v_s),
                (written.at[head, i], written_s),
                (taken.at[head, i], taken_s),
                (gates.at[head, i], gates_s),
            ]
            if reads:
                pairs += [(q.at[row, tokens, column], q_s), (scores.at[head, i], scores_s)]
            for source, target in pairs:
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
            s = plgpu.load(state.at[head, own], layout=MATRIX, optimized=False)

            def chunk(i, s):
                slot = jax.lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                tokens = pl.ds(i * SIDE, SIDE)
                key, low = k_s.at[slot], s.astype(jnp.bfloat16)
                gate = lambda which: columns(
                    plgpu.load(gates_s.at[slot, which], layout=PER_COLUMN, optimized=False),
                    (SIDE, SIDE),
                )
                recalled = cores.product((low, key.T)).astype(jnp.bfloat16)
                if reads:
                    y = cores.product((low, q_s.at[slot].T)) * gate(READ)
                u = cores.product(
                    (v_s.at[slot, :, mine].T, written_s.at[slot].T),
                    (-recalled, taken_s.at[slot].T),
                )
                if reads:
                    y = cores.add(y, (u.astype(jnp.bfloat16), scores_s.at[slot].T))
                s = gates_s[slot, CARRY, 0] * s
                s = cores.add(s, ((u * gate(KEPT)).astype(jnp.bfloat16), key))
                plgpu.barrier_arrive(free.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store_transposed(out_s.at[part], (y if reads else u).astype(jnp.bfloat16))
                if not reads:
                    save_s[part] = low
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[part], outputs[0].at[row, tokens, column, own])
                if not reads:
                    plgpu.copy_smem_to_gmem(save_s.at[part], outputs[1].at[head, i, own])
                return s

            s = jax.lax.fori_loop(0, n, chunk, s)
            last[head, own] = s
            plgpu.wait_smem_to_gmem(0)

    ring = functools.partial(tiles, stages)
    wide = jax.ShapeDtypeStruct((b, t, h, dv), jnp.bfloat16)
    starts = [] if reads else [jax.ShapeDtypeStruct((b * h, n, dv, dk), jnp.bfloat16)]
    final = jax.ShapeDtypeStruct((b * h, dv, dk), jnp.float32)
    read_only = ring if reads else lambda *shape: tiles(1, 8, 64)
    return plgpu.kernel(
        body,
        out_type=[wide, *starts, final],
        scratch_types=[
            read_only(SIDE, dk),
            ring(SIDE, dk),
            ring(SIDE, width),
            ring(SIDE, SIDE),
            ring(SIDE, SIDE),
            read_only(SIDE, SIDE),
            plgpu.SMEM((stages, 3, SIDE), jnp.float32),
            tiles(blocks, SIDE, SIDE),
            tiles(1, 8, 64) if reads else tiles(blocks, SIDE, dk),
            plgpu.Barrier(num_arrivals=7 if reads else 5, num_barriers=stages),
            plgpu.Barrier(num_arrivals=blocks, num_barriers=stages),
        ],
        grid=(b * h, dv // width),
        grid_names=("head", "block"),
        num_threads=blocks + 1,
        thread_name="part",
        interpret=interpret,
    )(q, k, v, written, taken, scores, gates, state)
