# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of `nlx run agents`."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from nlx_experiments import agents_tasks, continual_metrics, paired, report
from nlx_experiments.agents_contest import best
from nlx_experiments.agents_tasks import Task

SMOOTHED = 5  # steps of a curve that are shown as their mean
COLOURS: dict[str, str] = dict(zip(agents_tasks.MODELS, report.COLOURS, strict=False))
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # task -> model -> record


def shown(results: Results, tasks: Mapping[str, Task]) -> str:
    """What stands in the README."""
    of = lambda kind: {n: r for n, r in results.items() if tasks[n].kind == kind}
    parts = []
    if switches := of("switch"):
        parts += switched(switches)
    if memory := of("memory"):
        parts += remembered(memory, tasks)
    for task, models in of("skills").items():
        parts += kept(models, list(tasks[task].exams), tasks[task].keep)
    rows = [
        (task, model, rate, statistics.fmean(found["validation"]), *_of(record, rate))
        for task, models in results.items()
        for model, record in models.items()
        for rate, found in record["rates"].items()
    ]
    columns = ["task", "model", "rate", "validation", "parameters", "carried", "seconds"]
    parts += [
        "The whole grid; carried are numbers from step to step, seconds are of all rates together:"
    ]
    return "\n\n".join([*parts, report.Table("", columns, rows).markdown()])


def _of(record: Mapping[str, Any], rate: str) -> list[Any]:
    """Told once, beside the rate that was chosen."""
    told = "parameters", "carried", "seconds"
    return [record[name] if rate == record["rate"] else "" for name in told]


def switched(results: Results) -> list[str]:
    """Regret after the switch, and whose is less."""
    models = _models(results)
    rows, told = [], []
    for task, found in results.items():
        cells = [_interval(_switch(found[m])["regret"]) if m in found else "" for m in models]
        before = [
            f"{statistics.fmean(_switch(found[m])['before']):.2f}" if m in found else ""
            for m in models
        ]
        rows.append((task, *cells, " / ".join(before)))
        told += _verdicts(task, {m: _switch(r)["regret"] for m, r in found.items()}, less=True)
    columns = ["task", *models, "before it, " + " / ".join(models)]
    said = (
        "Regret after the switch: what the best policy would have had, less what was had, in the "
        "half lifetime after it; mean of the seeds (lowest to highest):"
    )
    parts = [said, report.Table("", columns, rows).markdown()]
    if told:
        less = (
            "Hope's regret less that of others, seed by seed on the same lifetimes, with the "
            "standard error over seeds; less is better; level: Student's t is not sure at 95 % of "
            "either."
        )
        parts += [less, "\n".join(told)]
    return parts


def remembered(results: Results, tasks: Mapping[str, Task]) -> list[str]:
    """Walks that end well, by length."""
    rows, told = [], []
    for task, found in results.items():
        titles = list(tasks[task].exams)
        for model, record in found.items():
            cells = [_percent(best(record)[title]["right"]) for title in titles]
            rows.append((task, model, *cells))
        longest = {m: [100 * x for x in best(r)[titles[-1]]["right"]] for m, r in found.items()}
        told += _verdicts(f"{task}, {titles[-1]} steps", longest, unit="points", digits=1)
    columns = ["task", "model", *(f"{title} steps" for title in titles)]
    said = (
        f"Walks that end well, in percent, trained on up to {titles[0]} steps; half is chance; "
        "mean of the seeds (lowest to highest):"
    )
    return [said, report.Table("", columns, rows).markdown(), *(["\n".join(told)] if told else [])]


def kept(models: Mapping[str, Mapping[str, Any]], names: Sequence[str], keep: float) -> list[str]:
    """Skills after each that was learned, and what is left of them."""
    rows, left = [], {}
    for model, record in models.items():
        found = best(record)
        matrices = np.asarray(found["matrix"])
        summaries = [
            continual_metrics.summary(matrix, np.asarray(before))
            for matrix, before in zip(matrices, found["untrained"], strict=True)
        ]
        left[model] = [100 * s["final"] for s in summaries]
        numbers = [_percent([s[of] for s in summaries]) for of in ("learned", "final", "backward")]
        ends = [_percent(matrices[:, -1, j].tolist()) for j in range(len(names))]
        rows.append((model, *numbers, *ends))
    columns = ["model", "just learned", "at the end", "backward transfer"]
    columns += [f"{name} at the end" for name in names]
    how = "by elastic weight consolidation kept, " if keep else ""
    said = (
        f"Skills learned one after the other ({', '.join(names)}), {how}in percent of the best "
        "policy's reward, mean of the seeds (lowest to highest); backward transfer is what is left "
        "at the end, less what there was just after learning, of all but the last:"
    )
    told = _verdicts("at the end", left, unit="points", digits=1)
    table = report.Table("", columns, rows).markdown()
    return [said, table, *(["\n".join(told)] if told else [])]


def plot(folder: pathlib.Path, name: str, results: Results, tasks: Mapping[str, Task]) -> None:
    """Regret around the switch, walks by length; and skills in a picture of their own."""
    drawn = {n: r for n, r in results.items() if tasks[n].kind != "skills"}
    if drawn:
        columns = min(4, len(drawn))
        lines = -(-len(drawn) // columns)
        size = (4.2 * columns, 3.4 * lines)
        figure, grid = plt.subplots(
            lines, columns, figsize=size, layout="constrained", squeeze=False
        )
        for axes in grid.flat[len(drawn) :]:
            axes.set_visible(False)
        for axes, (task, found) in zip(grid.flat, drawn.items(), strict=False):
            draw = _curves if tasks[task].kind == "switch" else _walks
            draw(axes, found, tasks[task])
            axes.set(title=task)
            axes.legend(frameon=False, fontsize=8)
        report.save(figure, folder / f"{name}.png")
    for task, found in results.items():
        if tasks[task].kind == "skills":
            matrices = {m: np.mean(best(r)["matrix"], 0) for m, r in found.items()}
            names = list(tasks[task].exams)
            place = folder / f"{name}-{task.replace(', ', '-')}.png"
            continual_metrics.draw(place, matrices, names)


def _curves(axes: Any, found: Mapping[str, Mapping[str, Any]], task: Task) -> None:
    """Mean regret of a step, and within one standard error over seeds."""
    for model, record in found.items():
        curves = np.asarray(_switch(record)["curve"])
        steps = curves.shape[1] // SMOOTHED
        parts = curves[:, : steps * SMOOTHED].reshape(len(curves), steps, SMOOTHED).mean(2)
        since = (np.arange(steps) + 0.5) * SMOOTHED - curves.shape[1] // 2
        error = parts.std(0, ddof=1) / len(parts) ** 0.5 if len(parts) > 1 else 0 * parts[0]
        mean, colour = parts.mean(0), COLOURS[model]
        axes.plot(since, mean, "o-" if steps == 1 else "-", color=colour, label=model)
        axes.fill_between(since, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.axvline(0, color="#888888", linestyle=":", linewidth=1)
    axes.set(xlabel="steps after the switch", ylabel="regret of a step")


def _walks(axes: Any, found: Mapping[str, Mapping[str, Any]], task: Task) -> None:
    """Share of walks that end well, by length."""
    lengths = [int(title) for title in task.exams]
    for model, record in found.items():
        right = np.array([best(record)[title]["right"] for title in task.exams])
        axes.plot(lengths, right.mean(1), "o-", color=COLOURS[model], label=model)
        axes.fill_between(lengths, right.min(1), right.max(1), color=COLOURS[model], alpha=0.15)
    axes.axhline(0.5, color="#888888", linestyle=":", linewidth=1)
    axes.set(xlabel="steps of a walk", ylabel="share that end well", xscale="log", ylim=(0, 1.03))
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()


def _verdicts(
    title: str,
    found: Mapping[str, Sequence[float]],
    unit: str = "",
    digits: int = 2,
    less: bool = False,
) -> list[str]:
    """Hope's numbers less each rival's, seed by seed; nothing where Hope was not run."""
    rivals = [model for model in found if model != "hope"]
    if "hope" not in found or not rivals:
        return []
    apart = {m: paired.by_seed(found["hope"], found[m]) for m in rivals}
    said = [f"{m} {difference.told(digits, unit, less)}" for m, difference in apart.items()]
    return [f"* {title}: {'; '.join(said)}."]


def _switch(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the examination of a switch found, at the chosen rate."""
    return best(record)["switch"]


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(model for found in results.values() for model in found))


def _interval(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _percent(values: Sequence[float]) -> str:
    values = [100 * float(value) for value in values]
    return f"{statistics.fmean(values):.0f} ({min(values):.0f} to {max(values):.0f})"
