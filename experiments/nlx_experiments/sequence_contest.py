# SPDX-License-Identifier: Apache-2.0
"""One model on one sequence task, by one protocol for all: trained, chosen, examined afresh.

A cell is every seed at every learning rate, trained at once on the same stream of fresh rows. Of
each training the weights that did best on validation rows are kept; it ends early once, at one
rate, every seed was right everywhere in three validations on end. The rate is chosen on validation
rows too; what is reported is measured on rows that were drawn for nothing else.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from nlx import nn
from nlx_experiments import sequence_learner, sequence_levels
from nlx_experiments.console import StopRequest
from nlx_experiments.errors import Stopped
from nlx_experiments.sequence_learner import Scores
from nlx_experiments.sequence_levels import InContext
from nlx_experiments.sequence_tasks import Batch, Task, chance, padded

MEASURES = ("rows", "tokens", "loss")
WORTHLESS = -1e9  # what a training is worth that has no finite loss
TRAINED, VALIDATED, TESTED = 0, 1, 2  # streams of rows
PROTOCOL = 2  # counts changes of what is measured here: cells of another one are not used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How every model is trained on a task, and examined."""

    bins: Mapping[str, tuple[int, int]]
    """Name -> shortest and longest rows of an examination; those that the task does not draw
    otherwise decide which weights stay, the last of them most."""
    shortest: int
    """Of the rows trained on."""
    stages: tuple[tuple[int, int], ...]
    """(step from which it holds, a multiple of `every`, longest rows trained on)."""
    steps: int
    """At most."""
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Learning rates tried."""
    seeds: int = 3
    """Trainings of each rate."""
    rows: int = 32
    """In a step."""
    noise: float = 0.0
    """On the embedded symbols while training; see `sequence_learner.make`."""
    decay: bool = False
    """Whether the rate falls."""
    every: int = 100
    """Steps between two validations."""
    validated: int = 256
    """Rows of a bin, to choose weights and rates on."""
    tested: int = 512
    """Rows of a bin, for what is reported."""
    by_loss: bool = False
    """Whether weights and rates are chosen by the loss, not by the rows that are right."""
    round_to: int = 64
    """Rows are filled up to multiples of it, so that little is compiled."""
    chosen: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Bin -> shortest and longest of its validation rows, where not those of the examination."""

    def __post_init__(self) -> None:
        """Raises ValueError, a sentence that names the field."""
        since = [step for step, _ in self.stages]
        if since[:1] != [0] or any(step % self.every for step in since):
            raise ValueError(
                f"`stages` is {self.stages}; the first must hold from step 0, and all from "
                f"multiples of `every`, {self.every}."
            )
        if unknown := self.chosen.keys() - self.bins.keys():
            raise ValueError(f"`chosen` holds {unknown}; it must hold bins of {[*self.bins]}.")


class Exam(NamedTuple):
    """What is measured besides, with the weights that were kept at the best rate.

    what: its name and sizes, which decide a cell as the plan does.
    measure: (configuration, weights with a leading axis of seeds, a function to call now and then,
        which raises Stopped where a signal came) -> what JSON can hold.
    """

    what: str
    measure: Callable[[nn.ModelConfig, PyTree, Callable[[], None]], Any]


def measure(
    name: str,
    task: Task,
    config: nn.ModelConfig | InContext,
    plan: Plan,
    stop: StopRequest | None = None,
    watch: Callable[[int, Mapping[str, Scores]], None] = lambda step, scores: None,
    exam: Exam | None = None,
) -> dict[str, Any]:
    """Trains and examines; what a cell's record holds, apart from what it is.

    watch: told of every validation, (steps taken, bin -> scores of all trainings).
    exam: what is measured besides, of models that read symbols and answer where they stand.

    Returns:
      "rates": rate -> bin -> {"rows", "tokens", "loss"}: `Scores` on the test rows, by seed, where
      the task has a curve also "curve", the share right at each scored place, mean of the seeds;
      and "validations" by seed, and "validation", their mean, which rates are compared by; "rate":
      the best one;
      "steps" taken; "seconds"; "parameters"; "device"; "chance": bin -> share of the most frequent
      answer; with an exam also "exam", what it measured.

    Raises Stopped where a signal came: a cell is whole or not there.
    """
    begun = time.monotonic()

    def leave() -> None:
        if stop is not None and stop.received is not None:
            raise Stopped(
                f"{stop.received.name}: {name} was not finished and begins anew; all before it is "
                "kept, the same command goes on from there.",
                stop.received,
            )

    make = sequence_levels.make if isinstance(config, InContext) else sequence_learner.make
    learners: sequence_learner.Learners = make(
        config,
        steps=plan.steps,
        noise=plan.noise,
        decay=plan.decay,
        decoded=plan.stages[-1][1] if task.compressed else 0,
    )
    pairs = list(itertools.product(plan.rates, range(plan.seeds)))
    rates = jnp.asarray([rate for rate, _ in pairs], jnp.float32)
    seeds = jnp.asarray([seed for _, seed in pairs], jnp.uint32)
    state, keys = learners.init(seeds), jax.vmap(jax.random.key)(seeds)
    checks = {b: rows(task, plan, VALIDATED, b) for b in plan.bins if b not in task.examined}
    stream = np.random.default_rng((TRAINED, _number(task.name)))
    kept = jax.tree.map(jnp.copy, state.params), np.full(len(pairs), -np.inf)
    step, perfect = 0, np.zeros(len(pairs), int)  # validations on end with nothing wrong
    while step < plan.steps and not _by_rate(perfect > 2, plan).all(1).any():
        count = min(plan.every, plan.steps - step)
        longest = [length for since, length in plan.stages if step >= since][-1]
        draw = lambda longest=longest: _filled(
            task.draw(stream, plan.rows, plan.shortest, longest), plan
        )
        batches = sequence_learner.stacked([draw() for _ in range(count)])
        state, _ = learners.learn(state, rates, keys, batches)
        step += count
        scores = {b: learners.score(state.params, batch) for b, batch in checks.items()}
        watch(step, scores)
        value = _value(list(scores.values()), task, plan)
        kept = sequence_learner.better((state.params, value), kept)
        perfect = np.where(_right(list(scores.values()), task, plan), perfect + 1, 0)
        leave()
    exams = {b: rows(task, plan, TESTED, b) for b in plan.bins}
    results = {b: learners.score(kept[0], batch) for b, batch in exams.items()}
    validation = _by_rate(kept[1], plan).mean(1)
    by_rate = {
        f"{rate:g}": {
            "validation": float(validation[n]),
            "validations": [float(v) for v in _by_rate(kept[1], plan)[n]],
            **{
                b: {
                    **{name: _listed(getattr(s, name), plan)[n] for name in MEASURES},
                    **({"curve": _curve(s.places, exams[b], plan)[n]} if task.curve else {}),
                }
                for b, s in results.items()
            },
        }
        for n, rate in enumerate(plan.rates)
    }
    chosen, further = int(validation.argmax()), {}
    if exam is not None:
        if isinstance(config, InContext):
            raise ValueError("`exam` is of models whose blocks do not learn in the context.")
        seeds = slice(chosen * plan.seeds, (chosen + 1) * plan.seeds)
        weights = jax.tree.map(lambda leaf: leaf[seeds], kept[0])
        further = {"exam": exam.measure(config, weights, leave)}
    return {
        "rates": by_rate,
        "rate": f"{plan.rates[chosen]:g}",
        "steps": step,
        "seconds": round(time.monotonic() - begun, 1),
        "parameters": learners.parameters,
        "device": jax.devices()[0].device_kind,
        "chance": {b: round(chance(batch), 4) for b, batch in exams.items()},
        **further,
    }


def equal(config: nn.ModelConfig, parameters: int, decoded: int = 0) -> nn.ModelConfig:
    """The configuration with the `hidden` that brings its parameters nearest to a number.

    decoded: see `sequence_learner.SequenceModel`.

    Raises ValueError where none comes within 1 %, or by half of what one unit more would take.
    """
    sized = lambda hidden: dataclasses.replace(config, hidden=hidden)
    least, more = (sequence_learner.count(sized(hidden), decoded) for hidden in (1, 2))
    made = sized(max(1, 1 + round((parameters - least) / (more - least))))
    found = sequence_learner.count(made, decoded)
    if abs(found - parameters) > max(0.01 * parameters, (more - least) / 2):
        raise ValueError(
            f"`parameters` is {parameters}; it must be at least {least} for {config.mixer} of "
            f"width {config.width}."
        )
    return made


def rows(task: Task, plan: Plan, stream: int, name: str) -> Batch:
    """The rows of an examination, the same for every model.

    stream: VALIDATED or TESTED. name: of the bin.
    """
    generator = np.random.default_rng((stream, _number(task.name), _number(name)))
    count = plan.validated if stream == VALIDATED else plan.tested
    usual = (task.validation if stream == VALIDATED else task.test) or task.draw
    draw = task.examined.get(name, usual)
    lengths = plan.bins[name]
    if stream == VALIDATED:
        lengths = plan.chosen.get(name, lengths)
    return _filled(draw(generator, count, *lengths), plan)


def digest(task: Task, plan: Plan) -> str:
    """A hash of a few rows that are trained on, validated and tested: another task has others."""
    few = dataclasses.replace(plan, validated=4, tested=4)
    stream = np.random.default_rng(0)
    drawn = [task.draw(stream, 4, plan.shortest, plan.stages[-1][1])]
    drawn += [rows(task, few, s, b) for s in (VALIDATED, TESTED) for b in plan.bins]
    parts = (np.asarray(x).tobytes() for b in drawn for x in (b.tokens, b.answers, b.scored))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _value(found: list[Scores], task: Task, plan: Plan) -> np.ndarray:
    """What a training is worth: all that is graded, then the last bin; losses break ties.

    What has no finite loss is WORTHLESS.
    """
    loss = np.mean([s.loss for s in found], 0)
    graded = [getattr(s, task.graded) for s in found]
    close = 1e-3 * np.mean([s.tokens for s in found], 0) - 1e-4 * np.minimum(loss, 1)
    value = -loss if plan.by_loss else np.mean(graded, 0) + close + graded[-1]
    return np.where(np.isfinite(loss), value, WORTHLESS)


def _right(found: list[Scores], task: Task, plan: Plan) -> np.ndarray:
    """Of each training whether all that is graded is right; never where losses are compared."""
    right = np.all([getattr(s, task.graded) == 1 for s in found], 0)
    return right & (not plan.by_loss)


def _filled(batch: Batch, plan: Plan) -> Batch:
    return padded(batch, plan.round_to * -(-batch.tokens.shape[1] // plan.round_to))


def _number(text: str) -> int:
    """A seed of its own for every name."""
    return int.from_bytes(text.encode(), "big")


def _by_rate(values: np.ndarray, plan: Plan) -> np.ndarray:
    return np.asarray(values).reshape(len(plan.rates), plan.seeds)


def _curve(places: np.ndarray, batch: Batch, plan: Plan) -> list[list[float]]:
    """Of each rate the mean over seeds at the places that are scored."""
    seen = places[:, batch.scored[0] > 0].reshape(len(plan.rates), plan.seeds, -1)
    return [[round(float(v), 4) for v in rate] for rate in seen.mean(1)]


def _listed(values: np.ndarray, plan: Plan) -> list[list[float | None]]:
    """By rate and seed; what is not finite is None, for JSON has no name for it."""
    kept = lambda v: round(float(v), 4) if np.isfinite(v) else None
    return [[kept(v) for v in row] for row in _by_rate(values, plan)]
