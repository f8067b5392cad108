# SPDX-License-Identifier: Apache-2.0
"""`nlx run babilong`: questions on facts that are scattered among a million symbols of text.

command    nlx run babilong [--only TASK ...] [--models MODEL ...] [--longest N] [--streamed N]
           nlx run babilong-tiny: next to nothing of it, in seconds; babilong-longer: one fact,
           twice the steps, rows of up to 65,536: what was not done learning?; babilong-gpu: three
           facts too, models of width 128, for a GPU
shows      the share of answers that are right, of models trained on rows of at most 192 symbols, in
           rows of up to `longest`, 1,048,576; and what is held in memory while Hope reads a stream
           of `streamed` symbols, ten million, and others one of at most 1,048,576
takes      1 fact: 81 minutes of a busy core for Hope with its ten million symbols, 9 to 26 for each
           other model; 2 facts are not run yet; -longer: two hours of half a core for Hope, the
           others are not run. A model that is stopped begins anew, finished ones are kept
expects    1 fact: Hope in the mean to 65,536 above Titans (64 and 41 %) and below DeltaNet (73) and
           Gated DeltaNet (71), which it was to pass; one seed of three does not learn the task,
           with twice the steps neither; at chance at a million; memory flat to ten million

The protocol is BABILong's (`scattered_tasks.py`): stories of 2 to 12 facts scattered among text,
the standard library's source or --data, a question at the end. It is easier than BABILong: facts
are three symbols each that no text contains. Each length has stories of its own, the same for all
models: 64 up to 4,096 symbols, 32 up to 65,536; beyond that 8, of the first task alone, read by the
first seed. Models are trained on short rows, with questions in them too; weights are chosen on rows
of those lengths. The rate is one, 1e-2: in recall's pilots 3e-3 was worse for DeltaNet, TTT, Titans
and Hope; it was not tried for Gated DeltaNet and the Transformer. Parameters are equal, states are
not: their bytes stand in the table. Hope's continuum memory system has three blocks that all learn
at every step, and no slower level.

Rows are made and read piece by piece, the state carried from one to the next; for the stream there
is room for one piece alone. Attention keeps every symbol, so the Transformer is examined up to
4,096 alone and reads no stream.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from nlx import nn
from nlx_experiments import babilong_table, facts_tasks, resident, scattered_tasks
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments.data import Bytes
from nlx_experiments.long_context import base, contestants, states, texts
from nlx_experiments.reasoning import told_last
from nlx_experiments.scattered_tasks import Story
from nlx_experiments.sequence_contest import Exam, Plan
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_reading import read
from nlx_experiments.sequence_tasks import Batch, chance

ATTENTION = 4_096  # symbols that attention is examined up to
LONGEST = 2**20
ROWS = {4_096: 64, 65_536: 32, LONGEST: 8}  # of a length, up to each
BY_ALL = 65_536  # symbols of the rows that all seeds and tasks read; the first ones read longer
OTHERS = 2**20  # symbols of the stream, at most, that models but Hope read
MARKS = 2**10, 2**14, 2**17, 2**20  # of the stream
SEEN = 2**26  # pairs of symbols that attention compares at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Babilong(Options):
    """Questions on facts scattered among text."""

    runs: pathlib.Path = pathlib.Path("runs/babilong")
    longest: int = LONGEST
    """Rows that are examined, at most."""
    streamed: int = 10_000_000
    """Symbols of the stream."""
    data: tuple[pathlib.Path, ...] = ()
    """Files and folders of text for the background; none: the standard library's source."""

    def __post_init__(self) -> None:
        """Raises ValueError for rows that are not examined, and too short a stream."""
        if not 1024 <= self.longest <= LONGEST:
            raise ValueError(f"`longest` is {self.longest}; it must be from 1,024 to {LONGEST:,}.")
        if self.streamed < 1024:
            raise ValueError(f"`streamed` is {self.streamed}; it must be >= 1,024.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longer(Babilong):
    """One fact, twice the steps, no stream to speak of: what was not done learning?"""

    runs: pathlib.Path = pathlib.Path("runs/babilong-longer")
    longest: int = BY_ALL
    streamed: int = 1_024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Babilong):
    """One, two and three facts, models of width 128: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/babilong-gpu")


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
    rates=(1e-2,), rows=16, tested=256,
    lengths=(128, 256, 1_024, 4_096, 16_384, 65_536, LONGEST), piece=512,
)  # fmt: skip
LONGER = FULL._replace(facts=(1,), stages=((0, 64), (1_200, 192)), steps=2_400)
OF_GPU = FULL._replace(
    facts=(1, 2, 3), width=128, layers=4, parameters=1_500_000,
    stages=((0, 128), (5_000, 512), (10_000, 1_024)), steps=20_000, rates=(2e-3,), tested=64,
    lengths=tuple(2**n for n in range(7, 21)),
)  # fmt: skip


def main(options: Babilong) -> dict[str, Any]:
    """Runs what is not known yet; writes tables, pictures and numbers."""
    given = texts(options.data)
    name, size = "babilong", FULL
    if isinstance(options, Longer):
        name, size = "babilong-longer", LONGER
    if isinstance(options, Gpu):
        name, size = "babilong-gpu", OF_GPU
    rows = full(size, given, options.longest, options.streamed)
    if isinstance(options, Tiny):
        rows = tiny(given, options.streamed)
    text = functools.partial(
        babilong_table.shown,
        sizes={task: states(row, ATTENTION) for task, row in rows.items()},
        picture=f"results/{name}-lengths.png",
    )
    results = experiment.run(options, name, rows, text, measure="tokens")
    if results:
        babilong_table.plot(options.place / "results" / f"{name}-lengths.png", results)
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
            f"{[(n, rows_of(n)) for n in lengths]} {size.piece} {streamed}",
            functools.partial(examine, supporting, parts[2], lengths, size.piece, streamed),
        )
        # Memory is the same whatever is asked.
        lengths, streamed = tuple(n for n in lengths if n <= BY_ALL), 0
        rows[task.name] = Row(task, plan, models, {}, models["deltanet"][""], exam)
    return rows


def rows_of(length: int) -> int:
    """How many rows of a length are examined."""
    return next(rows for longest, rows in ROWS.items() if length <= longest)


def examined(supporting: int, text: Bytes, length: int) -> Story:
    """The rows of a length, the same for every model; stories of one length stand at no other."""
    generator = np.random.default_rng((supporting, length))
    return scattered_tasks.stories(supporting, generator, rows_of(length), length, text)


def lines(supporting: int, story: Story) -> dict[str, float]:
    """What needs no model: the share right of the most frequent answer, and of the last move's."""
    flat = lambda x: x.reshape(len(x), -1)
    tokens = flat(story.tokens - scattered_tasks.VOCABULARY)
    told = Batch(tokens, flat(story.answers), flat(story.scored))
    last = told_last(told, facts_tasks.facts(supporting).classes)
    named = {"most frequent answer": chance(told), "where somebody went last": float(last[0])}
    return {name: round(share, 4) for name, share in named.items()}


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
    """What the rows of every length and the stream have shown.

    supporting, text: of the task. lengths: examined. piece: symbols read at once. streamed: symbols
    of the stream, 0: none is read. model, weights, leave: as of an `Exam`.

    Returns "right": length -> of each seed a string, "1" for a row that is right, "0" for another;
    "lines": length -> see `lines`; "stream": see `stream`.
    """
    attends = "attention" in model.mixers
    limit = ATTENTION if attends else max(lengths)
    one = jax.tree.map(lambda leaf: leaf[:1], weights)
    measured: dict[str, Any] = {"right": {}, "lines": {}}
    for length in (n for n in lengths if n <= limit):
        story = examined(supporting, text, length)
        rows = rows_of(length)
        size = min(piece, length, max(1, SEEN // (rows * length)) if attends else length)
        given = scattered_tasks.pieces(story, text, size)
        readers = weights if length <= BY_ALL else one
        for last in read(model, readers, given, capacity=length, leave=leave):
            right = last.right  # the question ends the row
        written = ["".join(map(str, seed)) for seed in right[:, :, -1].astype(int)]
        measured["right"][str(length)] = written
        measured["lines"][str(length)] = lines(supporting, story)
    if streamed and not attends:
        far = streamed if "self_modifying" in model.mixers else min(streamed, OTHERS)
        measured["stream"] = stream(supporting, text, piece, far, model, one, leave)
    return measured


def stream(
    supporting: int,
    text: Bytes,
    piece: int,
    streamed: int,
    model: nn.ModelConfig,
    weights: PyTree[Array],
    leave: Callable[[], None],
) -> list[dict[str, Any]]:
    """Reads one row of `streamed` symbols with room for a piece of it; notes, at MARKS and the end:

    "symbols" read; "mib", held by the device, or, where it does not count them, "of": "process", by
    the process, the most of it at the end of any piece since the mark before; "state", exact bytes
    that are carried on; "finite", whether all losses of the last piece are.
    """
    generator = np.random.default_rng(streamed)
    story = scattered_tasks.stories(supporting, generator, 1, streamed, text)
    marks, most, done = [], 0.0, 0
    due = [n for n in MARKS if n < streamed] + [streamed]
    given = scattered_tasks.pieces(story, text, piece)
    for part in read(model, weights, given, capacity=piece, leave=leave):
        counted = resident.on_device()
        most = max(most, resident.now() if counted is None else counted)
        done += part.batch.tokens.shape[1]
        if done >= due[0]:
            of = "process" if counted is None else "device"
            finite = bool(np.isfinite(part.loss).all())
            held = {"mib": round(most, 1), "of": of, "state": part.carried, "finite": finite}
            marks.append({"symbols": done, **held})
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
