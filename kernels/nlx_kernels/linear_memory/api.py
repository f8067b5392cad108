# SPDX-License-Identifier: Apache-2.0
"""linear_memory: one op for RetNet, DeltaNet, Gated DeltaNet and their kin."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nlx_kernels._checks import Checker
from nlx_kernels._dispatch import Implementation, Kernel, choose
from nlx_kernels.linear_memory import mosaic_gpu, pallas_tpu, reference, xla
from nlx_kernels.linear_memory.finite import guarded
from nlx_kernels.placement import on_each

OFFERED = {
    "xla": guarded(xla.linear_memory),
    "reference": guarded(reference.linear_memory),
    "pallas_tpu": Kernel(guarded(pallas_tpu.linear_memory), pallas_tpu.refusal),
    "mosaic_gpu": Kernel(mosaic_gpu.linear_memory, mosaic_gpu.refusal),
}


def linear_memory(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    *,
    retain: Float[Array, "b t h"],
    erase: Float[Array, "b t h"],
    rate: Float[Array, "b t h"],
    state: Float[Array, "b h k v"] | None = None,
    read: Literal["after_write", "chunk_start"] = "after_write",
    segment_ids: Int[Array, "b t"] | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """A matrix memory per head, written and read at every token.

        S_t = (retain_t I - erase_t k_t k_t^T) S_{t-1} + rate_t k_t v_t^T
        y_t = q_t S_t                  (read="chunk_start": y_t = q_t S_{t-1}, before the write)

    RetNet: erase 0, rate 1. DeltaNet: retain 1, erase = rate. Gated DeltaNet: erase = retain *
    beta, rate = beta. Keys are used as given; with unit keys the memory is stable while
    |retain - erase| <= 1.

    Args:
      q: queries, float64, float32 or bfloat16.
      k: keys, of q's dtype.
      v: values, of q's dtype.
      retain: share of the memory kept, in [0, 1]; exactly 0 empties it. At least float32.
      erase: strength of forgetting along the key, >= 0. At least float32.
      rate: strength of the write, >= 0. At least float32.
      state: the memory to go on from, float32 (float64 if any input is); None starts at 0.
      read: read the memory after the token's own write, or before it.
      segment_ids: where the id differs from the previous token's, the memory is emptied first;
        the first token goes on from `state`.
      block_size: tokens computed together; changes speed only. None: 64, or what was measured to
        be quicker for "xla" on this kind of device (`nlx_kernels/tuned`).
      implementation: None chooses: a kernel where the device has one and it takes the call, else
        "xla"; a name is obeyed or refused.
      interpret: run a kernel on the CPU.

    Returns:
      y in q's dtype, and the memory after the last token. A token that is not finite makes both
      NaN from there on, in its row and head, until a segment begins; never what stands before.

    Raises:
      ValueError, TypeError: one sentence that names the argument.

    References:
      Behrouz et al. (2024), Titans, Eq. 4, 5; Behrouz et al. (2025), Nested Learning, Eq. 5,
      15-18, 21, 64, 65, 93; Yang et al. (2024), Parallelizing Linear Transformers with the Delta
      Rule; Yang et al. (2025), Gated Delta Networks, Eq. 10.
    """
    run = choose("linear_memory", implementation, interpret, OFFERED)
    given = checked(
        "linear_memory", q, k, v, retain=retain, erase=erase, rate=rate, state=state, read=read,
        segment_ids=segment_ids, block_size=block_size,
    )  # fmt: skip
    options = {name: given.pop(name) for name in ("read", "block_size")}
    parts = dict.fromkeys(given, "b.h") | {"state": "bh", "segment_ids": "b"}
    b, _, h, _ = q.shape

    def part(q, k, v, **rest):
        return run(q, k, v, **rest, **options)

    return on_each(part, given, parts, ("b.h", "bh"), b=b, h=h)


def checked(
    op: str, q, k, v, *, retain, erase, rate, state, read, segment_ids, block_size
) -> dict[str, Any]:
    """The arguments of a call of `op`, all given; raises the sentence for a bad one."""
    check = Checker(op)
    q, k, v = check.inputs(q=(q, "b t h k"), k=(k, "b t h k"), v=(v, "b t h v"))
    retain, erase, rate = (
        check.gate(name, gate)
        for name, gate in (("retain", retain), ("erase", erase), ("rate", rate))
    )
    check.option("read", read, ("after_write", "chunk_start"))
    block = None if block_size is None else check.size("block_size", block_size)
    segment_ids = check.segments(segment_ids)
    if state is None:
        state = jnp.zeros([check.sizes[axis] for axis in "bhkv"], check.accumulator())
    state = check.state("state", state, "b h k v")
    return dict(
        q=q, k=k, v=v, retain=retain, erase=erase, rate=rate, state=state, read=read,
        segment_ids=segment_ids, block_size=block,
    )  # fmt: skip
