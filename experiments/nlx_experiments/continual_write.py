# SPDX-License-Identifier: Apache-2.0
"""What a level of values writes when its clock fires: least squares on all that its keys were."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

DAMPING = 3.0


class Pair(NamedTuple):
    """A matrix of values, or its gradient; and 0, or the Gram matrix of the keys it is read by."""

    values: Float[Array, "i o"]
    gram: Float[Array, "i i"]


class Statistics(NamedTuple):
    """Of the keys of one matrix."""

    gram: Float[Array, "i i"]  # S
    first: Float[Array, " i"]  # diagonal of the first Gram matrix
    begun: Bool[Array, ""]


def least_squares(
    rate: float | Float[Array, ""],
    horizon: float | Float[Array, ""],
    damping: float = DAMPING,
) -> optax.GradientTransformation:
    """Recursive least squares on a loss that need not be a square: writes where keys are new.

        S <- (1 - 1/horizon) S + K ;  W <- W - rate (S + damping diag(K_1))^-1 G

    G and K are the mean gradient, and the mean k k^T of the keys, of a period; K_1 is that of the
    first. Along keys that were often seen a step is small, so what is stored for them stays. For
    the loss 1/2 |k W - v|^2, rate 1 and no damping it is the exact minimizer over all pairs, each
    weighted by its age: the L2 memory at its optimum.

    Updates, parameters and results are a pytree of `Pair`s.

    rate: >= 0. horizon: firings after which a key counts 1/e, >= 1; infinity: it counts for ever.
    damping: > 0, in firings.
    Source: Haykin (2002), Adaptive Filter Theory, chapter 9 (exponentially weighted); Zeng et al.
    (2019), Continual learning of context-dependent processing, for its use against forgetting;
    Behrouz et al. (2025), Nested Learning, section 4.2: a preconditioner is a memory of its own.
    """
    paired = lambda tree: isinstance(tree, Pair)

    def init(params: Any) -> Any:
        none = lambda p: Statistics(
            jnp.zeros_like(p.gram), jnp.zeros_like(p.gram[0]), jnp.zeros((), bool)
        )
        return jax.tree.map(none, params, is_leaf=paired)

    def seen(pair: Pair, held: Statistics) -> Statistics:
        first = jnp.where(held.begun, held.first, jnp.diag(pair.gram))
        return Statistics((1 - 1 / horizon) * held.gram + pair.gram, first, jnp.ones((), bool))

    def step(pair: Pair, held: Statistics) -> Pair:
        ridge = damping * held.first + 1e-6 * jnp.mean(held.first) + 1e-30
        system = held.gram + jnp.diag(ridge)
        solved = jax.scipy.linalg.solve(system, pair.values, assume_a="pos")
        return Pair(-rate * solved, jnp.zeros_like(pair.gram))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(seen, updates, state, is_leaf=paired)
        return jax.tree.map(step, updates, state, is_leaf=paired), state

    return optax.GradientTransformation(init, update)
