# SPDX-License-Identifier: Apache-2.0
"""One agent on one task, by one protocol for all: trained, chosen, examined on other lifetimes.

A cell is every seed at every learning rate, trained at once. Of each training the weights with the
most reward on validation lifetimes are kept, and the rate is the one with most of it. What is
reported is of lifetimes that were lived for nothing else, the same for all models. Skills are
learned one after the other, each from the weights that the one before ended with.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, PyTree

from nlx import nn
from nlx_experiments import agent, environments, ppo, sequence_learner, skills
from nlx_experiments.agent import Recurrent
from nlx_experiments.agents_tasks import Size, Task
from nlx_experiments.environments import Outcome, World

PROTOCOL = 2  # counts changes of what is measured here: cells of another one are not used
VALIDATED, TESTED, WEIGHED = 1, 2, 3  # keys of lifetimes
LIVED = 64  # lifetimes that tell what a skill needs


def measure(
    config: nn.ModelConfig | Recurrent,
    task: Task,
    size: Size,
    leave: Callable[[], None] = lambda: None,
    watch: Callable[[int, Float[np.ndarray, " m"]], None] = lambda updates, values: None,
) -> dict[str, Any]:
    """Trains every seed at every rate at once, and examines them.

    leave: called after every validation; may raise. watch: told of every validation, (updates,
    mean reward of a step by training).

    Returns "rates": rate -> {"validation", by seed, and what `examined` or `matrices` found};
    "rate": the best; "updates", "seconds", "parameters", "device".
    """
    begun = time.monotonic()
    pairs = list(itertools.product(size.rates, range(size.seeds)))
    if task.kind == "skills":
        values, found = in_turn(config, task, size, pairs, leave, watch)
    else:
        values, weights = trained(config, task, size, pairs, None, leave, watch)
        found = {
            title: examined(config, task, world, size, weights)
            for title, world in task.exams.items()
        }
    cut = lambda n: slice(n * size.seeds, (n + 1) * size.seeds)
    listed = lambda x, n: np.round(np.asarray(x, float)[cut(n)], 4).tolist()
    rates = {
        f"{rate:g}": {"validation": listed(values, n)}
        | jax.tree.map(lambda x, n=n: listed(x, n), found)
        for n, rate in enumerate(size.rates)
    }
    best = max(rates, key=lambda rate: float(np.mean(rates[rate]["validation"])))
    percept = environments.percept_size(task.worlds[0].environment)
    return {
        "rates": rates,
        "rate": best,
        "updates": task.plan.updates * len(task.worlds),
        "seconds": round(time.monotonic() - begun, 1),
        "parameters": agent.count(config, percept, task.worlds[0].environment.actions),
        "device": jax.devices()[0].device_kind,
    }


def trained(
    config: nn.ModelConfig | Recurrent,
    task: Task,
    size: Size,
    pairs: list[tuple[float, int]],
    start: tuple[int, PyTree, skills.Kept | None] | None,
    leave: Callable[[], None],
    watch: Callable[[int, Float[np.ndarray, " m"]], None],
) -> tuple[Float[np.ndarray, " m"], PyTree]:
    """The mean reward of a step on validation lifetimes, and the weights [m] that had most of it.

    start: (which of the task's worlds, the weights to go on from, what earlier skills need), of a
    skill: then the last weights count, for a skill that is learned is not left early. None: its
    first world, from weights that are drawn.
    """
    which, given, kept_skills = start or (0, None, None)
    penalty = lambda params, kept: task.keep * skills.penalty(params, kept)
    if kept_skills is None:
        penalty = None
    made = ppo.make(config, task.worlds[which], task.plan, penalty)
    exam = ppo.examine(config, task.worlds[which], size.lifetimes)
    rates = jnp.asarray([rate for rate, _ in pairs], jnp.float32)
    seeds = jnp.asarray([seed for _, seed in pairs], jnp.uint32)
    state = made.init(seeds) if given is None else made.start(seeds, given)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), which))(seeds)
    kept = jax.tree.map(jnp.copy, state.train.params), np.full(len(pairs), -np.inf)
    for first in range(0, task.plan.updates, size.every):
        count = min(size.every, task.plan.updates - first)
        state, _ = made.learn(state, rates, keys, count, kept_skills)
        lived = exam(state.train.params, jax.random.key(VALIDATED))
        value = np.asarray(lived.reward).mean((1, 2))
        watch(first + count, value)
        if start is None:
            kept = sequence_learner.better((state.train.params, value), kept)
        else:
            kept = jax.tree.map(jnp.copy, state.train.params), value
        leave()
    return kept[1], kept[0]


def examined(
    config: nn.ModelConfig | Recurrent, task: Task, world: World, size: Size, weights: PyTree
) -> dict[str, np.ndarray]:
    """What an examination finds, by training [m].

    Of a switch "regret", the sum over the steps after it, mean of the lifetimes; "before", the sum
    over as many steps before it; "curve" [m, length], the mean regret at each step. Of a memory
    "right", the share of lifetimes whose first walk ends well.
    """
    lived = ppo.examine(config, world, size.lifetimes)(weights, jax.random.key(TESTED))
    if task.kind == "memory":
        return {"right": first_right(lived)}
    regret, middle = np.asarray(lived.regret).mean(2), world.length // 2
    before, after = regret[:, :middle].sum(1), regret[:, middle:].sum(1)
    return {"regret": after, "before": before, "curve": regret}


def first_right(lived: Outcome) -> Float[np.ndarray, " m"]:
    """The share of lifetimes [m, t, b] whose first episode ends, and with a reward above 0."""
    done = np.asarray(lived.done)
    first = done & (np.cumsum(done, 1) == 1)
    return (first & (np.asarray(lived.reward) > 0)).any(1).mean(1)


def in_turn(
    config: nn.ModelConfig | Recurrent,
    task: Task,
    size: Size,
    pairs: list[tuple[float, int]],
    leave: Callable[[], None],
    watch: Callable[[int, Float[np.ndarray, " m"]], None],
) -> tuple[Float[np.ndarray, " m"], dict[str, np.ndarray]]:
    """Skills one after the other, all examined after each; where `task.keep` is above 0 with what
    the earlier ones need as a penalty.

    Returns the mean over skills of what is left at the end, on validation lifetimes, and "matrix"
    [m, i, j], the share of the best reward that skill j has after skill i; "untrained" [m, j].
    """
    seeds = jnp.asarray([seed for _, seed in pairs], jnp.uint32)
    weights = ppo.make(config, task.worlds[0], task.plan).init(seeds).train.params
    exams = [ppo.examine(config, world, size.lifetimes) for world in task.worlds]

    def shares(weights: PyTree, key: int) -> Float[np.ndarray, "m j"]:
        lived = [exam(weights, jax.random.key(key)) for exam in exams]
        total = lambda x: np.asarray(x).sum((1, 2))
        return np.stack([1 - total(one.regret) / total(one.best) for one in lived], 1)

    untrained, rows = shares(weights, TESTED), []
    kept = skills.nothing(weights) if task.keep else None
    for n, world in enumerate(task.worlds):
        _, weights = trained(config, task, size, pairs, (n, weights, kept), leave, watch)
        rows.append(shares(weights, TESTED))
        if kept is not None:
            fisher = skills.fisher(config, world, LIVED)(weights, jax.random.key(WEIGHED))
            kept = skills.and_this(kept, weights, fisher)
    values = shares(weights, VALIDATED).mean(1)
    return values, {"matrix": np.stack(rows, 1), "untrained": untrained}


def carried(config: nn.ModelConfig | Recurrent, world: World) -> int:
    """Numbers that an agent carries from step to step of a lifetime."""
    build = lambda: ppo.agent_of(config, world, nnx.Rngs(0)).init_state(1, world.length)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.eval_shape(build)))


def identity(name: tuple[str, str], task: Task, size: Size, config: Any) -> str:
    """What decides a cell, besides the code of models and environments: protocol, sizes, lives."""
    worlds = [*task.worlds, *task.exams.values()]
    fields = [(w.name, w.length, w.switch, w.environment[3:5]) for w in worlds]
    lives = [environments.begin(world, jax.random.key(0)) for world in worlds]
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(lives))
    keep = f" {task.keep} {LIVED}" if task.keep else ""
    told = f"{PROTOCOL} {config} {task.plan} {size} {fields}{keep}"
    digest = hashlib.sha256(told.encode() + content).hexdigest()[:12]
    return f"{'; '.join(name)}; {digest}"


def best(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the chosen rate gave."""
    return record["rates"][record["rate"]]
