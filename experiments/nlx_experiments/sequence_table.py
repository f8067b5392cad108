# SPDX-License-Identifier: Apache-2.0
"""Results of models x sequence tasks as tables, sentences and pictures.

`results` is what `sequence_experiment.gather` returns: task -> {"plan", "chance", "models":
model -> variant -> record of `sequence_contest.measure`}.
"""

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from nlx_experiments import report


def best(variants: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant whose best rate did best on validation rows, and its results at that rate."""
    validation = lambda v: variants[v]["rates"][variants[v]["rate"]]["validation"]
    name = max(variants, key=validation)
    return name, variants[name]["rates"][variants[name]["rate"]]


def best_training(variants: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of all seeds, rates and variants the one that did best on validation rows: bin -> shares.

    Those that tie are all as good as can be known without the test rows: then their mean.
    """
    trainings = [
        (value, seed, found)
        for record in variants.values()
        for found in record["rates"].values()
        for seed, value in enumerate(found["validations"])
    ]
    most = max(value for value, _, _ in trainings)
    tied = [(seed, found) for value, seed, found in trainings if value == most]
    bins = [b for b, shares in tied[0][1].items() if isinstance(shares, Mapping)]
    mean = lambda b, name: statistics.fmean(found[b][name][seed] for seed, found in tied)
    return {b: {name: mean(b, name) for name in ("rows", "tokens")} for b in bins}


def solved(variants: Mapping[str, Any], bins: Sequence[str], measure: str = "rows") -> str:
    """How many trainings, of all rates and variants, are right in all test rows: "2 of 12"."""
    whole = [
        min(shares) == 1
        for record in variants.values()
        for found in record["rates"].values()
        for shares in zip(*(found[b][measure] for b in bins), strict=True)
    ]
    return f"{sum(whole)} of {len(whole)}"


def percent(shares: list[float]) -> str:
    """The mean over seeds, 100 only where every seed has every row."""
    mean = 100 * statistics.fmean(shares)
    return "100" if min(shares) == 1 else f"{min(mean, 99.9):.1f}".removesuffix(".0")


def interval(shares: list[float]) -> str:
    """Mean with the lowest and the highest seed's, where they differ."""
    if max(shares) - min(shares) < 5e-4:
        return percent(shares)
    return f"{percent(shares)} ({percent([min(shares)])} to {percent([max(shares)])})"


def table(
    results: Mapping[str, Any],
    cell: Callable[[str, str, Mapping[str, Any]], str],
    corner: str = "model",
) -> report.Table:
    """Models down, tasks across; cell(task, model, results of the best variant at its rate)."""
    models = list(dict.fromkeys(m for task in results.values() for m in task["models"]))
    lines = [
        (
            model,
            *(
                cell(name, model, best(task["models"][model])[1]) if model in task["models"] else ""
                for name, task in results.items()
            ),
        )
        for model in models
    ]
    return report.Table("", [corner, *results], lines)


def grid(results: Mapping[str, Any], measure: str = "rows") -> report.Table:
    """Every variant and rate: mean shares in all bins, ** what was chosen."""
    lines = []
    for name, task in results.items():
        for model, variants in task["models"].items():
            chosen = best(variants)[0]
            for variant, record in variants.items():
                for rate, found in record["rates"].items():
                    taken = variant == chosen and rate == record["rate"]
                    shares = " / ".join(interval(found[b][measure]) for b in task["plan"]["bins"])
                    mark = "**" if taken else ""
                    lines.append(
                        (name, model, variant, rate, f"{mark}{shares}{mark}", record["steps"])
                    )
    return report.Table("", ["task", "model", "variant", "rate", "right", "steps"], lines)


def control(results: Mapping[str, Any]) -> list[str]:
    """What was learned from shuffled answers, as a paragraph."""
    told, above = [], []
    for name, task in results.items():
        if "control" not in task:
            continue
        record, bins = task["control"], task["plan"]["bins"]
        found, chance = record["rates"][record["rate"]], record["chance"]
        shares = "/".join(f"{100 * statistics.fmean(found[b]['tokens']):.1f}" for b in bins)
        likely = "/".join(f"{100 * chance[b]:.1f}" for b in bins)
        told.append(f"{name} {shares} ({likely})")
        # Answers changed places, so those of a row are no more alike than others.
        counts = task.get("scored", dict.fromkeys(bins, task["plan"]["tested"]))
        error = {b: (chance[b] * (1 - chance[b]) / counts[b]) ** 0.5 for b in bins}
        if any(max(found[b]["tokens"]) > chance[b] + 3 * error[b] for b in bins):
            above.append(name)
    missing = [name for name, task in results.items() if "control" not in task]
    if not told:
        return [f"Control on shuffled answers: not run for {', '.join(missing)}."]
    return [
        "Control, trained on answers that belong to other rows: answers right in percent, in "
        f"brackets the most frequent answer: {'; '.join(told)}. More than three standard errors "
        f"of as many answers above it: {', '.join(above) or 'none'}."
        + (f" Not run for {', '.join(missing)}." if missing else "")
    ]


def plot(path: pathlib.Path, results: Mapping[str, Any], measure: str) -> None:
    """A panel for each task: every model's mean in each bin, its seeds, and what chance gives."""
    columns = min(4, len(results))
    lines = -(-len(results) // columns)
    size = (3.6 * columns + 1.5, 3.0 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    known: list[list[str]] = []  # bins that a legend names
    for axes in panels[:, 0]:
        axes.set_ylabel(
            {"rows": "share of rows right", "tokens": "share of answers right"}[measure]
        )
    for axes, (name, task) in zip(panels.flat, results.items(), strict=False):
        bins, models = list(task["plan"]["bins"]), list(task["models"])
        width = 0.8 / len(bins)
        for n, bin_name in enumerate(bins):
            for place, model in enumerate(models):
                shares = best(task["models"][model])[1][bin_name][measure]
                at = place + (n - (len(bins) - 1) / 2) * width
                colour = report.COLOURS[n]
                label = bin_name if place == 0 else "_"
                axes.bar(at, np.mean(shares), width, color=colour, alpha=0.7, label=label)
                axes.plot([at] * len(shares), shares, ".", color="#222222", markersize=3)
            if measure == "tokens":
                axes.axhline(
                    task["chance"][bin_name], color=report.COLOURS[n], linestyle=":", linewidth=1
                )
        axes.set(title=name, ylim=(0, 1.05))
        axes.set_xticks(range(len(models)), models, rotation=60, ha="right", fontsize=8)
        if bins not in known:
            axes.legend(frameon=False, fontsize=7, ncols=min(3, len(bins)))
            known.append(bins)
    report.save(figure, path)
