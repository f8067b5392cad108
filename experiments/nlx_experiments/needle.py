# SPDX-License-Identifier: Apache-2.0
"""`nlx run needle`: what was said once, far back, at every depth of longer and longer haystacks.

command    nlx run needle [--models MODEL ...] [--longest N]
           nlx run needle-tiny: next to nothing of it, in seconds
           nlx run needle-gpu [--data PATH ...]: bytes, nearly in RULER's words, texts from the
           standard library or --data, models of width 256, for a GPU
shows      the share of values that are said whole, each after the right ones before it, by kind of
           task, length and depth, of models trained on rows of at most 128 symbols (gpu: 2,048
           bytes); results/needle-map.png has a heat map, length x depth, for each model and kind
takes      200 minutes of one busy core, half of it for Hope's two variants. A model that is stopped
           begins anew, finished ones are kept
expects    in the mean of all kinds beyond the trained length Hope 30.6 % (its other variant, as
           good on validation rows, 24.4), Titans 13.4, DeltaNet 32.2, Gated DeltaNet 24.1: with
           three seeds, which differ far more, no difference is sure; in brackets in the table what
           Behrouz et al. (2025), Table 1, have at 4,096, 8,192 and 16,384 tokens, of far larger
           models

The default run is far from RULER: its text is symbols drawn evenly, keys are one symbol, numbers
two and uuids four, nothing instructs the model, and MK-NIAH-2 and 3 are not examined.

One model is trained on all kinds at once (`needle_mixture.py`), as one is that is examined on all
of RULER, in a curriculum of lengths; most rows trained on ask many questions. The rate is one,
1e-2, for all: in recall's pilots 3e-3 was worse for DeltaNet, TTT, Titans and Hope; it was not
tried for Gated DeltaNet and the Transformer. Hope and Titans compete with two variants each, the
others with one: Hope also with two of its memories, the one that is read and that of the rates, as
in recall, Titans with four times the hidden units in its memory. Parameters are equal, states are
not: their bytes stand in the table. Hope's continuum memory system has three blocks that all learn
at every step, and no slower level.

Weights are chosen on validation rows of up to the lengths trained on; `longer` rows, of twice as
many symbols, and the grid are only ever examined. Rows of the grid are read in pieces, the state
carried from one to the next, so a length costs time and, but for the Transformer, no memory; it
reads rows of up to 4,096 alone (gpu: all), for its time grows as their square. A value counts where
every symbol of it is right and in the place where it is due (RULER's score takes values in any
order).
"""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, PyTree

from nlx import nn
from nlx_experiments import needle_mixture, needle_table, needle_tasks, needle_writing
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments.long_context import base, contestants, states, texts
from nlx_experiments.needle_table import TASK
from nlx_experiments.needle_tasks import KINDS
from nlx_experiments.needle_writing import Writing
from nlx_experiments.reasoning import config
from nlx_experiments.sequence_contest import Exam, Plan
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_reading import cut, read
from nlx_experiments.sequence_tasks import Batch, joined

AT_ONCE = 2**17  # symbols of the rows that are read together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Options):
    """RULER's needles in haystacks, in few symbols."""

    runs: pathlib.Path = pathlib.Path("runs/needle")
    longest: int = 16_384
    """Rows of the grid, at most."""

    def __post_init__(self) -> None:
        """Raises ValueError for rows that the grid does not have."""
        most = max((OF_GPU if isinstance(self, Gpu) else FULL).grid.lengths)
        if not 1024 <= self.longest <= most:
            raise ValueError(f"`longest` is {self.longest}; it must be from 1,024 to {most:,}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Needle):
    """The same in bytes and RULER's words, rows trained on of up to 2,048, for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/needle-gpu")
    longest: int = 65_536
    data: tuple[pathlib.Path, ...] = ()
    """Files and folders of text for haystacks; none: the standard library's source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Needle):
    """One model, two kinds, two steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/needle-tiny")
    place: pathlib.Path = pathlib.Path("runs/needle-tiny")
    tiny = True


class Grid(NamedTuple):
    """What is examined: at all lengths and depths, so many rows of each kind."""

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    rows: int
    piece: int  # symbols read at once
    attended: int  # symbols of a row that attention, whose time grows as their square, reads


class Size(NamedTuple):
    """Of the models, and of what they are trained on."""

    width: int
    layers: int
    parameters: int
    lengths: tuple[int, int]  # shortest, longest row trained on
    stages: tuple[tuple[int, int], ...]
    steps: int
    rates: tuple[float, ...]
    rows: int
    checked: int  # rows of each kind, to choose by and of the bins
    grid: Grid


FEW = dict(retain=False, adaptive_key=False, adaptive_value=False)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIX = ("S-NIAH-1", "S-NIAH-2", "S-NIAH-3", "MK-NIAH-1", "MQ-NIAH", "MV-NIAH")
FULL = Size(
    width=32, layers=2, parameters=40_000, lengths=(40, 128), stages=((0, 64), (1_000, 128)),
    steps=2_000, rates=(1e-2,), rows=16, checked=32,
    grid=Grid(SIX, tuple(2**n for n in range(7, 15)), DEPTHS, 4, 256, 4_096),
)  # fmt: skip
OF_GPU = Size(
    width=256, layers=4, parameters=5_000_000, lengths=(1_024, 2_048),
    stages=((0, 1_024), (10_000, 2_048)), steps=30_000, rates=(2e-3,), rows=8, checked=4,
    grid=Grid(
        tuple(KINDS), tuple(2**n for n in range(10, 17)), tuple(n / 10 for n in range(11)), 16, 512,
        65_536,
    ),
)  # fmt: skip
TINY = FULL._replace(
    width=8, layers=1, parameters=3_000, lengths=(64, 64), stages=((0, 64),), steps=2, rows=4,
    grid=Grid(("S-NIAH-1", "MQ-NIAH"), (64, 128), (0.0, 1.0), 2, 64, 128),
)  # fmt: skip


def main(options: Needle) -> dict[str, Any]:
    """Runs what is not known yet; writes tables, heat maps and numbers."""
    name, size = "needle", FULL
    if isinstance(options, Tiny):
        size, rows = TINY, tiny()
    elif isinstance(options, Gpu):
        name, size = "needle-gpu", OF_GPU
        rows = full(size, options.longest, _in_bytes(options.data))
    else:
        rows = full(size, options.longest, _in_symbols())
    attended = min(options.longest, size.grid.attended)
    text = functools.partial(
        needle_table.shown,
        sizes=states(rows[TASK], attended),
        attended=attended,
        picture=f"results/{name}-map.png",
    )
    results = experiment.run(options, name, rows, text, measure="rows")
    if results:
        needle_table.draw(options.place / "results" / f"{name}-map.png", results[TASK])
    return results


def _in_symbols() -> dict[str, Writing]:
    return dict.fromkeys(("train", "validation", "test"), needle_writing.in_symbols())


def _in_bytes(paths: Sequence[pathlib.Path]) -> dict[str, Writing]:
    parts = zip(("train", "validation", "test"), texts(paths), strict=True)
    return {name: needle_writing.in_bytes(text) for name, text in parts}


def full(size: Size, longest: int, writings: Mapping[str, Writing]) -> dict[str, Row]:
    """One task of all kinds, all models.

    longest: of the grid. writings: "train", "validation" and "test".
    """
    kinds = size.grid.kinds
    task = needle_mixture.mixture(kinds, writings)
    short, long = size.lengths
    plan = Plan(
        bins={"trained": (short, long), "longer": (2 * long, 2 * long)},
        shortest=short,
        stages=size.stages,
        steps=size.steps,
        rates=size.rates,
        rows=size.rows,
        decay=True,
        round_to=size.stages[0][1],
        validated=size.checked * len(kinds),
        tested=size.checked * len(kinds),
    )
    task = dataclasses.replace(task, examined={"longer": task.test or task.draw})
    sizes = base(task.vocabulary, size.width, size.layers)
    models = contestants(sizes, size.parameters)
    models["hope"]["memory and rates"] = config(
        "self_modifying", sizes, size.parameters, feed_forward="cms", **FEW
    )
    larger = {**sizes, "memory_hidden": 4 * sizes["memory_hidden"]}
    models["titans"]["larger memory"] = config("titans_lmm", larger, size.parameters)
    lengths = tuple(n for n in size.grid.lengths if n <= longest)
    grid = size.grid._replace(lengths=lengths)
    return {TASK: Row(task, plan, models, {}, models["deltanet"][""], exam(grid, writings))}


def exam(grid: Grid, writings: Mapping[str, Writing]) -> Exam:
    """The grid of lengths and depths: see `examine`.

    Raises what drawing its shortest and its longest rows does: before anything is trained.
    """
    writing = writings["test"]
    drawn = [
        examined(kind, grid._replace(rows=2), writing, length, 0.5)
        for kind in grid.kinds
        for length in (min(grid.lengths), max(grid.lengths))
    ]
    digest = zlib.crc32(b"".join(batch.tokens.tobytes() for batch in drawn))
    return Exam(f"{grid} {digest}", functools.partial(examine, grid, writing))


def examined(kind: str, grid: Grid, writing: Writing, length: int, depth: float) -> Batch:
    """The rows of one cell of the grid, the same for every model."""
    seed = (zlib.crc32(kind.encode()), length, round(1000 * depth))
    generator = np.random.default_rng(seed)
    return needle_tasks.compose(KINDS[kind], writing, generator, grid.rows, length, depth).batch


def examine(
    grid: Grid,
    writing: Writing,
    model: nn.ModelConfig,
    weights: PyTree[Array],
    leave: Callable[[], None],
) -> dict[str, Any]:
    """{"right": kind -> length -> seeds x depths, "chance": kind -> share}, shares of values.

    A value is right where every symbol of it is, each after the right ones before it; by chance,
    where each is drawn from those that may stand there.

    grid: what is examined. writing: of its rows. model, weights, leave: as of an `Exam`.
    """
    shares: dict[str, dict[str, list[list[float]]]] = {kind: {} for kind in grid.kinds}
    limit = grid.attended if "attention" in model.mixers else max(grid.lengths)
    for length in (n for n in grid.lengths if n <= limit):
        for kind in grid.kinds:
            cells = [examined(kind, grid, writing, length, depth) for depth in grid.depths]
            right = answered(model, weights, joined(cells), grid.piece, leave)
            values = needle_tasks.right_values(right, KINDS[kind], writing).mean(-1)
            by_depth = values.reshape(len(values), len(grid.depths), grid.rows).mean(-1)
            shares[kind][str(length)] = np.round(by_depth.astype(float), 4).tolist()
    chance = {kind: needle_tasks.chance(KINDS[kind], writing) for kind in grid.kinds}
    return {"right": shares, "chance": chance}


def answered(
    model: nn.ModelConfig,
    weights: PyTree[Array],
    batch: Batch,
    piece: int,
    leave: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Whether each scored symbol is right, [m, b, n], of rows that have n such each."""
    count, length = batch.tokens.shape
    together = max(1, AT_ONCE // length)
    parts = []
    for first in range(0, count, together):
        few = slice(first, first + together)
        rows = Batch(batch.tokens[few], batch.answers[few], batch.scored[few])
        missing = min(together, count) - len(rows.tokens)  # one shape, compiled once
        fill = lambda x: np.pad(x, ((0, missing), (0, 0)))  # noqa: B023
        whole = Batch(fill(rows.tokens), fill(rows.answers), fill(rows.scored))
        pieces = read(model, weights, cut(whole, piece), capacity=length, leave=leave)
        right = np.concatenate([p.right for p in pieces], 2)[:, : len(rows.tokens)]
        parts.append(right[:, rows.scored > 0].reshape(len(right), len(rows.tokens), -1))
    return np.concatenate(parts, 1)


def tiny() -> dict[str, Row]:
    """Rows of 40 symbols; attention alone, which is compiled in the least time."""
    row = full(TINY, 2**14, _in_symbols())[TASK]
    plan = dataclasses.replace(row.plan, seeds=1, every=1, validated=4, tested=4)
    models = {"transformer": row.models["transformer"]}
    return {TASK: row._replace(plan=plan, models=models, control=None)}
