# SPDX-License-Identifier: Apache-2.0
"""Gradient memories: the one general form of momentum and its deeper relatives."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nlx import writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.memories import Memory
from nlx.optim.level import levelwise

Gate = float | Float[Array, ""]
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
Map = Callable[[Float[Array, "..."]], Any]


def _same(gradient: Float[Array, "..."]) -> Float[Array, "..."]:
    return gradient


def gradient_memory(
    memory: Callable[[Any], Memory],
    objective: Callable[[Any, Any], Float[Array, ""]],
    *,
    features: Map = _same,
    target: Map = _same,
    rate: Gate | Schedule = 1.0,
    retain: Gate | Schedule = 1.0,
    erase: Gate | Schedule | None = None,
    readout: Callable[[Callable[[Any], Any], Float[Array, "..."]], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A memory, one for each leaf, that stores the stream of its gradients u and gives the update.

    phi <- (retain I - erase z z^T) phi - rate grad_phi objective(m_phi(features(u)), target(u))
    update = readout(m_phi, u)

    With a constant memory and the dot objective this is `optax.trace(retain)`, to the bit, in an
    accumulator of at least float32; with the L2 objective it is an average: rate 1 - b gives
    `optax.ema(b, debias=False)`, rate `debiased(b)` the debiased one.

    memory: leaf -> `Memory` of that shape and dtype, for instance `memories.constant`.
    objective: (output, value) -> scalar, what storing means (`nlx.objectives`).
    features, target: u -> the key, and the value stored under it; both u itself if not given.
    rate: >= 0. retain: in [0, 1]. erase: >= 0, along z = memory.inputs(phi, key), a vector for each
        weight matrix; None: nothing is erased. Numbers, scalars that may be traced, or schedules:
        functions of the tick, 0 at first.
    readout: (read, u) -> update, with read(query) what the memory recalls after the write; recalls
        features(u) if not given. `lambda read, u: u + b * read(u)` is Nesterov momentum.

    Update is in optax's sign: a direction to be scaled by -learning_rate.
    Raises ValueError for a gate out of its range and a memory that has nothing to erase, TypeError
    for a `memory` or `readout` that can't be called as above.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 33-37, 46-52.
    """
    for name, gate, most in (("rate", rate, None), ("retain", retain, 1), ("erase", erase, None)):
        check_range(name, gate, most)
    if not callable(memory):
        raise TypeError(
            f"`memory` is of type {type(memory).__name__}; it must be a function that makes a "
            "`Memory` for a leaf, such as `memories.constant`."
        )
    if readout is not None and not _takes_two(readout):
        raise TypeError(
            f"`readout` is {readout!r}; it must be a function of two arguments, (read, u)."
        )
    read_out = readout or (lambda read, gradient: read(features(gradient)))

    def level(leaf):
        stored = memory(leaf)
        if erase is not None and stored.inputs is None:
            raise ValueError(f"`erase` is {erase}, but this `memory` has no inputs to erase along.")
        write = writes.gated(None if erase is None else stored.inputs, momentum=False)
        return associative_memory(stored, objective, write, Clock(1))

    def context(gradient, param, tick):
        del param
        gates = {"rate": rate, "retain": retain, "erase": erase}
        given = {
            name: wide(gate(tick) if callable(gate) else gate)
            for name, gate in gates.items()
            if gate is not None
        }
        return Association(features(gradient), target(gradient), **given)

    def recall(params, gradient):
        stored = memory(gradient)
        return read_out(lambda query: stored.read(params, query), gradient)

    return levelwise(level, recall, context)


def _takes_two(function: Callable) -> bool:
    """Whether it can be called with two arguments, as far as it tells."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some that are not written in Python tell nothing
        return True
    return True


def wide(gate: Any) -> Float[Array, ""]:
    """A gate in at least float32: `optax.inject_hyperparams` makes it of the parameters' dtype."""
    gate = jnp.asarray(gate)
    return gate.astype(jnp.promote_types(gate.dtype, jnp.float32))


def debiased(decay: Gate) -> Schedule:
    """The rate of a debiased average: the share of its newest value.

    (1 - b) / (1 - b^t) with t = tick + 1, and 1 / t at b = 1: the plain mean of all values.

    decay: b, in [0, 1]; the same bits whether it is a constant or traced. Written with logarithms,
        so that the first share is 1 to the bit.
    """

    def share(tick: Int[Array, ""]) -> Float[Array, ""]:
        ticks = tick + jnp.ones(())
        log = jnp.log(jax.lax.optimization_barrier(jnp.asarray(decay, ticks.dtype)))
        shrinks = log < 0
        log = jnp.where(shrinks, log, -1)
        return jnp.where(shrinks, jnp.expm1(log) / jnp.expm1(ticks * log), 1 / ticks)

    return share


def check_range(name: str, value: Any, most: float | None = None) -> None:
    """Raises ValueError for a Python number below 0 or above `most`; arrays may be traced."""
    if isinstance(value, int | float) and not 0 <= value <= (
        float("inf") if most is None else most
    ):
        wanted = ">= 0" if most is None else f"in [0, {most}]"
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")
