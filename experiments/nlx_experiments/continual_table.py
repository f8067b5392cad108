# SPDX-License-Identifier: Apache-2.0
"""The tables of `nlx run continual`: what follows from each matrix, by method."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nlx_experiments import continual_metrics as metrics
from nlx_experiments import report

COLUMNS = (
    "final", "average", "learned", "forgetting", "backward", "forward", "plasticity",
)  # fmt: skip
FT, EWC = "fine-tuning", "ewc"
HOPE = "hope, {} level{}"
MANY = 20  # tasks, from which on plasticity is drawn
Results = Mapping[str, Mapping[str, Any]]


def matrix_of(record: Mapping[str, Any]) -> Float[np.ndarray, "t t"]:
    """R of a record: null is NaN."""
    return np.array(record["matrix"], float)


def mean_matrix(records: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "t t"]:
    """The mean of the seeds' R, by place in the stream."""
    return np.mean([matrix_of(r) for r in records], 0)


def summaries(entry: Mapping[str, Any]) -> list[dict[str, float]]:
    """`continual_metrics.summary` of every seed."""
    return [metrics.summary(matrix_of(r), np.array(r["untrained"], float)) for r in entry["seeds"]]


def interval(values: Sequence[float]) -> str:
    """Percent: the mean, and the lowest and highest seed's where they differ."""
    told = f"{100 * statistics.fmean(values):.1f}"
    if len(values) == 1 or max(values) - min(values) < 5e-4:
        return told
    return f"{told} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def shown(results: Results, skipped: Mapping[str, str], name: str) -> str:
    """All streams' tables, verdicts, controls and pictures, as Markdown."""
    parts = [
        "In percent, mean of the seeds (lowest to highest). `learned`: just after each task; "
        "`plasticity`: that of the last fifth of tasks less that of the first; the others as "
        "`continual_metrics.py` defines them. `KiB`: carried from task to task beside the "
        "parameters in use, at the end. Of domains: bytes foretold right; of languages: chrF."
    ]
    for scenario, found in results.items():
        some = next(iter(found.values()))["seeds"]
        within, after = some[0]["chance"]
        seen = chance_of_seen(within, after, len(some[0]["stages"]))
        lines = [_line(method, entry) for method, entry in found.items()]
        count = f"{len(some[0]['stages'])} tasks, {max(len(e['seeds']) for e in found.values())}"
        parts.append(f"**{scenario}**: {count} seed(s).")
        if within < 1:
            guess = {"final": after, "learned": seen}
            told = (f"{100 * guess[c]:.1f}" if c in guess else "" for c in COLUMNS)
            lines.append(("*chance*", *told, "", ""))
        columns = ["method", *COLUMNS, "KiB", "settings"]
        parts.append(report.Table("", columns, lines).markdown())
        parts += verdict(found) + control(found)
        stem = f"results/{name}-{scenario.replace(' ', '-')}"
        parts.append(f"![examined against learned]({stem}.png)")
        if len(some[0]["stages"]) >= MANY:
            parts.append(f"![just after each task]({stem}-learned.png)")
    if skipped:
        parts.append("Skipped: " + "; ".join(f"{n} ({why})" for n, why in skipped.items()) + ".")
    parts += [
        "Settings tried, final accuracy on validation rows of the first tasks:",
        grid(results),
    ]
    return "\n\n".join(parts)


def _line(method: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    found = summaries(entry)
    told = (interval([s[column] for s in found]) for column in COLUMNS)
    size = f"{max(record['carried'] for record in entry['seeds']) / 1024:,.0f}"
    return (method, *told, size, settings(entry["seeds"][0]["choice"]))


def settings(choice: Mapping[str, float]) -> str:
    """A setting in words."""
    return ", ".join(f"{name} {value:g}" for name, value in choice.items()) or "none"


def grid(results: Results) -> str:
    """Every setting of every method: what it reached, ** what was chosen."""
    lines = []
    for scenario, found in results.items():
        for method, entry in found.items():
            chosen = entry["seeds"][0]["choice"]
            for record in entry["tried"]:
                mark = "**" if record["choice"] == chosen else ""
                told = f"{mark}{100 * record['validation']:.1f}{mark}"
                lines.append((scenario, method, settings(record["choice"]), told))
    return report.Table("", ["stream", "method", "settings", "validation"], lines).markdown()


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What was to be shown against fine-tuning at both rates, and EWC: at most half as much is
    forgotten, more is left, within 5 points just after a task. Nothing of one task, or where one
    did not run.

    What a further level brings is taken seed for seed.
    """
    three = HOPE.format(3, "s")
    tasks = len(next(iter(found.values()))["seeds"][0]["stages"])
    if tasks < 2 or not {FT, EWC, three} <= found.keys():
        return []
    plain = [method for method in found if method.startswith(FT)]
    mean = lambda method, what: statistics.fmean(s[what] for s in summaries(found[method]))
    lines = []
    for method in plain:
        named = f"{three}, {method}"
        told = lambda what, m=method: f"{100 * mean(three, what):.1f}, {100 * mean(m, what):.1f}"
        half, near = mean(method, "forgetting") / 2, mean(method, "learned") - 0.05
        if half > 0:  # else there is nothing to halve
            kept = mean(three, "forgetting") <= half
            lines.append((kept, f"{named} forget {told('forgetting')}"))
        lines += [
            (mean(three, "final") > mean(method, "final"), f"{named} end at {told('final')}"),
            (mean(three, "learned") >= near, f"{named} just after each task {told('learned')}"),
        ]
    ends = [mean(method, "final") for method in (three, EWC)]
    said = " at the end {:.1f}, {:.1f}".format(*(100 * x for x in ends))
    lines.append((ends[0] > ends[1], f"{three}, {EWC}{said}"))
    for less in (1, 2):
        fewer, more = HOPE.format(less, "s" * (less > 1)), HOPE.format(less + 1, "s")
        end, after = (gained(found, fewer, more, what) for what in ("final", "learned"))
        if end is None or after is None:
            continue
        told = [f"{100 * m:+.1f} (standard error {100 * error:.1f})" for m, error in (end, after)]
        said = f"{more} after {less} bring {told[0]} at the end, {told[1]} just after each task"
        lines.append((end[0] >= -end[1], said))
    return ["\n".join(f"* {'Shown' if holds else 'Not shown'}: {said}." for holds, said in lines)]


def gained(
    found: Mapping[str, Any], fewer: str, more: str, what: str
) -> tuple[float, float] | None:
    """What one method has more than another, seed for seed: mean and standard error.

    None where fewer than two seeds ran of both.
    """
    if not {fewer, more} <= found.keys():
        return None
    by_seed = lambda method: {
        record["part"]: told[what]
        for record, told in zip(found[method]["seeds"], summaries(found[method]), strict=True)
    }
    a, b = by_seed(fewer), by_seed(more)
    gains = [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]
    if len(gains) < 2:
        return None
    return statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5


def chance_of_seen(within: float, after: float, tasks: int) -> float:
    """What a guess among the classes seen so far gets right just after each of equal tasks."""
    if within == after:  # all tasks have the same classes
        return within
    return statistics.fmean(within / n for n in range(1, tasks + 1))


def control(found: Mapping[str, Any]) -> list[str]:
    """What was learned from shuffled labels; nothing where no control ran."""
    told, within = [], 1.0
    for method, entry in found.items():
        if "control" not in entry:
            continue
        matrix, (within, after) = matrix_of(entry["control"]), entry["control"]["chance"]
        seen = chance_of_seen(within, after, len(matrix))
        told.append(
            f"{method} {100 * metrics.learned(matrix):.1f} just after each task (chance among "
            f"classes seen {100 * seen:.1f}), {100 * metrics.final(matrix):.1f} at the end (chance "
            f"{100 * after:.1f})"
        )
    ceiling = (
        "Labels change places within a task, so of which task a row is can be learned: whoever "
        f"knows that and guesses gets {100 * within:.1f}."
    )
    return [f"Control, trained on shuffled labels: {'; '.join(told)}. {ceiling}"] if told else []
