# SPDX-License-Identifier: Apache-2.0
"""self_modifying_memory: the inner loop of Hope, self-modifying Titans."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from nlx_kernels._checks import Checker
from nlx_kernels._dispatch import Implementation, Kernel, choose
from nlx_kernels._finite import quarantine
from nlx_kernels.placement import on_each
from nlx_kernels.self_modifying_memory import pallas_tpu, reference, xla
from nlx_kernels.self_modifying_memory.state import (
    SelfModifyingParameters,
    SelfModifyingState,
    Streams,
)

OFFERED = {
    "xla": xla.self_modifying_memory,
    "reference": reference.self_modifying_memory,
    "pallas_tpu": Kernel(pallas_tpu.self_modifying_memory, pallas_tpu.refusal),
}
BOXES = ("key", "value", "rate", "retain", "memory")


def self_modifying_memory(
    x: Float[Array, "b t h d"] | Streams,
    q: Float[Array, "b t h d"],
    *,
    parameters: SelfModifyingParameters,
    state: SelfModifyingState | None = None,
    chunk_size: int,
    projection_chunk_size: int,
    read: Literal["after_write", "chunk_start"] = "after_write",
    momentum: Float[Array, "b t h"] | None = None,
    erase: bool = True,
    activation: Literal["gelu", "silu"] = "gelu",
    clip: float | None = 1.0,
    bound: float | None = 4.0,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h d"], SelfModifyingState]:
    """Memories that make their own keys, values, rates and retention, and are all written.

    Every box B holds M_B(z) = z + s(z W_1) W_2 with s(p) = act(p) / sqrt(|act(p)|^2 + 1/4).
    Token t is made from the boundary weights, those at the start of the running chunk:

        k = l2(M_key(x_key))     v = M_value(x_value)     q as given, or l2(M_query(q))
        alpha = sigmoid(retain_readout . M_retain(x_gate) + retain_bias)
        eta_B = top_B sigmoid(rate_readout_B . M_rate(x_gate) + rate_bias_B)
        top_B = (1 + alpha) / 2 if B's chunk is one token, else 1 + alpha

    with l2(z) = z / sqrt(|z|^2 + 1e-6). Then every box is written, per layer:

        g = gradient of 1/2 |M_B(k) - M_B(v)|^2 at B's boundary, M_B(v) held fixed,
            scaled back to Frobenius norm `clip`
        P <- momentum P - eta_B g
        W <- (alpha I - eta_B z z^T) W + P          z: the layer's input, of unit length or 0

    and y = M_memory(q) is read. A chunk of B ends where the row's own position is a multiple of
    its size: then W is scaled back to Frobenius norm `bound` and becomes the boundary.
    M_B(v) is fixed for the inner gradient only: outer gradients flow through everything.

    Args:
      x: what the generators read; one array, or one for keys, values and gates each. float64,
        float32 or bfloat16.
      q: queries of x's dtype, at unit length if `parameters` has no box "query".
      parameters: where the memories start, and the slow read-outs. With `state` the memories in
        it are only what later segments start from.
      state: the state to go on from, as returned; None starts from `parameters`.
      chunk_size: tokens in a chunk of the box "memory".
      projection_chunk_size: tokens in a chunk of all other boxes.
      read: read M_memory after the token's own write, or from its boundary (Eq. 90), which
        cannot see the tokens of the running chunk.
      momentum: share of the momentum kept, in [0, 1], at least float32; None: P = -eta g.
      erase: forget along the layer's input (DGD); False is plain gradient descent with decay.
      activation: act; gelu is its tanh form.
      clip: largest Frobenius norm of a token's gradient of one layer; None: no limit.
      bound: largest Frobenius norm of a weight matrix at a chunk's end; None: no limit.
      segment_ids: where the id differs from the previous token's, memories go back to
        `parameters`, momentum and position to 0; the first token goes on from `state`.
      implementation: None chooses: "pallas_tpu" on a TPU, else "xla"; a name is obeyed or refused.
      interpret: run a kernel on the CPU.

    Returns:
      y in x's dtype, and the state after the last token. A token that is not finite makes both
      NaN from there on, in its row and head, until a segment begins; never what stands before.

    Raises:
      ValueError, TypeError: one sentence that names the argument.

    References:
      Behrouz et al. (2025), Nested Learning, Eq. 83-91; Eq. 57 (erase per layer).
    """
    run = choose("self_modifying_memory", implementation, interpret, OFFERED)
    check = Checker("self_modifying_memory")
    x, q = _tokens(check, x, q)
    momentum = None if momentum is None else check.gate("momentum", momentum)
    chunk_size = check.size("chunk_size", chunk_size)
    projection_chunk_size = check.size("projection_chunk_size", projection_chunk_size)
    check.option("read", read, ("after_write", "chunk_start"))
    check.option("erase", erase, (True, False))
    check.option("activation", activation, tuple(reference.ACTIVATIONS))
    clip, bound = check.limit("clip", clip), check.limit("bound", bound)
    segment_ids = check.segments(segment_ids)
    parameters = _parameters(check, parameters)
    if state is not None:
        state = _state(check, state, set(parameters.memories), momentum is not None)
    q, (x, momentum), state, mark = quarantine(q, (x, momentum), state, segment_ids)
    given = dict(
        x=x, q=q, parameters=parameters, state=state, momentum=momentum, segment_ids=segment_ids
    )
    a_state = SelfModifyingState._make(("bh", "bh", None if momentum is None else "bh", "b"))
    special = {"parameters": "h", "state": None if state is None else a_state, "segment_ids": "b"}

    def part(x, q, **rest):
        return run(
            x, q, **rest, chunk_size=chunk_size, projection_chunk_size=projection_chunk_size,
            read=read, erase=erase, activation=activation, clip=clip, bound=bound,
        )  # fmt: skip

    parts = dict.fromkeys(given, "b.h") | special
    b, _, h, _ = q.shape
    y, new_state = on_each(part, given, parts, ("b.h", a_state), b=b, h=h)
    return mark(y.astype(q.dtype), new_state)


def _tokens(check: Checker, x: Any, q: Any) -> tuple[Streams, Array]:
    """The streams, one array standing for all three, and the queries."""
    if not isinstance(x, Streams):
        x, q = check.inputs(x=(x, "b t h d"), q=(q, "b t h d"))
        return Streams(x, x, x), q
    named = {f"x.{name}": (array, "b t h d") for name, array in x._asdict().items()}
    *x, q = check.inputs(**named, q=(q, "b t h d"))
    return Streams(*x), q


def _boxes(check: Checker, name: str, table: Any, boxes: set[str]) -> None:
    """A dict with exactly these keys."""
    if not isinstance(table, dict) or set(table) != boxes:
        found = (
            f"the keys {sorted(table)}"
            if isinstance(table, dict)
            else f"the type {type(table).__name__}"
        )
        raise ValueError(f"{check.op}: {name} has {found}; it must be a dict of {sorted(boxes)}.")


def _memories(
    check: Checker, one: Callable, name: str, memories: Any, lead: str, boxes: set[str]
) -> dict:
    """box -> two layers, for exactly these boxes; all have one hidden width."""
    _boxes(check, name, memories, boxes)
    checked = {}
    for box, layers in memories.items():
        where = f"{name}[{box!r}]"
        if not isinstance(layers, tuple | list) or len(layers) != 2:
            raise ValueError(f"{check.op}: {where} is no pair; it must be two arrays (W_1, W_2).")
        checked[box] = (
            one(f"{where}[0]", layers[0], f"{lead} d f"),
            one(f"{where}[1]", layers[1], f"{lead} f d"),
        )
    return checked


def _parameters(check: Checker, parameters: Any) -> SelfModifyingParameters:
    """Parameters whose read-outs match their boxes."""
    check.fields("parameters", parameters, SelfModifyingParameters)
    memories, readouts, biases, readout, bias = parameters
    boxes = {*BOXES, *({"query"} & set(memories if isinstance(memories, dict) else ()))}
    memories = _memories(check, check.weights, "parameters.memories", memories, "h", boxes)
    _boxes(check, "parameters.rate_readout", readouts, boxes)
    _boxes(check, "parameters.rate_bias", biases, boxes)
    named = [(f"parameters.rate_readout[{box!r}]", readouts[box], "h d") for box in memories]
    named += [(f"parameters.rate_bias[{box!r}]", biases[box], "h") for box in memories]
    *rates, readout, bias = (
        check.weights(*one)
        for one in (
            *named,
            ("parameters.retain_readout", readout, "h d"),
            ("parameters.retain_bias", bias, "h"),
        )
    )
    readouts = dict(zip(memories, rates[: len(memories)], strict=True))
    biases = dict(zip(memories, rates[len(memories) :], strict=True))
    return SelfModifyingParameters(memories, readouts, biases, readout, bias)


def _state(check: Checker, state: Any, boxes: set[str], momentum: bool) -> SelfModifyingState:
    """A state that fits the call."""
    check.fields("state", state, SelfModifyingState)
    check.buffer(state.momentum, momentum)

    def layers(name: str) -> dict:
        table = getattr(state, name)
        return _memories(check, check.state, f"state.{name}", table, "b h", boxes)

    return SelfModifyingState(
        weights=layers("weights"),
        chunk_start=layers("chunk_start"),
        momentum=layers("momentum") if momentum else None,
        position=check.array("state.position", state.position, "b", ("int32",)),
    )
