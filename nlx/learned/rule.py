# SPDX-License-Identifier: Apache-2.0
"""Update rules with parameters of their own: the first storey of learning to optimise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Float, Key, PyTree

Theta = PyTree[Array]  # what a rule learns: a dict of arrays, by name


class Rule(NamedTuple):
    """An update rule g, and what it learns.

    w_{t+1} = w_t + u_t ;  u_t, s_{t+1} = g(theta; gradient_t, s_t, w_t)

    init(key) -> theta, where meta-training begins.
    make(theta) -> the optax transformation of this theta; it may be differentiated by theta.
    """

    init: Callable[[Key[Array, ""]], Any]
    make: Callable[[Any], optax.GradientTransformationExtraArgs]


def as_transformation(rule: Rule, theta: Theta) -> optax.GradientTransformationExtraArgs:
    """The rule as an optax transformation, for any chain.

    Its updates are added to the parameters, sign and size included, as those of `optax.sgd`.
    rule: of `nlx.learned`. theta: of `rule.init`, or meta-trained.
    """
    return rule.make(theta)


def last(vector: Float[Array, " f"], axes: int) -> Float[Array, "... f"]:
    """A vector on the last of so many axes."""
    return vector.reshape((1,) * (axes - 1) + (-1,))
