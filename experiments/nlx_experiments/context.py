# SPDX-License-Identifier: Apache-2.0
"""`nlx run context`: what more and more context is worth to a model of text.

command    nlx run context [--models MODEL ...] [--data PATH ...]
           nlx run context-longer: windows of 512 bytes, half as many at a step, one rate: what of
           the curves is owed to the length trained on?
           nlx run context-tiny: next to nothing of it, in seconds; context-gpu: windows of 2,048
           bytes, examined to 32,768, models of width 256, for a GPU
shows      perplexity of a byte against how many came before it, in windows far longer than those
           trained on (256 bytes): one curve a model, as in Figure 10 of Behrouz et al. (2025)
takes      Hope 60 minutes of a busy core, Titans 20, DeltaNet 15, Gated DeltaNet 22, the
           Transformer 11, the control 2. A model that is stopped begins anew, finished ones are
           kept
expects    beyond the length trained on, in the mean of those positions, Gated DeltaNet's curve the
           lowest, Hope's 0.17 nats above it, 0.04 above DeltaNet's, 0.07 above Titans', and 1.95
           below the Transformer's, whose positions end there. Meant was Hope's lowest. From 129 to
           512 bytes it is below Titans'; farther out more context is worth less to it, most likely
           for the length trained on: -longer, its curve gains from 257 to 4,096 bytes 0.12 nats,
           Titans' 0.14, where here it is 0.03 and 0.13; four rows a step are too few for that rate

Text is the standard library's source or --data, one half of what is held out to choose weights and
rates by, the other to report. Every window begins with an empty state and is read in pieces, the
state carried from one to the next. The loss of a position is a mean over all windows; positions are
taken together from each power of two to the next. Parameters are equal, states are not: their bytes
stand in the table. Hope's continuum memory system has three blocks that all learn at every step,
and no slower level.
"""

import dataclasses
import functools
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float, PyTree

from nlx import nn
from nlx_experiments import paired, report, sequence_table
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments.data import Bytes
from nlx_experiments.errors import Refused
from nlx_experiments.long_context import aim, base, contestants, found, state, states, texts
from nlx_experiments.sequence_contest import Exam, Plan
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_reading import cut, read
from nlx_experiments.sequence_tasks import Batch, windows

TASK = "text"
FIRST = 16  # bytes of the first stretch of positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context(Options):
    """Perplexity against context."""

    runs: pathlib.Path = pathlib.Path("runs/context")
    data: tuple[pathlib.Path, ...] = ()
    """Files and folders of text; none: the standard library's source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longer(Context):
    """Trained on windows of 512 bytes: what is owed to the length trained on?"""

    runs: pathlib.Path = pathlib.Path("runs/context-longer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Context):
    """Windows of 2,048 bytes, examined to 32,768: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/context-gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Context):
    """One model, two steps, windows of 64 bytes: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/context-tiny")
    place: pathlib.Path = pathlib.Path("runs/context-tiny")
    tiny = True


class Size(NamedTuple):
    """Of the models, of the windows trained on, and of those that are examined."""

    width: int
    layers: int
    parameters: int
    length: int
    steps: int
    rates: tuple[float, ...]
    rows: int
    checked: int  # windows to choose by; twice as many of the bin
    examined: int  # bytes of a window
    windows: int
    piece: int  # bytes read at once


FULL = Size(
    width=64, layers=2, parameters=130_000, length=256, steps=1_000, rates=(3e-3, 1e-2),
    rows=8, checked=64, examined=4_096, windows=32, piece=256,
)  # fmt: skip
LONGER = FULL._replace(length=512, rows=4, rates=(1e-2,))
OF_GPU = Size(
    width=256, layers=4, parameters=5_000_000, length=2_048, steps=20_000, rates=(1e-3, 3e-3),
    rows=8, checked=16, examined=32_768, windows=8, piece=1_024,
)  # fmt: skip
TINY = FULL._replace(
    width=8, layers=1, parameters=6_500, length=32, steps=2, rates=(1e-2,), rows=4, examined=64,
    windows=4, piece=32,
)  # fmt: skip


def main(options: Context) -> dict[str, Any]:
    """Runs what is not known yet; writes table, picture and numbers."""
    given = texts(options.data)
    name, size, small = "context", FULL, isinstance(options, Tiny)
    if isinstance(options, Longer):
        name, size = "context-longer", LONGER
    if isinstance(options, Gpu):
        name, size = "context-gpu", OF_GPU
    if small:
        size = TINY
    rows = tiny(given) if small else full(size, given)
    text = functools.partial(
        shown,
        sizes=states(rows[TASK], size.examined),
        picture=f"results/{name}-curves.png",
    )
    results = experiment.run(options, name, rows, text, measure="tokens")
    if results:
        plot(options.place / "results" / f"{name}-curves.png", results[TASK])
    return results


def full(size: Size, parts: tuple[Bytes, Bytes, Bytes]) -> dict[str, Row]:
    """All models on one text. parts: to train, to choose, to report on."""
    task = windows(*parts)
    plan = Plan(
        bins={"fresh": (size.length, size.length)},
        shortest=size.length,
        stages=((0, size.length),),
        steps=size.steps,
        rates=size.rates,
        rows=size.rows,
        decay=True,
        validated=size.checked,
        tested=2 * size.checked,
        by_loss=True,
        round_to=size.length,
    )
    models = contestants(base(task.vocabulary, size.width, size.layers), size.parameters)
    batch = evenly(parts[2], size.windows, size.examined)
    exam = Exam(
        f"{size.piece} {zlib.crc32(batch.tokens.tobytes())}",
        functools.partial(examine, batch, size.piece),
    )
    return {TASK: Row(task, plan, models, {}, models["deltanet"][""], exam)}


def evenly(text: Bytes, count: int, length: int) -> Batch:
    """Windows that lie evenly in a text, from its first byte to its last.

    Raises Refused where it is shorter than one.
    """
    if text.size <= length:
        raise Refused(
            f"`--data` leaves {text.size} bytes to report on; it must be more than {length}, a "
            "window's, twice that in what is held out."
        )
    starts = np.linspace(0, text.size - length - 1, count).astype(int)
    rows = text[starts[:, None] + np.arange(length + 1)].astype(int)
    return Batch(rows[:, :-1], rows[:, 1:], np.ones((count, length), np.float32))


def stretches(length: int) -> list[int]:
    """Where stretches of positions end: FIRST, and each power of two times it, up to the length."""
    ends = [FIRST]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    return ends


def examine(
    batch: Batch,
    piece: int,
    model: nn.ModelConfig,
    weights: PyTree[Array],
    leave: Callable[[], None],
) -> dict[str, Any]:
    """{"ends": of stretches, "loss": seeds x stretches, nats a byte, None where not finite}.

    batch: windows. piece: bytes read at once. model, weights, leave: as of an `Exam`.
    """
    length = batch.tokens.shape[1]
    pieces = read(model, weights, cut(batch, piece), capacity=length, leave=leave)
    loss = np.concatenate([part.loss.mean(1) for part in pieces], 1)
    ends = stretches(length)
    return {"ends": ends, "loss": [_rounded(seed, ends) for seed in loss]}


def _rounded(loss: Float[np.ndarray, " t"], ends: Sequence[int]) -> list[float | None]:
    """The mean of each stretch; what is not finite is None, for JSON has no name for it."""
    means = [float(loss[a:b].mean()) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return [round(mean, 5) if math.isfinite(mean) else None for mean in means]


def perplexities(exam: Mapping[str, Any]) -> Float[np.ndarray, "m n"]:
    """Of seeds and stretches; NaN where a loss is None."""
    return np.exp(np.array(exam["loss"], float))


def tiny(parts: tuple[Bytes, Bytes, Bytes]) -> dict[str, Row]:
    """Attention alone, which is compiled in the least time."""
    row = full(TINY, parts)[TASK]
    plan = dataclasses.replace(row.plan, seeds=1, every=1, validated=4, tested=4)
    models = {"transformer": row.models["transformer"]}
    return {TASK: row._replace(plan=plan, models=models, control=None)}


def shown(
    results: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, int]],
    picture: str = "results/context-curves.png",
) -> str:
    """Perplexities by position, who is ahead, the control and the grid.

    sizes: what `long_context.states` returns, of a whole window.
    """
    task = results[TASK]
    trained = task["plan"]["stages"][-1][1]
    parts = [
        f"Perplexity of a byte by its position in the window, trained on windows of {trained} "
        "bytes, mean of the seeds (lowest to highest); bytes of the state that a window leaves:",
        table(task, sizes).markdown(),
        *verdicts(task),
        f"![perplexity against context]({picture})",
        *sequence_table.control(results),
        "Bytes foretold, in windows of the length trained on:",
        sequence_table.grid(results, "tokens").markdown(),
    ]
    return "\n\n".join(parts)


def table(task: Mapping[str, Any], sizes: Mapping[str, Mapping[str, int]]) -> report.Table:
    """Models down, bytes of state and stretches of positions across."""
    lines, ends = [], []
    for model, variants in task["models"].items():
        exam = found(variants)
        ends = exam["ends"]
        cells = [
            f"{seeds.mean():.3f} ({seeds.min():.3f} to {seeds.max():.3f})"
            for seeds in perplexities(exam).T
        ]
        lines.append((model, state(sizes, model, variants), *cells))
    names = [f"{a + 1:,} to {b:,}" for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return report.Table("", ["model", "state", *names], lines)


def verdicts(task: Mapping[str, Any]) -> list[str]:
    """Hope less each rival in nats a byte beyond the length trained on; what the aim says."""
    trained = task["plan"]["stages"][-1][1]
    lost = {model: beyond(found(variants), trained) for model, variants in task["models"].items()}
    if "hope" not in lost:
        return []
    rivals = [model for model, by_seed in lost.items() if model != "hope" and by_seed]
    apart = {rival: paired.by_seed(lost["hope"], lost[rival]) for rival in rivals}
    if not apart:
        return []
    lines = [
        f"* Hope against {rival}: {d.told(4, 'nats', less=True)}." for rival, d in apart.items()
    ]
    said = (
        f"What a byte after the first {trained} costs Hope more than its rivals, in nats, mean of "
        "all positions, seed by seed on the same windows, with the standard error over seeds; less "
        "is better; level: Student's t is not sure at 95 % of either."
    )
    return [said, "\n".join(lines), aim(apart, less=True)]


def beyond(exam: Mapping[str, Any], trained: int) -> list[float]:
    """Of each seed the mean loss of all positions after those trained on, NaN where one is None."""
    ends = np.array(exam["ends"])
    sizes = np.diff(ends, prepend=0) * (ends > trained)
    return (np.array(exam["loss"], float) @ sizes / sizes.sum()).tolist() if sizes.any() else []


def plot(path: pathlib.Path, task: Mapping[str, Any]) -> None:
    """Perplexity against context, a line a model, a band of its seeds."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for (model, variants), colour in zip(task["models"].items(), report.COLOURS, strict=False):
        exam = found(variants)
        ends, perplexity = exam["ends"], perplexities(exam)
        axes.plot(ends, perplexity.mean(0), "o-", color=colour, markersize=3, label=model)
        low, high = perplexity.min(0), perplexity.max(0)
        axes.fill_between(ends, low, high, color=colour, alpha=0.15, linewidth=0)
    trained = task["plan"]["stages"][-1][1]
    axes.axvline(trained, color="#888888", linestyle="--", linewidth=1, label="trained on")
    axes.set(xlabel="position in the window [bytes]", ylabel="perplexity of a byte", xscale="log")
    axes.legend(frameon=False)
    report.save(figure, path)
