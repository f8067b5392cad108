# SPDX-License-Identifier: Apache-2.0
"""Environments as pure functions, shaped as gymnax's, and lifetimes in them that hold a change.

An environment is what its parameters say, and these do not change within it. A `World` draws them
twice, for the time before a switch and for that after it, so that physics, goals and odds change
while an agent lives. A lifetime is a number of steps: an episode that ends is followed by the next
one, and the agent's memory goes on. It is told what it did last, what that brought, and whether an
episode began.

Source: Duan et al. (2016), RL^2, section 2.2 (what the agent is told, memory kept over episodes);
Lange (2022), gymnax (the form of `reset` and `step`).
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from nlx_experiments.errors import Refused

Params = PyTree[Array]


class Environment(NamedTuple):
    """What happens, by parameters that it is called with.

    reset(key, params) -> (observation [observation], state).
    step(key, state, action, params) -> (observation, state, reward, done, info): of the episode
        that goes on, with no reset where it is done. Where info holds "expected", that is the mean
        of the reward, which is random.
    params: those that it has by default.
    actions: integers in [0, actions). observation: numbers in one.
    best(params) -> the reward that the best policy has in a step in the long run, or None where it
        is not known.
    """

    reset: Callable[[Array, Params], tuple[Float[Array, " o"], PyTree]]
    step: Callable[..., tuple[Float[Array, " o"], PyTree, Array, Array, dict[str, Array]]]
    params: Params
    actions: int
    observation: int
    best: Callable[[Params], Float[Array, ""]] | None = None


class World(NamedTuple):
    """Lifetimes of `length` steps; the second parameters hold from a step of `switch` on.

    draw(key) -> (parameters before, parameters after).
    switch: the first and the last step, of which one is drawn evenly; None: the first hold for
        good.
    """

    name: str
    environment: Environment
    draw: Callable[[Array], tuple[Params, Params]]
    length: int
    switch: tuple[int, int] | None = None


class Life(NamedTuple):
    """A lifetime under way.

    percept: what is seen, the last action as one of so many, the reward that it brought, and 1
    where an episode begins; before the first action what is of it is 0.
    """

    before: Params
    after: Params
    switch: Int[Array, ""]
    tick: Int[Array, ""]  # steps lived
    state: PyTree[Array]  # of the environment
    percept: Float[Array, " p"]


class Outcome(NamedTuple):
    """What a step brought."""

    reward: Float[Array, ""]
    best: Float[Array, ""]  # what the best policy has in a step; NaN: not known
    regret: Float[Array, ""]  # best, less the reward or, where it is known, its mean
    done: Bool[Array, ""]  # whether an episode ended


def percept_size(environment: Environment) -> int:
    """Numbers that an agent is told at every step; see `Life`."""
    return environment.observation + environment.actions + 2


def begin(world: World, key: Array) -> Life:
    """A lifetime's first percept; nothing was done yet."""
    check(world)
    drawn, when, start = jax.random.split(key, 3)
    before, after = world.draw(drawn)
    first, last = world.switch or (world.length, world.length)
    switch = jax.random.randint(when, (), first, last + 1)
    observation, state = world.environment.reset(start, _params(before, after, switch, 0))
    rest = jnp.zeros(percept_size(world.environment) - len(observation) - 1)
    told = jnp.concatenate([observation, rest, jnp.ones(1)]).astype(jnp.float32)
    return Life(before, after, switch, jnp.int32(0), state, told)


def live(world: World, key: Array, life: Life, action: Int[Array, ""]) -> tuple[Life, Outcome]:
    """One step, and the next episode's beginning where one ended.

    key: of this step alone. action: in [0, actions).
    """
    environment = world.environment
    stepping, resetting = jax.random.split(key)
    now = _params(life.before, life.after, life.switch, life.tick)
    observation, state, reward, done, info = environment.step(stepping, life.state, action, now)
    reward, done = jnp.asarray(reward, jnp.float32), jnp.asarray(done, bool)
    coming = _params(life.before, life.after, life.switch, life.tick + 1)
    anew = environment.reset(resetting, coming)
    choose = lambda new, old: jnp.where(done, new, old)
    observation, state = jax.tree.map(choose, anew, (observation, state))
    best = jnp.float32(jnp.nan if environment.best is None else environment.best(now))
    regret = jnp.asarray(best - info.get("expected", reward), jnp.float32)
    acted = jax.nn.one_hot(action, environment.actions)
    rest = jnp.stack([reward, done.astype(jnp.float32)])
    told = jnp.concatenate([observation, acted, rest]).astype(jnp.float32)
    after = life._replace(tick=life.tick + 1, state=state, percept=told)
    return after, Outcome(reward, best, regret, done)


def padded(environment: Environment, actions: int, observation: int, place: int = 0) -> Environment:
    """The same with more actions and longer observations, as other skills of an agent need them.

    An action beyond its own means its remainder by their number. place: where its own observation
    begins; all else in it is 0.

    Raises ValueError where they do not fit.
    """
    own = environment.observation
    if actions < environment.actions or not 0 <= place <= observation - own:
        raise ValueError(
            f"`actions` is {actions}, `observation` {observation} and `place` {place}; they must "
            f"have room for the environment's own {environment.actions} and {own}."
        )
    fill = lambda seen: jnp.pad(seen, (place, observation - own - place))

    def reset(key, params):
        seen, state = environment.reset(key, params)
        return fill(seen), state

    def step(key, state, action, params):
        seen, *rest = environment.step(key, state, action % environment.actions, params)
        return fill(seen), *rest

    return environment._replace(reset=reset, step=step, actions=actions, observation=observation)


def from_gymnax(name: str) -> Environment:
    """An environment of gymnax, observations laid flat.

    name: as `gymnax.make` knows it; its actions must be integers. Its parameters are gymnax's own:
    a `World` may draw them anew, so that they switch.

    Raises Refused where gymnax is not installed, ValueError for a name that it does not know, or
    actions that are no integers.
    """
    try:
        gymnax = importlib.import_module("gymnax")
    except ImportError as error:
        raise Refused(
            'gymnax, which `name` is of, is not installed: pip install "nlx[gymnax]".'
        ) from error
    if name not in gymnax.registered_envs:
        known = ", ".join(gymnax.registered_envs)
        raise ValueError(f"`name` is {name!r}; it must be one of {known}.")
    inner, params = gymnax.make(name)
    space = inner.action_space(params)
    if not hasattr(space, "n"):
        raise ValueError(f"`name` is {name!r}, whose actions are no integers; they must be.")
    flat = lambda seen: jnp.ravel(jnp.asarray(seen, jnp.float32))

    def reset(key, params):
        seen, state = inner.reset_env(key, params)
        return flat(seen), state

    def step(key, state, action, params):
        seen, state, reward, ended, info = inner.step_env(key, state, action, params)
        return flat(seen), state, reward, ended | inner.is_truncated(state, params), info

    size = int(np.prod(inner.observation_space(params).shape, dtype=int))
    params = jax.tree.map(jnp.asarray, params)
    return Environment(reset, step, params, int(space.n), size)


def constant(environment: Environment, params: Params | None = None) -> Callable:
    """A world's `draw` where nothing is drawn and nothing switches; None: the default ones."""
    fixed = environment.params if params is None else params
    return lambda key: (fixed, fixed)


def check(world: World) -> None:
    """Raises ValueError for a lifetime without a step, or a switch that is outside of it."""
    if world.length < 1:
        raise ValueError(f"`length` is {world.length}; it must be an integer >= 1.")
    first, last = world.switch or (0, 0)
    if not 0 <= first <= last < world.length:
        raise ValueError(
            f"`switch` is {world.switch}; it must be two steps of a lifetime of {world.length}, "
            "the first not after the last."
        )


def _params(before: Params, after: Params, switch: Array, tick: Any) -> Params:
    return jax.tree.map(lambda old, new: jnp.where(tick < switch, old, new), before, after)
