# SPDX-License-Identifier: Apache-2.0
"""`nlx run forecasting`: sea temperatures of the next months, from those of the last eight years.

command    nlx run forecasting [--only HORIZON ...] [--models MODEL ...]
           nlx run forecasting-tiny: next to nothing of it, in seconds; forecasting-gpu: models of
           width 128, ten times the steps, 5 seeds, for a GPU
shows      mean squared and mean absolute error of forecasts of 6, 12 and 24 months
           (`forecasting_tasks.py`: a real series, and the protocol), of models that read the window
           in patches of four months, beside a linear forecaster and three rules of thumb
takes      70 minutes of one busy core; a model that is stopped begins anew, finished ones are kept
expects    mean squared error at 6, 12 and 24 months: Hope 0.40, 0.66, 0.76, level with Titans
           (0.41, 0.64, 0.77) and nearly all others; the linear forecaster, which is solved and not
           trained, 0.35, 0.57, 0.63: no model reaches it, which Hope was to; persistence 1.32,
           1.51, 1.80, last year's months 1.03, 1.04, 1.09

A window is normalised by its own mean and deviation, forecast, and scaled back. Models have as many
parameters as each other within 1 %; Hope's continuum memory system has three blocks that all learn
at every step, and no slower level. Weights are those, the rate is the one, with the least error on
validation windows; errors are of test windows, which choose nothing. The control is trained on what
follows other windows: it can't beat the window's mean by much.

Source: Behrouz et al. (2024), Titans, section 5 (forecasting as a further use of its memory).
"""

import dataclasses
import functools
import hashlib
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt

from nlx import nn
from nlx_experiments import forecasting_tasks as tasks
from nlx_experiments import paired, report, runs
from nlx_experiments.cells import Store
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Stopped
from nlx_experiments.forecasting_learner import Size, measure
from nlx_experiments.forecasting_tasks import Windows
from nlx_experiments.long_context import base, contestants
from nlx_experiments.sequence_experiment import PLACE, Options, check, compiled, published

HORIZONS = 6, 12, 24
RULES = {
    "persistence": tasks.persistence,
    "last year": tasks.last_year,
    "mean of the window": tasks.average,
}
CONTROL = "control"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecasting(Options):
    """Forecasts of a real series."""

    runs: pathlib.Path = pathlib.Path("runs/forecasting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Forecasting):
    """Models of width 128, ten times the steps, 5 seeds: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/forecasting-gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Forecasting):
    """One model, two steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/forecasting-tiny")
    place: pathlib.Path = pathlib.Path("runs/forecasting-tiny")
    tiny = True


FULL = Size(96, HORIZONS, 32, 2, 34_000, 600, 25, (1e-3, 3e-3), 3, 32)
OF_GPU = FULL._replace(width=128, layers=4, parameters=1_000_000, steps=6_000, seeds=5, rows=128)
TINY = FULL._replace(
    horizons=(6,), width=8, layers=1, parameters=1_500, steps=2, every=1, rates=(1e-2,), seeds=1
)


def main(options: Forecasting) -> dict[str, Any]:
    """Runs what is not known yet; writes table, picture and numbers.

    Raises Refused for an unknown horizon or model; Stopped: a signal came, finished cells are kept.
    """
    gpu, tiny = isinstance(options, Gpu), isinstance(options, Tiny)
    name = "forecasting-gpu" if gpu else "forecasting"
    size = OF_GPU if gpu else TINY if tiny else FULL
    sizes = {**base(2, size.width, size.layers), "chunk_size": 4}
    models = {m: found[""] for m, found in contestants(sizes, size.parameters).items()}
    cells = {**models, CONTROL: models["deltanet"]}
    if tiny:
        cells = {"transformer": models["transformer"]}
    check(options, only=[*map(str, size.horizons)], models=cells)
    cache = compiled(options.runs, hastily=tiny)
    with runs.Run(options.runs) as folder, StopRequest() as stop, cache:
        runs.note_environment(folder, say)
        store, series, results = Store(folder), tasks.temperatures(), {}
        before = published(options.place / "results" / f"{name}.json")
        for horizon in size.horizons:
            parts = tasks.split(series, size.context, horizon)
            run = not options.only or str(horizon) in options.only
            found = {}
            for model, config in cells.items():
                what = identity(model, config, horizon, size, parts)
                wanted = not options.models or model in options.models
                if run and wanted and what not in store.known:
                    called = f"{horizon} months, {model}"
                    leave = functools.partial(_leave, stop, called)
                    record = measure(config, horizon, size, parts, model == CONTROL, leave)
                    store.add({"what": what, **record})
                    say(f"{called}: {_interval(best(record)['mse'])}")
                if what in (known := before | store.known):
                    found[model] = {"": known[what]}
            if found:
                results[str(horizon)] = {"models": found, "lines": lines(parts)}
    write(options, name, results)
    return results


def _leave(stop: StopRequest, name: str) -> None:
    if stop.received is not None:
        raise Stopped(
            f"{stop.received.name}: {name} was not finished and begins anew; all before it is "
            "kept, the same command goes on from there.",
            stop.received,
        )


def identity(
    model: str, config: nn.ModelConfig, horizon: int, size: Size, parts: tuple[Windows, ...]
) -> str:
    """What decides a cell, besides the code of the models."""
    fields = f"{dataclasses.asdict(config)} {size._replace(horizons=())}"
    content = b"".join(x.tobytes() for part in parts for x in part)
    digest = hashlib.sha256(fields.encode() + content).hexdigest()[:12]
    return f"{horizon}; {model}; {digest}"


def lines(parts: tuple[Windows, Windows, Windows]) -> dict[str, dict[str, float]]:
    """Errors of forecasts that need no training."""
    found = {"linear": tasks.errors(tasks.linear(*parts), parts[2].future)}
    found |= {name: tasks.errors(rule(parts[2]), parts[2].future) for name, rule in RULES.items()}
    return {name: {k: round(v, 4) for k, v in e.items()} for name, e in found.items()}


def best(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the chosen rate gave."""
    return record["rates"][record["rate"]]


def _records(task: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {model: variants[""] for model, variants in task["models"].items()}


def _interval(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def shown(results: Mapping[str, Any]) -> str:
    """Errors by horizon, who is ahead, and the grid of rates."""
    parts = []
    for of, called in (("mse", "Mean squared error"), ("mae", "Mean absolute error")):
        models = list(dict.fromkeys(m for task in results.values() for m in task["models"]))
        rows: list[tuple] = []
        for model in models:
            found = [_records(task).get(model) for task in results.values()]
            name = "*control: what follows other windows*" if model == CONTROL else model
            rows.append((name, *("" if r is None else _interval(best(r)[of]) for r in found)))
        for line in next(iter(results.values()))["lines"]:
            rows.append((f"*{line}*", *(task["lines"][line][of] for task in results.values())))
        columns = ["model", *(f"{horizon} months" for horizon in results)]
        parts += [
            f"{called} of test windows, in units of the standardised series, mean of the seeds "
            "(lowest to highest):",
            report.Table("", columns, rows).markdown(),
        ]
    parts += verdicts(results)
    grid = [
        (horizon, model, rate, statistics.fmean(found["validation"]), _interval(found["mse"]))
        for horizon, task in results.items()
        for model, record in _records(task).items()
        for rate, found in record["rates"].items()
    ]
    columns = ["months", "model", "rate", "validation", "mean squared error"]
    return "\n\n".join([*parts, "The whole grid:", report.Table("", columns, grid).markdown()])


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Hope's mean squared error less each rival's and the linear forecaster's, by horizon."""
    told = []
    for horizon, task in results.items():
        missed = {model: best(record)["mse"] for model, record in _records(task).items()}
        if "hope" not in missed:
            continue
        ours = missed.pop("hope")
        rivals = {model: errors for model, errors in missed.items() if model != CONTROL}
        rivals["linear"] = [task["lines"]["linear"]["mse"]] * len(ours)  # has no seeds
        apart = {rival: paired.by_seed(ours, theirs) for rival, theirs in rivals.items()}
        said = [f"{rival} {d.told(3, '', less=True)}" for rival, d in apart.items()]
        told.append(f"* {horizon} months: {'; '.join(said)}.")
    if not told:
        return []
    said = (
        "Hope's mean squared error less that of others, seed by seed on the same windows, with the "
        "standard error over seeds; less is better; level: Student's t is not sure at 95 % of "
        "either."
    )
    return [said, "\n".join(told)]


def write(options: Forecasting, name: str, results: Mapping[str, Any]) -> None:
    """Numbers, picture and text of what is finished."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / f"{name}.json", {"environment": runs.environment(), "tasks": results})
    if not results:
        return
    plot(folder / f"{name}.png", results)
    text = shown(results)
    runs.write_whole(folder / f"{name}.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", name, text)
    say(f"\n{text}")


def plot(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """A bar a model and seed-wise dots, a panel for each horizon; lines need no training."""
    size = (4.6 * len(results), 3.6)
    figure, panels = plt.subplots(
        1, len(results), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (horizon, task) in zip(panels.flat, results.items(), strict=True):
        for place, record in enumerate(_records(task).values()):
            errors = best(record)["mse"]
            colour = report.COLOURS[place % len(report.COLOURS)]
            axes.bar(place, statistics.fmean(errors), color=colour, alpha=0.7)
            axes.plot([place] * len(errors), errors, ".", color="#222222", markersize=4)
        for (line, found), dash in zip(task["lines"].items(), ("-", "--", ":", "-."), strict=True):
            axes.axhline(found["mse"], color="#888888", linestyle=dash, linewidth=1, label=line)
        axes.set_xticks(range(len(task["models"])), list(task["models"]), rotation=45, ha="right")
        axes.set(title=f"{horizon} months", ylabel="mean squared error")
        axes.legend(frameon=False, fontsize=7)
    report.save(figure, path)
