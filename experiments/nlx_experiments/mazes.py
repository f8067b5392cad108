# SPDX-License-Identifier: Apache-2.0
"""Tasks of memory: what was seen first decides what is right many steps later.

Both take their length as a parameter, so that longer ones than those trained on are examined by the
same functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nlx_experiments.environments import Environment, World

FORWARD, LEFT, RIGHT = range(3)
IDLE = -0.1  # the reward of a step that leads nowhere


class Walk(NamedTuple):
    """Where a walker stands, and what it was shown."""

    sign: Int[Array, ""]  # 0 or 1
    place: Int[Array, ""]


def t_maze() -> Environment:
    """A corridor of params steps: a sign at its beginning says where to turn at its end.

    Actions are FORWARD, LEFT and RIGHT. Seen is one of: sign for left, sign for right, corridor,
    junction. A turn at the junction ends the episode, with reward 1 if it is that of the sign and
    -1 if not; a step that leads nowhere has IDLE.

    Source: Bakker (2002), Reinforcement Learning with Long Short-Term Memory, section 4; here a
    wrong turn has -1 and not -0.1, and the sign is not seen on the way back.
    """

    def reset(key: Array, params: Int[Array, ""]):
        state = Walk(jax.random.randint(key, (), 0, 2), jnp.int32(0))
        return look(state, params), state

    def look(state: Walk, params: Array):
        here = jnp.where(state.place == params, 3, jnp.where(state.place == 0, state.sign, 2))
        return jax.nn.one_hot(here, 4)

    def step(key: Array, state: Walk, action: Array, params: Int[Array, ""]):
        end, turn = state.place == params, action != FORWARD
        right = jnp.where(action - LEFT == state.sign, 1.0, -1.0)
        reward = jnp.where(end & turn, right, jnp.where(end | turn, IDLE, 0.0))
        after = Walk(state.sign, state.place + (~end & ~turn))
        return look(after, params), after, reward, end & turn, {}

    return Environment(reset, step, jnp.int32(10), 3, 4, _one_a_walk)


def memory_chain() -> Environment:
    """A sign is shown once, and asked for params steps later; in between it does not matter.

    Two actions. Seen are the sign, -1 or 1, 0 once it is gone, and whether it is asked for. The
    answer ends the episode, with reward 1 or -1.

    Source: Osband et al. (2020), Behaviour Suite for Reinforcement Learning, "memory length".
    """

    def reset(key: Array, params: Int[Array, ""]):
        state = Walk(jax.random.randint(key, (), 0, 2), jnp.int32(0))
        return look(state, params), state

    def look(state: Walk, params: Array):
        shown = jnp.where(state.place == 0, 2.0 * state.sign - 1, 0.0)
        return jnp.stack([shown, (state.place == params).astype(jnp.float32)])

    def step(key: Array, state: Walk, action: Array, params: Int[Array, ""]):
        end = state.place == params
        right = jnp.where(action == state.sign, 1.0, -1.0)
        after = Walk(state.sign, state.place + 1)
        return look(after, params), after, jnp.where(end, right, 0.0), end, {}

    return Environment(reset, step, jnp.int32(10), 2, 2, _one_a_walk)


def walks(
    name: str, make: Callable[[], Environment], lengths: tuple[int, int], length: int
) -> World:
    """Lifetimes in one of them, its length drawn evenly for each and then the same in all episodes.

    lengths: the shortest and the longest, >= 1. length: of a lifetime, in steps. Raises ValueError
    for lengths that are none.
    """
    if not 1 <= lengths[0] <= lengths[1]:
        raise ValueError(f"`lengths` is {lengths}; it must be two integers >= 1 that do not fall.")

    def draw(key: Array):
        long = jax.random.randint(key, (), lengths[0], lengths[1] + 1)
        return long, long

    return World(name, make(), draw, length)


def _one_a_walk(params: Array):
    """Reward 1 in so many steps and the one that ends them."""
    return 1 / (params + 1)
