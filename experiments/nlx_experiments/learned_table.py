# SPDX-License-Identifier: Apache-2.0
"""Tables, verdicts and pictures of `nlx run learned`."""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from nlx_experiments import learned_contest, paired, report
from nlx_experiments.learned_tasks import HORIZON, Exam

Cells = Sequence[Mapping[str, Any]]
LEARNED_HERE = ("quadratics", "digits", "bandit")  # whose contests have tables of their own
COUNTERPARTS = (
    ("DMGD, learned", "DMGD, coordinates"),
    ("DMGD, learned", "DMGD, memory at rest"),
    ("DMGD, learned", "DMGD"),
    ("DMGD, rate and decay learned", "DMGD, coordinates"),
    ("Adam, learned", "Adam"),
    ("momentum, learned", "heavy ball"),
)


def mean(costs: Sequence[float | None]) -> float:
    """Infinity where a run diverged."""
    return math.inf if None in costs else statistics.fmean(c for c in costs if c is not None)


def shown(cells: Cells, exams: Mapping[str, Exam]) -> str:
    """All tables and verdicts of what is known."""
    parts = []
    for task in LEARNED_HERE:
        if task in exams and (found := _of(cells, task)):
            parts += contest(task, found, exams[task])
    parts += matrix(cells, exams)
    parts += transfer(cells, exams)
    parts.append(
        f"![costs of the first {learned_contest.FIRST} problems against steps; all were set by "
        f"runs of {HORIZON}](results/learned.png)"
    )
    parts += grids(cells)
    return "\n\n".join(parts)


def contest(task: str, found: Mapping[str, Cells], exam: Exam) -> list[str]:
    """Everyone that was set by a kind of problem, on that kind, and whether the LSTM is ahead."""
    rows = []
    for name, cells in found.items():
        of = [cell["exams"][task] for cell in cells]
        means = [mean(one["costs"]) for one in of]
        middle = [statistics.median(math.inf if c is None else c for c in o["costs"]) for o in of]
        rows.append((name, _setting(cells[0]), _spread(means), _spread(middle)))
        if exam.longer > exam.steps:
            last = [math.inf if one["curve"][-1] is None else one["curve"][-1] for one in of]
            rows[-1] += (_spread(last),)
    columns = ("optimizer", "set to", f"mean after {HORIZON}", "median")
    if exam.longer > exam.steps:
        first = min(exam.count, learned_contest.FIRST)
        columns += (f"mean of the first {first} after {exam.longer:,}",)
    told = [
        f"**{task}**: {exam.count} problems that chose nothing, {exam.unit}; of seeds the mean "
        f"(lowest to highest); rates and thetas are chosen by the mean after {HORIZON} steps, "
        f"meta-training lowers that of all {HORIZON}:",
        report.Table("", columns, rows).markdown(),
    ]
    for name, ours in found.items():
        if ours[0]["plan"] is not None and (said := ahead(task, ours, found)):
            told.append(
                f"* {name} less others, problem by problem, with the standard error over seeds and "
                f"problems (level: not sure at 95 %): {'; '.join(said)}."
            )
    return told


def ahead(task: str, ours: Cells, found: Mapping[str, Cells]) -> list[str]:
    """Ours less the costs of each that is set by hand on the problems of a task, and who wins more.

    Where a run diverged there is no difference.
    """
    said = []
    for rival, theirs in found.items():
        if theirs[0]["plan"] is None:
            less = difference(task, ours, theirs)
            wins = 100 * statistics.fmean(_wins(task, cell, theirs[0]) for cell in ours)
            said.append(f"{rival} {less.told(4, '', less=True)}, better on {wins:.0f} %")
    return said


def _wins(task: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    of = lambda cell: np.array(cell["exams"][task]["costs"], float)
    return float(
        np.mean(np.nan_to_num(of(ours), nan=np.inf) < np.nan_to_num(of(theirs), nan=np.inf))
    )


def difference(task: str, ours: Cells, theirs: Cells) -> paired.Difference:
    """Ours, of every seed, less the mean of theirs on the same problems."""
    of = lambda cells: np.array([cell["exams"][task]["costs"] for cell in cells], float)
    return paired.by_seed_and_row([of(ours) - of(theirs).mean(0, keepdims=True)])


def matrix(cells: Cells, exams: Mapping[str, Exam]) -> list[str]:
    """What everyone makes of every kind of problem, by what it was set by."""
    rows: list[tuple] = []
    best = ["*best by hand, set by the kind itself*", ""]
    for task in exams:
        found = [
            (mean(c["exams"][task]["costs"]), c["name"])
            for c in cells
            if c["plan"] is None and c["task"] == task
        ]
        best.append("" if not found else f"{min(found)[0]:.3g} ({min(found)[1]})")
    rows.append(tuple(best))
    for task in dict.fromkeys(cell["task"] for cell in cells):
        for name, found in _of(cells, task).items():
            if len(found[0]["exams"]) < len(exams):
                continue  # set by a kind that no rule is trained on
            means = [statistics.fmean(mean(c["exams"][t]["costs"]) for c in found) for t in exams]
            rows.append(
                (name, task, *(f"{m:.3g}" if math.isfinite(m) else "diverges" for m in means))
            )
    told = (
        f"Cost after {HORIZON} steps on every kind of problem, by what meta-training or the choice "
        "of the rate saw; mean of problems and seeds. `digits, held out` and `bandit` are costs on "
        "what steps don't see, the others those of the next batch; digits and convolutions see the "
        "same 1,438 images:"
    )
    return [told, report.Table("", ("optimizer", "set by", *exams), rows).markdown()]


def transfer(cells: Cells, exams: Mapping[str, Exam]) -> list[str]:
    """Learned numbers against the same optimizer by hand, on kinds that neither was set by.

    Held-out cost of the same runs is of what they were set by, too.
    """
    rows = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        found, kind = _of(cells, task), task.split(",")[0]
        same = {t for t in exams if kind in exams and exams[t].task is exams[kind].task} | {kind}
        for ours, theirs in COUNTERPARTS:
            if ours not in found or theirs not in found:
                continue
            told = [
                "set by it" if t in same else _against(t, found[ours], found[theirs]) for t in exams
            ]
            rows.append((ours, theirs, task, *told))
    if not rows:
        return []
    return [
        "What was learned less the same optimizer by hand, whose rate alone was chosen on the same "
        "problems, on kinds that neither was set by; less is better:",
        report.Table("", ("learned", "by hand", "set by", *exams), rows).markdown(),
    ]


def _against(task: str, ours: Cells, theirs: Cells) -> str:
    of = lambda cells: [mean(cell["exams"][task]["costs"]) for cell in cells]
    if not all(map(math.isfinite, of(ours))):
        return "learned one diverges"
    if not all(map(math.isfinite, of(theirs))):
        return "one by hand diverges"
    return difference(task, ours, theirs).told(3, "", less=True)


def grids(cells: Cells) -> list[str]:
    """Rates that were chosen, and what meta-training took."""
    rates, trainings = [], []
    for cell in cells:
        if cell["plan"] is None:
            edge = "on the grid's edge" if cell["edge"] else ""
            rates.append((cell["task"], cell["name"], f"{cell['rate']:.3g}", edge))
        else:
            looks = [x for x in cell["looks"] if x is not None]
            trainings.append(
                (
                    cell["task"], cell["name"], cell["seed"], cell["plan"]["estimator"],
                    f"{cell['seconds']:.0f}", cell["pieces"], cell["plan"]["pieces"],
                    _told(cell["looks"][0]), _told(min(looks, default=None)),
                )
            )  # fmt: skip
    parts = []
    if trainings:
        columns = (
            "kind", "rule", "seed", "estimator", "seconds", "best after", "of pieces", "before",
            "best",
        )  # fmt: skip
        told = "Meta-training; costs of the problems that choose theta:"
        parts += [told, report.Table("", columns, trainings).markdown()]
    if rates:
        told = "Rates of optimizers made by hand, the best of the grid:"
        parts += [told, report.Table("", ("kind", "optimizer", "rate", ""), rates).markdown()]
    return parts


def plot(path: pathlib.Path, cells: Cells, exams: Mapping[str, Exam]) -> None:
    """Costs against steps, to ten times those that rules were trained for."""
    wanted = [("quadratics", "quadratics"), ("digits", "digits"), ("digits", "digits, ReLU")]
    panels = [(a, b) for a, b in wanted if b in exams and _of(cells, a)]
    if "bandit" in exams and _of(cells, "bandit"):
        panels.append(("bandit", "bandit"))
    size = (5.2 * max(1, len(panels)), 4.2)
    figure, grid = plt.subplots(
        1, max(1, len(panels)), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (task, other) in zip(grid.flat, panels, strict=False):
        for name, found in _of(cells, task).items():
            by_hand = found[0]["plan"] is None
            names = dict.fromkeys(c["name"] for c in cells if (c["plan"] is None) == by_hand)
            colour = report.COLOURS[list(names).index(name) % len(report.COLOURS)]
            for n, cell in enumerate(found):
                one = cell["exams"][other]
                y = np.array([np.nan if v is None else v for v in one["curve"]], float)
                at = learned_contest.points(exams[other])
                axes.plot(
                    at, y, "--" if by_hand else "-", color=colour, linewidth=1.2,
                    alpha=1 if n == 0 else 0.4, label=name if n == 0 else None,
                )  # fmt: skip
        axes.axvline(HORIZON, color="#888888", linestyle=":", linewidth=1)
        title = other if task == other else f"{other}; set by {task}"
        axes.set(title=title, xlabel="steps", xscale="log", yscale="log", ylabel=exams[other].unit)
        axes.legend(frameon=False, fontsize=6)
    report.save(figure, path)


def _of(cells: Cells, task: str) -> dict[str, Cells]:
    """Name -> the cells of its seeds, of those set by a kind of problem."""
    found: dict[str, Any] = {}
    for cell in cells:
        if cell["task"] == task:
            found.setdefault(cell["name"], []).append(cell)
    return found


def _told(cost: float | None) -> str:
    return "diverges" if cost is None else f"{cost:.3g}"


def _setting(cell: Mapping[str, Any]) -> str:
    if cell["plan"] is None:
        return f"rate {cell['rate']:.3g}" + (", on the edge" if cell["edge"] else "")
    plan = cell["plan"]
    return f"{plan['estimator']}, {plan['pieces']:,} pieces"


def _spread(values: Sequence[float]) -> str:
    told = lambda x: f"{x:.4g}" if math.isfinite(x) else "diverges"
    if len(values) == 1:
        return told(values[0])
    return f"{told(statistics.fmean(values))} ({told(min(values))} to {told(max(values))})"
