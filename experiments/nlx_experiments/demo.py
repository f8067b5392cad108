# SPDX-License-Identifier: Apache-2.0
"""`nlx run demo` (`make demo`): Hope learns real text on this machine, beside its rivals.

command    nlx run demo [--folder DIR] [--steps N]
shows      held-out bits per byte of hope-tiny with either optimizer, of transformer++-tiny on as
           many tokens, and of n-gram models and xz; a sample; pictures; one page with it all
takes      3 minutes on two idle cores, 8 on busy ones; stopped at any moment, the same command goes
           on
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from nlx_experiments import config, data, evaluate, generate, learner, loop, report, runs
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import say

# The size of the demonstration, all of it.
STEPS = 400
FIELDS: Mapping[str, Any] = {"batch": 4, "length": 128, "save_every": 200, "log_every": 20}
LEARNING_RATES = {"hope-tiny": 5e-3, "transformer++-tiny": 5e-3}
PROMPT, SAMPLE_LENGTH = "    def __init__(self", 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Trains Hope on real text, compares, samples, reports."""

    folder: pathlib.Path = pathlib.Path("runs/demo")
    """Where its runs and its report go."""
    steps: int = STEPS
    """Updates of each model."""
    data: tuple[pathlib.Path, ...] = ()
    """Files or folders of text; the Python standard library's own source by default."""


def configurations(demo: Demo) -> dict[str, TrainConfig]:
    """The three trainings; the first is what the demonstration is about.

    The rival learns with AdamW, with which its learning rate was chosen (`nlx run demo-check`).
    """
    default = config.DEFAULT_OPTIMIZER
    (other,) = [o for o in config.OPTIMIZERS if o != default]
    chosen = [("hope-tiny", default), ("hope-tiny", other), ("transformer++-tiny", "adamw")]
    return {
        f"{preset}, {optimizer}": config.make(
            preset,
            optimizer=optimizer,
            learning_rate=LEARNING_RATES[preset],
            run=demo.folder / f"{preset}-{optimizer}",
            steps=demo.steps,
            data=demo.data,
            **FIELDS,
        )
        for preset, optimizer in chosen
    }


def main(demo: Demo) -> None:
    """Does it all; what is done already is not done again."""
    begun = time.monotonic()
    chosen = configurations(demo)
    results = {name: loop.train(c) for name, c in chosen.items()}
    first = next(iter(chosen.values()))
    table = compare(demo, first, results)
    sample = PROMPT + draw(first)
    say(f"\n{table.text()}\n\nA sample of {first.preset} after {PROMPT!r}:\n\n{sample}\n")
    write_report(demo, chosen, table, sample)
    took = (time.monotonic() - begun) / 60
    say(f"Everything on one page: {demo.folder / 'report.html'} ({took:.1f} minutes)")


def compare(demo: Demo, first: TrainConfig, results: Mapping[str, Mapping]) -> report.Table:
    """All models on the same held-out bytes."""
    rivals = runs.read_json(demo.folder / "rivals.json")
    if rivals is None or rivals["steps"] != demo.steps:
        corpus = data.load(first.data)
        positions = evaluate.scored_positions(corpus, first.length, first.eval_bytes)
        rivals = {
            "steps": demo.steps,
            "train_bytes": int(corpus.train.size),
            "order 3": evaluate.ngram_bits(corpus, 3, positions),
            "xz": evaluate.xz_bits(corpus, positions),
        }
        runs.write_json(demo.folder / "rivals.json", rivals)
    rows = [
        (name, r["parameters"], r["distinct_bytes_seen"], r["bits_per_byte"])
        for name, r in results.items()
    ]
    hope = next(iter(results.values()))
    rows += [
        (f"order-{n} Witten-Bell, Hope's bytes", "", hope["distinct_bytes_seen"], bits)
        for n, bits in hope["ngram_bits_per_byte"].items()
    ]
    total = rivals["train_bytes"]
    rows.append(("to chase: order-3 Witten-Bell, all bytes", "", total, rivals["order 3"]))
    rows.append(("to chase: xz -9, after all bytes", "", total, rivals["xz"]["after training"]))
    rows.append(("to chase: xz -9, alone", "", 0, rivals["xz"]["alone"]))
    scored = hope["bytes_scored"]
    return report.Table(
        f"Bits per byte of {scored:,} held-out bytes",
        ("model", "parameters", "bytes learned from", "bits per byte"),
        rows,
    )


def draw(chosen: TrainConfig) -> str:
    """What the trained model writes after the prompt."""
    model = learner.load(chosen)
    drawn = generate.stream(model, PROMPT, length=SAMPLE_LENGTH, temperature=0.8, seed=0)
    return b"".join(map(generate.shown, drawn)).decode(errors="replace")


def write_report(
    demo: Demo, chosen: Mapping[str, TrainConfig], table: report.Table, sample: str
) -> None:
    """Draws the pictures and writes the page."""
    records = {name: runs.read_lines(c.folder / "metrics.jsonl") for name, c in chosen.items()}
    loss, levels = demo.folder / "loss.png", demo.folder / "levels.png"
    ngrams = {row[0].split(",")[0]: row[-1] for row in table.rows if row[0].startswith("order")}
    report.plot_losses(loss, records, ngrams)
    report.plot_levels(levels, next(iter(records.values())))
    name, first = next(iter(chosen.items()))
    page = report.Page(
        title="Hope on real text",
        summary=(
            f"{name} and its rivals, {demo.steps} steps of {first.batch} x {first.length} bytes "
            "each, scored on files that none of them saw."
        ),
        tables=[table],
        pictures={
            "Training loss": loss,
            f"How far each level of {name} moved from its start": levels,
        },
        blocks={f"{first.preset} writes": sample, "Its levels": learner.levels(first)},
        details={
            **config.to_json(first),
            **(runs.read_json(first.folder / "environment.json") or {}),
        },
    )
    report.write(demo.folder / "report.html", page)
