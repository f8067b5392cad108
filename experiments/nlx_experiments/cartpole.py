# SPDX-License-Identifier: Apache-2.0
"""A pole on a cart whose physics change while the agent lives."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlx_experiments.environments import Environment, World

CART, POLE = 1.0, 0.1  # kg
SECONDS = 0.04  # of a step
TRACK, TILT = 2.4, math.radians(12)  # beyond these it has fallen: m, rad
START = 0.05  # the most of every number of the state at first


class Physics(NamedTuple):
    """What holds."""

    gravity: Float[Array, ""]  # m/s^2
    half: Float[Array, ""]  # half the pole's length, m
    force: Float[Array, ""]  # of action 1, N; action 0 has the opposite


def cart_pole() -> Environment:
    """Two actions push the cart; a pole that tilts too far, or a cart that leaves, has reward -1.

        theta'' = (g sin - cos (F + m l theta'^2 sin) / M) / (l (4/3 - m cos^2 / M))
        x'' = (F + m l (theta'^2 sin - theta'' cos)) / M

    m: the pole's mass, M: that of both, l: half its length; a step of Euler takes SECONDS. Every
    other reward is 0, so the best is 0. Seen are the place and the tilt alone, by TRACK and TILT.

    Source: Barto, Sutton and Anderson (1983), Neuronlike Adaptive Elements, section V and appendix;
    without friction, steps twice as long, speeds not seen.
    """

    look = lambda state: jnp.stack([state[0] / TRACK, state[2] / TILT])

    def reset(key: Array, params: Physics):
        state = jax.random.uniform(key, (4,), jnp.float32, -START, START)
        return look(state), state

    def step(key: Array, state: Float[Array, " 4"], action: Array, params: Physics):
        place, speed, tilt, turning = state
        force = jnp.where(action == 1, params.force, -params.force)
        whole, arm = CART + POLE, POLE * params.half
        sine, cosine = jnp.sin(tilt), jnp.cos(tilt)
        push = (force + arm * turning**2 * sine) / whole
        lever = params.half * (4 / 3 - POLE * cosine**2 / whole)
        spin = (params.gravity * sine - cosine * push) / lever
        pull = push - arm * spin * cosine / whole
        change = jnp.stack([speed, pull, turning, spin])
        after = state + SECONDS * change
        fallen = (jnp.abs(after[0]) > TRACK) | (jnp.abs(after[2]) > TILT)
        return look(after), after, -fallen.astype(jnp.float32), fallen, {}

    usual = Physics(jnp.float32(9.8), jnp.float32(0.5), jnp.float32(10.0))
    return Environment(reset, step, usual, 2, 2, lambda params: jnp.float32(0))


def switching_physics(length: int, switch: tuple[int, int]) -> World:
    """Gravity, the pole and the force are drawn; after the switch anew, and actions are reversed.

    Gravity is within 7 to 13 m/s^2, half the pole within 0.3 to 0.8 m, the force within 8 to 14 N,
    to either side at first. Arguments as in `World`.
    """

    def draw(key: Array):
        keys = jax.random.split(key, 3)
        side = jnp.where(jax.random.bernoulli(keys[0]), 1.0, -1.0)

        def physics(key: Array, side: Array) -> Physics:
            low, high = jnp.array([7.0, 0.3, 8.0]), jnp.array([13.0, 0.8, 14.0])
            gravity, half, force = low + (high - low) * jax.random.uniform(key, (3,))
            return Physics(gravity, half, side * force)

        return physics(keys[1], side), physics(keys[2], -side)

    return World("cart-pole", cart_pole(), draw, length, switch)
