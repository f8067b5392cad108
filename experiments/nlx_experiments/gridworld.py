# SPDX-License-Identifier: Apache-2.0
"""A room whose goal is not seen, and whose goal or compass switches while the agent lives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nlx_experiments.environments import Environment, World

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left: (rows, columns)


class Room(NamedTuple):
    """What holds in a room."""

    goal: Int[Array, " 2"]  # row, column
    turn: Int[Array, ""]  # action a moves by MOVES[(a + turn) % 4]


def gridworld(size: int) -> Environment:
    """size x size cells; from the middle to the goal, where reward 1 ends the episode.

    Seen are the row and the column of the agent, each as one of `size`. A move into a wall changes
    nothing. size: odd, 3 or more; ValueError for another.
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"`size` is {size}; it must be an odd integer >= 3.")
    middle = jnp.full(2, size // 2, jnp.int32)
    look = lambda place: jax.nn.one_hot(place, size).reshape(-1)

    def reset(key: Array, params: Room):
        return look(middle), middle

    def step(key: Array, state: Int[Array, " 2"], action: Array, params: Room):
        move = jnp.asarray(MOVES, jnp.int32)[(action + params.turn) % 4]
        place = jnp.clip(state + move, 0, size - 1)
        there = jnp.all(place == params.goal)
        return look(place), place, there.astype(jnp.float32), there, {}

    def best(params: Room):
        return 1 / jnp.sum(jnp.abs(params.goal - middle))

    corner = Room(jnp.zeros(2, jnp.int32), jnp.int32(0))
    return Environment(reset, step, corner, 4, 2 * size, best)


def switching_goal(size: int, length: int, switch: tuple[int, int]) -> World:
    """The goal is a corner; after the switch it is another one. Arguments as in `World`."""

    def draw(key: Array):
        places = jax.random.choice(key, 4, (2,), replace=False)
        first, second = (Room(_corner(n, size), jnp.int32(0)) for n in places)
        return first, second

    return World("goal", gridworld(size), draw, length, switch)


def switching_compass(size: int, length: int, switch: tuple[int, int]) -> World:
    """The goal is a corner and stays; after the switch every action moves another way.

    Arguments as in `World`.
    """

    def draw(key: Array):
        of_goal, of_turn = jax.random.split(key)
        goal = _corner(jax.random.randint(of_goal, (), 0, 4), size)
        first, second = jax.random.choice(of_turn, 4, (2,), replace=False)
        return Room(goal, first), Room(goal, second)

    return World("compass", gridworld(size), draw, length, switch)


def _corner(number: Array, size: int) -> Int[Array, " 2"]:
    return (size - 1) * jnp.stack([number // 2, number % 2])
