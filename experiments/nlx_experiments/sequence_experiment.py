# SPDX-License-Identifier: Apache-2.0
"""Models x sequence tasks: runs what is not known yet, and writes table, picture and numbers."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from nlx import nn
from nlx_experiments import report, runs, sequence_table
from nlx_experiments import sequence_contest as contest
from nlx_experiments.cells import Store
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Refused
from nlx_experiments.sequence_contest import Exam, Plan
from nlx_experiments.sequence_learner import Scores
from nlx_experiments.sequence_levels import InContext
from nlx_experiments.sequence_tasks import Batch, Task, shuffled

SILENCE = 60.0  # seconds without a line, where there is no terminal
CONTROL, CONTROL_STEPS = "control", 200
PLACE = pathlib.Path(__file__).parents[1]


Line = Callable[[Batch], Float[np.ndarray, " n"]]


class Row(NamedTuple):
    """One task, how it is trained, and who competes: model -> variant -> configuration.

    lines: rivals that need no training: name -> bin -> function of the test rows, the share right,
    one number or one for each scored place.
    control: a model that is trained on the task with its answers shuffled too; see `controlled`.
    exam: what is measured besides of every model but the control.
    """

    task: Task
    plan: Plan
    models: Mapping[str, Mapping[str, nn.ModelConfig | InContext]]
    lines: Mapping[str, Mapping[str, Line]] = types.MappingProxyType({})
    control: nn.ModelConfig | None = None
    exam: Exam | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every experiment on sequence tasks is told."""

    runs: pathlib.Path
    """Where finished cells are kept."""
    only: tuple[str, ...] = ()
    """Tasks to run; all by default."""
    models: tuple[str, ...] = ()
    """Models to run; all by default."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""
    tiny: ClassVar[bool] = False
    """Whether compiling takes longer than running: then little is optimised."""


def run(
    options: Options,
    name: str,
    rows: Mapping[str, Row],
    shown: Callable[[Mapping[str, Any]], str],
    measure: str = "rows",
    table: Mapping[str, Row] | None = None,
) -> dict[str, Any]:
    """Runs an experiment, or goes on; writes results/<name>.json, .md, .png and the README's table.

    Args:
      options: where, and which part of it.
      name: of the experiment.
      rows: task name -> row, in the table's order.
      shown: results -> what stands in the README.
      measure: what pictures show: shares of "rows" or of "tokens" that are right.
      table: what the table holds of what is known, where that may be more than is run; the rows.

    Raises:
      Refused: an unknown task or model. Stopped: a signal came; finished cells are kept.
    """
    known_models = list(dict.fromkeys(m for row in rows.values() for m in row.models))
    check(options, only=rows, models=known_models)
    cache = compiled(options.runs, hastily=options.tiny)
    with runs.Run(options.runs) as folder, StopRequest() as stop, cache:
        runs.note_environment(folder, say)
        store = Store(folder)
        for task_name in options.only or rows:
            row = rows[task_name]
            for model in (m for m in row.models if not options.models or m in options.models):
                for variant, config in row.models[model].items():
                    _cell(store, (task_name, model, variant), row, config, stop)
            if row.control is not None and not options.models:
                _cell(store, (task_name, CONTROL, ""), controlled(row), row.control, stop)
        before = published(options.place / "results" / f"{name}.json")
        results = gather(before | store.known, rows if table is None else table)
    left = before.keys() - records(results).keys()
    if left:
        of = ", ".join(sorted({what.split(";")[0] for what in left}))
        say(
            f"{len(left)} cells of results/{name}.json are left out, for their task, sizes or "
            f"training are not those of this run: {of}."
        )
    write(options, name, results, shown, measure)
    return results


def check(options: Any, **known: Iterable[str]) -> None:
    """Raises Refused for a name that is not known, or where the table has no place.

    options: of an experiment. known: their field -> the names that it may hold.
    """
    for field, names in known.items():
        for given in getattr(options, field):
            if given not in names:
                raise Refused(f"`{field}` holds {given!r}; it must be one of {', '.join(names)}.")
    if options.place == PLACE and not (options.place / "README.md").exists():
        raise Refused(
            f"`place` is {options.place}, which holds no README.md to write the table to."
        )


@contextlib.contextmanager
def compiled(folder: pathlib.Path, *, hastily: bool) -> Iterator[None]:
    """What is compiled meanwhile is kept in a run's folder, unless there is a cache already.

    hastily: it is hardly optimised.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
    flag = "jax_disable_most_optimizations"
    before = jax.config.values[flag]
    jax.config.update(flag, hastily or before)
    try:
        yield
    finally:
        jax.config.update(flag, before)


def controlled(row: Row) -> Row:
    """The control: answers that belong to other rows, few steps, one rate."""
    plan = row.plan
    steps = min(plan.steps, CONTROL_STEPS)
    plan = dataclasses.replace(plan, steps=steps, rates=plan.rates[-1:], by_loss=False)
    return row._replace(task=shuffled(row.task), plan=plan, exam=None)


def _cell(
    store: Store,
    where: tuple[str, str, str],
    row: Row,
    config: nn.ModelConfig | InContext,
    stop: StopRequest,
) -> None:
    """Runs a cell that is not known."""
    what = identity(where, row, config)
    if what in store.known:
        return
    called = ", ".join(part for part in where if part)
    with Watch(called, row.plan) as watch:
        record = contest.measure(called, row.task, config, row.plan, stop, watch, row.exam)
    store.add({"what": what, **record})
    best = record["rates"][record["rate"]]
    shares = "/".join(sequence_table.percent(best[b][row.task.graded]) for b in row.plan.bins)
    say(
        f"{called}: {shares} % of {row.task.graded} at {record['rate']}, {record['steps']} steps, "
        f"{record['seconds']:.0f} s"
    )


class Watch:
    """Tells of every validation: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, name: str, plan: Plan):
        """name: of the cell."""
        self.name, self.plan, self.told = name, plan, time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            self.bar = Progress(TextColumn("{task.description}"), BarColumn(), transient=True)

    def __enter__(self) -> "Watch":
        """Shows the bar."""
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task(self.name, total=self.plan.steps)
        return self

    def __exit__(self, *error: Any) -> None:
        """Takes it away."""
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, step: int, scores: Mapping[str, Scores]) -> None:
        """After a validation."""
        best = "/".join(f"{100 * s.rows.max():.0f}" for s in scores.values())
        text = f"{self.name}: step {step} of {self.plan.steps}, best rows {best} %"
        if self.bar is not None:
            self.bar.update(TaskID(0), completed=step, description=text)
        elif time.monotonic() - self.told > SILENCE:
            self.told = time.monotonic()
            say(text)


def identity(where: tuple[str, str, str], row: Row, config: nn.ModelConfig | InContext) -> str:
    """What decides a cell, besides the code of the models: the protocol, the task's rows, sizes."""
    fields = f"{dataclasses.asdict(config)} {dataclasses.asdict(row.plan)} {contest.PROTOCOL} "
    fields += contest.digest(row.task, row.plan)
    fields += "" if row.exam is None else row.exam.what
    digest = hashlib.sha256(fields.encode()).hexdigest()[:12]
    return f"{'; '.join(where)}; {digest}"


def published(path: pathlib.Path) -> dict[str, Any]:
    """The cells of a results file, by what they are: tables keep them where a run has no newer."""
    return records(json.loads(path.read_text())["tasks"]) if path.exists() else {}


def records(results: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of some results, controls among them, by what they are."""
    tasks = results.values()
    found = [r for task in tasks for model in task["models"].values() for r in model.values()]
    found += [task["control"] for task in tasks if "control" in task]
    return {r["what"]: r for r in found if "what" in r}


def gather(known: Mapping[str, Any], rows: Mapping[str, Row]) -> dict[str, Any]:
    """All finished cells: task -> {"plan", "chance", "models": model -> variant -> record}.

    Where a task has lines also "lines": name -> bin -> shares right; where it has a control also
    "control": the record of it, and "scored": bin -> answers that are examined.
    """
    results: dict[str, Any] = {}
    for task_name, row in rows.items():
        models: dict[str, Any] = {}
        for model, variants in row.models.items():
            found = {
                variant: known[what]
                for variant, config in variants.items()
                if (what := identity((task_name, model, variant), row, config)) in known
            }
            if found:
                models[model] = found
        if models:
            some = next(iter(next(iter(models.values())).values()))
            plan = dataclasses.asdict(row.plan)
            results[task_name] = {"plan": plan, "chance": some["chance"], "models": models}
        if models and row.lines:
            results[task_name]["lines"] = lines(row)
        if models and row.control is not None:
            what = identity((task_name, CONTROL, ""), controlled(row), row.control)
            if what in known:
                exams = {
                    b: contest.rows(row.task, row.plan, contest.TESTED, b) for b in row.plan.bins
                }
                counts = {b: int((batch.scored > 0).sum()) for b, batch in exams.items()}
                results[task_name] |= {"control": known[what], "scored": counts}
    return results


def lines(row: Row) -> dict[str, dict[str, list[float]]]:
    """What rivals without training get right, on the rows that models are examined on."""
    exam = functools.partial(contest.rows, row.task, row.plan, contest.TESTED)
    listed = lambda shares: [round(float(share), 4) for share in np.atleast_1d(shares)]
    return {
        name: {b: listed(line(exam(b))) for b, line in by_bin.items()}
        for name, by_bin in row.lines.items()
    }


def write(
    options: Options,
    name: str,
    results: Mapping[str, Any],
    shown: Callable[[Mapping[str, Any]], str],
    measure: str,
) -> None:
    """Numbers, picture and text of what is finished."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / f"{name}.json", {"environment": runs.environment(), "tasks": results})
    if not results:
        return
    sequence_table.plot(folder / f"{name}.png", results, measure)
    text = shown(results)
    runs.write_whole(folder / f"{name}.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", name, text)
    say(f"\n{text}")
