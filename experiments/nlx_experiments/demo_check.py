# SPDX-License-Identifier: Apache-2.0
"""`nlx run demo-check`: is Hope as good as Transformer++ at equal parameters and tokens?

command    nlx run demo-check [--runs DIR]
shows      held-out bits per byte of hope-tiny and transformer++-tiny, three learning rates each,
           the same for both, three seeds; written to experiments/results/demo-check.json and
           into experiments/README.md
expects    Hope within 3 % of Transformer++ or better, each at its best rate
takes      18 trainings as in the demonstration; stopped at any moment, the same command goes on
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nlx_experiments import config, demo, loop, report, runs
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

PRESETS = ("hope-tiny", "transformer++-tiny")
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
    for seed in SEEDS:
        for rate in LEARNING_RATES:
            for preset in PRESETS:
                chosen = config.make(
                    preset,
                    learning_rate=rate,
                    seed=seed,
                    steps=check.steps,
                    run=check.runs / f"{preset}-{rate:g}-{seed}",
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
    for preset in PRESETS:
        for rate in LEARNING_RATES:
            bits = scores(done, preset, rate)
            if bits:
                each = ", ".join(f"{b:.3f}" for b in bits)
                spread = f"{statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
                rows.append((preset, f"{rate:g}", statistics.mean(bits), spread, each))
    columns = ("model", "learning rate", "bits per byte", "std", "seeds")
    return report.Table("Held-out text", columns, rows)


def scores(done: Sequence[Mapping[str, Any]], preset: str, rate: float) -> list[float]:
    """Bits per byte of one cell, by seed."""
    return [r["bits_per_byte"] for r in done if (r["preset"], r["learning_rate"]) == (preset, rate)]


def verdict(done: Sequence[Mapping[str, Any]]) -> str:
    """Both models at their best rate, in a sentence."""
    best = {}
    for preset in PRESETS:
        cells = {r: scores(done, preset, r) for r in LEARNING_RATES}
        means = {r: statistics.mean(bits) for r, bits in cells.items() if bits}
        if not means:
            return f"{len(done)} of {len(PRESETS) * len(LEARNING_RATES) * len(SEEDS)} runs done."
        rate = min(means, key=lambda r: means[r])
        edge = (
            " (on the edge of the grid)" if rate in (LEARNING_RATES[0], LEARNING_RATES[-1]) else ""
        )
        best[preset] = (means[rate], f"{rate:g}{edge}")
    (hope, hope_rate), (rival, rival_rate) = (best[p] for p in PRESETS)
    total = len(PRESETS) * len(LEARNING_RATES) * len(SEEDS)
    return (
        f"{len(done)} of {total} runs: at its best learning rate {hope_rate} {PRESETS[0]} needs "
        f"{hope:.3f} bits per byte, {PRESETS[1]} at {rival_rate} {rival:.3f}: "
        f"{100 * (hope / rival - 1):+.1f} %."
    )
