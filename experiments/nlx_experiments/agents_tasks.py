# SPDX-License-Identifier: Apache-2.0
"""What agents are trained on and examined by: switches, memory, skills in sequence."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nlx import nn
from nlx_experiments import agent, bandits, cartpole, environments, gridworld, mazes
from nlx_experiments.agent import Recurrent
from nlx_experiments.environments import World
from nlx_experiments.ppo import Plan

MODELS = "hope", "gru", "wider gru", "transformer"
KEEP = 100.0  # of what earlier skills need; ten times as much kept all in a pilot of a GRU


class Size(NamedTuple):
    """Of all agents, and how often they are trained."""

    width: int
    parameters: int
    rates: tuple[float, ...]  # learning rates tried
    seeds: int
    every: int  # updates between two validations
    lifetimes: int  # of an examination


class Task(NamedTuple):
    """Worlds that are learned one after the other, mostly one, and worlds that are examined.

    exams: title -> world. Weights and rates are chosen on lifetimes in the world trained on. keep:
    weight of what earlier skills need, `skills.penalty`.
    """

    worlds: tuple[World, ...]
    plan: Plan
    exams: Mapping[str, World]
    kind: str  # "switch", "memory" or "skills"
    keep: float = 0.0


def full() -> dict[str, Task]:
    """Lifetimes of 60 or 120 steps with a switch within the middle third; walks of up to 10 steps.

    In the bandit of many contexts what comes next does not depend on what is done: an action is
    worth its own reward (discount 0).
    """
    plan = Plan(updates=60, lifetimes=16, segment=60)
    short = plan._replace(discount=0.8, trace=0.8)
    many = Plan(updates=300, lifetimes=64, segment=120, epochs=2, discount=0.0, trace=0.0)
    balanced = plan._replace(updates=80, discount=0.95)
    when, times = (20, 39), (1, 2, 5, 10)
    return {
        "bandit": switching(lambda of: bandits.switching_bandit(5, 60, of), when, short),
        "contexts": switching(
            lambda of: bandits.switching_contexts((1, 12), 3, 120, of), (40, 79), many
        ),
        "goal": switching(lambda of: gridworld.switching_goal(5, 60, of), when, plan),
        "compass": switching(
            lambda of: gridworld.switching_compass(5, 60, of), when, plan._replace(updates=100)
        ),
        "cart-pole": switching(lambda of: cartpole.switching_physics(60, of), when, balanced),
        "t-maze": walked("t-maze", mazes.t_maze, 10, 60, plan, times),
        "memory chain": walked("memory chain", mazes.memory_chain, 10, 60, plan, times),
        "skills": skills(60, short._replace(updates=50)),
        "skills, kept": skills(60, short._replace(updates=50))._replace(keep=KEEP),
    }


def tiny() -> dict[str, Task]:
    """One of each kind, next to nothing of it."""
    plan = Plan(updates=2, lifetimes=2, segment=6, epochs=1, parts=1)
    learned = skills(6, plan)._replace(keep=KEEP)
    return {
        "bandit": switching(lambda of: bandits.switching_bandit(2, 6, of), (2, 3), plan),
        "t-maze": walked("t-maze", mazes.t_maze, 2, 6, plan, (1,)),
        "skills": learned._replace(
            worlds=learned.worlds[:2], exams=dict(list(learned.exams.items())[:2])
        ),
    }


def switching(make: Callable[..., World], switch: tuple[int, int], plan: Plan) -> Task:
    """Trained with a switch drawn of `switch`, examined with one in the middle.

    make: (switch) -> world.
    """
    trained = make(switch)
    middle = trained.length // 2
    return Task((trained,), plan, {"switch": make((middle, middle))}, "switch")


def walked(
    name: str, make: Callable, longest: int, length: int, plan: Plan, times: Sequence[int]
) -> Task:
    """Trained on walks of up to `longest` steps; examined at so many times this length.

    Of every lifetime that is examined the first walk counts, and there is time for half as many
    steps again as it takes. length: of a lifetime that is trained on.
    """
    one = lambda n: mazes.walks(name, make, (n, n), 3 * (n + 1) // 2)
    exams = {str(longest * more): one(longest * more) for more in times}
    return Task((mazes.walks(name, make, (1, longest), length),), plan, exams, "memory")


def skills(length: int, plan: Plan) -> Task:
    """A bandit, a room and a chain in turn; of each skill other numbers of an observation tell.

    length: of all lifetimes.
    """
    third = length // 3
    when = third, length - third - 1
    apart = (
        bandits.switching_bandit(5, length, when),
        gridworld.switching_goal(3, length, when),
        mazes.walks("chain", mazes.memory_chain, (1, 4), length),
    )
    actions = max(world.environment.actions for world in apart)
    sizes = [world.environment.observation for world in apart]
    fit = lambda n, one: environments.padded(one, actions, sum(sizes), sum(sizes[:n]))
    worlds = tuple(
        world._replace(environment=fit(n, world.environment)) for n, world in enumerate(apart)
    )
    return Task(worlds, plan, {world.name: world for world in worlds}, "skills")


def models(task: Task, size: Size) -> dict[str, nn.ModelConfig | Recurrent]:
    """Hope and its rivals, brought to one number of parameters; a GRU also with more of them in its
    cell and fewer in its feed-forward.

    Hope's memories are written at every step, so that the next action knows of it, and do not
    decay: they forget only what other writes erase.
    """
    first = task.worlds[0].environment
    percept = environments.percept_size(first)
    base: dict[str, Any] = dict(vocabulary=1, width=size.width, hidden=1)
    found = {
        "hope": nn.ModelConfig(
            mixer="self_modifying",
            feed_forward="cms",
            cms_periods=(1, 4),
            heads=2,
            memory_hidden=size.width // 2,
            layers=1,
            chunk_size=1,
            projection_chunk_size=1,
            momentum=False,
            retain=False,
            **base,
        ),
        "gru": Recurrent(width=size.width, layers=1, hidden=1),
        "wider gru": Recurrent(width=5 * size.width // 4, layers=1, hidden=1),
        "transformer": nn.ModelConfig(
            mixer="attention", feed_forward="swiglu", heads=4, layers=2, **base
        ),
    }
    fit = lambda config: agent.equal(config, percept, first.actions, size.parameters)
    return {name: fit(config) for name, config in found.items()}
