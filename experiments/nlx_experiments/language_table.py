# SPDX-License-Identifier: Apache-2.0
"""What `nlx run language` shows: one table, the verdicts, the pilots, a picture.

results: model -> {"rate": chosen, "pilot": rate -> late training bits per byte, "seeds": records};
a record is a run's result and, where files were given, "choices": format -> scores.
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from nlx_experiments import choices as choosing
from nlx_experiments import paired, report
from nlx_experiments.multiple_choice import Item

# Perplexity of WikiText in words, Behrouz et al. (2025), Nested Learning, Table 2, 760M and 30B.
PAPER: Mapping[str, float] = {
    "transformer++": 24.18,
    "samba": 21.07,
    "retnet": 25.77,
    "deltanet": 24.52,
    "ttt-linear": 24.17,
    "titans-lmm": 20.08,
    "hope": 18.68,
}


def shown(results: Mapping[str, Any], given: Mapping[str, Sequence[Item]]) -> str:
    """The family in one table, the verdict, the pilot."""
    columns = ["model", "parameters", "rate", "bits per byte", "word perplexity"]
    columns += [column for name, items in given.items() for column in _columns(name, items)]
    rows = []
    for model, found in results.items():
        seeds = found["seeds"]
        cells = [model, seeds[0]["parameters"], f"{found['rate']:g}"]
        cells.append(interval([s["bits_per_byte"] for s in seeds], 3))
        cells.append(interval([s["word_perplexity"] for s in seeds], 1))
        for name, items in given.items():
            of_name = [s["choices"][name] for s in seeds]
            cells.append(interval([100 * s["acc"] for s in of_name], 1))
            if len(_columns(name, items)) > 1:
                last = len(items[0].choices) == 1
                second = [s["perplexity"] if last else 100 * s["acc_norm"] for s in of_name]
                cells.append(interval(second, 1))
        rows.append((*cells, f"{PAPER[model]:.2f}" if model in PAPER else ""))
    first = next(iter(results.values()))["seeds"][0]
    parts = [
        f"After {first['bytes_trained_on']:,} bytes ({first['steps']:,} steps), on "
        f"{first['bytes_scored']:,} held-out bytes with {first['words_scored']:,} words; mean of "
        "the seeds (lowest to highest). The paper's word perplexity is of WikiText, 760 million "
        "parameters and 30 billion tokens.",
        report.Table("", (*columns, "paper: perplexity"), rows).markdown(),
        *verdicts(results),
        *edges(results),
    ]
    return "\n\n".join(parts)


def _columns(name: str, items: Sequence[Item]) -> list[str]:
    """What is shown of a test: acc, and acc_norm or a perplexity; WinoGrande has acc alone."""
    if len(items[0].choices) == 1:
        return [f"{name} acc", f"{name} perplexity"]
    chance = f"{100 * choosing.chance(items):.1f}"
    alone = name == "winogrande"
    return [f"{name} acc (chance {chance})"] + ([] if alone else [f"{name} acc_norm"])


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Hope less Titans and Transformer++ in bits per byte, seed by seed; less is better."""
    said = []
    for rival in ("titans-lmm", "transformer++"):
        if "hope" not in results or rival not in results:
            continue
        ours, theirs = ([s["bits_per_byte"] for s in results[m]["seeds"]] for m in ("hope", rival))
        apart = paired.by_seed(ours, theirs).told(3, "bits per byte", less=True)
        said.append(
            f"Hope against {rival}: {apart} (seed by seed, with the standard error; level: "
            "Student's t is not sure at 95 % of either)."
        )
    return said


def edges(results: Mapping[str, Any]) -> list[str]:
    """The pilot, and which of its best rates lie on the edge of the grid."""
    lines = []
    for model, found in ((m, f) for m, f in results.items() if f["pilot"]):
        tried = list(found["pilot"])
        best = f"{found['rate']:g}"
        edge = ", on the edge" if len(tried) > 1 and best in (tried[0], tried[-1]) else ""
        bits = ", ".join(
            f"{r} {'no number' if b is None else f'{b:.3f}'}" for r, b in found["pilot"].items()
        )
        lines.append(f"* {model}: {bits}; {best} was taken{edge}.")
    return lines and ["The pilot's training bits per byte at each learning rate:", "\n".join(lines)]


def interval(values: Sequence[float | None], digits: int) -> str:
    """Mean with the lowest and the highest; "beyond all numbers" where one is.

    digits: after the point; of numbers from a million on three count.
    """
    form = lambda x: f"{x:.{digits}f}" if x < 1e4 else f"{x:,.0f}" if x < 1e6 else f"{x:.2e}"
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "beyond all numbers"
    mean, low, high = (form(f(numbers)) for f in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def plot(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Bits per byte of every model: mean, seeds, and the pilot's rates beside it."""
    names = list(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for place, name in enumerate(names):
        bits = [s["bits_per_byte"] for s in results[name]["seeds"]]
        left.bar(place, np.mean(bits), 0.7, color=report.COLOURS[0], alpha=0.6)
        left.plot([place] * len(bits), bits, ".", color="#222222", markersize=5)
        pilot = {float(r): b for r, b in results[name]["pilot"].items() if b is not None}
        right.plot(list(pilot), list(pilot.values()), "o-", markersize=4, label=name)
    every = [s["bits_per_byte"] for found in results.values() for s in found["seeds"]]
    room = 0.2 * (max(every) - min(every)) + 0.01
    left.set(ylim=(min(every) - room, max(every) + room), ylabel="held-out bits per byte")
    left.set_xticks(range(len(names)), names, rotation=40, ha="right")
    right.set(xscale="log", xlabel="learning rate", ylabel="pilot: late training bits per byte")
    right.legend(frameon=False, fontsize=8)
    report.save(figure, path)
