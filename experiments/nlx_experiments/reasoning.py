# SPDX-License-Identifier: Apache-2.0
"""`nlx run reasoning`: questions that need several facts, functions told by examples, levels.

command    nlx run reasoning [--only TASK ...] [--models MODEL ...]
           nlx run reasoning-tiny: next to nothing of it, in seconds; reasoning-gpu: models of
           width 128 and 20 times the steps, for a GPU
shows      the share of answers that are right: of questions on two and three facts
           (`facts_tasks.py`), in stories as long as those trained on and longer; of functions in
           context (`function_tasks.py`), those trained on, others of their classes and of classes
           held out, after more and more examples; and whether further levels that learn in the
           context help there
takes      about two and a half hours on two cores, most of it Hope with 2 to 4 levels (26 minutes
           of one core a cell with `--inner-rates 1.0`, measured beside other work; twice that with
           both rates); DeltaNet with 1 level half a minute, with more two to three, others one to
           three; a model that is stopped begins anew, finished ones are kept
expects    functions of the classes trained on 74 % with DeltaNet, 73 with Hope (Bayes: 79, nearest
           examples: 72); held-out networks 62 to 63 with both (Bayes knowing the class: 66), xor
           about 30; further levels of DeltaNet add 1 to 3 points on conjunctions, 4 to 5 on xor,
           where all stay below chance, and nothing on networks. Two facts: DeltaNet 82 %, Hope 68,
           Transformer 54; in longer stories 66, 51, 42. Three facts and Hope with 2 to 4 levels are
           not run yet

All models of a task have as many parameters as Hope within 1 %, and two layers for questions. For
functions one will do, but for the Transformer, which can't otherwise tell whose value a value is.
What has 1, 2, 3 and 4 levels is one architecture: a mixer, Hope's or DeltaNet's, and three blocks
of a continuum memory system. With 1 level the mixer's memories alone learn in the context; with 2,
3 and 4 so do one, two and three of the blocks, every 1, 2 and 4 chunks of 4 symbols, by gradient
descent on the loss of the next symbol, at the rates in the grid. Training differentiates through
all their writes. Weights, rates and variants are chosen on validation rows of the lengths and
classes trained on; held-out ones are only ever examined. Further levels have a rate more to choose
from, the one in the context.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

from nlx import nn
from nlx_experiments import facts_tasks, function_tasks, report, sequence_table
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments.sequence_contest import Plan, equal
from nlx_experiments.sequence_experiment import Line, Options, Row
from nlx_experiments.sequence_levels import InContext
from nlx_experiments.sequence_tasks import Batch

PERIODS = (1, 2, 4)
TRAINED, HELD_OUT, BITS = ("linear", "conjunction", "decision list"), ("network", "xor"), 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasoning(Options):
    """Questions on several facts, functions in context, levels 1 to 4."""

    runs: pathlib.Path = pathlib.Path("runs/reasoning")
    steps: int = 1000
    """Of every training, at most."""
    inner_rates: tuple[float, ...] = (0.1, 1.0)
    """Learning rates in the context, of the levels that learn there."""

    def __post_init__(self) -> None:
        """Raises ValueError for no steps, and for rates below 0."""
        if self.steps < 1:
            raise ValueError(f"`steps` is {self.steps}; it must be an integer >= 1.")
        if not all(rate >= 0 for rate in self.inner_rates):
            raise ValueError(f"`inner_rates` is {self.inner_rates}; all must be >= 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Reasoning):
    """Models of width 128 and twice the layers, 20 times the steps, 5 seeds: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/reasoning-gpu")
    steps: int = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Reasoning):
    """Two tasks with few models, a few steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/reasoning-tiny")
    place: pathlib.Path = pathlib.Path("runs/reasoning-tiny")
    tiny = True


def main(options: Reasoning) -> dict[str, Any]:
    """Runs what is not known yet; writes tables, pictures and numbers."""
    name, rows = "reasoning", tiny() if isinstance(options, Tiny) else {}
    if isinstance(options, Gpu):
        name, rows = "reasoning-gpu", full(options.steps, options.inner_rates, OF_GPU)
    rows = rows or full(options.steps, options.inner_rates)
    text = functools.partial(shown, picture=f"results/{name}-curves.png")
    results = experiment.run(options, name, rows, text, measure="tokens")
    curves = {name: task for name, task in results.items() if _curved(task)}
    if curves:
        plot(options.place / "results" / f"{name}-curves.png", curves)
    return results


def config(mixer: Any, base: Mapping[str, Any], parameters: int, **fields: Any) -> nn.ModelConfig:
    """A model of a number of parameters; continuum memory systems have three blocks.

    base: vocabulary, width, heads, layers, tokens of a chunk, and hidden units of memories.
    """
    chunk = dict(projection_chunk_size=base["chunk_size"], cms_periods=(1,) * len(PERIODS))
    made: dict[str, Any] = {"feed_forward": "swiglu", "hidden": 1, **chunk, **base, **fields}
    return equal(nn.ModelConfig(mixer=mixer, **made), parameters)


def rivals(base: Mapping[str, Any], parameters: int) -> dict[str, dict[str, nn.ModelConfig]]:
    """Models without a continuum memory system; base: see `config`."""
    mixers = {
        "titans": "titans_lmm",
        "deltanet": "deltanet",
        "gated deltanet": "gated_deltanet",
        "ttt": "ttt_linear",
    }
    made = {name: {"": config(mixer, base, parameters)} for name, mixer in mixers.items()}
    return made | {
        "transformer": {
            "": config("attention", {**base, "layers": max(2, base["layers"])}, parameters)
        }
    }


def levels(
    name: str, alone: nn.ModelConfig, inner_rates: Sequence[float]
) -> dict[str, dict[str, nn.ModelConfig | InContext]]:
    """A model whose first, first two, and all three blocks learn in the context too.

    name: of the model in tables. alone: the model, whose mixers alone learn in the context.
    """

    def of(learning: int) -> dict[str, nn.ModelConfig | InContext]:
        periods = tuple(p if n < learning else None for n, p in enumerate(PERIODS))
        return {
            f"in context {rate:g}": InContext(alone, periods, rate, alone.chunk_size)
            for rate in inner_rates
        }

    further = {f"{name}, {1 + n} levels": of(n) for n in range(1, 1 + len(PERIODS))}
    return {f"{name}, 1 level": {"": alone}, **further}


class Size(NamedTuple):
    """Of the models and of what they are trained on."""

    width: int
    layers: int  # for functions; for questions twice as many
    parameters: tuple[int, int]  # for questions, for functions
    seeds: int
    rows: tuple[int, int]  # in a step, likewise


FULL = Size(width=32, layers=1, parameters=(33_000, 17_500), seeds=3, rows=(16, 8))
OF_GPU = Size(width=128, layers=2, parameters=(1_000_000, 500_000), seeds=5, rows=(64, 64))


def full(steps: int, inner_rates: Sequence[float], size: Size = FULL) -> dict[str, Row]:
    """Two and three facts; functions of 4 bits in rows of all 16 inputs."""
    plan = Plan(
        bins={"4 to 16": (12, 48), "17 to 32": (51, 96)},
        shortest=12,
        stages=((0, 48),),
        steps=steps,
        seeds=size.seeds,
        rates=(3e-3, 1e-2),
        rows=size.rows[0],
        decay=True,
        round_to=48,
    )
    base = dict(width=size.width, heads=2, memory_hidden=16)
    two = {**base, "layers": 2 * size.layers, "chunk_size": 8}
    rows = {f"{n} facts": facts(n, plan, two, size.parameters[0]) for n in (2, 3)}
    bins = {name: (32, 32) for name in ("fresh", *TRAINED, *HELD_OUT)}
    plan = dataclasses.replace(
        plan, bins=bins, shortest=32, stages=((0, 32),), rows=size.rows[1], rates=(5e-3, 2e-2),
        validated=256, tested=256, round_to=32,
    )  # fmt: skip
    one = {**base, "layers": size.layers, "chunk_size": 4}
    told = functions(plan, one, size.parameters[1], BITS, inner_rates)
    return rows | {"functions": told}


def facts(supporting: int, plan: Plan, base: Mapping[str, Any], parameters: int) -> Row:
    """Questions on so many facts; the last bin of the plan is longer than what is trained on."""
    task = facts_tasks.facts(supporting)
    longer = list(plan.bins)[-1]
    task = dataclasses.replace(task, examined={longer: task.draw})
    base = {**base, "vocabulary": task.vocabulary}
    hope = config("self_modifying", base, parameters, feed_forward="cms")
    models = {"hope": {"": hope}, **rivals(base, parameters)}
    even = lambda batch: np.full(1, 1 / task.classes)
    lines = {
        "any place": even,
        "where somebody went last": lambda batch: told_last(batch, task.classes),
    }
    by_bin = {n: {b: f for b in plan.bins} for n, f in lines.items()}
    return Row(task, plan, models, by_bin, models["deltanet"][""])


def functions(
    plan: Plan,
    base: Mapping[str, Any],
    parameters: int,
    bits: int,
    inner_rates: Sequence[float],
) -> Row:
    """Functions in context, all models and levels, rivals that need no training."""
    task = function_tasks.functions(TRAINED, bits, HELD_OUT)
    base = {**base, "vocabulary": task.vocabulary}
    nested: dict[str, Any] = {}
    for name, mixer in (("hope", "self_modifying"), ("deltanet", "deltanet")):
        nested |= levels(name, config(mixer, base, parameters, feed_forward="cms"), inner_rates)
    models = {**nested, **rivals(base, parameters)}

    def bayes(*names: str) -> Line:
        outside = TRAINED if set(names) <= set(HELD_OUT) else ()
        return lambda batch: function_tasks.bayes(batch, names, bits, outside=outside)

    bins = plan.bins
    lines: dict[str, dict[str, Line]] = {
        "majority so far": dict.fromkeys(bins, function_tasks.majority),
        "nearest examples": {b: lambda batch: function_tasks.nearest(batch, bits) for b in bins},
        "Bayes, classes trained on": dict.fromkeys(bins, bayes(*TRAINED)),
        "Bayes, the class itself": {b: bayes(b) for b in bins if b in function_tasks.CLASSES},
    }
    return Row(task, plan, models, lines, models["deltanet"][""])


def told_last(batch: Batch, places: int) -> Float[np.ndarray, " 1"]:
    """Share right of the guess that the answer is where somebody went last."""
    place = np.arange(batch.tokens.shape[1])
    where = np.where((batch.tokens < places) & (place % 3 == 2), place, 0)
    last = np.take_along_axis(batch.tokens, np.maximum.accumulate(where, 1), 1)
    scored = batch.scored > 0
    return np.mean(last[scored] == batch.answers[scored], keepdims=True)


def tiny() -> dict[str, Row]:
    """Rows of 18 and 16 symbols; attention alone, which is compiled in the least time."""
    plan = Plan(
        bins={"4": (12, 12), "5 to 6": (15, 18)}, shortest=12, stages=((0, 12),), steps=2, every=1,
        seeds=1, rows=4, rates=(1e-2,), validated=8, tested=8, round_to=18,
    )  # fmt: skip
    base = dict(width=8, heads=2, layers=1, memory_hidden=4, chunk_size=4)
    two = facts(2, plan, base, 2_000)
    bins = {name: (16, 16) for name in ("fresh", "linear", "xor")}
    plan = dataclasses.replace(plan, bins=bins, shortest=16, stages=((0, 16),), round_to=16)
    told = functions(plan, base, 2_000, 4, (0.1,))
    alone = config("attention", {**base, "vocabulary": 18}, 2_000, feed_forward="cms")
    nested = levels("transformer", alone, (0.1,))
    some = {m: nested[m] for m in ("transformer, 1 level", "transformer, 2 levels")}
    return {
        "2 facts": two._replace(models={"transformer": two.models["transformer"]}, control=None),
        "functions": told._replace(models=some, control=None),
    }


def shown(results: Mapping[str, Any], picture: str = "results/reasoning-curves.png") -> str:
    """Means over seeds, lines that need no training, what a level brings, and the grid."""
    told = {name: task for name, task in results.items() if not _curved(task)}
    parts = ["Answers that are right, in percent, mean of the seeds (lowest to highest)."]
    for name, task in told.items():
        bins = ", ".join(task["plan"]["bins"])
        parts += [
            f"Questions on {name}, stories of {bins} sentences (trained on the first):",
            _by_bin(task).markdown(),
        ]
    for task in (task for task in results.values() if _curved(task)):
        seen = [b for b in task["plan"]["bins"] if b in HELD_OUT]
        parts += [
            "Functions in context: fresh rows of those trained on (`fresh`), and functions of each "
            f"class that training left out; held-out classes: {', '.join(seen)}. Mean over all "
            "examples of a row:",
            _by_bin(task).markdown(),
            *verdicts(task),
            "After so many examples:",
            f"![share right against examples seen]({picture})",
        ]
    parts += [*sequence_table.control(results), "The whole grid:"]
    return "\n\n".join([*parts, sequence_table.grid(results, "tokens").markdown()])


def verdicts(task: Mapping[str, Any]) -> list[str]:
    """What each further level brings, seed against seed of the same model with one level."""
    bins = list(task["plan"]["bins"])
    found = {m: sequence_table.best(v)[1] for m, v in task["models"].items() if "level" in m}
    lines = []
    for model in found:
        alone = f"{model.split(',')[0]}, 1 level"
        if model == alone or alone not in found:
            continue
        gains = []
        for b in bins:
            more, less = found[model][b], found[alone][b]
            by_seed = [100 * (x - y) for x, y in zip(more["tokens"], less["tokens"], strict=True)]
            late = 100 * (_late(more["curve"]) - _late(less["curve"]))
            low, high = min(by_seed), max(by_seed)
            mean = statistics.fmean(by_seed)
            gains.append(f"{b} {mean:+.1f} ({low:+.1f} to {high:+.1f}), late {late:+.1f}")
        lines.append(f"* {model} against {alone}: {'; '.join(gains)}.")
    if not lines:
        return []
    said = (
        "Points that further levels bring, mean of the seeds (lowest to highest); late: in the "
        "last quarter of a row."
    )
    return [said, "\n".join(lines)]


def _late(curve: list[float]) -> float:
    """The mean over the last quarter."""
    return statistics.fmean(curve[-max(1, len(curve) // 4) :])


def _curved(task: Mapping[str, Any]) -> bool:
    return any("curve" in found for found in _some(task).values() if isinstance(found, Mapping))


def _some(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """What one model has shown."""
    return sequence_table.best(next(iter(task["models"].values())))[1]


def _by_bin(task: Mapping[str, Any]) -> report.Table:
    """Models and lines down, bins across."""
    bins = list(task["plan"]["bins"])
    rows: list[tuple] = [
        (m, *(sequence_table.interval(sequence_table.best(v)[1][b]["tokens"]) for b in bins))
        for m, v in task["models"].items()
    ]
    for name, line in task.get("lines", {}).items():
        shares = [f"{100 * statistics.fmean(line[b]):.1f}" if b in line else "" for b in bins]
        rows.append((f"*{name}*", *shares))
    chance = [f"{100 * task['chance'][b]:.1f}" for b in bins]
    return report.Table("", ["model", *bins], [*rows, ("*most frequent answer*", *chance)])


def plot(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Share right against examples seen, a panel for each class."""
    panels = [(task, b) for task in results.values() for b in task["plan"]["bins"]]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (4.2 * columns, 3.2 * lines + 0.8)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (task, b) in zip(grid.flat, panels, strict=False):
        for n, (model, variants) in enumerate(task["models"].items()):
            curve = sequence_table.best(variants)[1][b]["curve"]
            solid = "-" if "level" in model else "--"
            colour = report.COLOURS[n % len(report.COLOURS)]
            axes.plot(curve, solid, color=colour, linewidth=1.4, label=model)
        for name, style in zip(task.get("lines", {}), ("-.", "-", "--", ":"), strict=False):
            if b in task["lines"][name]:
                curve = task["lines"][name][b]
                axes.plot(curve, style, color="#888888", linewidth=1, label=name)
        axes.axhline(task["chance"][b], color="#222222", linestyle=":", linewidth=1)
        held = ", held out" if b in HELD_OUT else ""
        axes.set(title=b + held, xlabel="examples seen", ylabel="share right", ylim=(0, 1.02))
    handles, labels = grid.flat[-1 if len(panels) == grid.size else 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    report.save(figure, path)
