# SPDX-License-Identifier: Apache-2.0
"""Averages as levels: the value-less memories that Adam, M3, Shampoo and SOAP are nests of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nlx import memories, writes
from nlx.clock import Clock
from nlx.level import Association, Level, associative_memory
from nlx.memories import Memory
from nlx.objectives import dot_product
from nlx.optim.gradient_memory import Gate, check_range, debiased
from nlx.optim.level import wide_dtype
from nlx.optim.published import published


class Share(NamedTuple):
    """How a memory takes a value in: m <- retain m + rate value."""

    rate: Float[Array, ""]
    retain: Float[Array, ""]


class Moment(NamedTuple):
    """One tick of a gradient stream, the context of a leaf's nest."""

    gradient: Float[Array, "..."]
    first: Share  # of u in its average
    second: Share  # of u^2, or of an outer product
    ahead: Share  # of u in its average one tick later


def value_less(like: Any) -> Memory:
    """`memories.constant` in at least float32, split over devices as `like` is."""
    zeros = lambda key: jnp.zeros_like(like, dtype=wide_dtype(like))
    return memories.constant(like)._replace(init=zeros)


def average(
    like: Any, clock: Clock = Clock(1), readout: Callable[[Any], Any] | None = None
) -> Level:
    """A value-less memory m <- retain m + rate value, from 0; its contexts are `stored`.

    like: gives the shape. clock: when others see it anew. readout: what of it they see.
    """
    write = writes.gated(momentum=False)
    write = write if readout is None else published(write, readout)
    return associative_memory(value_less(like), dot_product, write, clock)


def stored(value: Float[Array, "..."], share: Share) -> Association:
    """The context that takes a value into an `average`."""
    return Association((), value, *share)


def moments(b1: Gate, b2: Gate, literal: bool = False, most: float = 0.5) -> Callable:
    """(gradient, parameter, tick) -> `Moment`, of debiased averages with decays b1 and b2.

    literal: of sums instead, m <- m + b value. most: see `bounded`.
    """

    def share(decay: Gate, tick: Int[Array, ""], dtype) -> Share:
        rate = jnp.asarray(decay) if literal else debiased(decay)(tick)
        rate = rate.astype(jnp.promote_types(rate.dtype, dtype))
        return Share(rate, jnp.ones_like(rate) if literal else 1 - rate)

    def context(gradient, param, tick) -> Moment:
        del param
        first, second, ahead = (
            share(b, t, gradient.dtype) for b, t in ((b1, tick), (b2, tick), (b1, tick + 1))
        )
        return Moment(bounded(gradient, most), first, second, ahead)

    return context


def look_ahead(held: Float[Array, "..."], moment: Moment, decay: Gate) -> Float[Array, "..."]:
    """Nesterov's read-out of a debiased average, as Dozat (2016) and optax debias it.

    decay M_t / (1 - decay^(t+1)) + (1 - decay) u / (1 - decay^t), with M_t not debiased.
    """
    return (
        decay * (moment.ahead.rate / moment.first.rate) * held + moment.first.rate * moment.gradient
    )


def bounded(gradient: Float[Array, "..."], most: float = 0.5) -> Float[Array, "..."]:
    """Clipped to `most` times the root of the largest number, so that squares are finite."""
    limit = most * jnp.sqrt(jnp.finfo(gradient.dtype).max)
    return jnp.clip(gradient, -limit, limit)


def check_decays(b1: Gate, b2: Gate, clock: Any = None) -> None:
    """Raises ValueError for a decay outside [0, 1], TypeError for a clock that is none or stops."""
    check_range("b1", b1, 1)
    check_range("b2", b2, 1)
    if clock is not None and not (isinstance(clock, Clock) and clock.period is not None):
        raise TypeError(f"`clock` must be an nlx.Clock with a period, got {clock!r}.")


def matrices_and_others(
    matrix: optax.GradientTransformation,
    other: optax.GradientTransformation,
    is_matrix: Callable[[Any], bool],
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the leaves that are matrices, another for the rest."""
    labels = lambda tree: jax.tree.map(lambda x: "matrix" if is_matrix(x) else "other", tree)
    return optax.partition({"matrix": matrix, "other": other}, labels)
