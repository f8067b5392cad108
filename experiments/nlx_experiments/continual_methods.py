# SPDX-License-Identifier: Apache-2.0
"""How a model learns a stream of tasks: six methods, the same rows, steps and number of trials.

fine-tuning         Adam on all parameters, the class vectors among them
in context          no learning: examples of the tasks seen so far in the prompt (below)
ewc                 fine-tuning with the penalty strength/2 sum_tasks sum_n F_n (p_n - p*_n)^2
replay              fine-tuning, half of each batch from a memory of rows of the tasks before
hope, k levels      the MLPs' values as k levels on clocks (below)
hope, 3 levels, adam  the same, each level with Adam in place of its write

**Fine-tuning.** Gradients are clipped to norm 1; Adam's memories go on from task to task.

**EWC** (Kirkpatrick et al., 2017, Eq. 3, a penalty for each task): after a task F is the diagonal
of the Fisher information, the mean over `FISHER` rows of the squared gradient of log p(y | row),
the answers y drawn from the model itself.

**Replay** (Chaudhry et al., 2019): after a task `kept` rows of each of its classes (of language:
of the task) are kept for ever.

**In context**: before a question stand as many training rows with their answers as fit into the
window the model was trained on. Of classes and translations those most alike, by byte trigrams
shared with the question (retrieval, Liu et al., 2022); of domains any. Classes are scored by the
likelihood of their names; `ASKED` rows of each class are asked.

**Hope.** Ad-hoc stacking (Behrouz et al., 2025, section 7.3): `nn.from_pretrained_mlps(split=True)`
cuts the hidden units of every layer into k levels with the clocks 1, 4, 16 steps. An MLP is a
memory: its hidden activations are keys, the rows of its last matrix the values found by them.
Levels learn values. Keys, attention, embeddings, norms and class vectors belong to no level and
stay fixed: what is found by a key can only be kept if the key stays what it was. At the end of its
period a level writes the mean gradient of the task's loss, by `least_squares`: the step is small
along keys that were often seen, and goes where they are new, so that a class is written without
writing over others. Each level remembers its keys for `horizon` firings, one number for all: the
fastest for that many steps, then it is free to learn anew, the next for 4 times, the slowest for
16 times as many. So fast levels adapt, slow levels keep, and the sum of them is what is read. What
each part is worth is to be read off the rows: one level has the write but one clock; with Adam
there are the clocks but not the write.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from nlx import nn, optim
from nlx.clock import Clock
from nlx_experiments import continual_language as language
from nlx_experiments.continual_model import Reader, mean_over
from nlx_experiments.continual_tasks import Kind, Rows, Scenario, Stage
from nlx_experiments.continual_write import Pair, least_squares

PERIODS = (1, 4, 16)
FISHER = 64
ASKED = 1
EXAMINED, WRITTEN = 64, 16  # rows at a time
Choice = Mapping[str, float]


class Method(NamedTuple):
    """One row of the tables.

    grid: what is tried. levels: of Hope; 0: all parameters learn. adam: in place of their write.
    replay: whether rows are kept. context: whether nothing is learned.
    """

    grid: tuple[Choice, ...]
    levels: int = 0
    adam: bool = False
    replay: bool = False
    context: bool = False


def _grid(**axes: tuple[float, ...]) -> tuple[Choice, ...]:
    grids = np.meshgrid(*axes.values(), indexing="ij")
    return tuple(
        dict(zip(axes, map(float, point), strict=True))
        for point in zip(*(g.ravel() for g in grids), strict=True)
    )


_RATES = _grid(rate=(3e-4, 1e-3, 3e-3, 1e-2))
_WRITE = _grid(rate=(16.0, 64.0), horizon=(64.0, 256.0))
METHODS: Mapping[str, Method] = {
    "fine-tuning": Method(_RATES),
    "in context": Method(({},), context=True),
    "ewc": Method(_grid(rate=(1e-3, 3e-3), strength=(1e2, 1e4))),
    "replay": Method(_RATES, replay=True),
    "hope, 1 level": Method(_WRITE, levels=1),
    "hope, 2 levels": Method(_WRITE, levels=2),
    "hope, 3 levels": Method(_WRITE, levels=3),
    "hope, 3 levels, adam": Method(_RATES, levels=3, adam=True),
}


class Plan(NamedTuple):
    """What all methods are given: rows of a step, passes over a task, rows kept for replay."""

    batch: int
    epochs: int
    kept: int


class Batch(NamedTuple):
    """Rows as jax takes them, and the classes that may be answered."""

    tokens: Any
    labels: Any
    scored: Any
    seen: Any


def batch_of(rows: Rows, seen: Bool[np.ndarray, " c"]) -> Batch:
    """All rows."""
    return Batch(*map(jnp.asarray, (rows.tokens, rows.labels, rows.scored, seen)))


class Learner:
    """A method at work on one stream."""

    def __init__(
        self, method: Method, model: nn.LanguageModel, scenario: Scenario, plan: Plan, seed: int
    ):
        """Compiles nothing yet. model: pretrained, left as it is. seed: of the class vectors."""
        clocks = [Clock(period) for period in PERIODS[: method.levels]]
        model = nn.from_pretrained_mlps(model, clocks, split=True) if clocks else model
        classes = max(1, len(scenario.texts))
        reader = Reader(model, classes, rngs=nnx.Rngs(1000 + seed))
        self.method, self.kind, self.plan, self.texts = method, scenario.kind, plan, scenario.texts
        self.graph, self.params = nnx.split(reader)
        self.context = model.config.context
        self.seen = np.zeros(classes, bool)
        self.held: list[Rows] = []
        self.steps = 0
        self.generator = np.random.default_rng((1, seed))
        self.functions = functions(method, self.graph, self.params, scenario.kind)
        self.memories = self.functions["begin"](self.params)

    def learn(self, stage: Stage, choice: Choice) -> None:
        """Learns one task: `epochs` passes over its rows, in batches of `batch`."""
        self.seen[list(stage.classes)] = True
        if self.method.context:
            self.held.append(stage.train)
            return
        choice = {name: jnp.float32(value) for name, value in choice.items()}
        size = min(self.plan.batch, len(stage.train))
        for _ in range(self.plan.epochs):
            order = self.generator.permutation(len(stage.train))
            for begin in range(0, len(order) - size + 1, size):
                rows = stage.train.take(order[begin : begin + size])
                if self.held:
                    rows = self._mixed(rows)
                self.steps += 1
                self.params, self.memories = self.functions["step"](
                    self.params, self.memories, batch_of(rows, self.seen), choice
                )
        if "strength" in choice:
            places = self.generator.permutation(len(stage.train))[:FISHER]
            key = jax.random.key(int(self.generator.integers(2**31)))
            rows = batch_of(stage.train.take(places), self.seen)
            self.memories = self.functions["remember"](self.params, self.memories, rows, key)
        if self.method.replay:
            self.held.append(self._kept(stage))

    def _mixed(self, rows: Rows) -> Rows:
        """Half of the rows, and as many of those that are kept."""
        half = len(rows) // 2
        owners = self.generator.integers(0, len(self.held), len(rows) - half)
        old = [self.held[n].take(self.generator.integers(0, len(self.held[n]), 1)) for n in owners]
        return joined([rows.take(np.arange(half)), *old])

    def _kept(self, stage: Stage) -> Rows:
        """Some rows of every class of a task, of language some of the task."""
        order = self.generator.permutation(len(stage.train))
        labels = stage.train.labels[order]
        places = [order[labels == c][: self.plan.kept] for c in np.unique(labels)]
        return stage.train.take(np.concatenate(places))

    def examine(self, stage: Stage, rows: Rows) -> float:
        """How well a task is done, in [0, 1]: among classes seen so far and the task's own."""
        seen = self.seen.copy()
        seen[list(stage.classes)] = True
        if self.method.context:
            return in_context(self, rows, seen)
        if self.kind == "translation":
            tokens, begins = language.asked(rows)
            whole = np.concatenate(
                [
                    self.functions["write"](self.params, t, b)
                    for t, b in zip(*map(_pieces, (tokens, begins)), strict=True)
                ]
            )[: len(rows)]
            return language.chrf(_written(whole, begins), rows)
        right = total = 0.0
        for n in range(0, len(rows), EXAMINED):
            part = rows.take(np.arange(n, min(n + EXAMINED, len(rows))))
            missing = EXAMINED - len(part)
            counts = np.pad(np.ones(len(part), np.float32), (0, missing))
            part = Rows(*(np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in
                          (part.tokens, part.labels, part.scored)))  # fmt: skip
            hits, of = self.functions["right"](self.params, batch_of(part, seen), counts)
            right, total = right + float(hits), total + float(of)
        return right / max(total, 1.0)


def joined(parts: list[Rows]) -> Rows:
    """All rows of all parts."""
    join = lambda name: np.concatenate([getattr(part, name) for part in parts])
    return Rows(join("tokens"), join("labels"), join("scored"))


def _pieces(x: np.ndarray) -> list[np.ndarray]:
    """Cut into WRITTEN rows, the last filled up."""
    x = np.pad(x, ((0, -len(x) % WRITTEN), *[(0, 0)] * (x.ndim - 1)))
    return np.split(x, len(x) // WRITTEN)


def _written(tokens: np.ndarray, begins: np.ndarray) -> list[bytes]:
    return [bytes(row[b:].tolist()) for row, b in zip(tokens, begins, strict=True)]


_COMPILED: dict[Any, dict[str, Any]] = {}


def functions(method: Method, graph: nnx.GraphDef, params: Any, kind: Kind) -> dict[str, Any]:
    """The compiled functions of a method: kept, so that seeds and tasks share them."""
    shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(params))
    what = (method.levels, method.adam, graph, shapes, kind)
    if what not in _COMPILED:
        if len(_COMPILED) > 15:
            _COMPILED.clear()
        made = hope(method, graph, kind) if method.levels else whole(graph, kind)
        _COMPILED[what] = made | examinations(graph, kind)
    return _COMPILED[what]


def task_loss(reader: Reader, batch: Batch, kind: Kind) -> tuple[Float[Array, ""], Any]:
    """Cross-entropy in nats: of a row's class among those seen, or of a scored byte; and keys.

    Keys are what every level's values were read by: [n, units], the mean over a row's bytes where a
    row has one answer; at bytes that are not scored they are 0.
    """
    if kind == "classes":
        x, keys = reader.mix(batch.tokens)
        scores = reader.class_scores(x, batch.tokens)
        scores = jnp.where(batch.seen[None], scores, -1e30)
        lost = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
        return lost.mean(), {name: mean_over(k, batch.tokens) for name, k in keys.items()}
    x, keys = reader.mix(batch.tokens[:, :-1])
    scores, counts = reader.model.read_out(x), batch.scored[:, 1:]
    lost = optax.softmax_cross_entropy_with_integer_labels(scores, batch.tokens[:, 1:])
    flat = {n: (k * counts[..., None]).reshape(-1, k.shape[-1]) for n, k in keys.items()}
    return jnp.sum(lost * counts) / jnp.maximum(jnp.sum(counts), 1), flat


def examinations(graph: nnx.GraphDef, kind: Kind) -> dict[str, Any]:
    """right(params, batch, counts) -> (how many are right, of how many); write(params, tokens,
    begins) -> tokens, those from `begins` on the likeliest, one after the other."""

    def right(params: Any, batch: Batch, counts: Float[Array, " b"]):
        reader = nnx.merge(graph, params)
        if kind == "classes":
            scores = reader.class_scores(reader.mix(batch.tokens)[0], batch.tokens)
            given = jnp.argmax(jnp.where(batch.seen[None], scores, -jnp.inf), 1)
            return jnp.sum((given == batch.labels) * counts), jnp.sum(counts)
        given = jnp.argmax(reader.model.read_out(reader.mix(batch.tokens[:, :-1])[0]), -1)
        scored = batch.scored[:, 1:] * counts[:, None]
        return jnp.sum((given == batch.tokens[:, 1:]) * scored), jnp.sum(scored)

    def write(params: Any, tokens: Array, begins: Array):
        reader = nnx.merge(graph, params)

        def body(place, tokens):
            scores = reader.model.read_out(reader.mix(tokens)[0])[:, place - 1]
            there = jnp.where(place >= begins, jnp.argmax(scores, -1), tokens[:, place])
            return tokens.at[:, place].set(there.astype(tokens.dtype))

        return jax.lax.fori_loop(1, tokens.shape[1], body, tokens)

    return {"right": jax.jit(right), "write": jax.jit(write)}


class Whole(NamedTuple):
    """Memories of methods that train all parameters."""

    adam: Any
    fisher: Any  # sum over tasks of F
    anchor: Any  # sum over tasks of F p*


def whole(graph: nnx.GraphDef, kind: Kind) -> dict[str, Any]:
    """begin, step and remember of fine-tuning, EWC and replay."""
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))

    def begin(params: Any) -> Whole:
        none = jax.tree.map(jnp.zeros_like, params)
        return Whole(rule.init(params), none, none)

    def step(params: Any, memories: Whole, batch: Batch, choice: Mapping[str, Array]):
        def loss(params):
            lost, _ = task_loss(nnx.merge(graph, params), batch, kind)
            if "strength" not in choice:
                return lost
            return lost + choice["strength"] * penalty(params, memories)

        gradients = jax.grad(loss)(params)
        moved, adam = rule.update(gradients, memories.adam, params)
        params = jax.tree.map(lambda p, m: p - choice["rate"] * m, params, moved)
        return params, memories._replace(adam=adam)

    def remember(params: Any, memories: Whole, batch: Batch, key: Array) -> Whole:
        found = fisher(graph, params, batch, key, kind)
        total = jax.tree.map(jnp.add, memories.fisher, found)
        anchor = jax.tree.map(lambda a, f, p: a + f * p, memories.anchor, found, params)
        return memories._replace(fisher=total, anchor=anchor)

    return {"begin": begin, "step": jax.jit(step), "remember": jax.jit(remember)}


def penalty(params: Any, memories: Whole) -> Float[Array, ""]:
    """sum_tasks sum_n 1/2 F_n (p_n - p*_n)^2, less a constant: of two sums, however many tasks.

    Source: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting, Eq. 3.
    """
    part = lambda p, f, a: jnp.sum(0.5 * f * p * p - a * p)
    parts = jax.tree.map(part, params, memories.fisher, memories.anchor)
    return sum(jax.tree.leaves(parts), jnp.zeros(()))


def fisher(graph: nnx.GraphDef, params: Any, batch: Batch, key: Array, kind: Kind) -> Any:
    """Diagonal of the Fisher information: mean over rows of (d log p(y | row) / dp)^2, y from p.

    Of language y is one byte for each scored place, and a row's log-likelihood their sum.
    """

    def squared(row: Batch, key: Array):
        row = row._replace(tokens=row.tokens[None], scored=row.scored[None])

        def log_likelihood(params):
            reader = nnx.merge(graph, params)
            if kind == "classes":
                scores = reader.class_scores(reader.mix(row.tokens)[0], row.tokens)
                scores, counts = jnp.where(row.seen[None], scores, -1e30), jnp.ones(1)
            else:
                scores = reader.model.read_out(reader.mix(row.tokens[:, :-1])[0])[0]
                counts = row.scored[0, 1:]
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), drawn[:, None], 1)[:, 0]
            return jnp.sum(chosen * counts)

        return jax.tree.map(jnp.square, jax.grad(log_likelihood)(params))

    def add(total, one):
        row, key = one
        return jax.tree.map(jnp.add, total, squared(row._replace(seen=batch.seen), key)), None

    keys = jax.random.split(key, len(batch.tokens))
    rows = batch._replace(seen=jnp.zeros(len(batch.tokens)))
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (rows, keys))
    return jax.tree.map(lambda x: x / len(batch.tokens), total)


def hope(method: Method, graph: nnx.GraphDef, kind: Kind) -> dict[str, Any]:
    """begin and step of levels of values on their clocks; nothing else ever moves."""
    clocks = [Clock(period) for period in PERIODS[: method.levels]]

    def rule(choice: Mapping[str, Any]) -> optax.GradientTransformation:
        if method.adam:
            scale = optax.scale_by_adam(b2=0.99)
            return optax.chain(scale, optax.scale(-1.0), _times(choice["rate"]))
        return least_squares(choice["rate"], choice["horizon"])

    def parts(values: Mapping[str, Any], grams: Mapping[str, Any] | None = None):
        """Pairs by level."""
        by_level: list[dict[str, Pair]] = [{} for _ in clocks]
        for name, w in values.items():
            none = jnp.zeros((len(w), len(w)), w.dtype)
            gram = none if grams is None else grams[name]
            by_level[int(name.split(".")[1])][name] = Pair(w, gram)
        return by_level

    def begin(params: Any) -> list[Any]:
        start = rule({"rate": 0.0, "horizon": 1.0})
        held = parts(values_of(params))
        return [optim.on_clock(start, c).init(p) for c, p in zip(clocks, held, strict=True)]

    def step(params: Any, memories: list[Any], batch: Batch, choice: Mapping[str, Array]):
        values = values_of(params)

        def loss(values):
            return task_loss(nnx.merge(graph, holding(params, values)), batch, kind)

        gradients, keys = jax.grad(loss, has_aux=True)(values)
        scored = len(batch.tokens) if kind == "classes" else jnp.sum(batch.scored[:, 1:])
        grams = {name: keys[name].T @ keys[name] / jnp.maximum(scored, 1) for name in values}
        after, kept = {}, []
        for clock, given, held, memory in zip(
            clocks, parts(gradients, grams), parts(values), memories, strict=True
        ):
            moved, memory = optim.on_clock(rule(choice), clock).update(given, memory, held)
            after |= {name: held[name].values + moved[name].values for name in held}
            kept.append(memory)
        return holding(params, after), kept

    return {"begin": begin, "step": jax.jit(step)}


def _times(rate: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: rate * u, updates))


def values_of(params: nnx.State) -> dict[str, Float[Array, "i o"]]:
    """The last matrix of each level's MLP in the last layer, named as its keys: "<layer>.<level>".
    """
    named = {_name(path): variable for path, variable in nnx.to_flat_state(params)}
    last = str(max(int(name.split(".")[0]) for name in named if name is not None))
    return {n: v[...] for n, v in named.items() if n is not None and n.split(".")[0] == last}


def holding(params: nnx.State, values: Mapping[str, Array]) -> nnx.State:
    """The parameters with these values."""

    def place(path, variable):
        name = _name(path)
        return variable.replace(values[name]) if name in values else variable

    return nnx.map_state(place, params)


def _name(path: tuple) -> str | None:
    """Of a block's values, from ("model", "blocks", layer, "feed_forward", "levels", level, ...)."""
    return f"{path[2]}.{path[5]}" if path[-2:] == ("down", "kernel") else None


def in_context(learner: Learner, rows: Rows, seen: Bool[np.ndarray, " c"]) -> float:
    """How well rows are answered by the model as it is, after examples in its prompt."""
    from nlx_experiments import continual_prompt as prompt

    known = joined(learner.held) if learner.held else None
    model = nnx.merge(learner.graph, learner.params).model
    if learner.kind == "classes":
        order = np.argsort(rows.labels, kind="stable")
        first = np.unique(rows.labels[order], return_index=True)[1]
        some = np.concatenate([order[f : f + ASKED] for f in first])
        return prompt.classes(model, rows.take(some), known, learner.texts, seen)
    if learner.kind == "translation":
        return prompt.translations(model, rows, known)
    return prompt.text(model, rows, known, learner.generator)
