# SPDX-License-Identifier: Apache-2.0
"""`nlx run continual`: tasks one after the other; what is learned, kept and forgotten.

command    nlx run continual [--only SCENARIO ...] [--models METHOD ...] [--file CSV --classes N]
           [--domains PATH ...] [--clinc PATH] [--banking PATH] [--kalamang FOLDER]
           nlx run continual-tiny: next to nothing of it, in seconds; continual-gpu: a larger model,
           all rows, 5 seeds, for a GPU (not run yet)
shows      how well every task is done after each task of a stream, and what follows from it
           (`continual_metrics.py`), of fourteen methods (`continual_methods.py`) on one model that
           is trained here first (`continual_model.py`). Streams (`continual_tasks.py`,
           `continual_language.py`): CLINC150's 10 domains of 15 intents, Banking77 as 7 tasks of 11
           classes, any CSV file of texts and labels, digits two at a time, 50 orders of their
           pixels, domains of text, Kalamang to English, alone and after a made-up language
takes      CLINC150 (`--only clinc150`): 114 minutes of one busy core, digits 34, Kalamang after
           another language 16, domains 10, Kalamang 8 (the last three with seven methods), permuted
           digits 60 with five; Banking77 is not run yet. A cell that is stopped begins anew,
           finished ones are kept
expects    on CLINC150, 3 seeds: Hope with 3 levels forgets a quarter of what fine-tuning forgets
           (18.8 of 77.8 points), ends at 58.0 % where fine-tuning ends at 8.3 and EWC at 17.5, and
           knows each task just after it at 74.8 % (fine-tuning at 78.3 by the rate that is chosen
           by what it leaves, at 83.7 by a third of it); a second level brings 5.1 points at the
           end, a third none (0.1, standard error 0.6), clocks 3.6. Levels by Adam forget as
           fine-tuning does. On digits Hope ends above fine-tuning (21.2 and 14.4 %) and forgets as
           much; of fifty orders of pixels it stays plastic and learns little, as all do; on domains
           of text it forgets next to nothing and learns little, below EWC and replay; Kalamang is
           learned to a chrF of 11 to 14 by all

A stream's data comes from a path that is given, or from the folder NLX_DATA; what is neither there
nor on every machine is skipped, with a line that says so. CLINC150 has 40 of its 100 training rows
a class, 15 of 30 test rows, the first 64 bytes of each, and nothing out of scope. All methods take
the same steps on the same number of rows, from the same pretrained model; what each carries from
task to task differs, and is shown in bytes. Each may try four settings (`METHODS`; but for those
that say so): on the first three tasks of the first seed, the one with the best final accuracy on
validation rows is taken for all seeds. A seed draws the order of tasks, rows, batches and class
vectors. A class is looked for among all classes seen so far. Controls learn shuffled labels.
"""

import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from nlx import nn
from nlx_experiments import continual_methods as methods
from nlx_experiments import continual_metrics as metrics
from nlx_experiments import continual_table as table
from nlx_experiments import continual_tasks as tasks
from nlx_experiments import report, runs
from nlx_experiments.cells import Store
from nlx_experiments.console import StopRequest, say
from nlx_experiments.continual_learner import Learner
from nlx_experiments.continual_methods import CHOSEN_AS, METHODS, Choice
from nlx_experiments.continual_model import Size, pretrained
from nlx_experiments.continual_streams import Continual, Row, full, tiny
from nlx_experiments.continual_tasks import Absent, Scenario
from nlx_experiments.errors import Stopped
from nlx_experiments.sequence_experiment import PLACE, check, compiled

PROTOCOL = 1  # counts changes of what is measured here: cells of another one are not used
TUNED = 3
CONTROLLED = ("fine-tuning", "hope, 3 levels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Continual):
    """A larger model, all rows, 5 seeds of every stream: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/continual-gpu")
    seeds: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Continual):
    """Digits, next to no rows: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/continual-tiny")
    place: pathlib.Path = pathlib.Path("runs/continual-tiny")
    seeds: int = 1
    tiny = True


def main(options: Continual) -> dict[str, Any]:
    """Runs what is not known yet; writes tables, pictures and numbers.

    Raises:
      Refused: an unknown stream or method, or data of another form. Stopped: a signal came;
      finished cells are kept.
    """
    name, size, rows = "continual", Size(), full(options)
    if isinstance(options, Gpu):
        name, rows = "continual-gpu", full(options, large=True)
        size = Size(width=512, layers=8, heads=8, hidden=1408, steps=20_000, rows=32, length=512)
    if isinstance(options, Tiny):
        size, rows = Size(width=16, layers=1, heads=2, hidden=12, steps=2, rows=2), tiny()
    check(options, only=rows, models=METHODS)
    asked, skipped = {}, {}
    for scenario, row in rows.items():
        if options.only and scenario not in options.only:
            continue
        try:
            row.made(
                np.random.default_rng((0, 0))
            )  # bad data is refused before anything is learned
            asked[scenario] = row
        except Absent as absent:
            skipped[scenario] = str(absent)
            say(f"{scenario}: skipped, {absent}.")
    cache = compiled(options.runs, hastily=options.tiny)
    with runs.Run(options.runs) as folder, StopRequest() as stop, cache:
        runs.note_environment(folder, say)
        store, path = Store(folder), options.place / "results" / f"{name}.json"
        earlier = (runs.read_json(path) or {}).get("cells", [])
        model = pretrained(size, options.runs, stop)
        for scenario, row in asked.items():
            Contest(scenario, row, model, size, store, stop).run(options)
        known = {r["what"]: r for r in earlier} | store.known
        results = gather(known, rows, size)
    write(options, name, list(known.values()), results, skipped)
    return results


class Contest:
    """All methods on one stream."""

    def __init__(
        self,
        name: str,
        row: Row,
        model: nn.LanguageModel,
        size: Size,
        store: Store,
        stop: StopRequest,
    ):
        """name: of the stream. Others: what it needs."""
        self.name, self.row, self.model, self.size = name, row, model, size
        self.store, self.stop = store, stop
        self.drawn = functools.cache(lambda seed: row.made(np.random.default_rng((0, seed))))

    def run(self, options: Continual) -> None:
        """Chooses and measures what is not known."""
        seeds = range(min(options.seeds, self.row.seeds))
        scenario = self.drawn(0)
        wanted = [m for m in METHODS if not options.models or m in options.models]
        for method in wanted:
            choice = self.choose(method)
            for seed in seeds:
                self.cell(method, seed, choice, self.drawn(seed))
        if self.row.control and scenario.kind == "classes":
            shuffled = tasks.shuffled(scenario, np.random.default_rng(7))
            for method in (m for m in CONTROLLED if m in wanted):
                self.cell(method, "control", self.choose(method), shuffled)

    def choose(self, method: str) -> Choice:
        """The setting with the best final accuracy on validation rows of the first tasks.

        That of `CHOSEN_AS` where a method has another's.
        """
        method = CHOSEN_AS.get(method, method)
        grid, scenario = METHODS[method].grid, self.drawn(0)
        if len(grid) == 1:
            return grid[0]
        first = dataclasses.replace(scenario, stages=scenario.stages[:TUNED])
        found = [self.cell(method, f"try {n}", choice, first) for n, choice in enumerate(grid)]
        return grid[max(range(len(grid)), key=lambda n: found[n]["validation"])]

    def cell(
        self, method: str, part: int | str, choice: Choice, scenario: Scenario
    ) -> dict[str, Any]:
        """One record; from the store where it is there."""
        where = identity(self.name, self.row, self.size, method)
        told = f"{sorted(choice.items())} {digest(scenario)}"
        what = f"{where}; {part}; {hashlib.sha256(told.encode()).hexdigest()[:12]}"
        if what in self.store.known:
            return self.store.known[what]
        begun, trial = time.monotonic(), isinstance(part, str) and part.startswith("try")
        seed = part if isinstance(part, int) else 0
        learner = Learner(METHODS[method], self.model, scenario, self.row.plan, seed)
        matrix, untrained = examined(learner, scenario, choice, self.stop, trial)
        plain = lambda m: [[None if np.isnan(x) else round(float(x), 5) for x in r] for r in m]
        record: dict[str, Any] = {
            "what": what, "where": where, "part": part, "choice": dict(choice),
            "stages": [stage.name for stage in scenario.stages],
            "chance": tasks.chance(scenario), "steps": learner.steps, "carried": learner.carried(),
            "seconds": round(time.monotonic() - begun, 1),
        }  # fmt: skip
        if trial:
            record["validation"] = float(np.mean(matrix[-1]))
        else:
            record |= {"matrix": plain(matrix), "untrained": plain([untrained])[0]}
        self.store.add(record)
        final = record.get("validation", float(np.mean(matrix[-1])))
        say(f"{self.name}, {method}, {part}: {100 * final:.1f} % at the end, {record['seconds']} s")
        return record


def examined(
    learner: Learner, scenario: Scenario, choice: Choice, stop: StopRequest, trial: bool
) -> tuple[np.ndarray, np.ndarray]:
    """R of a stream, and what the first model makes of each task; see `continual_metrics`.

    R[i, j] is there for j <= i + 1. R[j - 1, j] and what stands beside it are among the same
    classes. A trial learns all, and is examined on validation rows at the end alone.
    Raises Stopped where a signal came.
    """
    count = len(scenario.stages)
    matrix, untrained = np.full((count, count), np.nan), np.full(count, np.nan)
    if not trial:
        for n, stage in enumerate(scenario.stages):
            learner.seen[:] = False
            learner.seen[[c for before in scenario.stages[:n] for c in before.classes]] = True
            untrained[n] = learner.examine(stage, stage.test)
        learner.seen[:] = False
    for i, stage in enumerate(scenario.stages):
        learner.learn(stage, choice)
        for j in range(min(i + 2, count)) if not trial else range(count) if i + 1 == count else ():
            if stop.received is not None:
                raise Stopped(
                    f"{stop.received.name}: finished cells are kept; the same command goes on.",
                    stop.received,
                )
            other = scenario.stages[j]
            matrix[i, j] = learner.examine(other, other.validation if trial else other.test)
    return matrix, untrained


def digest(scenario: Scenario) -> str:
    """Of all rows of a stream."""
    held = hashlib.sha256()
    for stage in scenario.stages:
        for rows in (stage.train, stage.validation, stage.test):
            for x in (rows.tokens, rows.labels, rows.scored):
                held.update(np.ascontiguousarray(x).tobytes())
    return held.hexdigest()[:12]


def identity(name: str, row: Row, size: Size, method: str) -> str:
    """What decides a cell, besides data, seed and choice: the protocol, sizes, the plan."""
    told = f"{PROTOCOL} {size} {row.plan} {row.told} {METHODS[method]} {methods.PERIODS}"
    return f"{name}; {method}; {hashlib.sha256(told.encode()).hexdigest()[:12]}"


def gather(known: Mapping[str, Any], rows: Mapping[str, Row], size: Size) -> dict[str, Any]:
    """Finished cells: stream -> method -> {"seeds": records by seed, "tried": records, "control"}.

    Of several records of one seed, made of different data, the last is taken.
    """
    results: dict[str, Any] = {}
    for name, row in rows.items():
        for method in METHODS:
            where = identity(name, row, size, method)
            found = [r for r in known.values() if r["where"] == where]
            seeds = {r["part"]: r for r in found if isinstance(r["part"], int)}
            if not seeds:
                continue
            entry: dict[str, Any] = {"seeds": [seeds[n] for n in sorted(seeds)]}
            tried = [r for r in found if "validation" in r]
            entry["tried"] = [] if method in CHOSEN_AS else tried
            if controls := [r for r in found if r["part"] == "control"]:
                entry["control"] = controls[-1]
            results.setdefault(name, {})[method] = entry
    return results


def write(
    options: Continual, name: str, cells: list[Any], results: Any, skipped: Mapping[str, str]
) -> None:
    """Numbers, pictures and text of what is finished."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    held = {"environment": runs.environment(), "skipped": dict(skipped), "cells": cells}
    runs.write_json(folder / f"{name}.json", held)
    if not results:
        return
    for scenario, found in results.items():
        matrices = {m: table.mean_matrix(e["seeds"]) for m, e in found.items()}
        stages = next(iter(found.values()))["seeds"]
        named = stages[0]["stages"] if len(stages) == 1 else range(1, 1 + len(stages[0]["stages"]))
        stem = folder / f"{name}-{scenario.replace(' ', '-')}"
        metrics.draw(stem.with_suffix(".png"), matrices, list(map(str, named)))
        if len(named) >= table.MANY:
            metrics.draw_learned(folder / f"{stem.name}-learned.png", matrices)
    text = table.shown(results, skipped, name)
    runs.write_whole(folder / f"{name}.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", name, text)
    say(f"\n{text}")
