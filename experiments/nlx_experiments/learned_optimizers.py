# SPDX-License-Identifier: Apache-2.0
"""`nlx run learned`: optimizers that were learned, beside optimizers made by hand.

command    nlx run learned [--only TASK ...] [--models RULE ...] [--seeds N]
           nlx run learned-tiny: next to nothing of it, in seconds
shows      what problems cost after 100 and 1,000 steps (`learned_tasks.py`), of six rules
           (`nlx.learned`) that were meta-trained for 100 steps on one kind of problem, and of
           optimizers made by hand at the best of 33 rates for that kind; on that kind and others
takes      of a busy core: an optimizer by hand 1 to 2 minutes a kind, most of it compiling; to
           meta-train the LSTM on quadratics 2 minutes a seed, on digits 5, all else 2 at most; and
           as much again to examine it. Finished cells and thetas are kept, and meta-training goes
           on from its file
expects    the LSTM ahead of all by hand in the mean of quadratics after 100 steps (0.213, heavy
           ball 0.321), behind heavy ball in the median; on digits ahead of Adam (0.043, 0.060), in
           larger or other networks and on quadratics of no use; deep momentum that learns its
           memory at 0.029 on digits, ahead of the same by hand there; elsewhere ahead of it with
           its usual inner rate, not of it with a memory at rest

Plans of meta-training were chosen by pilots of one seed on problems of another draw (part 2), which
are not reported on.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree

from nlx import learned, optim
from nlx.learned import Rule
from nlx_experiments import learned_contest as contest
from nlx_experiments import learned_table as table
from nlx_experiments import learned_tasks as tasks
from nlx_experiments import report, runs
from nlx_experiments.cells import Store
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Stopped
from nlx_experiments.learned_contest import Plan
from nlx_experiments.sequence_experiment import PLACE, Options, check, compiled

PROTOCOL = 1  # counts changes of what is measured here: cells of another one are not used
DMGD = learned.dmgd_rule()
_FIRST = DMGD.init(jax.random.key(0))


def _coordinates(rate):
    """Deep momentum as `dmgd_rule` begins, at another rate."""
    return DMGD.make(_FIRST | {"log_rate": jax.numpy.log(rate)})


def _at_rest(rate):
    """The same with a memory that stays as it begins: what is learning within a run worth?"""
    return DMGD.make(_FIRST | {"log_rate": jax.numpy.log(rate), "log_inner_lr": math.log(1e-9)})


def _of_two() -> Rule:
    """Deep momentum of which rate and decay alone are learned: what is the rest worth?"""
    two = ("log_rate", "decay_logit")
    return Rule(lambda key: {n: _FIRST[n] for n in two}, lambda theta: DMGD.make(_FIRST | theta))


BY_HAND = {
    "SGD": contest.by_rate(optax.sgd),
    "heavy ball": contest.by_rate(lambda rate: optax.sgd(rate, 0.9)),
    "Nesterov": contest.by_rate(lambda rate: optax.sgd(rate, 0.9, nesterov=True)),
    "Adam": contest.by_rate(optax.adam),
    "RMSprop": contest.by_rate(optax.rmsprop),
    "DMGD": contest.by_rate(optim.dmgd),
    "DMGD, coordinates": contest.by_rate(_coordinates),
    "DMGD, memory at rest": contest.by_rate(_at_rest),
}
RULES: Mapping[str, Rule] = {
    "LSTM": learned.lstm_rule(),
    "MLP": learned.mlp_rule(step=0.1, exponent=0.1),
    "momentum, learned": learned.momentum_rule(),
    "Adam, learned": learned.adam_rule(),
    "hypergradient": learned.hypergradient_rule(),
    "DMGD, learned": DMGD,
    "DMGD, rate and decay learned": _of_two(),
}


def plan(rule: str, task: str) -> Plan:
    """How a rule is meta-trained on a task."""
    small = task in ("quadratics", "bandit")  # a few parameters: many runs at once
    if rule == "LSTM":
        pieces = {"quadratics": 5_000, "bandit": 500}.get(task, 1_500)
        return Plan("backpropagation", 64 if small else 2, pieces, 1e-2)
    most = 300.0 if task == "quadratics" else 10.0  # some three times what runs cost at first
    return Plan("pes", 128 if small else 8, 1_000, 3e-2, sigma=0.03, most=most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(Options):
    """Learned optimizers and optimizers made by hand."""

    runs: pathlib.Path = pathlib.Path("runs/learned")
    seeds: int = 3
    """Of each meta-training."""

    def __post_init__(self) -> None:
        """Raises ValueError for fewer than one seed."""
        if self.seeds < 1:
            raise ValueError(f"`seeds` is {self.seeds}; it must be an integer >= 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Learned):
    """Two rules, two pieces, two steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/learned-tiny")
    place: pathlib.Path = pathlib.Path("runs/learned-tiny")
    seeds: int = 1
    tiny = True


def main(options: Learned) -> dict[str, Any]:
    """Runs what is not known yet; writes tables, pictures and numbers.

    Raises Refused for an unknown task or rule; Stopped: a signal came, finished cells are kept.
    """
    exams = tasks.exams(options.tiny)
    by_hand = {n: BY_HAND[n] for n in ("SGD", "heavy ball")} if options.tiny else BY_HAND
    rules = {n: RULES[n] for n in ("LSTM", "DMGD, learned")} if options.tiny else RULES
    trained_on = ("quadratics",) if options.tiny else tasks.TRAINED_ON
    check(options, only=dict.fromkeys([*exams, *trained_on]), models=[*by_hand, *rules])
    cache = compiled(options.runs, hastily=options.tiny)
    with runs.Run(options.runs) as folder, StopRequest() as stop, cache:
        runs.note_environment(folder, say)

        def leave() -> None:
            if stop.received is not None:
                raise Stopped(
                    f"{stop.received.name}: finished cells are kept; the same command goes on.",
                    stop.received,
                )

        wanted = []
        for task in dict.fromkeys([*trained_on, *exams]):
            wanted += [(task, name, 0, None) for name in by_hand]
        for seed in range(options.seeds):
            for task in trained_on:
                wanted += [(task, name, seed, plan(name, task)) for name in rules]
        if options.tiny:
            short = lambda p: p and p._replace(runs=2, pieces=2, truncation=1, looks=1)
            wanted = [(task, name, seed, short(p)) for task, name, seed, p in wanted]
        cell = Cell(Store(folder), folder.folder, exams, {**by_hand, **rules}, trained_on, leave)
        for task, name, seed, how in wanted:
            chosen = not options.only or task in options.only
            if chosen and (not options.models or name in options.models):
                cell.run((task, name, seed, how))
        path = options.place / "results" / "learned.json"
        earlier = {r["what"]: r for r in (runs.read_json(path) or {}).get("cells", [])}
        known = earlier | cell.store.known
        found = [known[what] for what in map(cell.what, wanted) if what in known]
    write(options, found, exams)
    return {"cells": found}


Wanted = tuple[str, str, int, Plan | None]  # set by, name, seed, how it is meta-trained


class Cell:
    """One optimizer, set by one kind of problem, and what it makes of all."""

    def __init__(
        self,
        store: Store,
        folder: pathlib.Path,
        exams: Mapping[str, tasks.Exam],
        rules: Mapping[str, Rule],
        trained_on: tuple[str, ...],
        leave: Callable[[], None],
    ):
        """What all cells share."""
        self.store, self.folder, self.exams, self.rules = store, folder, exams, rules
        self.trained_on, self.leave = trained_on, leave

    def what(self, wanted: Wanted) -> str:
        """What decides a cell."""
        task, name, seed, how = wanted
        sizes = {n: tuple(e._replace(task=None)) for n, e in self.exams.items()}
        return f"{self.setting(wanted)}; {_digest(f'{sizes} {contest.REPORTED} {contest.FIRST}')}"

    def setting(self, wanted: Wanted) -> str:
        """What decides how an optimizer is set."""
        task, name, seed, how = wanted
        of = self.exam(task)
        told = f"{PROTOCOL} {how} {of.objective} {of.steps} {of.choosing}"
        told += f" {contest.RATES}" * (how is None)
        return f"{task}; {name}; {seed}; {_digest(told)}"

    def exam(self, task: str) -> tasks.Exam:
        """The problems of a kind that is trained on or examined."""
        return self.exams[task] if task in self.exams else tasks.trained_on(task)

    def run(self, wanted: Wanted) -> None:
        """Sets the optimizer and examines it, unless that is known."""
        task, name, seed, how = wanted
        if self.what(wanted) in self.store.known:
            return
        self.leave()
        rule, exam = self.rules[name], self.exam(task)
        if how is None:
            found = contest.tuned(rule, exam)
            theta = {"rate": jax.numpy.float32(found["rate"])}
        else:
            theta, found = self.meta_trained(wanted, rule, exam)
        reach = self.exams if task in self.trained_on else {task: exam}
        exams = {}
        for other, one in reach.items():
            self.leave()
            exams[other] = contest.examined(rule, one, theta)
        plain = None if how is None else how._asdict()
        cell = {"what": self.what(wanted), "task": task, "name": name, "seed": seed, "plan": plain}
        self.store.add(cell | found | {"exams": exams})
        told = ", ".join(f"{n} {table.mean(e['costs']):.3g}" for n, e in exams.items())
        say(f"{name}, set by {task}, {seed}: {told}; {found.get('seconds', 0)} s")

    def meta_trained(
        self, wanted: Wanted, rule: Rule, exam: tasks.Exam
    ) -> tuple[PyTree[Array], dict[str, Any]]:
        """From its file where it is there; else it is trained, and written."""
        task, name, seed, how = wanted
        assert how is not None
        stem = f"{name} {task} {seed} {_digest(self.setting(wanted))}".replace(" ", "-")
        path = self.folder / f"{stem}.safetensors"
        if path.exists():
            return contest.restored(path, rule.init(jax.random.key(0)))
        under_way = path.with_name(f"under-way-{path.name}")
        theta, found = contest.meta_trained(rule, exam, how, seed, self.leave, under_way)
        contest.kept(path, theta, found)
        under_way.unlink(missing_ok=True)
        return theta, found


def _digest(told: str) -> str:
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def write(options: Learned, cells: list[dict[str, Any]], exams: Mapping[str, tasks.Exam]) -> None:
    """Numbers, pictures and text of what is finished."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in cells)
    environment = json.dumps(runs.environment())
    content = f'{{"environment": {environment},\n"cells": [\n{lines}\n]}}\n'
    runs.write_whole(folder / "learned.json", content)
    if not cells:
        return
    table.plot(folder / "learned.png", cells, exams)
    text = table.shown(cells, exams)
    runs.write_whole(folder / "learned.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", "learned", text)
    say(f"\n{text}")
