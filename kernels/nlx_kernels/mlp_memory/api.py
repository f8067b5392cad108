# SPDX-License-Identifier: Apache-2.0
"""mlp_memory: Titans, TTT and every memory that is an MLP written from outside."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from nlx_kernels._checks import Checker
from nlx_kernels._dispatch import Implementation, Kernel, choose
from nlx_kernels._finite import quarantine
from nlx_kernels.mlp_memory import pallas_tpu, reference, xla
from nlx_kernels.mlp_memory.state import MLPMemoryState
from nlx_kernels.placement import on_each

OFFERED = {
    "xla": xla.mlp_memory,
    "reference": reference.mlp_memory,
    "pallas_tpu": Kernel(pallas_tpu.mlp_memory, pallas_tpu.refusal),
}
MAX_DEPTH = 4


def mlp_memory(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    *,
    weights: tuple[Float[Array, "h i o"], ...] | None = None,
    state: MLPMemoryState | None = None,
    rate: Float[Array, "b t h"],
    retain: Float[Array, "b t h"],
    momentum: Float[Array, "b t h"] | None = None,
    erase: Float[Array, "b t h"] | None = None,
    chunk_size: int,
    read: Literal["after_write", "chunk_start"] = "after_write",
    activation: Literal["gelu", "silu"] = "gelu",
    residual: bool = True,
    norm: bool = False,
    clip: float | None = None,
    bound: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h v"], MLPMemoryState]:
    """An MLP memory per head, written at every token, its gradients frozen for a chunk.

        M(z) = z + act(.. act(z W_1) W_2 ..) W_L                with norm: z + layernorm(..)
        g_t  = gradient of 1/2 |M(k_t) - v_t|^2 at the weights of the chunk's start,
               per layer scaled back to Frobenius norm `clip`
        P_t  = momentum_t P_{t-1} - rate_t g_t
        W_t  = (retain_t I - erase_t z_t z_t^T) W_{t-1} + P_t                  per layer
        y_t  = M(q_t) at W_t, or at the chunk's start

    z_t is the layer's own input at the chunk's start, of unit length (0 where it is 0). A chunk
    ends where the row's own position is a multiple of `chunk_size`, whatever the calls; then every
    W is scaled back to Frobenius norm `bound`.

    Args:
      q: queries, float64, float32 or bfloat16.
      k: keys, of q's dtype.
      v: values, of q's dtype; as wide as the keys if `residual`.
      weights: where the memory starts, 1 to 4 layers [h, in, out]. Pass this or `state`; both
        only with `segment_ids`, whose later segments start from `weights`.
      state: the memory to go on from, as returned.
      rate: inner learning rate, >= 0. Gates are at least float32.
      retain: share of the weights kept, in [0, 1]; exactly 0 is a reset.
      momentum: share of the momentum kept, in [0, 1]; None: P_t = -rate_t g_t, and no buffer.
      erase: strength of forgetting along the layer's input, >= 0; None is 0.
      chunk_size: tokens between two moves of the point where gradients are taken; 1 is exact
        online gradient descent.
      read: read after the token's own write, or from the chunk's start.
      activation: between the layers; gelu is its tanh form.
      residual: add z to the output.
      norm: normalise the last layer's output to mean 0 and variance 1 (epsilon 1e-6), as TTT.
      clip: largest Frobenius norm of a token's gradient of one layer, > 0; None: no limit.
      bound: largest Frobenius norm of a layer at a chunk's end, > 0; None: no limit.
      segment_ids: where the id differs from the previous token's, weights go back to `weights`,
        momentum and position to 0; the first token goes on from `state`.
      implementation: None chooses: "pallas_tpu" on a TPU, else "xla"; a name is obeyed or refused.
      interpret: run a kernel on the CPU.

    Returns:
      y in q's dtype, and the state after the last token. A token that is not finite makes both
      NaN from there on, in its row and head, until a segment begins; never what stands before.

    Raises:
      ValueError, TypeError: one sentence that names the argument.

    References:
      Behrouz et al. (2024), Titans, Eq. 8-18, 32, 33; Behrouz et al. (2025), Nested
      Learning, Eq. 57, 89;
      Sun et al. (2024), Learning to (Learn at Test Time), Eq. 4-7.
    """
    run = choose("mlp_memory", implementation, interpret, OFFERED)
    check = Checker("mlp_memory")
    q, k, v = check.inputs(q=(q, "b t h k"), k=(k, "b t h k"), v=(v, "b t h v"))
    rate, retain = check.gate("rate", rate), check.gate("retain", retain)
    momentum = None if momentum is None else check.gate("momentum", momentum)
    erase = None if erase is None else check.gate("erase", erase)
    chunk_size = check.size("chunk_size", chunk_size)
    check.option("read", read, ("after_write", "chunk_start"))
    check.option("activation", activation, tuple(reference.ACTIVATIONS))
    check.option("residual", residual, (True, False))
    check.option("norm", norm, (True, False))
    clip, bound = check.limit("clip", clip), check.limit("bound", bound)
    if residual and check.sizes["k"] != check.sizes["v"]:
        raise ValueError(
            f"mlp_memory: v has {check.sizes['v']} channels and k {check.sizes['k']}; with "
            f"residual=True they must be equal."
        )
    segment_ids = check.segments(segment_ids)
    check.start("weights", weights, state, segment_ids)
    if weights is not None:
        weights = _layers(check, check.weights, "weights", weights, "h")
    if state is not None:
        state = _state(check, state, momentum is not None)
    written = {"k": k, "v": v, "rate": rate, "retain": retain, "momentum": momentum, "erase": erase}
    q, written, state, mark = quarantine(q, written, state, segment_ids)
    given = {"q": q, **written, "weights": weights, "state": state, "segment_ids": segment_ids}
    a_state = MLPMemoryState._make(("bh", "bh", None if momentum is None else "bh", "b"))
    special = {"weights": "h", "state": None if state is None else a_state, "segment_ids": "b"}

    def part(q, **rest):
        return run(
            q, **rest, chunk_size=chunk_size, read=read, activation=activation, residual=residual,
            norm=norm, clip=clip, bound=bound,
        )  # fmt: skip

    parts = dict.fromkeys(given, "b.h") | special
    b, _, h, _ = q.shape
    y, new_state = on_each(part, given, parts, ("b.h", a_state), b=b, h=h)
    return mark(y.astype(q.dtype), new_state)


def _layers(check: Checker, one: Callable, name: str, weights: Any, lead: str) -> tuple:
    """Weights whose widths follow each other from the keys' to the values'."""
    if not isinstance(weights, tuple | list) or not 1 <= len(weights) <= MAX_DEPTH:
        several = isinstance(weights, tuple | list)
        found = f"has {len(weights)} layers" if several else f"is a {type(weights).__name__}"
        raise ValueError(
            f"mlp_memory: {name} {found}; it must be a tuple of 1 to {MAX_DEPTH} arrays "
            f"[{', '.join(lead.split())}, in, out]."
        )
    widths = ["k", *(f"f{layer}" for layer in range(1, len(weights))), "v"]
    return tuple(
        one(f"{name}[{i}]", weight, f"{lead} {widths[i]} {widths[i + 1]}")
        for i, weight in enumerate(weights)
    )


def _state(check: Checker, state: Any, momentum: bool) -> MLPMemoryState:
    """A state that fits the call."""
    check.fields("state", state, MLPMemoryState)
    check.buffer(state.momentum, momentum)

    def layers(name: str) -> tuple:
        return _layers(check, check.state, f"state.{name}", getattr(state, name), "b h")

    return MLPMemoryState(
        weights=layers("weights"),
        chunk_start=layers("chunk_start"),
        momentum=layers("momentum") if momentum else None,
        position=check.array("state.position", state.position, "b", ("int32",)),
    )
