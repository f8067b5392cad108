# SPDX-License-Identifier: Apache-2.0
"""The loop over chunks as a kernel: the state stays in registers, tokens stream past it.

A program owns 64 values of one head; one warpgroup computes, one fetches. All matrices are
transposed (values are rows), so that what a product needs on its left is what the last one left in
registers: S^T [64, k], U^T and Y^T [64, 64].
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
    narrow,
    store_transposed,
    stream,
    tiles,
)

READ, KEPT, CARRY = range(3)  # rows of `gates`
STAGES = 3  # chunks in flight: 195 of 227 KiB of shared memory with 128 channels
SQUARE = (SIDE, SIDE)


@narrow
@functools.partial(jax.jit, static_argnames=("reads", "interpret"))
def scan(q, k, v, written, taken, scores, gates, state, *, reads, interpret):
    """Y, S after the last chunk, and 0 or NaN per value (reads=True); or U, S before, S after.

        U   = written V - taken K S        Y = diag(gates[0]) Q S + scores U
        S' = gates[2] S + K^T diag(gates[1]) U

    Args:
      q, k: [b, t, h, k] bfloat16, t a multiple of 64.
      v: [b, t, h, v] bfloat16.
      written, taken, scores: [b h, n, 64, 64] bfloat16, n = t / 64.
      gates: [b h, n, 3, 64] float32.
      state: S^T [b h, v, k] float32.
      reads: whether Y is wanted, or what a backward pass needs: U [b, t, h, v], S^T before every
        chunk [b h, n, v, k], both bfloat16.
      interpret: how the kernel runs on a CPU, or False.
    """
    b, t, h, dk = k.shape
    dv, n = v.shape[-1], t // SIDE
    stages = min(STAGES, n)
    cores = Products(bool(interpret))
    low = lambda x: x.astype(jnp.bfloat16)

    def body(q, k, v, written, taken, scores, gates, state, tokens_out, other, last, *buffers):
        q_s, k_s, v_s, written_s, taken_s, scores_s, gates_s, out_s, save_s, full, free = buffers
        head, block, part = (jax.lax.axis_index(x) for x in ("head", "block", "part"))
        row, column = jax.lax.div(head, jnp.int32(h)), jax.lax.rem(head, jnp.int32(h))
        own = pl.ds(block * SIDE, SIDE)

        def fetch(i, slot):
            tokens = pl.ds(i * SIDE, SIDE)
            pairs = [
                (k.at[row, tokens, column], k_s),
                (v.at[row, tokens, column, own], v_s),
                (written.at[head, i], written_s),
                (taken.at[head, i], taken_s),
                (gates.at[head, i], gates_s),
            ]
            if reads:
                pairs += [(q.at[row, tokens, column], q_s), (scores.at[head, i], scores_s)]
            for source, target in pairs:
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        @pl.when(part == 1)
        def _fetch():
            stream(n, stages, fetch, free)

        def chunk(i, carry):
            s, spoiled = carry
            slot = jax.lax.rem(i, jnp.int32(stages))
            plgpu.barrier_wait(full.at[slot])
            before = low(s)
            gate = lambda which: columns(
                plgpu.load(gates_s.at[slot, which], layout=PER_COLUMN, optimized=False), SQUARE
            )

            def products(recalled, u, y):
                cores.multiply(recalled, before, k_s.at[slot].T)
                if reads:
                    cores.multiply(y, before, q_s.at[slot].T)
                cores.multiply(u, v_s.at[slot].T, written_s.at[slot].T)
                taken = low(-cores.read(recalled, 1 + reads))
                cores.multiply(u, taken, taken_s.at[slot].T)
                return cores.read(u), cores.read(y) if reads else None

            u, y = cores.sums(products, SQUARE, SQUARE, SQUARE if reads else (SIDE, 8))
            if reads:
                y = cores.add(y * gate(READ), (low(u), scores_s.at[slot].T))
                spoiled = spoiled + 0.0 * y
            s = cores.add(gates_s[slot, CARRY, 0] * s, (low(u * gate(KEPT)), k_s.at[slot]))
            plgpu.barrier_arrive(free.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store_transposed(out_s, low(y if reads else u))
            if not reads:
                save_s[...] = before
            plgpu.commit_smem()
            tokens = pl.ds(i * SIDE, SIDE)
            plgpu.copy_smem_to_gmem(out_s, tokens_out.at[row, tokens, column, own])
            if not reads:
                plgpu.copy_smem_to_gmem(save_s, other.at[head, i, own])
            return s, spoiled

        @pl.when(part == 0)
        def _compute():
            s = plgpu.load(state.at[head, own], layout=MATRIX, optimized=False)
            clean = plgpu.layout_cast(
                jnp.zeros(SQUARE if reads else (SIDE, 8), jnp.float32), MATRIX
            )
            s, spoiled = jax.lax.fori_loop(jnp.int32(0), jnp.int32(n), chunk, (s, clean))
            last[head, own] = s
            if reads:
                other[head, own] = spoiled.sum(axis=1)
            plgpu.wait_smem_to_gmem(0)

    ring = functools.partial(tiles, stages)
    unused = lambda *shape: tiles(8, 64)
    if reads:
        other = jax.ShapeDtypeStruct((b * h, dv), jnp.float32)
    else:
        other = jax.ShapeDtypeStruct((b * h, n, dv, dk), jnp.bfloat16)
    y_or_u, other, last = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((b, t, h, dv), jnp.bfloat16),
            other,
            jax.ShapeDtypeStruct((b * h, dv, dk), jnp.float32),
        ],
        scratch_types=[
            (ring if reads else unused)(SIDE, dk),
            ring(SIDE, dk),
            ring(SIDE, SIDE),
            ring(SIDE, SIDE),
            ring(SIDE, SIDE),
            (ring if reads else unused)(SIDE, SIDE),
            plgpu.SMEM((stages, 3, SIDE), jnp.float32),
            tiles(SIDE, SIDE),
            (unused if reads else tiles)(SIDE, dk),
            plgpu.Barrier(num_arrivals=7 if reads else 5, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(b * h, dv // SIDE),
        grid_names=("head", "block"),
        num_threads=2,
        thread_name="part",
        kernel_name="linear_memory_scan",
        interpret=interpret,
    )(q, k, v, written, taken, scores, gates, state)
    return (y_or_u, last, other) if reads else (y_or_u, other, last)
