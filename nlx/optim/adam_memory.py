# SPDX-License-Identifier: Apache-2.0
"""Adam and AdaGrad as best memories: an L2 objective over all gradients, minimised."""

from typing import Any

import jax.numpy as jnp
import optax

from nlx.clock import Clock
from nlx.nest import Nest
from nlx.optim.alias import with_learning_rate
from nlx.optim.averages import average, check_decays, matrices_and_others, moments, stored
from nlx.optim.gradient_memory import Gate, check_range
from nlx.optim.level import nestwise
from nlx.optim.matrices import across, gathered, of_eigenvalues, outer, outer_like, sides

Transformation = optax.GradientTransformationExtraArgs


def scale_by_adam_memory(
    b1: Gate = 0.9, b2: Gate = 0.999, *, ridge: Gate = 1e-16, literal: bool = False
) -> Transformation:
    """The element-wise memory of all gradients for which an L2 objective is least: Adam.

    m* = argmin_m <m^2, H> - 2 <m, P M> + ridge ||m||^2 = P M / (H + ridge) ;  P = sqrt(H)
    M, H = debiased averages of u and u^2, with decays b1 and b2

    With sums for averages the objective is sum_i ||m u_i - P||^2 + ridge ||m||^2, up to a constant.
    Both are value-less memories of one level. For ridge -> 0 it is `optax.scale_by_adam(eps=0)`; a
    ridge of eps^2 acts where eps does.

    b1, b2: in [0, 1]. ridge: >= 0. An entry whose gradients were all 0 gets 0.
    literal: the printed recurrences, sums that never decay: M <- M + b1 u, H <- H + b2 u^2 and
        P = sqrt(sum u^2), so that update = M / sqrt(b2 H) for ridge -> 0. They forget nothing,
        and overflow where gradients stay above a quarter of the root of the largest number
        (float32: 5e18).

    Raises ValueError for an argument out of range.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 101-103, 105.
    """
    check_decays(b1, b2)
    check_range("ridge", ridge)

    def nest(leaf) -> Nest:
        levels = {"first": average(leaf), "second": average(leaf)}
        return Nest(levels, lambda params, moment: ((), {
            "first": stored(moment.gradient, moment.first),
            "second": stored(jnp.square(moment.gradient), moment.second),
        }))  # fmt: skip

    def readout(before, after, moment):
        del before, moment
        second = after["second"]
        target = jnp.sqrt(second / b2 if literal else second)
        kept = jnp.where(second > 0, second + ridge, 1)
        return jnp.where(second > 0, target * after["first"] / kept, 0)

    return nestwise(nest, readout, moments(b1, b2, literal))


def adam_memory(
    learning_rate: optax.ScalarOrSchedule,
    b1: Gate = 0.9,
    b2: Gate = 0.999,
    *,
    ridge: Gate = 1e-16,
    literal: bool = False,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> Transformation:
    """Descent along `scale_by_adam_memory`.

    weight_decay: >= 0, decoupled; mask: of the leaves to decay, as in `optax.adamw`.
    """
    scaled = scale_by_adam_memory(b1, b2, ridge=ridge, literal=literal)
    return with_learning_rate(learning_rate, scaled, weight_decay=weight_decay, mask=mask)


def scale_by_adagrad_memory(
    b1: Gate = 0.9,
    b2: Gate = 0.999,
    *,
    ridge: Gate = 1e-6,
    clock: Clock = Clock(1, phase=1),
    literal: bool = False,
) -> Transformation:
    """The same memory for outer products, one side of each matrix whole: AdaGrad with momentum.

    m* = argmin_m tr(m (H + r I) m^T) - 2 tr(m P M^T) = M P (H + r I)^-1 ;  P = H^(1/2)
    M, H = debiased averages of u and u^T u / in, or on the other side, the shorter one

    for each matrix u [..., in, out]; r is ridge times the largest eigenvalue of H. Vectors, and
    matrices with no side of 2 to 2048, have the element-wise memory.

    b1, b2: in [0, 1]. ridge: >= 0. clock: when P (H + r I)^-1, an eigendecomposition, is made anew.
    literal: the printed recurrences M <- M + b1 u, H <- H + b2 u^T u, P = (sum u^T u)^(1/2), on the
        output side: update = M H^(-1/2) / sqrt(b2) for ridge -> 0. b1 = 1 is AdaGrad.

    Raises ValueError for an argument out of range, TypeError for a clock without a period.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 106-111 (which print H^(-1/2) on the side
    where it does not fit M).
    """
    check_decays(b1, b2, clock)
    check_range("ridge", ridge)

    def factor(values, largest):
        target = jnp.sqrt(values / b2 if literal else values)
        kept = values + ridge * largest
        return jnp.where(kept > 0, target / jnp.where(kept > 0, kept, 1), 0)

    def root(statistic):
        return of_eigenvalues(factor, statistic)

    def side(leaf) -> int:
        return -1 if literal or leaf.shape[-1] <= leaf.shape[-2] else -2

    def nest(leaf) -> Nest:
        axis = side(leaf)
        levels = {"first": average(leaf), "second": average(outer_like(leaf, axis), clock, root)}

        def forward(params, moment):
            del params
            u = moment.gradient
            product = outer(u, axis) * (u.shape[-3 - axis] if literal else 1)
            return (), {
                "first": stored(u, moment.first),
                "second": stored(product, moment.second),
            }

        return Nest(levels, forward)

    def readout(before, after, moment):
        del before
        kept, left = gathered(after["second"]), side(moment.gradient) == -2
        return across(lambda m: kept @ m if left else m @ kept, after["first"])

    return matrices_and_others(
        nestwise(nest, readout, moments(b1, b2, literal, most=2.0**-16)),
        scale_by_adam_memory(b1, b2, literal=literal),
        lambda leaf: bool(sides(leaf)) and side(leaf) in sides(leaf),
    )


def adagrad_memory(
    learning_rate: optax.ScalarOrSchedule,
    b1: Gate = 0.9,
    b2: Gate = 0.999,
    *,
    ridge: Gate = 1e-6,
    clock: Clock = Clock(1, phase=1),
    literal: bool = False,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> Transformation:
    """Descent along `scale_by_adagrad_memory`.

    weight_decay: >= 0, decoupled; mask: of the leaves to decay, as in `optax.adamw`.
    """
    scaled = scale_by_adagrad_memory(b1, b2, ridge=ridge, clock=clock, literal=literal)
    return with_learning_rate(learning_rate, scaled, weight_decay=weight_decay, mask=mask)
