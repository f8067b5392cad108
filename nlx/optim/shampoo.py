# SPDX-License-Identifier: Apache-2.0
"""Shampoo and SOAP: preconditioners from both outer products, on a slower clock."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nlx.clock import Clock
from nlx.level import Level
from nlx.nest import Nest
from nlx.optim.adam_memory import scale_by_adam_memory
from nlx.optim.alias import with_learning_rate
from nlx.optim.averages import average, check_decays, matrices_and_others, moments, stored
from nlx.optim.gradient_memory import Gate, check_range
from nlx.optim.level import nestwise
from nlx.optim.matrices import (
    across,
    eigenvectors,
    gathered,
    of_eigenvalues,
    outer,
    outer_like,
    resized,
    sides,
)

Transformation = optax.GradientTransformationExtraArgs
SIDES = {"left": -2, "right": -1}  # level of the outer product along each axis
MOST = 2.0**-16  # of the largest root: outer products and their eigenvalues stay finite


def scale_by_shampoo(
    b1: Gate = 0.9,
    b2: Gate = 0.999,
    *,
    ridge: Gate = 1e-6,
    eps: Gate = 1e-8,
    clock: Clock = Clock(10, phase=1),
) -> Transformation:
    """Shampoo: momentum between the inverse fourth roots of both outer products.

    M, V = debiased averages of u and u^2 ;  L, R = of u u^T / out and u^T u / in
    update = L^(-1/4) M R^(-1/4), rescaled to the norm of Adam's M / (sqrt(V) + eps)

    for each matrix u [..., in, out]. A side shorter than 2 or longer than 2048 is left alone, the
    other then has the power -1/2. Leaves without a side have the element-wise memory.

    b1, b2: decays, in [0, 1]. ridge: >= 0, added to eigenvalues, relative to the largest; below
        about 1e-6 rounding decides the small ones in float32.
    eps: >= 0. clock: when the roots are made anew, before the update; until it first fires they are
        the identity. State: twice the parameters, and 2 (in^2 + out^2) for each matrix.

    Raises ValueError for an argument out of range, TypeError for a clock without a period.
    Source: Gupta et al. (2018), Shampoo, algorithm 1; averages and size as in Anil et al. (2020).
    """
    check_decays(b1, b2, clock)
    check_range("ridge", ridge)
    check_range("eps", eps)

    def root(power, statistic):
        def raised(values, largest):
            kept = jnp.where(largest > 0, values + ridge * largest, 1)  # of nothing: the identity
            return jnp.where(kept > 0, jnp.where(kept > 0, kept, 1) ** power, 0)

        return of_eigenvalues(raised, statistic)

    def nest(leaf) -> Nest:
        power = -0.5 / len(sides(leaf))
        return _nest(leaf, clock, functools.partial(root, power), lambda params, u: u)

    def readout(before, after, moment):
        del before
        adam = after["first"] / (jnp.sqrt(after["second"]) + eps)
        rooted = across(lambda m: _between(m, after, transposed=False), after["first"])
        return resized(rooted, adam)

    return matrices_and_others(
        nestwise(nest, readout, moments(b1, b2, most=MOST)),
        scale_by_adam_memory(b1, b2, ridge=eps**2),
        lambda leaf: bool(sides(leaf)),
    )


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Gate = 0.9,
    b2: Gate = 0.999,
    *,
    ridge: Gate = 1e-6,
    eps: Gate = 1e-8,
    clock: Clock = Clock(10, phase=1),
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> Transformation:
    """Descent along `scale_by_shampoo`, at learning rates of AdamW.

    weight_decay: >= 0, decoupled; mask: of the leaves to decay, as in `optax.adamw`.
    """
    scaled = scale_by_shampoo(b1, b2, ridge=ridge, eps=eps, clock=clock)
    return with_learning_rate(learning_rate, scaled, weight_decay=weight_decay, mask=mask)


def scale_by_soap(
    b1: Gate = 0.95,
    b2: Gate = 0.95,
    *,
    eps: Gate = 1e-8,
    clock: Clock = Clock(10, phase=1),
) -> Transformation:
    """SOAP: Adam in the eigenbases of Shampoo's outer products.

    M = debiased average of u ;  V = of (Q_L^T u Q_R)^2 ;  L, R = of u u^T and u^T u
    update = Q_L [Q_L^T M Q_R / (sqrt(V) + eps)] Q_R^T
    after the update, where the clock fires: Q_L, Q_R = eigenvectors of L, R

    for each matrix u [..., in, out]. They start as the identity, so the first step is Adam's. A
    side shorter than 2 or longer than 2048 is left alone; leaves without a side: the element-wise
    memory.

    b1, b2: decays of M, and of V, L and R, in [0, 1]. eps: >= 0. clock: of the eigenbases.
    State: twice the parameters, and 2 (in^2 + out^2) for each matrix.

    Raises ValueError for an argument out of range, TypeError for a clock without a period.
    Source: Vyas et al. (2024), SOAP, algorithm 3; there one step of power iteration stands for the
    decomposition, and the first step is left out.
    """
    check_decays(b1, b2, clock)
    check_range("eps", eps)

    def nest(leaf) -> Nest:
        project = lambda params, u: across(lambda x: _between(x, params, transposed=True), u)
        return _nest(leaf, clock, eigenvectors, project)

    def readout(before, after, moment):
        del moment

        def adam(mean):
            size = jnp.sqrt(gathered(after["second"])) + eps
            turned = _between(mean, before, transposed=True) / size
            return _between(turned, before, transposed=False)

        return across(adam, after["first"])

    return matrices_and_others(
        nestwise(nest, readout, moments(b1, b2, most=MOST)),
        scale_by_adam_memory(b1, b2, ridge=eps**2),
        lambda leaf: bool(sides(leaf)),
    )


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Gate = 0.95,
    b2: Gate = 0.95,
    *,
    eps: Gate = 1e-8,
    clock: Clock = Clock(10, phase=1),
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> Transformation:
    """Descent along `scale_by_soap`, at learning rates of AdamW.

    weight_decay: >= 0, decoupled; mask: of the leaves to decay, as in `optax.adamw`.
    """
    scaled = scale_by_soap(b1, b2, eps=eps, clock=clock)
    return with_learning_rate(learning_rate, scaled, weight_decay=weight_decay, mask=mask)


def _nest(leaf, clock: Clock, readout, project) -> Nest:
    """Both moments, the second of what `project` makes of u, and the outer product of each side."""
    own = {name: axis for name, axis in SIDES.items() if axis in sides(leaf)}
    levels = {"first": average(leaf), "second": average(leaf)}
    for name, axis in SIDES.items():
        levels[name] = (
            _slow(outer_like(leaf, axis), clock, readout) if name in own else _absent(leaf)
        )

    def forward(params, moment):
        u = moment.gradient
        contexts = {
            "first": stored(u, moment.first),
            "second": stored(jnp.square(project(params, u)), moment.second),
        }
        for name, axis in SIDES.items():
            value = outer(u, axis) if name in own else jnp.zeros((), u.dtype)
            contexts[name] = stored(value, moment.second)
        return (), contexts

    return Nest(levels, forward)


def _slow(like: jax.ShapeDtypeStruct, clock: Clock, readout) -> Level:
    """The average of an outer product; others see a function of it, at first the identity."""
    level = average(like, clock, readout)

    def init(key):
        zeros = level.init(key)
        return jnp.broadcast_to(jnp.eye(zeros.shape[-1], dtype=zeros.dtype), zeros.shape)

    return level._replace(init=init)


def _absent(leaf) -> Level:
    """In the place of a side that is left alone: a state of the same structure, of scalars."""
    return average(jax.ShapeDtypeStruct((), leaf.dtype), readout=lambda zero: zero)


def _between(
    x: Float[Array, "*n i o"], params: dict[str, Any], transposed: bool
) -> Float[Array, "*n i o"]:
    """A x B^T with A, B the sides of which `params` has a matrix, or their transposes."""
    left, right = (gathered(params[name]) for name in SIDES)
    if transposed:
        left, right = (side.mT if side.ndim else side for side in (left, right))
    x = left @ x if left.ndim else x
    return x @ right.mT if right.ndim else x
