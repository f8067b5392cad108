# SPDX-License-Identifier: Apache-2.0
"""`nlx run babilong`: questions on facts that are scattered among a million symbols of text.

command    nlx run babilong [--only TASK ...] [--models MODEL ...] [--longest N] [--streamed N]
           nlx run babilong-tiny: next to nothing of it, in seconds; babilong-gpu: three facts too,
           rows of up to 1,048,576, a stream of ten million, models of width 128, for a GPU
shows      the share of answers that are right, of models trained on rows of at most 192 symbols, in
           rows of up to `longest`; and the memory of the process while those of the first task read
           a stream of `streamed` symbols
takes      not run yet; a model that is stopped begins anew, finished ones are kept
expects    meant, and not shown yet: Hope in the mean at least level with Titans and above DeltaNet
           and Gated DeltaNet; accuracy at 1,048,576 symbols (`--longest 1048576`); memory that is
           flat to ten million (`--streamed 10000000`)

The protocol is BABILong's (`scattered_tasks.py`): stories of 2 to 12 facts, here of three symbols
each, scattered among text, the standard library's source or --data, a question at the end. All
lengths are examined on the same stories, the long ones on fewer of them. Models are trained on
short rows, with questions in them too; weights are chosen on rows of those lengths. Rows are made
and read piece by piece, the state carried from one to the next. Attention keeps every symbol, so
the Transformer is examined up to 4,096 alone and reads no stream.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, PyTree

from nlx import nn
from nlx_experiments import report, resident, scattered_tasks, sequence_table
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments.data import Bytes
from nlx_experiments.long_context import base, contestants, found, texts
from nlx_experiments.sequence_contest import Exam, Plan
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_reading import read

ATTENTION = 4_096  # symbols that attention is examined up to
MARKS = tuple(10**n for n in range(3, 8))  # of the stream
ROWS, AT_ONCE = (8, 64), 2**19  # of a length: fewest and most rows, symbols of them all
SEEN = 2**26  # pairs of symbols that attention compares at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Babilong(Options):
    """Questions on facts scattered among text."""

    runs: pathlib.Path = pathlib.Path("runs/babilong")
    longest: int = 65_536
    """Rows that are examined, at most."""
    streamed: int = 1_000_000
    """Symbols of the stream."""
    data: tuple[pathlib.Path, ...] = ()
    """Files and folders of text for the background; none: the standard library's source."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers below 1,024."""
        for name in ("longest", "streamed"):
            if getattr(self, name) < 1024:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be >= 1,024.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Babilong):
    """One, two and three facts, a million symbols, a stream of ten million: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/babilong-gpu")
    longest: int = 1_048_576
    streamed: int = 10_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Babilong):
    """One task, two steps, rows of up to 256: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/babilong-tiny")
    place: pathlib.Path = pathlib.Path("runs/babilong-tiny")
    streamed: int = 2_000
    tiny = True


class Size(NamedTuple):
    """Of the models, of what they are trained on, and of what they are examined on."""

    facts: tuple[int, ...]
    width: int
    layers: int
    parameters: int
    stages: tuple[tuple[int, int], ...]
    steps: int
    rates: tuple[float, ...]
    rows: int
    tested: int  # rows of a bin; half as many to choose by
    lengths: tuple[int, ...]
    piece: int  # symbols read at once


FULL = Size(
    facts=(1, 2), width=32, layers=2, parameters=50_000, stages=((0, 64), (600, 192)), steps=1_200,
    rates=(1e-2,), rows=16, tested=256, lengths=tuple(2**n for n in range(7, 21)), piece=512,
)  # fmt: skip
OF_GPU = FULL._replace(
    facts=(1, 2, 3), width=128, layers=4, parameters=1_500_000,
    stages=((0, 128), (5_000, 512), (10_000, 1_024)), steps=20_000, rates=(2e-3,), tested=64,
)  # fmt: skip


def main(options: Babilong) -> dict[str, Any]:
    """Runs what is not known yet; writes tables, pictures and numbers."""
    given = texts(options.data)
    name = "babilong-gpu" if isinstance(options, Gpu) else "babilong"
    size = OF_GPU if isinstance(options, Gpu) else FULL
    rows = full(size, given, options.longest, options.streamed)
    if isinstance(options, Tiny):
        rows = tiny(given, options.streamed)
    text = functools.partial(shown, picture=f"results/{name}-lengths.png")
    results = experiment.run(options, name, rows, text, measure="tokens")
    if results:
        plot(options.place / "results" / f"{name}-lengths.png", results)
    return results


def full(
    size: Size, parts: tuple[Bytes, Bytes, Bytes], longest: int, streamed: int
) -> dict[str, Row]:
    """A task for each number of facts, all models.

    parts: to train, to choose, to report on. longest: rows that are examined, at most. streamed:
    symbols of the stream.
    """
    long = size.stages[-1][1]
    plan = Plan(
        bins={"trained": (long // 2, long), "longer": (2 * long, 2 * long)},
        shortest=size.stages[0][1] // 2,
        stages=size.stages,
        steps=size.steps,
        rates=size.rates,
        rows=size.rows,
        decay=True,
        round_to=size.stages[0][1],
        validated=size.tested // 2,
        tested=size.tested,
    )
    lengths = tuple(n for n in size.lengths if n <= longest)
    rows = {}
    for supporting in size.facts:
        task = scattered_tasks.scattered(supporting, *parts)
        task = dataclasses.replace(task, examined={"longer": task.test or task.draw})
        sizes = base(task.vocabulary, size.width, size.layers)
        models = contestants(sizes, size.parameters)
        exam = Exam(
            f"{lengths} {size.piece} {streamed}",
            functools.partial(examine, supporting, parts[2], lengths, size.piece, streamed),
        )
        streamed = 0  # memory is the same whatever is asked
        rows[task.name] = Row(task, plan, models, {}, models["deltanet"][""], exam)
    return rows


def examine(
    supporting: int,
    text: Bytes,
    lengths: Sequence[int],
    piece: int,
    streamed: int,
    model: nn.ModelConfig,
    weights: PyTree[Array],
    leave: Callable[[], None],
) -> dict[str, Any]:
    """{"right": length -> share right by seed, "rows": length -> rows, "stream": see `stream`}.

    supporting, text: of the task. lengths: examined. piece: symbols read at once. streamed: symbols
    of the stream, 0: none is read. model, weights, leave: as of an `Exam`.
    """
    attends = "attention" in model.mixers
    limit = ATTENTION if attends else max(lengths)
    measured: dict[str, Any] = {"right": {}, "rows": {}}
    for length in (n for n in lengths if n <= limit):
        rows = int(np.clip(AT_ONCE // length, *ROWS))
        generator = np.random.default_rng(supporting)  # the same stories for all lengths
        story = scattered_tasks.stories(supporting, generator, ROWS[1], length, text).first(rows)
        size = min(piece, length, max(1, SEEN // (rows * length)) if attends else length)
        given = scattered_tasks.pieces(story, text, size)
        for last in read(model, weights, given, capacity=length, leave=leave):
            right = last.right  # the question ends the row
        shares = right[:, :, -1].mean(1)
        measured["right"][str(length)] = [round(float(share), 4) for share in shares]
        measured["rows"][str(length)] = rows
    if streamed and not attends:
        one = jax.tree.map(lambda leaf: leaf[:1], weights)
        measured["stream"] = stream(supporting, text, piece, streamed, model, one, leave)
    return measured


def stream(
    supporting: int,
    text: Bytes,
    piece: int,
    streamed: int,
    model: nn.ModelConfig,
    weights: PyTree[Array],
    leave: Callable[[], None],
) -> list[dict[str, float]]:
    """Reads one row of `streamed` symbols; after MARKS and at the end, {"symbols", "resident_mib"}.

    The memory is that of the process, the most of it at the end of any piece since the mark before.
    """
    generator = np.random.default_rng(streamed)
    story = scattered_tasks.stories(supporting, generator, 1, streamed, text)
    marks, most, done = [], 0.0, 0
    due = [n for n in MARKS if n < streamed] + [streamed]
    given = scattered_tasks.pieces(story, text, piece)
    for part in read(model, weights, given, capacity=streamed, leave=leave):
        done, most = done + part.batch.tokens.shape[1], max(most, resident.now())
        if done >= due[0]:
            marks.append({"symbols": done, "resident_mib": round(most, 1)})
            due, most = [n for n in due if n > done], 0.0
    return marks


def tiny(parts: tuple[Bytes, Bytes, Bytes], streamed: int) -> dict[str, Row]:
    """One fact, DeltaNet of width 8."""
    size = FULL._replace(
        facts=(1,), width=8, layers=1, parameters=6_500, stages=((0, 32),), steps=2, rows=4,
        lengths=(64, 128), piece=64,
    )  # fmt: skip
    ((name, row),) = full(size, parts, 128, streamed).items()
    plan = dataclasses.replace(row.plan, seeds=1, every=1, validated=4, tested=4, round_to=64)
    models = {"deltanet": row.models["deltanet"]}
    return {name: row._replace(plan=plan, models=models, control=None)}


def shown(results: Mapping[str, Any], picture: str = "results/babilong-lengths.png") -> str:
    """Means over seeds by length, the memory of streams, the control and the grid."""
    parts = ["Answers that are right, in percent, mean of the seeds (lowest to highest)."]
    for name, task in results.items():
        parts += [f"{name}, by the length of the row:", by_length(task).markdown()]
    parts += [
        f"![share right by length]({picture})",
        "MiB of the process while one row is read, at the most since the column before:",
        streams(results).markdown(),
        *sequence_table.control(results),
        "The whole grid:",
        sequence_table.grid(results, "tokens").markdown(),
    ]
    return "\n\n".join(parts)


def by_length(task: Mapping[str, Any]) -> report.Table:
    """Models down, lengths and how many rows they have across; then the mean of all lengths."""
    exams = {model: found(variants) for model, variants in task["models"].items()}
    lengths = list(dict.fromkeys(n for exam in exams.values() for n in exam["right"]))
    lines: list[tuple] = []
    for model, exam in exams.items():
        right = exam["right"]
        cells = [sequence_table.interval(right[n]) if n in right else "" for n in lengths]
        whole = [statistics.fmean(right[n]) for n in lengths if n in right]
        mean = f"{100 * statistics.fmean(whole):.1f}" if len(whole) == len(lengths) else ""
        lines.append((model, *cells, mean))
    chance = f"{100 * task['chance']['trained']:.1f}"
    lines.append(("*most frequent answer*", *([chance] * (len(lengths) + 1))))
    counts = {n: rows for exam in exams.values() for n, rows in exam["rows"].items()}
    lines.append(("*rows of each seed*", *(str(counts[n]) for n in lengths), ""))
    return report.Table("", ["model", *(f"{int(n):,}" for n in lengths), "mean"], lines)


def streams(results: Mapping[str, Any]) -> report.Table:
    """Memory after more and more symbols."""
    lines, columns = [], []
    for name, task in results.items():
        for model, variants in task["models"].items():
            marks = found(variants).get("stream", [])
            columns = max(columns, [f"{mark['symbols']:,}" for mark in marks], key=len)
            if marks:
                lines.append((name, model, *(f"{mark['resident_mib']:,.0f}" for mark in marks)))
    return report.Table("", ["task", "model", *columns], lines)


def plot(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Share right against length, a panel for each task, a line a model, a band of its seeds."""
    size = (5.2 * len(results), 3.8)
    figure, panels = plt.subplots(
        1, len(results), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (name, task) in zip(panels.flat, results.items(), strict=True):
        for (model, variants), colour in zip(task["models"].items(), report.COLOURS, strict=False):
            right = found(variants)["right"]
            lengths, shares = [int(n) for n in right], np.array(list(right.values()))
            axes.plot(lengths, shares.mean(1), "o-", color=colour, markersize=3, label=model)
            axes.fill_between(
                lengths, shares.min(1), shares.max(1), color=colour, alpha=0.15, linewidth=0
            )
        axes.axhline(task["chance"]["trained"], color="#222222", linestyle=":", linewidth=1)
        trained = task["plan"]["stages"][-1][1]
        axes.axvline(trained, color="#888888", linestyle="--", linewidth=1)
        axes.set(title=name, xlabel="symbols of the row", xscale="log", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8)
    panels.flat[0].set_ylabel("share right")
    report.save(figure, path)
