# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a rule on a task, cut into pieces: the context of the second storey."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from nlx.learned.rule import Rule
from nlx.learned.tasks import Task


class Unrolled(NamedTuple):
    """A system that theta moves, piece by piece.

    begin(theta, key) -> state: the start of a run.
    advance(theta, state) -> (state, loss): one piece of it, and what it costs.
    pieces: of a whole run, >= 1.
    """

    begin: Callable[[Any, Key[Array, ""]], Any]
    advance: Callable[[Any, Any], tuple[Any, Float[Array, ""]]]
    pieces: int


class Trained(NamedTuple):
    """A problem under way."""

    params: Any
    rule: Any  # state of the rule's transformation
    instance: Any
    key: Key[Array, ""]
    step: Int[Array, ""]  # steps taken


def start(rule: Rule, task: Task, theta: Any, key: Key[Array, ""]) -> Trained:
    """A problem that is drawn, before its first step."""
    drawn, first, batches = jax.random.split(key, 3)
    instance = task.draw(drawn)
    params = task.init(instance, first)
    return Trained(params, rule.make(theta).init(params), instance, batches, jnp.int32(0))


def train(
    rule: Rule,
    task: Task,
    theta: Any,
    trained: Trained,
    steps: int,
    *,
    objective: Literal["training", "held-out"] = "training",
    second_order: bool = True,
) -> tuple[Trained, Float[Array, " t"]]:
    """Some steps of a problem, and what each of them found.

    "training": the loss of each step's batch before the step; "held-out": `task.heldout` after it.
    second_order: whether losses may be differentiated through the gradients that the rule is given.
    Raises ValueError for another objective, or held-out loss of a task that has none.
    """
    _check_objective(task, objective)
    transformation = rule.make(theta)

    def step(trained: Trained, _):
        key = jax.random.fold_in(trained.key, trained.step)
        cost, gradient = jax.value_and_grad(task.loss)(trained.params, trained.instance, key)
        if not second_order:
            gradient = jax.lax.stop_gradient(gradient)
        update, state = transformation.update(gradient, trained.rule, trained.params)
        params = optax.apply_updates(trained.params, update)
        if objective == "held-out":
            assert task.heldout is not None
            cost = task.heldout(params, trained.instance)
        return trained._replace(params=params, rule=state, step=trained.step + 1), cost

    return jax.lax.scan(step, trained, None, steps)


def unrolled(
    rule: Rule,
    task: Task,
    *,
    horizon: int,
    truncation: int,
    objective: Literal["training", "held-out"] = "training",
    second_order: bool = False,
    most: float | None = None,
) -> Unrolled:
    """Runs of a rule on a task, of `horizon` steps in pieces of `truncation`.

    A piece costs the mean of its steps.
    objective, second_order: see `train`; without second order as Andrychowicz et al. (2016) do.
    most: what a step costs that costs more, or no number: a run that diverges then tells `es` and
    `pes` to keep away, where no number would spoil theta for good. The slope that
    `backpropagation` takes through such a run may still be no number. None: costs are as they are.
    Raises ValueError for steps < 1, a horizon that isn't whole pieces, held-out loss of none, or a
    `most` that is no number.
    """
    for name, value in (("horizon", horizon), ("truncation", truncation)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be an integer >= 1.")
    if horizon % truncation:
        raise ValueError(
            f"`truncation` is {truncation}; it must divide `horizon`, which is {horizon}."
        )
    _check_objective(task, objective)
    if most is not None and not jnp.isfinite(most):
        raise ValueError(f"`most` is {most}; it must be a finite number, or None.")

    def advance(theta, trained):
        trained, costs = train(
            rule, task, theta, trained, truncation, objective=objective, second_order=second_order
        )
        if most is not None:
            costs = jnp.where(costs < most, costs, most)  # also where it is no number
        return trained, costs.mean()

    begin = lambda theta, key: start(rule, task, theta, key)
    return Unrolled(begin, advance, horizon // truncation)


def _check_objective(task: Task, objective: str) -> None:
    if objective not in ("training", "held-out"):
        raise ValueError(f'`objective` is {objective!r}; it must be "training" or "held-out".')
    if objective == "held-out" and task.heldout is None:
        raise ValueError('`objective` is "held-out", of which the task has none; take "training".')
