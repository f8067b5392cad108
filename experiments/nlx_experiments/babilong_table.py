# SPDX-License-Identifier: Apache-2.0
"""Results of stories scattered among text as tables, sentences and a picture.

`results` and `task` are of `sequence_experiment.gather`; an exam is what `babilong.examine`
returns; sizes: task -> what `long_context.states` returns.
"""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

from nlx_experiments import paired, report, sequence_table
from nlx_experiments.long_context import LINEAR, aim, found, state
from nlx_experiments.paired import Difference


def shown(
    results: Mapping[str, Any],
    sizes: Mapping[str, Any],
    picture: str = "results/babilong-lengths.png",
) -> str:
    """Means over seeds by length, who is ahead, memory of streams, the control and the grid."""
    parts = [
        "Answers that are right, in percent, mean of the seeds (lowest to highest); bytes of the "
        "state of one row, the Transformer's after 4,096 symbols. Facts are of symbols that no "
        "text contains, which is easier than BABILong."
    ]
    for name, task in results.items():
        told = by_length(task, sizes[name]).markdown()
        parts += [f"{name}, by the length of the row:", told]
    parts += [*verdicts(results), f"![share right by length]({picture})"]
    marks = [m for task in results.values() for e in _exams(task).values()
             for m in e.get("stream", ())]  # fmt: skip
    if marks:
        held = "the device" if marks[0]["of"] == "device" else "the process, whatever holds them"
        parts += [
            f"One row, read with room for one piece: MiB of {held}, at the most since the column "
            "before; then exact bytes of what is carried on, after the first and the last piece, "
            "and whether all losses of the last piece are finite:",
            streams(results).markdown(),
        ]
    parts += [
        *sequence_table.control(results),
        "The whole grid:",
        sequence_table.grid(results, "tokens").markdown(),
    ]
    return "\n\n".join(parts)


def right(exam: Mapping[str, Any], length: str) -> Float[np.ndarray, "seeds rows"]:
    """Which rows of a length are right."""
    return np.array([[*seed] for seed in exam["right"][length]], float)


def _exams(task: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {model: found(variants) for model, variants in task["models"].items()}


def by_length(task: Mapping[str, Any], sizes: Mapping[str, Any]) -> report.Table:
    """Models and what needs none down; bytes, lengths and the mean of all that all seeds read."""
    exams = _exams(task)
    lengths = list(dict.fromkeys(n for exam in exams.values() for n in exam["right"]))
    some = {n: exam for exam in exams.values() for n in exam["right"]}
    whole = _by_all(some)
    columns = ["model", "state", *(f"{int(n):,}" for n in lengths), f"mean to {int(whole[-1]):,}"]
    lines: list[tuple] = []
    for model, exam in exams.items():
        shares = {n: right(exam, n).mean(1).tolist() for n in exam["right"]}
        cells = [sequence_table.interval(shares[n]) if n in shares else "" for n in lengths]
        means = [100 * statistics.fmean(shares[n]) for n in whole if n in shares]
        mean = f"{statistics.fmean(means):.1f}" if len(means) == len(whole) else ""
        size = state(sizes, model, task["models"][model])
        lines.append((model, size, *cells, mean))
    for name in some[lengths[0]]["lines"][lengths[0]]:
        shares = {n: 100 * some[n]["lines"][n][name] for n in lengths}
        mean = statistics.fmean(shares[n] for n in whole)
        lines.append((f"*{name}*", "", *(f"{shares[n]:.1f}" for n in lengths), f"{mean:.1f}"))
    counts = [right(some[n], n).shape for n in lengths]
    lines.append(("*rows*", "", *(str(rows) for _, rows in counts), ""))
    lines.append(("*seeds that read them*", "", *(str(seeds) for seeds, _ in counts), ""))
    return report.Table("", columns, lines)


def _by_all(some: Mapping[str, Any]) -> list[str]:
    """The lengths that as many seeds as any have read; some: length -> an exam that has it."""
    seeds = {n: len(exam["right"][n]) for n, exam in some.items()}
    return [n for n in seeds if seeds[n] == max(seeds.values())]


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Hope less each rival on the same rows, by task and in the mean; and what the aim says."""
    told, means = [], {}
    for rival in ("titans", *LINEAR):
        apart: list[Difference] = []
        for name, task in results.items():
            exams = _exams(task)
            if not {"hope", rival} <= exams.keys():
                continue
            ours, theirs = exams["hope"], exams[rival]
            both = {n: ours for n in ours["right"] if n in theirs["right"]}
            gaps = {n: 100 * (right(ours, n) - right(theirs, n)) for n in both}
            mean = paired.by_seed_and_row([gaps[n] for n in _by_all(both)])
            apart.append(mean)
            last = [*gaps][-1]
            longest = paired.by_seed_and_row([gaps[last]])
            told.append(
                f"* Hope against {rival}, {name}: {mean.told(1, 'points')}; at {int(last):,} "
                f"symbols alone {longest.told(1, 'points')}."
            )
        if apart:
            means[rival] = paired.together(apart)
            if len(apart) > 1:
                told.append(f"* Hope against {rival}, all tasks: {means[rival].told(1, 'points')}.")
    if not told:
        return []
    said = (
        "Points that Hope is ahead on the same rows, mean of the lengths that all seeds read, with "
        "the standard error over seeds and rows (over rows alone where one seed read them); level: "
        "Student's t is not sure at 95 % of either."
    )
    return [said, "\n".join(told), aim(means)]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def streams(results: Mapping[str, Any]) -> report.Table:
    """Memory after more and more symbols."""
    of = {
        (name, model): exam["stream"]
        for name, task in results.items()
        for model, exam in _exams(task).items()
        if "stream" in exam
    }
    columns = sorted({mark["symbols"] for marks in of.values() for mark in marks})
    lines = []
    for (name, model), marks in of.items():
        held = {mark["symbols"]: f"{mark['mib']:,.0f}" for mark in marks}
        first, last = marks[0], marks[-1]
        carried = f"{first['state']:,}", f"{last['state']:,}", _yes(last["finite"])
        lines.append((name, model, *(held.get(n, "") for n in columns), *carried))
    names = [*(f"{n:,}" for n in columns), "state at first", "state at last", "finite"]
    return report.Table("", ["task", "model", *names], lines)


def plot(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Share right against length, a panel for each task, a line a model, a band of its seeds."""
    size = (5.2 * len(results), 3.8)
    figure, panels = plt.subplots(
        1, len(results), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (name, task) in zip(panels.flat, results.items(), strict=True):
        known: dict[str, dict[int, float]] = {}
        for (model, exam), colour in zip(_exams(task).items(), report.COLOURS, strict=False):
            lengths = [int(n) for n in exam["right"]]
            shares = [right(exam, n).mean(1) for n in exam["right"]]
            mean, low, high = ([f(x) for x in shares] for f in (np.mean, np.min, np.max))
            axes.plot(lengths, mean, "o-", color=colour, markersize=3, label=model)
            axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
            for n, of in exam["lines"].items():
                for line, share in of.items():
                    known.setdefault(line, {})[int(n)] = share
        for (line, of), dash in zip(known.items(), (":", "-."), strict=False):
            axes.plot([*of], [*of.values()], dash, color="#222222", linewidth=1, label=line)
        trained = task["plan"]["stages"][-1][1]
        axes.axvline(trained, color="#888888", linestyle="--", linewidth=1)
        axes.set(title=name, xlabel="symbols of the row", xscale="log", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8)
    panels.flat[0].set_ylabel("share right")
    report.save(figure, path)
