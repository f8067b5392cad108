# SPDX-License-Identifier: Apache-2.0
"""`nlx run recall`: what a memory of a given size holds.

command    nlx run recall [--only TASK ...] [--models MODEL ...]
           nlx run recall-tiny: next to nothing of it, in seconds; recall-longer: four times the
           steps; recall-gpu: rows of 256 symbols, up to 64 pairs and 128 KiB, for a GPU
shows      the share of answers that are right, at equal bytes of state and equal parameters: MAD's
           five tasks (Poli et al., 2024; Behrouz et al., 2025, Table 4), and multi-query recall
           of more and more pairs with states of one, two and four times the bytes
takes      about two hours of one core, a cell half a minute to three minutes; a model that
           is stopped begins anew, finished ones are kept
expects    Hope level with Titans in the mean, 67 to 66 %, below DeltaNet (83), Gated DeltaNet and
           TTT (78); all that recur at 100 % of in-context recall and memorization, none of them
           above half of selective copying, nothing far above chance in compression. With four times
           the steps selective copying is 52 % for Hope and 65 for DeltaNet

A model's state is what one row carries from a chunk to the next, convolutions included. Linear
memories have the width that comes nearest to the bytes; Titans and Hope a width of 32 or 64 and the
hidden units that do; then `hidden` of the feed-forward makes parameters equal, a decoder's among
them. Hope has five memories to share the bytes between, so it also competes with two: the one that
is read, and that of the rates; keys and values are then slow maps, and nothing is forgotten (rows
of Table 6). Each model has two variants and one learning rate, 1e-2: in pilots on 8 pairs 3e-3 was
worse for all that were tried (DeltaNet, TTT, Titans, Hope), 2e-2 for Hope. Neither Titans nor Hope
has momentum here: it doubles the bytes. Chunks have 16 tokens of the 64 of a row. Attention keeps
every token: its state grows, so it is shown as what is possible.
"""

import bisect
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from nlx import nn
from nlx_experiments import recall_tasks as tasks
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments import sequence_table
from nlx_experiments.sequence_contest import Plan, equal
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_tasks import Task

# Behrouz et al. (2025), Nested Learning, Table 4, in percent.
PAPER: Mapping[str, tuple[float, ...]] = {
    "transformer": (49.4, 100, 47.9, 96.2, 83.7),
    "titans": (49.8, 100, 50.0, 99.4, 83.4),
    "hope": (51.2, 100, 52.1, 99.7, 85.2),
}
MAD = ("compression", "in-context recall", "fuzzy recall", "selective copying", "memorization")
LENGTH, CHUNK = 64, 16
STATE = 16 * 2**10
PARAMETERS = 50_000
LEVEL = 5e-3  # shares this near are level


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Options):
    """MAD's tasks and multi-query recall, at equal bytes of state."""

    runs: pathlib.Path = pathlib.Path("runs/recall")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longer(Recall):
    """The same with four times the steps: what was not done learning?"""

    runs: pathlib.Path = pathlib.Path("runs/recall-longer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Recall):
    """The same at about the papers' lengths, 16 to 64 pairs, states of 32 to 128 KiB: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/recall-gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Recall):
    """Two tasks with two models, a few steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/recall-tiny")
    place: pathlib.Path = pathlib.Path("runs/recall-tiny")
    tiny = True


def main(options: Recall) -> dict[str, Any]:
    """Runs what is not known yet; writes table, picture and numbers."""
    name, rows = "recall", tiny() if isinstance(options, Tiny) else full()
    if isinstance(options, Longer):
        name, rows = "recall-longer", full(LONGER)
    if isinstance(options, Gpu):
        name, rows = "recall-gpu", full(OF_GPU)
    return experiment.run(options, name, rows, shown, measure="tokens")


@functools.cache
def state_bytes(config: nn.ModelConfig, tokens: int = LENGTH) -> int:
    """What a row's state takes at the end of a chunk.

    There the weights that gradients are taken at are the running ones, so they are counted once;
    what those of Hope's memories would take that stand still, zeros, is not counted.
    """
    make = lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)).init_state(1, tokens)
    learns = {"retain": config.retain, "key": config.adaptive_key, "value": config.adaptive_value}
    still = {f"['{name}']" for name, there in learns.items() if not there}

    def counted(path: set[str]) -> bool:
        return ".chunk_start" not in path and (".weights" not in path or not path & still)

    return sum(
        x.size * x.dtype.itemsize
        for path, x in jax.tree_util.tree_leaves_with_path(jax.eval_shape(make))
        if counted(set(map(str, path)))
    )


def contestants(
    vocabulary: int, state: int, parameters: int, chunk: int = CHUNK, decoded: int = 0
) -> dict[str, dict[str, nn.ModelConfig]]:
    """Models whose states come nearest to `state` bytes, with `parameters` parameters.

    decoded: places that a decoder answers, which has parameters too.
    """

    def config(mixer: Any, **fields: Any) -> nn.ModelConfig:
        kind = "cms" if mixer == "self_modifying" else "swiglu"
        rest: dict[str, Any] = dict(vocabulary=2, layers=1, hidden=1, cms_periods=(1,))
        given = dict(width=32, heads=1, chunk_size=chunk, projection_chunk_size=chunk)
        return nn.ModelConfig(mixer=mixer, feed_forward=kind, **{**rest, **given, **fields})

    def whole(made: nn.ModelConfig) -> nn.ModelConfig:
        return equal(dataclasses.replace(made, vocabulary=vocabulary), parameters, decoded)

    def wide(mixer: Any, **fields: Any) -> nn.ModelConfig:
        """The width that comes nearest; states grow with it."""
        made = [config(mixer, **fields, width=width) for width in range(8, 257, 4)]
        above = bisect.bisect_left(made, state, 1, len(made) - 1, key=state_bytes)
        return whole(min(made[above - 1 : above + 1], key=lambda c: abs(state_bytes(c) - state)))

    def deep(mixer: Any, **fields: Any) -> nn.ModelConfig:
        """The hidden units that come nearest: each takes as many bytes."""
        sizes = [state_bytes(config(mixer, **fields, memory_hidden=n)) for n in (1, 2)]
        units = 1 + round((state - sizes[0]) / (sizes[1] - sizes[0]))
        return whole(config(mixer, **fields, memory_hidden=max(1, units)))

    few = dict(retain=False, adaptive_key=False, adaptive_value=False)
    hope = functools.partial(deep, "self_modifying", momentum=False)
    titans = functools.partial(deep, "titans_lmm", momentum=False)
    return {
        "hope": {
            "all memories, width 32": hope(),
            "memory and rates, width 64": hope(**few, width=64),
        },
        "titans": {"width 32": titans(), "width 64": titans(width=64)},
        "deltanet": {
            "rates to 1": wide("deltanet"),
            "rates to 2": wide("deltanet", negative_eigenvalues=True),
        },
        "gated deltanet": {
            "one head": wide("gated_deltanet"),
            "two heads": wide("gated_deltanet", heads=2),
        },
        "ttt": {f"linear, C = {n}": wide("ttt_linear", chunk_size=n) for n in (chunk, 4 * chunk)},
        "transformer": {
            "one layer": whole(config("attention", width=64, heads=2)),
            "two layers": whole(config("attention", width=48, heads=2, layers=2)),
        },
    }


class Size(NamedTuple):
    """Of an experiment: tokens of a row, parameters at `state` bytes, steps, multi-query."""

    length: int
    parameters: int
    steps: int
    queries: tuple[tuple[int, int], ...]  # pairs, bytes of state
    symbols: int  # keys, and as many values, of multi-query recall
    state: int = STATE


FULL = Size(LENGTH, PARAMETERS, 800, ((4, STATE), (8, STATE), (8, STATE // 2), (8, 2 * STATE)), 32)
LONGER = FULL._replace(steps=4 * FULL.steps)
OF_GPU = Size(
    256, 400_000, 5_000, tuple((p, n * STATE) for p in (16, 32, 64) for n in (2, 4, 8)), 256,
    4 * STATE,
)  # fmt: skip


def full(size: Size = FULL) -> dict[str, Row]:
    """MAD's tasks at one size of state, multi-query recall of more pairs and at other sizes."""
    plan = Plan(
        bins={"fresh": (size.length, size.length)},
        shortest=size.length,
        stages=((0, size.length),),
        steps=size.steps,
        rates=(1e-2,),
        rows=16,
        decay=True,
        round_to=size.length,
    )
    mad = {
        "compression": tasks.compression(),
        "in-context recall": tasks.recall(),
        "fuzzy recall": tasks.fuzzy_recall(),
        "selective copying": tasks.selective_copying(),
        "memorization": tasks.memorization(),
    }
    rows = {n: row(task, plan, size.state, size.parameters) for n, task in mad.items()}
    for pairs, state in size.queries:
        name = f"{pairs} pairs, {state // 2**10} KiB"
        # A wide linear memory needs as many.
        parameters = max(1, state // size.state) * size.parameters
        task = tasks.multi_query(pairs, size.symbols, size.symbols)
        rows[name] = row(task, plan, state, parameters)
    return rows


def row(task: Task, plan: Plan, state: int, parameters: int) -> Row:
    """A task for models of its own vocabulary."""
    decoded = plan.stages[-1][1] if task.compressed else 0
    models = contestants(task.vocabulary, state, parameters, decoded=decoded)
    return Row(task, plan, models, control=models["deltanet"]["rates to 1"])


def tiny() -> dict[str, Row]:
    """Rows of 8, states of 8 KiB."""
    plan = Plan(
        bins={"fresh": (8, 8)}, shortest=8, stages=((0, 8),), steps=2, every=1, seeds=1, rows=4,
        rates=(1e-2,), validated=8, tested=8, round_to=8,
    )  # fmt: skip
    few = lambda task, *models: Row(
        task,
        plan,
        {
            name: dict(list(variants.items())[:1])
            for name, variants in contestants(
                task.vocabulary, 2**13, 50_000, 4, 8 if task.compressed else 0
            ).items()
            if name in models
        },
    )
    return {
        "compression": few(tasks.compression(), "deltanet"),
        "2 pairs": few(tasks.multi_query(2, 8, 8), "hope"),
    }


def shown(results: Mapping[str, Any]) -> str:
    """Means over seeds, and the verdict."""

    def cell(task: str, model: str, found: Mapping[str, Any]) -> str:
        paper = PAPER[model][MAD.index(task)] if model in PAPER and task in MAD else None
        ours = sequence_table.interval(found["fresh"]["tokens"])
        return ours if paper is None else f"{ours} [{paper:g}]"

    chance = ", ".join(f"{n} {100 * r['chance']['fresh']:.1f}" for n, r in results.items())
    parts = [
        "Answers that are right, in percent, mean of the seeds (lowest to highest); in square "
        "brackets Table 4 of the paper, whose rows and models are larger:",
        sequence_table.table(results, cell).markdown(),
        f"Chance: {chance}.",
        *verdicts(results),
        *sequence_table.control(results),
        "The whole grid:",
        sequence_table.grid(results, "tokens").markdown(),
    ]
    return "\n\n".join(parts)


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Hope against each rival: the mean over cells, and in how many it is ahead, level, behind."""
    means = {
        task: {
            model: sum(shares := sequence_table.best(v)[1]["fresh"]["tokens"]) / len(shares)
            for model, v in row["models"].items()
        }
        for task, row in results.items()
    }
    lines = []
    for rival in ("titans", "deltanet", "gated deltanet", "ttt"):
        both = [(m["hope"], m[rival]) for m in means.values() if "hope" in m and rival in m]
        if not both:
            continue
        ahead = sum(hope > other + LEVEL for hope, other in both)
        behind = sum(hope < other - LEVEL for hope, other in both)
        ours, theirs = (100 * sum(side) / len(both) for side in zip(*both, strict=True))
        lines.append(
            f"Hope against {rival}: {ours:.1f} to {theirs:.1f} in the mean; ahead in {ahead} "
            f"cells, level (within half a point) in {len(both) - ahead - behind}, behind in "
            f"{behind}."
        )
    return lines
