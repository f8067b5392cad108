# SPDX-License-Identifier: Apache-2.0
"""`nlx run state-tracking`: which mixers keep a state that they were told only by its changes.

command    nlx run state-tracking [--only TASK ...] [--models MODEL ...]
           nlx run state-tracking-tiny: next to nothing of it, in seconds; state-tracking-gpu: all
           mixers, all variants and all word problems, for a GPU; one table holds what both know
shows      the share of rows that are right at every position, at the lengths trained on and up to
           twice as long: six formal languages (Irie et al., 2023; Behrouz et al., 2025, Table 5),
           and word problems: of S5 and A5, which are beyond TC0, and of arithmetic modulo 5 from
           left to right, which is not
takes      an hour and a half by the seconds of its cells, most of Hope's on an H100 (two minutes a
           cell, nearly all of it compiling; six run side by side), the others on a core each (Hope
           up to 9 minutes a cell, DeltaNet 1 to 5, the Transformer half a minute to 5); a model
           that is stopped begins anew, finished ones are kept
expects    Hope at 100 % of the regular languages at three of three seeds; of the counting ones up
           to the trained length, and in some trainings of each up to twice it; the Transformer at
           0 % of long rows of parity; DeltaNet at 100 % of the regular languages with rates up to 2
           and not with rates up to 1; S5 by swaps solved by Hope at twice the lengths trained on,
           at which DeltaNet and the Transformer solve nothing

One protocol for all (`sequence_contest.py`): all models have as many parameters within 1 %, the
same steps, rows, seeds and two learning rates; one layer, but where a variant says two. What
differs is named in the grid: the Transformer with and without rotary positions, DeltaNet with rates
up to 1 and up to 2, Titans and Hope by the tokens of a chunk, Hope with its gated delta writes,
with these alone (no retention, no momentum) and with additive ones (no erase either; Table 6 has
those switches). Best of the grid by validation rows, as in the papers; reported are fresh rows.
Where a language has one word a length, weights and rates are chosen on rows of up to 75 symbols, so
that longer ones are met at the report alone.

Training words are drawn without end, their lengths evenly from the shortest to 16 for the first
steps, then to 50. Noise on the embedded symbols, of all models alike, is 0.4 of their size for the
regular languages and 0 for those that count. Shuffle-2 takes 2,400 steps at most, the others 800.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from nlx import nn
from nlx_experiments import formal_languages as languages
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments import sequence_table
from nlx_experiments.sequence_contest import Plan, equal
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_tasks import Task

# Behrouz et al. (2025), Nested Learning, Table 5: rows right in bin 0 / bin 1, in percent.
PAPER: Mapping[str, tuple[str, ...]] = {
    "LSTM": ("100/100",) * 6,
    "Transformer": ("46.4/0", "0/0", "0/0", "100/100", "100/100", "100/100"),
    "Linear Transformer": ("78.1/0", "0/0", "0/0", "100/100", "100/100", "100/100"),
    "DeltaNet": ("98.2/10.1", "0/0", "0/0", "100/100", "100/100", "100/100"),
    "SRWM": ("100/100",) * 6,
    "Hope": ("100/100",) * 6,
}
# RetNet is a linear Transformer that forgets.
OURS = {"transformer": "Transformer", "retnet": "Linear Transformer", "deltanet": "DeltaNet"}
OURS |= {"hope": "Hope"}
Kind = Literal["regular", "counting", "word"]
REGULAR = ("parity", "(aa)*", "(abab)*")
LONGER = "parity, 6,000 steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTracking(Options):
    """Formal languages and word problems, every mixer."""

    runs: pathlib.Path = pathlib.Path("runs/state-tracking")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(StateTracking):
    """Every mixer, every variant, all word problems: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/state-tracking-gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(StateTracking):
    """Parity with two models, a few steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/state-tracking-tiny")
    place: pathlib.Path = pathlib.Path("runs/state-tracking-tiny")
    tiny = True


def main(options: StateTracking) -> dict[str, Any]:
    """Runs what is not known yet; writes table, picture and numbers."""
    if isinstance(options, Tiny):
        return experiment.run(options, "state-tracking", tiny(), shown)
    rows = full()
    chosen = rows if isinstance(options, Gpu) else few(rows)
    return experiment.run(options, "state-tracking", chosen, shown, table=rows)


def contestants(
    base: Mapping[str, Any], parameters: int, kind: Kind = "regular"
) -> dict[str, dict[str, nn.ModelConfig]]:
    """Every mixer at one number of parameters, and its variants: three of the main rivals.

    base: vocabulary, width, heads, layers and hidden units of memories. kind: of the task, which
    decides the writes of Hope that are tried.
    """

    def config(mixer: Any, **fields: Any) -> nn.ModelConfig:
        kind = "cms" if mixer == "self_modifying" else "swiglu"
        made = nn.ModelConfig(
            mixer=mixer, feed_forward=kind, hidden=1, **{**base, **fields}, cms_periods=(1,)
        )
        return equal(made, parameters)

    def hope(size: int, **fields: Any) -> nn.ModelConfig:
        return config("self_modifying", chunk_size=size, projection_chunk_size=size, **fields)

    alone = dict(retain=False, momentum=False)
    if kind == "word":
        hopes = {
            "delta alone, C = 128": hope(128, **alone),
            "delta alone, C = 4": hope(4, **alone),
            "delta, C = 4": hope(4),
        }
    elif kind == "counting":
        # Delta writes saturate: a count not met in training is then a state not met.
        half = max(1, base["memory_hidden"] // 2)
        additive = dict(**alone, erase=False)
        hopes = {
            "additive, C = 128": hope(128, **additive),
            "additive, half as wide, C = 128": hope(128, **additive, memory_hidden=half),
            "additive, C = 10": hope(10, **additive),
        }
    else:
        # A state that must last as long as a word is kept by a memory that does not forget.
        kept = dict(retain=False, heads=base["heads"] // 2, memory_hidden=2 * base["memory_hidden"])
        hopes = {
            "delta, no retention, half the heads, C = 128": hope(128, **kept),
            "delta, C = 10": hope(10),
            "delta, no retention, half the heads, C = 10": hope(10, **kept),
        }
    two = 2 * base["layers"]
    return {
        "hope": hopes,
        "titans": {
            "C = 10": config("titans_lmm", chunk_size=10),
            "no momentum, C = 10": config("titans_lmm", chunk_size=10, momentum=False),
            "C = 128": config("titans_lmm", chunk_size=128),
        },
        "deltanet": {
            "rates to 1": config("deltanet"),
            "rates to 2": config("deltanet", negative_eigenvalues=True),
            "rates to 1, twice the layers": config("deltanet", layers=two),
        },
        "transformer": {
            "no positions": config("attention", rotary=False),
            "rotary": config("attention"),
            "no positions, twice the layers": config("attention", rotary=False, layers=two),
        },
        "retnet": {"": config("retnet")},
        "gated deltanet": {"": config("gated_deltanet")},
        "mamba2": {"": config("mamba2")},
        "samba": {  # Mamba-2's layer has many parameters, and here is one of attention too
            "twice the layers, narrower": config(
                "mamba2", then=("attention",), layers=two, window=16, width=3 * base["width"] // 4
            )
        },
        "ttt linear": {"C = 10": config("ttt_linear", chunk_size=10)},
        "ttt mlp": {"C = 10": config("ttt_mlp", chunk_size=10)},
        "titans mac": {"C = 10": config("titans_mac", chunk_size=10)},
        "titans mag": {"C = 10": config("titans_mag", chunk_size=10, window=16)},
        "titans mal": {"C = 10": config("titans_mal", chunk_size=10, window=16)},
    }


def full() -> dict[str, Row]:
    """Six languages by the paper's bins; word problems at lengths that grow."""
    base = dict(vocabulary=4, width=32, heads=4, layers=1, memory_hidden=8)
    plan = Plan(
        bins={"2 to 50": (2, 50), "51 to 100": (51, 100)},
        shortest=2,
        stages=((0, 16), (200, 50)),
        steps=800,
        rates=(3e-3, 1e-2),
        chosen={"51 to 100": (51, 75)},
        validated=512,
        noise=0.4,
        decay=True,
        round_to=50,
    )
    regular = contestants(base, 16_500)
    counting = contestants({**base, "heads": 1, "memory_hidden": 32}, 16_500, "counting")
    # A count must not be blurred.
    exact = dataclasses.replace(plan, noise=0.0)
    # Its words of one length differ: those to choose on may be as long as those reported.
    longer = dataclasses.replace(exact, steps=2400, chosen={})
    plans = dict.fromkeys(REGULAR, plan) | {"shuffle-2": longer}
    rows = {
        name: row(task, plans.get(name, exact), regular if name in REGULAR else counting)
        for name, task in languages.LANGUAGES.items()
    }
    some = {m: dict(list(regular[m].items())[:1]) for m in ("hope", "deltanet", "transformer")}
    rows[LONGER] = Row(languages.LANGUAGES["parity"], dataclasses.replace(plan, steps=6000), some)
    base = dict(vocabulary=120, width=32, heads=1, layers=1, memory_hidden=32)
    problems = dataclasses.replace(
        plan,
        bins={"1 to 4": (1, 4), "5 to 8": (5, 8), "9 to 16": (9, 16)},
        chosen={},
        shortest=1,
        stages=((0, 3), (100, 8)),
        steps=2000,
        rates=(1e-2, 2e-2),
        rows=128,
        validated=256,
        noise=0.0,
        round_to=16,
    )
    words = contestants(base, 30_000, "word")
    return rows | {n: row(task, problems, words) for n, task in languages.WORD_PROBLEMS.items()}


def few(rows: Mapping[str, Row]) -> dict[str, Row]:
    """What two cores do in an hour or two: the languages and S5 by swaps, the main models."""
    count = {"hope": 2, "deltanet": 2, "transformer": 2}
    return {
        name: row._replace(
            models={m: dict(list(row.models[m].items())[:n]) for m, n in count.items()}
        )
        for name, row in rows.items()
        if name in (*languages.LANGUAGES, "S5 by swaps")
    }


def row(task: Task, plan: Plan, models: Mapping[str, Mapping[str, nn.ModelConfig]]) -> Row:
    """A task with DeltaNet as its control."""
    return Row(task, plan, models, control=models["deltanet"]["rates to 2"])


def tiny() -> dict[str, Row]:
    """Parity in rows of 8."""
    base = dict(vocabulary=4, width=16, heads=2, layers=1, memory_hidden=4)
    models = contestants(base, 10_000)
    few = {name: dict(list(models[name].items())[-1:]) for name in ("transformer", "hope")}
    plan = Plan(
        bins={"2 to 6": (2, 6), "7 to 8": (7, 8)}, shortest=2, stages=((0, 8),), steps=4, every=2,
        seeds=2, rows=4, rates=(1e-2,), validated=16, tested=16, noise=0.2, round_to=8,
    )  # fmt: skip
    return {"parity": Row(languages.LANGUAGES["parity"], plan, few)}


def shown(results: Mapping[str, Any]) -> str:
    """The paper's table beside ours, the word problems, and the grid."""
    formal = {n: r for n, r in results.items() if n in languages.LANGUAGES}
    words = {n: r for n, r in results.items() if n in languages.WORD_PROBLEMS}
    columns = list(languages.LANGUAGES)

    def both(task: str, model: str, found: Mapping[str, Any]) -> str:
        bins = results[task]["plan"]["bins"]
        ours = "/".join(sequence_table.percent(found[b]["rows"]) for b in bins)
        best = sequence_table.best_training(results[task]["models"][model])
        if (alone := "/".join(sequence_table.percent([best[b]["rows"]]) for b in bins)) != ours:
            ours += f" [{alone}]"
        paper = PAPER.get(OURS.get(model, ""))
        name = "parity" if task == LONGER else task
        return f"{ours} ({paper[columns.index(name)]})" if paper and name in columns else ours

    parts = []
    whole = lambda task, model, found: sequence_table.solved(
        results[task]["models"][model], list(results[task]["plan"]["bins"])
    )
    if formal:
        parts += [
            "Rows right at every position, of 2 to 50 symbols / of 51 to 100, in percent, mean of "
            "the seeds; in square brackets of the one training of the grid that did best on "
            "validation rows (of several that tie the mean), where that is another number; in "
            "round ones Table 5 of the paper, which shows the best of a grid:",
            sequence_table.table(formal, both).markdown(),
            "RetNet, a linear transformer that forgets, stands beside the paper's linear "
            "transformer; DeltaNet's cells may be those of rates to 2. Models of the paper that "
            "are not run here: "
            + "; ".join(f"{n} {', '.join(PAPER[n])}" for n in PAPER if n not in OURS.values())
            + ".",
            "The most frequent answer is right at so many positions of the shorter / of the longer "
            "rows, in percent, and in next to no whole row: " + _chance(formal),
            "Trainings of the grid (every seed, rate and variant) that are right in all test rows "
            "of both bins:",
            sequence_table.table(formal, whole).markdown(),
        ]
    if LONGER in results:
        parts += [
            "Is the protocol too hard on the rivals? Parity with 6,000 steps instead of 800, one "
            "variant each:",
            sequence_table.table({LONGER: results[LONGER]}, both).markdown(),
        ]
    if words:
        bins = " / ".join(next(iter(words.values()))["plan"]["bins"])
        parts += [
            f"Word problems, rows of {bins} symbols (trained on up to 8):",
            sequence_table.table(words, both).markdown(),
            "Trainings that are right in all test rows of all bins:",
            sequence_table.table(words, whole).markdown(),
        ]
    parts += [*sequence_table.control(results), "The whole grid:"]
    return "\n\n".join([*parts, sequence_table.grid(results).markdown()])


def _chance(results: Mapping[str, Any]) -> str:
    """Shares of the most frequent answer, task by task."""
    shares = lambda task: "/".join(f"{100 * share:.0f}" for share in task["chance"].values())
    return "; ".join(f"{name} {shares(task)}" for name, task in results.items()) + "."
