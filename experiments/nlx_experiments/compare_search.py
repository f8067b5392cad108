# SPDX-License-Identifier: Apache-2.0
"""Running and tuning for `nlx run optimizers`: every finished cell is kept, none is run twice.

All seeds, learning rates, schedules and settings of an optimizer are inputs of one compiled
function: a batch of whole trainings.
"""

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlx import optim
from nlx_experiments.cells import Store
from nlx_experiments.compare_rules import Rule
from nlx_experiments.compare_tasks import Task
from nlx_experiments.console import StopRequest
from nlx_experiments.errors import Stopped

SCHEDULES = ("constant", "cosine")
# The one grid of learning rates: four to a decade. Tuning begins on every second one.
TO_A_DECADE, COARSE = 4, 2
EXTENSIONS = 4  # how often the grid may grow before the best is called one on its edge
FRESH = 4000  # the first of the seeds that are reported; rates are chosen on 0, 1, ...
WORKERS = 2  # batches at a time


class Row(NamedTuple):
    """One problem, who competes on it, and who is meant to win."""

    task: Task
    rules: Mapping[str, Rule]
    declared: Mapping[str, tuple[str, float]]  # schedule -> name, largest loss over the best one's
    grid: tuple[float, float]  # decimal logarithms of the first and the last rate tried at first
    seeds: int  # reported
    tuning: int  # seeds to choose rates and settings on
    batch: int  # trainings that are run as one
    log: bool = True  # the plot's axis
    schedules: Sequence[str] = SCHEDULES


class Cell(NamedTuple):
    """One learning rate and setting, run on several seeds."""

    schedule: str
    exponent: int  # of the rate, in steps of the grid
    setting: int  # number of the rule's setting
    fresh: bool = False

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 10 ** (self.exponent / TO_A_DECADE)


class Contest:
    """One rule on one row: runs cells that are not known yet, and finds the best."""

    def __init__(self, name: str, row: Row, rule_name: str, store: Store, stop: StopRequest):
        """Compiles nothing before it has to."""
        self.name, self.row, self.rule_name = name, row, rule_name
        self.rule, self.store, self.stop = row.rules[rule_name], store, stop
        self.compiled: Any = None

    def measure(self, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
        """The records of cells, run now or before."""
        cells = list(cells)
        missing = [cell for cell in cells if self._what(cell) not in self.store.known]
        jobs = [(cell, seed) for cell in missing for seed in self._seeds(cell)]
        size = self.row.batch
        batches = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        found: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in missing}
        if batches:
            self._compile()
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                for batch, results in zip(batches, pool.map(self._run, batches), strict=True):
                    for (cell, _), result in zip(batch, results, strict=True):
                        found[cell].append(result)
                        if len(found[cell]) == len(self._seeds(cell)):
                            self.store.add(self._record(cell, found[cell]))
                    if self.stop.received is not None:
                        raise Stopped(
                            f"{self.stop.received.name}: what is finished is kept in "
                            f"{self.store.path}; the same command goes on from there.",
                            self.stop.received,
                        )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return {cell: self.store.known[self._what(cell)] for cell in cells}

    def choose(self, schedule: str) -> tuple[Cell, bool]:
        """The best cell on the seeds for tuning, and whether it is on the edge of what was tried.

        The coarse grid with the first setting, longer where the best is at an end; every other
        setting at the best rate and its neighbours; then from the best to its neighbours.
        """
        low, high = (round(end * TO_A_DECADE) for end in self.row.grid)
        found = self.measure(Cell(schedule, e, 0) for e in range(low, high + 1, COARSE))
        for _ in range(EXTENSIONS):
            at, tried = best(found).exponent, [cell.exponent for cell in found]
            if min(tried) < at < max(tried):
                break
            ends = {min(tried): at - COARSE, max(tried): at + COARSE}
            found |= self.measure([Cell(schedule, ends[at], 0)])
        at = best(found).exponent
        others = range(1, len(self.rule.settings))
        found |= self.measure(Cell(schedule, e, s) for s in others for e in (at - 1, at, at + 1))
        for _ in range(EXTENSIONS + 1):
            missing = _beside(best(found)) - set(found)
            if not missing:
                break
            found |= self.measure(sorted(missing))
        winner = best(found)
        inside = _beside(winner) <= set(found) and not self._at_the_end(winner)
        return winner, not inside or not math.isfinite(score(found[winner]))

    def _at_the_end(self, cell: Cell) -> bool:
        """Whether the setting is the largest or smallest of a long list of them, and not 0."""
        values = [next(iter(setting.values()), 0.0) for setting in self.rule.settings]
        here = values[cell.setting]
        return len(values) > 3 and here != 0 and here in (min(values), max(values))

    def seconds(self) -> float:
        """Of one step of one training, in the quickest batch of all: others may have waited."""
        mine = f"{self.name}; {self.row.task.steps} steps; {self.rule_name}; "
        return min(r["seconds"] for what, r in self.store.known.items() if what.startswith(mine))

    def bytes(self) -> int:
        """Of the optimizer's state."""
        task = self.row.task
        params, _ = jax.eval_shape(task.init, task.data, jax.random.key(0))
        made = self.rule.make(lambda step: 0.1, **self.rule.settings[0])
        state = jax.eval_shape(made.init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    def _seeds(self, cell: Cell) -> range:
        if cell.fresh:
            return range(FRESH, FRESH + self.row.seeds)
        return range(self.row.tuning)

    def _what(self, cell: Cell) -> str:
        setting = ", ".join(f"{k} {v:g}" for k, v in self.rule.settings[cell.setting].items())
        seeds = self._seeds(cell)
        return (
            f"{self.name}; {self.row.task.steps} steps; {self.rule_name}; {setting}; "
            f"{cell.schedule} {cell.rate:.4g}; seeds {seeds.start} to {seeds.stop - 1}"
        )

    def _compile(self) -> None:
        if self.compiled is None:
            function = jax.jit(jax.vmap(training(self.row.task, self.rule), (None, 0, 0, 0, 0)))
            given = self._arguments([(Cell("constant", 0, 0), 0)])
            self.compiled = function.lower(self.row.task.data, *given).compile()

    def _arguments(self, batch: Sequence[tuple[Cell, int]]) -> tuple[Any, ...]:
        """Of a full batch: a short one repeats its last training."""
        full = [*batch, *[batch[-1]] * (self.row.batch - len(batch))]
        settings = [self.rule.settings[cell.setting] for cell, _ in full]
        floats = lambda values: np.asarray(list(values), np.float32)
        return (
            floats(cell.rate for cell, _ in full),
            np.asarray([cell.schedule == "cosine" for cell, _ in full]),
            np.asarray([seed for _, seed in full], np.int32),
            {name: floats(s[name] for s in settings) for name in settings[0]},
        )

    def _run(self, batch: Sequence[tuple[Cell, int]]) -> list[dict[str, Any]]:
        if self.stop.received is not None:
            return [{}] * len(batch)
        given, begun = self._arguments(batch), time.monotonic()
        result = jax.device_get(self.compiled(self.row.task.data, *given))
        seconds = (time.monotonic() - begun) / (self.row.batch * self.row.task.steps)
        return [
            {"seconds": seconds, **{name: value[i] for name, value in result.items()}}
            for i in range(len(batch))
        ]

    def _record(self, cell: Cell, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A cell as JSON holds it: losses by seed, the rest averaged; None: no number."""
        mean = lambda name: _finite(np.mean([r[name] for r in results], 0))
        return {
            "what": self._what(cell),
            "losses": _finite(np.asarray([r["loss"] for r in results])),
            "seconds": min(r["seconds"] for r in results),
            **{name: mean(name) for name in results[0] if name not in ("loss", "seconds")},
        }


def training(task: Task, rule: Rule):
    """(data, rate, whether cosine, seed, setting) -> what one training comes to."""
    stretch = task.steps // task.points

    def train(data, rate, cosine, seed, setting):
        start, stream = jax.random.split(jax.random.key(seed))
        params, fixed = task.init(data, start)
        taps = optim.input_taps(params)

        def schedule(step):
            falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / task.steps, 1)))
            return rate * jnp.where(cosine, falling, 1)

        tx = optax.with_extra_args_support(rule.make(schedule, **setting))

        def learn(carry, step):
            params, state = carry
            loss = lambda p, t: task.loss(fixed, p, t, jax.random.fold_in(stream, step), step)
            if rule.reads_inputs:
                value, (gradient, gram) = jax.value_and_grad(loss, (0, 1))(params, taps)
                updates, state = tx.update(gradient, state, params, input_gram=gram)
            else:
                value, gradient = jax.value_and_grad(loss)(params, taps)
                updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        def stage(carry, number):
            carry, online = jax.lax.scan(learn, carry, number * stretch + jnp.arange(stretch))
            params, state = carry
            scores = task.score(fixed, rule.weights(state, params), (number + 1) * stretch)
            return carry, (online, scores)

        begin = (params, tx.init(params))
        _, (online, scores) = jax.lax.scan(stage, begin, jnp.arange(task.points))
        return _outcome(task, online, scores)

    return train


def _outcome(task: Task, online, scores) -> dict[str, Any]:
    """`curve` is drawn, `descent` decides how many steps a target takes."""
    if not task.online:
        last = {name: values[-1] for name, values in scores.items()}
        return {**last, "curve": scores["loss"], "descent": scores["loss"]}
    lost = scores["accuracy"][:-1] - scores["accuracy before"][1:]
    return {
        "loss": jnp.mean(online),
        "plasticity": jnp.mean(scores["accuracy"]),
        "forgetting": jnp.mean(lost),
        "curve": jnp.mean(online, 1),
        "descent": jnp.mean(online, 0),
    }


def best(found: Mapping[Cell, Mapping[str, Any]]) -> Cell:
    """The cell of the smallest mean loss."""
    return min(found, key=lambda cell: (score(found[cell]), cell))


def score(record: Mapping[str, Any]) -> float:
    """Mean loss over seeds; infinite where a training diverged."""
    losses = record["losses"]
    return math.inf if None in losses else statistics.fmean(losses)


def _beside(cell: Cell) -> set[Cell]:
    return {cell._replace(exponent=cell.exponent + step) for step in (-1, 1)}


def _finite(values: np.ndarray) -> Any:
    """As JSON holds it."""
    keep = lambda x: float(f"{x:.6g}") if math.isfinite(x) else None
    return keep(float(values)) if values.ndim == 0 else [keep(float(x)) for x in values]
