# SPDX-License-Identifier: Apache-2.0
"""Hope's inner loop as a nest: memories that make their own keys, values and gates."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlx import memories, objectives, writes
from nlx.clock import Clock
from nlx.level import Association, Level, associative_memory
from nlx.nest import Nest

BOXES = ("key", "value", "rate", "retain", "memory")


class Token(NamedTuple):
    """One tick's context of the nest; on a sequence every field has a leading tick axis."""

    key: Float[Array, " d"]  # what the generator of keys reads
    value: Float[Array, " d"]  # what the generator of values reads
    gate: Float[Array, " d"]  # what the generators of rates and of retention read
    query: Float[Array, " d"]  # of unit length if no memory makes the query
    momentum: Float[Array, ""] | None = None  # in [0, 1], share of the momentum kept


class Readouts(NamedTuple):
    """Parameters of the level "readouts", which never fires: they are learned outside only."""

    rate: dict[str, Float[Array, " d"]]  # by box
    rate_bias: dict[str, Float[Array, ""]]  # by box
    retain: Float[Array, " d"]
    retain_bias: Float[Array, ""]


def self_modifying_nest(
    width: int,
    hidden: int,
    *,
    chunk_size: int,
    projection_chunk_size: int,
    read: Literal["after_write", "chunk_start"] = "after_write",
    momentum: bool = False,
    erase: bool = True,
    adaptive_query: bool = False,
    activation: Literal["gelu", "silu"] = "gelu",
    clip: float | None = 1.0,
    bound: float | None = 4.0,
) -> Nest:
    """Self-modifying Titans, one head of it, as levels: the specification of the op.

        k = l2(M_key(x_key)),  v = M_value(x_value),  q as given, or l2(M_query(q))
        alpha = sigmoid(retain . M_retain(x_gate) + retain_bias)
        eta_B = top_B sigmoid(rate_B . M_rate(x_gate) + rate_bias_B)
        box B stores (k, M_B(v)) with rate eta_B, retention alpha, erase eta_B;  y = M_memory(q)

    Every box is an MLP memory M(z) = z + s(z W_1) W_2, s = `memories.soft_unit`, under the L2
    objective and a gated write. Its contexts are `Token`s, its outputs y. top_B is (1 + alpha) / 2
    where B's clock has period 1 and 1 + alpha elsewhere: the range in which a linear memory is
    stable. `nlx.ops.self_modifying_memory` is this nest for every row and head, in parallel.

    Args:
      width: channels d of a token and of every memory.
      hidden: hidden units f of every memory.
      chunk_size: period of "memory", in tokens.
      projection_chunk_size: period of all other boxes.
      read: y from the working weights after the token's write, or from the visible ones (Eq. 90).
      momentum: whether writes carry momentum; then tokens bring its gate.
      erase: whether writes erase along each layer's input (Eq. 57).
      adaptive_query: whether a sixth box makes the queries (Table 6).
      activation: of the hidden layer.
      clip: largest Frobenius norm of a token's gradient of one weight matrix; None: no limit.
      bound: largest Frobenius norm of a weight matrix at a firing; None: no limit.

    Raises:
      ValueError: sizes, periods, `clip` or `bound` below what they must be; unknown names.

    References:
      Behrouz et al. (2025), Nested Learning, Eq. 83-91.
    """
    if read not in ("after_write", "chunk_start"):
        raise ValueError(f"`read` must be 'after_write' or 'chunk_start', got {read!r}.")
    memory = _memory(width, hidden, activation)
    write = writes.gated(memory.inputs if erase else None, momentum, clip, bound)
    boxes = (*BOXES, "query") if adaptive_query else BOXES
    clocks = dict.fromkeys(boxes, Clock(projection_chunk_size)) | {"memory": Clock(chunk_size)}

    def forward(params: dict[str, Any], token: Token):
        streams = dict(key=token.key, value=token.value, rate=token.gate, retain=token.gate)
        made = {box: memory.read(params[box], stream) for box, stream in streams.items()}
        query = _l2(memory.read(params["query"], token.query)) if adaptive_query else token.query
        retain, rates = _gates(params["readouts"], made["rate"], made["retain"], clocks)
        contexts = {
            box: Association(
                key=_l2(made["key"]),
                value=memory.read(params[box], made["value"]),
                rate=rates[box],
                retain=retain,
                momentum=token.momentum,
                erase=rates[box] if erase else None,
            )
            for box in boxes
        }
        y = memory.read(params["memory"], query) if read == "chunk_start" else query
        return y, contexts

    def read_working(working: dict[str, Any], query: Float[Array, " d"], token: Token):
        del token
        return memory.read(working["memory"], query)

    levels = {
        box: associative_memory(memory, objectives.l2, write, clock)
        for box, clock in clocks.items()
    }
    levels["readouts"] = Level(lambda key: _readouts(key, width, boxes))
    return Nest(levels, forward, read=read_working if read == "after_write" else None)


def _memory(width: int, hidden: int, activation: str) -> memories.Memory:
    """z + s(z W_1) W_2, which starts with W_2 half as large as usual, so near the identity."""
    memory = memories.mlp((width, hidden, width), memories.soft_unit(activation))

    def init(key):
        first, second = memory.init(key)
        return first, 0.5 * second

    return memory._replace(init=init)


def _gates(readouts: Readouts, rate, retain, clocks: dict[str, Clock]):
    """Retention, and the rate of each box within the range that its clock allows."""
    alpha = jax.nn.sigmoid(retain @ readouts.retain + readouts.retain_bias)
    rates = {}
    for box, clock in clocks.items():
        top = (1 + alpha) / 2 if clock.period == 1 else 1 + alpha
        rates[box] = top * jax.nn.sigmoid(rate @ readouts.rate[box] + readouts.rate_bias[box])
    return alpha, rates


def _readouts(key, width: int, boxes: tuple[str, ...]) -> Readouts:
    """Rates near 0.27 of their range and a retention near 0.98 at first."""
    *keys, last = jax.random.split(key, len(boxes) + 1)
    normal = {box: jax.random.normal(k, (width,)) for box, k in zip(boxes, keys, strict=True)}
    return Readouts(
        rate={box: readout / width**0.5 for box, readout in normal.items()},
        rate_bias=dict.fromkeys(boxes, -jnp.ones(())),
        retain=jax.random.normal(last, (width,)) / width**0.5,
        retain_bias=jnp.full((), 4.0),
    )


def _l2(z: Float[Array, " d"]) -> Float[Array, " d"]:
    """z / sqrt(|z|^2 + 1e-6)."""
    return z * jax.lax.rsqrt(jnp.sum(jnp.square(z)) + 1e-6)
