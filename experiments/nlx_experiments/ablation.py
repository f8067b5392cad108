# SPDX-License-Identifier: Apache-2.0
"""`nlx run ablation`: what each part of Hope is worth (Behrouz et al., 2025, Table 6).

command    nlx run ablation [--only TASK ...] [--models ROW ...]
           nlx run ablation-tiny: next to nothing of it, in seconds; ablation-gpu: eight layers of
           width 512 and windows of 2,048 bytes, for a GPU
shows      Hope without one of its parts, at equal parameters: bits per byte on held-out text (the
           Python standard library's source, or --data), and the rows of parity that are right
takes      an hour and a quarter of one core (250 to 400 s a row of text, 160 to 250 s of parity); a
           model that is stopped begins anew, finished ones are kept
expects    on text every part but one has the paper's sign in the mean, but only DGD beyond the
           noise (0.08 bits a byte); the query's memory helps by 0.025 ± 0.010 bits, where the
           paper's costs 0.05 of 12.24 in perplexity. Parity in rows of trained lengths falls from
           99.9 to 55 % without DGD and stays without anything else

"Hope" here makes its queries by a memory, as the first row of the paper's table does; "w/o
inner-projection q" is what the presets are. A removed projection is the slow map that stands before
the memory. Without the continuum memory system the feed-forward is one block, on the clock of all
else; "w/o DGD" writes by plain gradient descent, "w/o weight decay" holds the retention at 1.
All rows have one learning rate.
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from scipy import stats

from nlx import nn
from nlx_experiments import data, formal_languages, sequence_table
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments.sequence_contest import Plan, equal
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_learner import count
from nlx_experiments.sequence_tasks import windows

# Table 6 of the paper: perplexity and accuracy.
PAPER: Mapping[str, tuple[float, float]] = {
    "Hope": (12.24, 58.1),
    "w/o DGD": (13.41, 56.5),
    "w/o momentum": (13.58, 56.9),
    "w/o weight decay": (13.71, 57.2),
    "w/o CMS": (13.04, 57.3),
    "w/o inner-projection k": (13.77, 56.9),
    "w/o inner-projection v": (13.90, 55.1),
    "w/o inner-projection q": (12.19, 57.4),
}
REMOVED: Mapping[str, Mapping[str, Any]] = {
    "Hope": {},
    "w/o DGD": dict(erase=False),
    "w/o momentum": dict(momentum=False),
    "w/o weight decay": dict(retain=False),
    "w/o CMS": dict(cms_periods=(1,)),
    "w/o inner-projection k": dict(adaptive_key=False),
    "w/o inner-projection v": dict(adaptive_value=False),
    "w/o inner-projection q": dict(adaptive_query=False),
}
FULL = dict(width=64, heads=2, layers=1, memory_hidden=16)
OF_GPU = dict(width=512, heads=8, layers=8, memory_hidden=64)
TINY = dict(width=16, heads=1, layers=1, memory_hidden=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(Options):
    """Table 6 of the paper: Hope without one part at a time."""

    runs: pathlib.Path = pathlib.Path("runs/ablation")
    data: tuple[pathlib.Path, ...] = ()
    """Files and folders of text; by default the Python standard library's source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Ablation):
    """Eight layers of width 512 on windows of 2,048 bytes: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/ablation-gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Ablation):
    """Two rows of it on text, a few steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/ablation-tiny")
    place: pathlib.Path = pathlib.Path("runs/ablation-tiny")
    tiny = True


def main(options: Ablation) -> dict[str, Any]:
    """Runs what is not known yet; writes table, picture and numbers."""
    corpus = data.load(options.data)
    half = corpus.heldout.size // 2
    text = windows(corpus.train, corpus.heldout[:half], corpus.heldout[half:])
    tasks = {"text": text}
    if not isinstance(options, Tiny):  # compiling each row takes seconds
        tasks["parity"] = formal_languages.LANGUAGES["parity"]
    size = TINY if isinstance(options, Tiny) else OF_GPU if isinstance(options, Gpu) else FULL
    plans = tiny_plans() if isinstance(options, Tiny) else full_plans(isinstance(options, Gpu))
    rows = {
        name: Row(
            task,
            plans[name],
            {row: {"": config} for row, config in made.items()},
            control=made.get("w/o CMS"),
        )
        for name, task in tasks.items()
        for made in [variants(task.vocabulary, size)]
    }
    name = "ablation-gpu" if isinstance(options, Gpu) else "ablation"
    return experiment.run(options, name, rows, shown, measure="tokens")


def variants(vocabulary: int, size: Mapping[str, Any] = FULL) -> dict[str, nn.ModelConfig]:
    """The rows of the table, all with as many parameters; of TINY the first two."""
    whole = nn.ModelConfig(
        mixer="self_modifying",
        feed_forward="cms",
        vocabulary=vocabulary,
        hidden=2 * size["width"],
        cms_periods=(1, 4),
        chunk_size=16,
        projection_chunk_size=16,
        adaptive_query=True,
        **size,
    )
    chosen = list(REMOVED)[:2] if size is TINY else list(REMOVED)
    return {row: equal(dataclasses.replace(whole, **REMOVED[row]), count(whole)) for row in chosen}


def full_plans(large: bool = False) -> dict[str, Plan]:
    """Text in windows of 256 bytes; parity. large: windows of 2,048, more steps, a lower rate."""
    length = 2048 if large else 256
    text = Plan(
        bins={"held out": (length, length)},
        shortest=length,
        stages=((0, length),),
        steps=10_000 if large else 600,
        rates=(1e-3 if large else 5e-3,),
        seeds=4,
        decay=True,
        by_loss=True,
        rows=8,
        validated=128,
        tested=256,
        round_to=length,
    )
    parity = Plan(
        bins={"2 to 32": (2, 32), "33 to 64": (33, 64)},
        shortest=2,
        stages=((0, 16), (200, 32)),
        steps=5_000 if large else 600,
        rates=text.rates,
        seeds=4,
        noise=0.2,
        decay=True,
        round_to=32,
    )
    return {"text": text, "parity": parity}


def tiny_plans() -> dict[str, Plan]:
    """Two steps on text."""
    text = Plan(
        bins={"held out": (16, 16)}, shortest=16, stages=((0, 16),), by_loss=True, steps=2, every=1,
        seeds=2, rows=4, rates=(1e-2,), validated=8, tested=8, round_to=16,
    )  # fmt: skip
    return {"text": text}


def shown(results: Mapping[str, Any]) -> str:
    """Every row against the whole: by how much worse, and what the paper has."""
    found = {
        task: {row: sequence_table.best(v)[1] for row, v in entry["models"].items()}
        for task, entry in results.items()
    }
    bits = {
        row: [math.nan if loss is None else loss / math.log(2) for loss in r["held out"]["loss"]]
        for row, r in found.get("text", {}).items()
    }
    bins = list(results["parity"]["plan"]["bins"]) if "parity" in results else []
    parity = found.get("parity", {})
    wrong = {row: [1 - share for share in r[bins[-1]]["rows"]] for row, r in parity.items()}
    lines = []
    for row, (perplexity, accuracy) in PAPER.items():
        if row not in bits and row not in parity:
            continue
        theirs = perplexity - PAPER["Hope"][0], PAPER["Hope"][1] - accuracy
        of_text = compared(bits, row, theirs[0], lambda x: f"{x:+.3f}")
        of_parity = compared(wrong, row, theirs[1], lambda x: f"{100 * x:+.1f}")
        shares = (
            [sequence_table.interval(parity[row][b]["rows"]) for b in bins] if row in parity else []
        )
        lines.append(
            (
                row,
                f"{statistics.fmean(bits[row]):.3f}" if row in bits else "",
                *of_text,
                f"{perplexity:.2f}" + ("" if row == "Hope" else f" ({theirs[0]:+.2f})"),
                " / ".join(shares),
                *of_parity,
                f"{accuracy:.1f}" + ("" if row == "Hope" else f" ({-theirs[1]:+.1f})"),
            )
        )
    columns = ("", "bits per byte", "worse by", "same sign?", "paper: perplexity")
    columns += (f"parity, rows of {' / '.join(bins)}", "fewer long rows by", "same sign?")
    table = experiment.report.Table("", (*columns, "paper: accuracy"), lines).markdown()
    trained = [f"{name} {trainings(entry)}" for name, entry in results.items()]
    said = f"± is one standard error of paired seeds. All rows alike: {'; '.join(trained)}."
    return "\n\n".join([table, said, *sequence_table.control(results)])


def trainings(entry: Mapping[str, Any]) -> str:
    """How the rows of a task were trained: the steps taken, the rates, how many seeds."""
    records = [record for variants in entry["models"].values() for record in variants.values()]
    steps = " to ".join(str(n) for n in sorted({record["steps"] for record in records}))
    rates = ", ".join(dict.fromkeys(rate for record in records for rate in record["rates"]))
    seeds = len(records[0]["rates"][records[0]["rate"]]["validations"])
    return f"{steps} steps, rate {rates}, {seeds} seeds"


def compared(
    values: Mapping[str, list[float]], row: str, paper: float, form: Callable[[float], str]
) -> tuple[str, str]:
    """By how much a row is worse than the whole, with the standard error, and the verdict.

    values: of each row by seed, the lower the better. paper: by how much it is worse there.
    """
    if row == "Hope" or row not in values or "Hope" not in values:
        return "", ""
    worse, error = difference(values[row], values["Hope"])
    told = f"{form(worse)} ± {form(error).lstrip('+')}"
    return told, verdict(worse, error, paper, len(values[row]))


def difference(row: list[float], whole: list[float]) -> tuple[float, float]:
    """How much larger a row's mean is, and the standard error of that; seeds are paired."""
    apart = [a - b for a, b in zip(row, whole, strict=True)]
    error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else math.inf
    return statistics.fmean(apart), error


def verdict(worse: float, error: float, paper: float, seeds: int) -> str:
    """Whether a difference has the paper's sign, where Student's t is sure at 95 % that it has one.

    error: standard error of the mean of so many seeds.
    """
    if not math.isfinite(worse):
        return "a training diverged"
    if not abs(worse) > stats.t.ppf(0.975, seeds - 1) * error:
        return "within the noise"
    return "yes" if (worse > 0) == (paper > 0) else "no"
