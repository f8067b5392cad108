# SPDX-License-Identifier: Apache-2.0
"""`nlx run demo-check`: is Hope as good as Transformer++ at equal parameters and tokens?

command    nlx run demo-check [--runs DIR]
shows      held-out bits per byte of hope-tiny, of transformer++-tiny, and of hope-tiny with the
           deep optimizer, the same three learning rates for all, three seeds; written to
           experiments/results/demo-check.json and into experiments/README.md
expects    Hope 10 % below Transformer++, each at its best rate; DMGD a little below AdamW
takes      27 trainings as in the demonstration, about 50 minutes on two cores; stopped at any
           moment, the same command goes on
"""

import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nlx_experiments import config, demo, loop, report, runs
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

MODELS = (("hope-tiny", "adamw"), ("transformer++-tiny", "adamw"), ("hope-tiny", "dmgd"))
LEARNING_RATES = (1.25e-3, 2.5e-3, 5e-3)
SEEDS = (0, 1, 2)
BEGIN, END = "<!-- demo-check -->", "<!-- end of demo-check -->"
PLACE = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoCheck:
    """Compares Hope with Transformer++: seeds x learning rates."""

    runs: pathlib.Path = pathlib.Path("runs/demo-check")
    """Where the trainings go."""
    steps: int = demo.STEPS
    """Updates of each."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""


def main(check: DemoCheck) -> None:
    """Trains what is not trained yet, and writes the table after each training."""
    if not (check.place / "README.md").exists():
        raise Refused(f"`place` is {check.place}, which holds no README.md to write the table to.")
    done: list[dict[str, Any]] = []
    for (preset, optimizer), seed, rate in itertools.product(MODELS, SEEDS, LEARNING_RATES):
        chosen = config.make(
            preset,
            optimizer=optimizer,
            learning_rate=rate,
            seed=seed,
            steps=check.steps,
            run=check.runs / f"{preset}-{optimizer}-{rate:g}-{seed}",
            **demo.FIELDS,
        )
        result = loop.train(chosen)
        done.append({**result, "learning_rate": rate, "seed": seed})
        write(check, done)
    say(verdict(done))


def write(check: DemoCheck, done: Sequence[Mapping[str, Any]]) -> None:
    """Writes the results so far as JSON, and the table between README.md's markers."""
    results = check.place / "results"
    results.mkdir(exist_ok=True)
    content = {
        "steps": check.steps,
        **demo.FIELDS,
        "environment": runs.environment(),
        "runs": list(done),
    }
    runs.write_json(results / "demo-check.json", content)
    readme = check.place / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    shown = f"{table(done).markdown()}\n\n{verdict(done)}"
    runs.write_whole(readme, f"{before}{BEGIN}\n{shown}\n{END}{after}")


def table(done: Sequence[Mapping[str, Any]]) -> report.Table:
    """Mean and standard deviation over seeds, one row per model and learning rate."""
    rows = []
    for model in MODELS:
        for rate in LEARNING_RATES:
            bits = scores(done, model, rate)
            if bits:
                each = ", ".join(f"{b:.3f}" for b in bits)
                spread = f"{statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
                rows.append((*model, f"{rate:g}", statistics.mean(bits), spread, each))
    columns = ("model", "optimizer", "learning rate", "bits per byte", "std", "seeds")
    return report.Table("Held-out text", columns, rows)


def scores(done: Sequence[Mapping[str, Any]], model: tuple[str, str], rate: float) -> list[float]:
    """Bits per byte of one cell, by seed."""
    cell = (*model, rate)
    runs = ((r["preset"], r["optimizer"], r["learning_rate"], r["bits_per_byte"]) for r in done)
    return [bits for *key, bits in runs if tuple(key) == cell]


def verdict(done: Sequence[Mapping[str, Any]]) -> str:
    """Every model at its best rate, and Hope against its rival, in a sentence each."""
    total = len(MODELS) * len(LEARNING_RATES) * len(SEEDS)
    best, said = {}, []
    for model in MODELS:
        cells = {rate: scores(done, model, rate) for rate in LEARNING_RATES}
        means = {rate: statistics.mean(bits) for rate, bits in cells.items() if bits}
        if not means:
            return f"{len(done)} of {total} runs done."
        rate = min(means, key=lambda r: means[r])
        on_edge = rate in (LEARNING_RATES[0], LEARNING_RATES[-1])
        edge = " (on the edge of the grid)" if on_edge else ""
        best[model] = means[rate]
        said.append(f"{' with '.join(model)} {means[rate]:.3f} at {rate:g}{edge}")
    ratio = best[MODELS[0]] / best[MODELS[1]] - 1
    return (
        f"{len(done)} of {total} runs. Bits per byte at the best learning rate: {'; '.join(said)}. "
        f"{MODELS[0][0]} against {MODELS[1][0]}: {100 * ratio:+.1f} %."
    )
