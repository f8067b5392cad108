# SPDX-License-Identifier: Apache-2.0
"""`nlx run personalisation`: one model, many users, each with a memory of their own.

command    nlx run personalisation [--only text items] [--models MODEL ...]
           nlx run personalisation-tiny: next to nothing of it, in seconds
shows      what a token costs, session by session of a user's stream, with a memory that is kept,
           one that is reset at every session, and one that all users share; for users of text with
           habits of their own and for choices of items by a drifting taste; bytes a user; and that
           1,000 users served together get, bit by bit, what each gets alone
takes      of a core, ten minutes for DeltaNet, thirteen for Hope; the others are not run
expects    a kept memory cheaper than a reset one (nats a token of text and of items: DeltaNet
           0.040 and 0.012, Hope 0.011 and 0.009, not sure) and than a shared one (DeltaNet 0.037,
           not sure, and 0.120; Hope 0.035, not sure, and 0.127); no bit of any user that depends
           on others

Models have equal parameters, and learn here, from users that are none of those examined (their
text is of other files, too). Each trains on streams of `length` tokens from an empty memory, with
AdamW at a rate that falls along a cosine; no slow weight changes afterwards: what a user's memory
holds is all that is the user's. Rates were not searched for: the same for all. Users examined read
`sessions` sessions in turn; "shared" is one memory that reads a session of each of eight users in
turn, and so on. For items there stand two lines that need no training: frequencies of all
users, and of the user's own choices, forgotten exponentially at the best of nine rates.
"""

import dataclasses
import hashlib
import itertools
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from nlx import nn
from nlx.inspect import surprise
from nlx_experiments import personalisation_streams as streams
from nlx_experiments import personalisation_table as table
from nlx_experiments import report, runs
from nlx_experiments import sequence_experiment as experiment
from nlx_experiments.cells import Store
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Stopped
from nlx_experiments.long_context import base, contestants
from nlx_experiments.personalisation_table import KINDS
from nlx_experiments.recall import state_bytes
from nlx_experiments.tokenization import BYTES
from nlx_experiments.user_batches import Batches
from nlx_experiments.user_jobs import Job
from nlx_experiments.user_memory import Reader
from nlx_experiments.users import Users

MODELS = ("hope", "titans", "deltanet", "transformer")
FIRST = 10_000_000  # number of the first user examined
TOGETHER = 8  # users of one shared memory
PLACE = experiment.PLACE


class Size(NamedTuple):
    """Of models, trainings and exams."""

    width: int = 32
    layers: int = 2
    parameters: tuple[int, int] = (60_000, 48_000)  # of text, of items
    length: int = 256
    rows: int = 8
    steps: int = 300
    rate: float = 1e-2
    seeds: int = 3
    session: int = 128
    sessions: int = 8
    users: int = 64
    served: int = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Personalisation:
    """Many users of one model."""

    runs: pathlib.Path = pathlib.Path("runs/personalisation")
    """Where finished cells are kept."""
    only: tuple[str, ...] = ()
    """Tasks to run, of text and items; all by default."""
    models: tuple[str, ...] = ()
    """Models to run; all by default."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""
    size: ClassVar[Size] = Size()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Personalisation):
    """One model on items, a few steps and users: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/personalisation-tiny")
    only: tuple[str, ...] = ("items",)
    models: tuple[str, ...] = ("deltanet",)
    place: pathlib.Path = pathlib.Path("runs/personalisation-tiny")
    size: ClassVar[Size] = Size(
        width=8, layers=1, parameters=(6_500, 2_600), length=16, rows=2, steps=3, seeds=2,
        session=8, sessions=3, users=8, served=6,
    )  # fmt: skip


def main(options: Personalisation) -> dict[str, Any]:
    """Runs what is not known yet; writes table, picture and numbers."""
    size = options.size
    experiment.check(options, only=streams.TASKS, models=MODELS)
    cache = experiment.compiled(options.runs, hastily=isinstance(options, Tiny))
    with runs.Run(options.runs) as folder, StopRequest() as stop, cache:
        runs.note_environment(folder, say)
        store = Store(folder)
        for task, model in itertools.product(
            options.only or streams.TASKS, options.models or MODELS
        ):
            what = identity(task, model, size)
            if what not in store.known:
                store.add(
                    {"what": what, "task": task, "model": model, **cell(task, model, size, stop)}
                )
        known = store.known
    before = published(options.place / "results" / "personalisation.json")
    tasks: dict[str, Any] = {}
    for task, model in itertools.product(streams.TASKS, MODELS):
        record = (before | known).get(identity(task, model, size))
        if record is not None:
            tasks.setdefault(task, {"models": {}, "lines": lines(task, size)})
            tasks[task]["models"][model] = record
    results = {"environment": runs.environment(), "size": size._asdict(), "tasks": tasks}
    write(options, results)
    return results


def published(path: pathlib.Path) -> dict[str, Any]:
    """The cells of a results file, by what they are."""
    tasks = (runs.read_json(path) or {"tasks": {}})["tasks"].values()
    return {r["what"]: r for task in tasks for r in task["models"].values()}


def identity(task: str, model: str, size: Size) -> str:
    """What decides a cell, besides the code of the models: sizes, streams."""
    drawn = streams.TASKS[task].users(FIRST, 2, size.session, True)
    fields = f"{config(task, model, size)} {size} {drawn.tolist()}"
    return f"{task}; {model}; {hashlib.sha256(fields.encode()).hexdigest()[:12]}"


def config(task: str, model: str, size: Size) -> nn.ModelConfig:
    """The model, of as many parameters as the others."""
    made = base(streams.TASKS[task].vocabulary, size.width, size.layers)
    parameters = size.parameters[list(streams.TASKS).index(task)]
    found = contestants(made, parameters)[model][""]
    return dataclasses.replace(found, context=size.session * size.sessions)


def cell(task: str, model: str, size: Size, stop: StopRequest) -> dict[str, Any]:
    """Trains and examines all seeds of a model. Raises Stopped."""
    begun, chosen = time.monotonic(), config(task, model, size)
    made = streams.TASKS[task]
    graph = nnx.graphdef(nnx.eval_shape(lambda: nn.LanguageModel(chosen, rngs=nnx.Rngs(0))))
    learn = learning(graph, size)
    exam = examining(graph, size)
    tested = made.users(FIRST, size.users, size.session * size.sessions + 1, True)
    losses: dict[str, list] = {kind: [] for kind in KINDS}
    weights = None
    for seed in range(size.seeds):
        weights = nnx.split(nn.LanguageModel(chosen, rngs=nnx.Rngs(seed)))[1]
        memory = rule(size).init(weights)
        for step in range(size.steps):
            if stop.asked:
                raise Stopped(f"{task}, {model}: stopped; finished cells are kept.", stop.received)
            first = (seed * size.steps + step) * size.rows
            batch = made.users(first, size.rows, size.length + 1, False)
            weights, memory, loss = learn(weights, memory, batch)
            if step % 100 == 99 or step + 1 == size.steps:
                say(f"{task}, {model}, seed {seed}: step {step + 1}, {float(loss):.3f} nats")
        for kind in KINDS:
            losses[kind].append([round(float(x), 5) for x in exam(weights, tested, kind)])
    assert weights is not None
    differ, served = interference(nnx.merge(graph, weights), made, size)
    return {
        "loss": losses,
        "parameters": nn.parameter_count(nnx.merge(graph, weights)),
        "bytes": state_bytes(chosen, size.session * size.sessions),
        "served": served,
        "differ": differ,
        "seconds": round(time.monotonic() - begun, 1),
    }


def rule(size: Size) -> optax.GradientTransformation:
    """AdamW, its rate along a cosine."""
    curve = optax.warmup_cosine_decay_schedule(
        0.0, size.rate, max(1, size.steps // 10), size.steps, size.rate / 10
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(curve, b2=0.99))


def learning(graph: nnx.GraphDef, size: Size):
    """One update: (weights, memory, tokens [b, t+1]) -> (weights, memory, nats a token)."""

    def loss(weights: PyTree[Array], tokens: Int[Array, "b t+1"]) -> Float[Array, ""]:
        scores, _ = nnx.merge(graph, weights)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()

    @jax.jit
    def learn(weights, memory, tokens):
        value, slopes = jax.value_and_grad(loss)(weights, tokens)
        updates, memory = rule(size).update(slopes, memory, weights)
        return optax.apply_updates(weights, updates), memory, value

    return learn


def examining(graph: nnx.GraphDef, size: Size):
    """(weights, tokens of users [u, t+1], kind of memory) -> nats a token in every session."""

    @jax.jit
    def read(weights, tokens: Int[Array, "b t+1"], state):
        scores, state = nnx.merge(graph, weights)(tokens[:, :-1], state)
        return surprise(scores, tokens[:, 1:]).mean(1) * np.log(2), state

    def exam(weights, tokens: Int[np.ndarray, "u t+1"], kind: str) -> Float[np.ndarray, " s"]:
        model, t = nnx.merge(graph, weights), size.session
        start = lambda rows, turns=1: model.init_state(rows, t * size.sessions * turns)
        cut = [tokens[:, s * t : (s + 1) * t + 1] for s in range(size.sessions)]
        if kind == "shared":  # rows: memories; each reads the session of one user after the other
            rows = len(tokens) // TOGETHER
            state = start(rows, TOGETHER)
            found = np.zeros((size.sessions, TOGETHER, rows))
            for s, n in itertools.product(range(size.sessions), range(TOGETHER)):
                found[s, n], state = read(weights, cut[s][n::TOGETHER], state)
            return found.mean((1, 2))
        state, found = start(len(tokens)), []
        for part in cut:
            nats, state = read(weights, part, start(len(tokens)) if kind == "reset" else state)
            found.append(np.asarray(nats).mean())
        return np.array(found)

    return exam


def interference(model: nn.LanguageModel, made: streams.Streams, size: Size) -> tuple[int, int]:
    """(users that get other bits when served with all others than alone, how many were served)."""
    tokenizer = numbers(made.vocabulary)
    reader = Reader(model, tokenizer, slots=8, piece=16)
    texts = made.users(FIRST, size.served, 40, True)

    def jobs(name: str, n: int) -> list[Job]:
        parts = np.split(texts[n], [21])
        return [Job(name, parts[0]), Job(name, parts[1], 3, seed=n)]

    def outputs(done: list) -> bytes:
        return b"".join(np.array([*d.bits, *d.drawn]).tobytes() for d in done) + b"".join(
            np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(done[-1].memory)
        )

    def serve(numbers: list[int], folder: pathlib.Path) -> list[bytes]:
        with Users(folder, reader.start, reader.identity, held=64) as users:
            names = [users.named(users.create()) or "" for _ in numbers]
            with Batches(reader, users, waiting=10 * size.served) as batches:
                asked = [
                    [batches.submit(j) for j in jobs(names[i], n)] for i, n in enumerate(numbers)
                ]
                return [outputs([future.result() for future in own]) for own in asked]

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        together = serve(list(range(size.served)), folder / "together")
        alone = [serve([n], folder / str(n))[0] for n in range(size.served)]
    return sum(a != b for a, b in zip(together, alone, strict=True)), size.served


def numbers(vocabulary: int):
    """Numbers below the vocabulary as their own tokens."""

    return BYTES._replace(pieces=BYTES.pieces[:vocabulary])


def lines(task: str, size: Size) -> dict[str, list[float]]:
    """What needs no training, on the users examined: name -> nats a token in every session."""
    if task != "items":
        return {}
    tokens = streams.TASKS[task].users(FIRST, size.users, size.session * size.sessions + 1, True)
    trained = streams.TASKS[task].users(0, size.users, size.session, False)
    counts = np.bincount(trained.ravel(), minlength=streams.ITEMS) + 1.0
    prior = counts / counts.sum()
    by_rate = {}
    for keep in (0.0, *(1 - 2.0**-n for n in range(2, 10))):
        found = np.zeros((len(tokens), tokens.shape[1] - 1))
        for u, row in enumerate(tokens):
            held = 4 * prior
            for t, (item, after) in enumerate(itertools.pairwise(row)):
                held = keep * held + (1 - keep) * 4 * prior
                held[item] += keep > 0
                found[u, t] = -np.log(held[after] / held.sum())
        by_rate[keep] = found.mean(0).reshape(size.sessions, -1).mean(1).round(5).tolist()
    best = min(by_rate, key=lambda keep: by_rate[keep][-1])
    return {"frequencies of all": by_rate[0.0], "the user's own, forgotten": by_rate[best]}


def write(options: Personalisation, results: Mapping[str, Any]) -> None:
    """Numbers, picture and text."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "personalisation.json", results)
    if not results["tasks"]:
        return
    table.plot(folder / "personalisation.png", results)
    text = table.shown(results)
    runs.write_whole(folder / "personalisation.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", "personalisation", text)
    say(f"\n{text}")
