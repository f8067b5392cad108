# SPDX-License-Identifier: Apache-2.0
"""The slopes of each chunk's tokens and gates, as a kernel: one program for a chunk and head."""

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
from nlx_kernels.linear_memory.mosaic_prepare import (
    AFTER,
    BEFORE,
    ERASE,
    RATE,
    SQUARE,
    START,
    masks,
    put,
)

READ, KEPT = 5, 6  # rows of `gates` after those of `prepare`
D_RATE, D_ERASE, D_RETAIN, D_READ, D_START, D_KEPT, D_CARRY = range(7)


@narrow
@functools.partial(jax.jit, static_argnames=("read", "interpret"))
def slopes(q, k, v, u, dy, du, inverse, starts, ends, gates, *, read, interpret):
    """dq, dk, dv, and slopes of the gates [b h, n, 7, 64] float32.

    With R = diag(rate) V - diag(start) K S, U = X R, and E, D the products of gates that erase and
    scores hold (README.md):

        dR = X^T dU     dL = -dR U^T     dP = dY U^T     dV = diag(rate) dR
        dQ = diag(read) dY S^T + (dP D) K
        dK = diag(kept) U dS'^T - diag(start) dR S^T + (dP D)^T Q + (G + G^T) K
        G  = dL diag(erase) E

    Args:
      q, k: [b, t, h, k] bfloat16.
      v, u, dy, du: [b, t, h, v] bfloat16.
      inverse: X [b h, n, 64, 64] bfloat16.
      starts, ends: S^T before and dS^T after each chunk, [b h, n, v, k] bfloat16.
      gates: [b h, n, 7, 64] float32: those of `prepare`, then the first two of `scan`.
      read: as `linear_memory` takes it.
      interpret: how the kernel runs on a CPU, or False.
    """
    b, t, h, width = k.shape
    dv, n = v.shape[-1], t // SIDE
    cores = Products(bool(interpret))
    low = lambda x: x.astype(jnp.bfloat16)
    total = lambda x: plgpu.layout_cast(x.sum(axis=1), PER_ROW)

    def body(q, k, v, u, dy, du, inverse, starts, ends, gates, *refs):
        outputs, buffers = refs[:4], refs[4:]
        q_s, k_s, v_s, u_s, dy_s, du_s, x_s, s_s, ds_s, *buffers = buffers
        a_s, b_s, o_s, gates_s, sums_s, ready = buffers
        head, i = jax.lax.axis_index("head"), jax.lax.axis_index("chunk")
        row, column = jax.lax.div(head, jnp.int32(h)), jax.lax.rem(head, jnp.int32(h))
        tokens = pl.ds(i * SIDE, SIDE)
        for source, target in [(q, q_s), (k, k_s), (v, v_s), (u, u_s), (dy, dy_s), (du, du_s)]:
            plgpu.copy_gmem_to_smem(source.at[row, tokens, column], target, ready)
        for source, target in [(inverse, x_s), (starts, s_s), (ends, ds_s), (gates, gates_s)]:
            plgpu.copy_gmem_to_smem(source.at[head, i], target, ready)
        plgpu.barrier_wait(ready)

        down = lambda which, shape=SQUARE: rows(
            plgpu.load(gates_s.at[which], layout=PER_ROW, optimized=False), shape
        )
        across = lambda which: columns(
            plgpu.load(gates_s.at[which], layout=PER_COLUMN, optimized=False), SQUARE
        )
        matrix = lambda ref: plgpu.load(ref, layout=MATRIX).astype(jnp.float32)
        lower, upper, diagonal, _ = masks()
        power = lambda exponent, where: jnp.where(where, jnp.exp2(jnp.minimum(exponent, 0.0)), 0.0)
        since = across(AFTER)
        before = power(down(BEFORE) - since, lower)

        # Q, and the gates of its scores
        dp = cores.product((dy_s, u_s.T))
        decayed = jnp.where(lower, dp * cores.product((q_s, k_s.T)), 0.0)
        if read == "after_write":
            decay = power(down(AFTER) - since, lower | diagonal)
            decayed_before = decayed * jnp.exp2(jnp.minimum(down(AFTER) - down(BEFORE), 0.0))
        else:
            decay, decayed_before = before, decayed
        put(a_s, low(dp * decay))
        y = cores.product((dy_s, s_s), shape=(SIDE, width))
        sums_s[D_READ] = total(y * matrix(q_s))
        o_s[...] = low(cores.add(y * down(READ, (SIDE, width)), (a_s, k_s)))

        # V, and its gate
        dr = cores.product((x_s.T, du_s), shape=(SIDE, dv))
        sums_s[D_RATE] = total(dr * matrix(v_s))
        v_s[...] = low(dr * down(RATE, (SIDE, dv)))
        dr = low(dr)

        # the system, and its gates
        system = -cores.product((dr, u_s.T))
        alike = system * cores.product((plgpu.load(k_s, layout=MATRIX), k_s.T))
        sums_s[D_ERASE] = total(alike * before)
        put(b_s, low(jnp.where(lower, alike, 0.0) * down(ERASE) + decayed_before))
        later = low(power(across(BEFORE) - down(AFTER), upper))
        earlier = cores.product((later, b_s))
        own = decayed if read == "after_write" else 0.0
        sums_s[D_RETAIN] = total((earlier + own) * before)
        system = low(system * before * down(ERASE))
        put(b_s, system)

        # K, and the gates of the state
        erased = cores.product((dr, s_s), shape=(SIDE, width))
        kept = cores.product((u_s, ds_s), shape=(SIDE, width))
        sums_s[D_START] = -total(erased * matrix(k_s))
        sums_s[D_KEPT] = total(kept * matrix(k_s))
        dk = kept * down(KEPT, (SIDE, width)) - erased * down(START, (SIDE, width))
        dk = cores.add(dk, (a_s.T, q_s), (system, k_s), (b_s.T, k_s))
        k_s[...] = low(dk)
        sums_s[D_CARRY] = sum(
            total(matrix(s_s.at[part]) * matrix(ds_s.at[part]))
            for part in (pl.ds(start, SIDE) for start in range(0, dv, SIDE))
        )
        plgpu.commit_smem()
        for source, target in [(o_s, outputs[0]), (k_s, outputs[1]), (v_s, outputs[2])]:
            plgpu.copy_smem_to_gmem(source, target.at[row, tokens, column])
        plgpu.copy_smem_to_gmem(sums_s, outputs[3].at[head, i])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=[
            *(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v)),
            jax.ShapeDtypeStruct((b * h, n, 7, SIDE), jnp.float32),
        ],
        scratch_types=[
            *[tiles(SIDE, width)] * 2,
            *[tiles(SIDE, dv)] * 4,
            tiles(SIDE, SIDE),
            *[tiles(dv, width)] * 2,
            *[tiles(SIDE, SIDE)] * 2,
            tiles(SIDE, width),
            plgpu.SMEM((7, SIDE), jnp.float32),
            plgpu.SMEM((7, SIDE), jnp.float32),
            plgpu.Barrier(num_arrivals=10),
        ],
        grid=(b * h, n),
        grid_names=("head", "chunk"),
        kernel_name="linear_memory_slopes",
        interpret=interpret,
    )(q, k, v, u, dy, du, inverse, starts, ends, gates)
