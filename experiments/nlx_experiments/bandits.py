# SPDX-License-Identifier: Apache-2.0
"""Bandits whose good arms move while the agent lives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nlx_experiments.environments import Environment, World

GOOD, BAD = 0.9, 0.1


def bandit(arms: int) -> Environment:
    """reward ~ Bernoulli(params[action]); nothing is seen, every pull is an episode.

    params: chances [arms], in [0, 1]. The reward's mean is told in info.
    """

    def reset(key: Array, params: Float[Array, " k"]):
        return jnp.zeros(1), jnp.int32(0)

    def step(key: Array, state: Array, action: Array, params: Float[Array, " k"]):
        won = jax.random.bernoulli(key, params[action]).astype(jnp.float32)
        return jnp.zeros(1), state, won, jnp.bool_(True), {"expected": params[action]}

    return Environment(reset, step, jnp.full(arms, 0.5), arms, 1, lambda params: params.max())


def switching_bandit(arms: int, length: int, switch: tuple[int, int]) -> World:
    """One arm pays with chance GOOD, all others with BAD; after the switch another one does.

    arms: 2 or more. length, switch: as in `World`. Raises ValueError for fewer arms.
    """
    if arms < 2:
        raise ValueError(f"`arms` is {arms}; it must be an integer >= 2: another one must be good.")

    def draw(key: Array):
        first, second = jax.random.choice(key, arms, (2,), replace=False)
        chances = lambda good: jnp.where(jnp.arange(arms) == good, GOOD, BAD)
        return chances(first), chances(second)

    return World("bandit", bandit(arms), draw, length, switch)


class Contexts(NamedTuple):
    """Parameters of a contextual bandit."""

    chances: Float[Array, "c k"]  # of a reward, in [0, 1]
    shown: Int[Array, ""]  # contexts that occur, the first ones, in [1, c]


def contextual_bandit(contexts: int, arms: int) -> Environment:
    """One of the contexts that occur is shown at every step, and each has chances of its own.

    params: `Contexts`. The reward's mean is told in info.
    """

    def reset(key: Array, params: Contexts):
        shown = jax.random.randint(key, (), 0, params.shown)
        return jax.nn.one_hot(shown, contexts), shown

    def step(key: Array, state: Int[Array, ""], action: Array, params: Contexts):
        chance = params.chances[state, action]
        won = jax.random.bernoulli(key, chance).astype(jnp.float32)
        # every pull is an episode, so that what is shown next is drawn by `reset`
        return jax.nn.one_hot(state, contexts), state, won, jnp.bool_(True), {"expected": chance}

    def best(params: Contexts) -> Float[Array, ""]:
        occurs = jnp.arange(contexts) < params.shown
        return jnp.mean(params.chances.max(1), where=occurs)

    params = Contexts(jnp.full((contexts, arms), 0.5), jnp.int32(contexts))
    return Environment(reset, step, params, arms, contexts, best)


def switching_contexts(
    contexts: tuple[int, int], arms: int, length: int, switch: tuple[int, int]
) -> World:
    """In every context one arm pays, always, and no other; after the switch another one does.

    contexts: least and most that occur in a lifetime; agents learn by the lifetimes of few what
    those of many need. arms: 2 or more. length, switch: as in `World`. Raises ValueError for fewer
    arms or contexts that are none.
    """
    least, most = contexts
    if arms < 2:
        raise ValueError(f"`arms` is {arms}; it must be an integer >= 2: another one must be good.")
    if not 1 <= least <= most:
        raise ValueError(f"`contexts` is {contexts}; it must be the least, >= 1, and the most.")

    def draw(key: Array):
        arm, number = jax.random.split(key)
        one = lambda key: jax.random.choice(key, arms, (2,), replace=False)
        good = jax.vmap(one)(jax.random.split(arm, most))
        shown = jax.random.randint(number, (), least, most + 1)
        world = lambda n: Contexts(jax.nn.one_hot(good[:, n], arms), shown)
        return world(0), world(1)

    return World("contexts", contextual_bandit(most, arms), draw, length, switch)
