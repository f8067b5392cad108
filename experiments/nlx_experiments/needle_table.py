# SPDX-License-Identifier: Apache-2.0
"""Results of needles as tables, sentences and heat maps; `task` is one of `gather`'s."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from nlx_experiments import paired, report, sequence_table
from nlx_experiments.long_context import LINEAR, aim, found, state
from nlx_experiments.needle_tasks import KINDS, guesses

TASK = "needles"
# Behrouz et al. (2025), Nested Learning, Table 1, in percent: 4,096, 8,192 and 16,384 tokens.
PAPER: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "transformer": {
        "S-NIAH-1": (88.6, 76.4, 79.8), "S-NIAH-2": (100, 98.8, 94.2),
        "S-NIAH-3": (78.0, 69.2, 40.8), "MK-NIAH-1": (79.4, 83.0, 61.4),
        "MQ-NIAH": (58.9, 48.0, 29.8), "MV-NIAH": (37.5, 34.1, 21.5),
    },
    "titans": {
        "S-NIAH-1": (100, 100, 100), "S-NIAH-2": (99.6, 84.6, 75.4),
        "S-NIAH-3": (74.2, 42.8, 21.2), "MK-NIAH-1": (26.4, 23.6, 8.2),
        "MQ-NIAH": (22.8, 19.8, 9.4), "MV-NIAH": (24.6, 15.1, 8.2),
    },
    "hope": {
        "S-NIAH-1": (100, 100, 100), "S-NIAH-2": (99.2, 88.4, 78.2),
        "S-NIAH-3": (73.2, 46.2, 24.8), "MK-NIAH-1": (29.4, 24.8, 14.8),
        "MQ-NIAH": (31.7, 24.8, 14.2), "MV-NIAH": (31.4, 17.2, 11.4),
    },
}  # fmt: skip


def shown(
    results: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, int]],
    attended: int,
    picture: str = "results/needle-map.png",
) -> str:
    """Means over depths and seeds by kind and length, who is ahead, the control and the grid.

    sizes: what `long_context.states` returns, of rows of `attended` symbols.
    """
    task = results[TASK]
    far = "" if "gpu" in picture else (
        " This is far from RULER: text is symbols drawn evenly, keys are one symbol, numbers two, "
        "uuids four, nothing instructs the model, MK-NIAH-2 and 3 are not examined."
    )  # fmt: skip
    parts = [
        "Values that are said whole, each after the right ones before it, in percent, mean of all "
        "depths and seeds (seeds' lowest to highest), the paper's of far larger models in square "
        "brackets; bytes of the state of one row at the end of a chunk, the Transformer's after "
        f"{attended:,} symbols.{far}"
    ]
    for kind in found(next(iter(task["models"].values())))["right"]:
        parts += [f"{kind}:", by_length(task, kind, sizes).markdown()]
    parts += [*verdicts(task), f"![share right by length and depth]({picture})"]
    parts += [*sequence_table.control(results), "Whole answers, rows of all kinds:"]
    return "\n\n".join([*parts, sequence_table.grid(results, "rows").markdown()])


def by_length(
    task: Mapping[str, Any], kind: str, sizes: Mapping[str, Mapping[str, int]]
) -> report.Table:
    """Models and guesses down, lengths across: the mean, seeds' lowest and highest, the paper's."""
    exams = {model: found(variants) for model, variants in task["models"].items()}
    some = next(iter(exams.values()))
    rows, lengths = [], _lengths(exams, kind)
    for model, exam in exams.items():
        cells = []
        for length in lengths:
            if length not in exam["right"][kind]:
                cells.append("")
                continue
            seeds = [statistics.fmean(depths) for depths in exam["right"][kind][length]]
            paper = PAPER.get(model, {}).get(kind, ())
            places = dict(zip(("4096", "8192", "16384"), paper, strict=False))
            told = f" [{places[length]:g}]" if length in places else ""
            cells.append(sequence_table.interval(seeds) + told)
        rows.append((model, state(sizes, model, task["models"][model]), *cells))
    lines = {"each symbol drawn": some["chance"][kind], **guesses(KINDS[kind])}
    rows += [(f"*{n}*", "", *([f"{100 * x:.2g}"] * len(lengths))) for n, x in lines.items()]
    return report.Table("", ["model", "state", *(f"{int(n):,}" for n in lengths)], rows)


def _lengths(exams: Mapping[str, Any], kind: str) -> list[str]:
    """That any model was examined at."""
    return list(dict.fromkeys(n for exam in exams.values() for n in exam["right"][kind]))


def verdicts(task: Mapping[str, Any]) -> list[str]:
    """Means over kinds and lengths beyond those trained on, of models examined at all of them.

    Hope less its rivals, seed by seed; what the aim says.
    """
    longest = task["plan"]["stages"][-1][1]
    exams = {model: found(variants) for model, variants in task["models"].items()}
    means = {}  # by seed
    for model, exam in exams.items():
        cells = [
            np.mean(seeds, 1)
            for lengths in exam["right"].values()
            for length, seeds in lengths.items()
            if int(length) > longest
        ]
        if cells and all([*of] == _lengths(exams, kind) for kind, of in exam["right"].items()):
            means[model] = 100 * np.mean(cells, 0)
    if not means:
        return []
    told = ", ".join(f"{model} {mean.mean():.1f}" for model, mean in means.items())
    said = f"Mean of all kinds and all lengths beyond those trained on: {told}."
    if "hope" not in means:
        return [said]
    rivals = [rival for rival in ("titans", *LINEAR) if rival in means]
    apart = {rival: paired.by_seed(means["hope"], means[rival]) for rival in rivals}
    if not apart:
        return [said]
    lines = [f"* Hope against {rival}: {d.told(1, 'points')}." for rival, d in apart.items()]
    how = (
        "Points that Hope is ahead there, seed by seed on the same rows, with the standard error "
        "over seeds; level: Student's t is not sure at 95 % of either."
    )
    return [said, how, "\n".join(lines), aim(apart)]


def draw(path: pathlib.Path, task: Mapping[str, Any]) -> None:
    """A heat map for each kind and model: lengths across, depths down, mean of the seeds."""
    exams = {model: found(variants) for model, variants in task["models"].items()}
    kinds = list(next(iter(exams.values()))["right"])
    size = (2.1 * len(kinds) + 1.5, 1.7 * len(exams) + 0.8)
    figure, grid = plt.subplots(
        len(exams), len(kinds), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    scale = Normalize(0, 1)
    for line, (model, exam) in zip(grid, exams.items(), strict=True):
        for axes, (kind, of) in zip(line, exam["right"].items(), strict=True):
            lengths = _lengths(exams, kind)
            none = np.full_like(next(iter(of.values())), np.nan)  # seeds x depths
            shares = np.mean([of.get(n, none) for n in lengths], 1).T  # depths x lengths
            axes.imshow(shares, norm=scale, aspect="auto", cmap="RdYlGn")
            names = [f"{int(n) // 1024}k" if int(n) >= 1024 else n for n in lengths]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks([0, len(shares) - 1], ["start", "end"], fontsize=7)
            axes.set_title(kind if model == next(iter(exams)) else "", fontsize=9)
        line[0].set_ylabel(model, fontsize=9)
    shown = ScalarMappable(scale, "RdYlGn")
    figure.colorbar(shown, ax=grid, label="values said whole", shrink=0.6)
    report.save(figure, path)
