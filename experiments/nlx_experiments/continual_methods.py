# SPDX-License-Identifier: Apache-2.0
"""How a model learns a stream of tasks: eight methods, the same rows, steps and trials.

fine-tuning         Adam on all parameters, the class vectors among them
in context          no learning: examples of the tasks seen so far in the prompt (below)
ewc                 fine-tuning with the penalty strength/2 sum_tasks sum_n F_n (p_n - p*_n)^2
replay              fine-tuning, half of each batch from a memory of rows of the tasks before
hope, k levels      k more levels of the MLPs' values, each on its clock (below)
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

**Hope.** Ad-hoc stacking (Behrouz et al., 2025, section 7.3): what was pretrained is the slowest
level, which stands still, and k levels are added on the clocks 1, 4, 16 steps. An MLP is a memory:
hidden activations are keys, the rows of its last matrix the values found by them. All levels add to
the same values, each its own share, which starts at 0 (the nested variant of `nlx.nn.CMS`, Eq. 72;
instead of a share that begins anew, what a level remembers of its keys fades). With rate 0 it is
the model that was given. Each choice answers one way to forget:

- Keys, attention, embeddings, norms and class vectors belong to no level and stay fixed. What is
  found by a key is kept only if the key stays what it was. For the same reason the values of the
  last layer alone are written: those of a layer below would move the keys of the layers above. (In
  a pilot on three tasks the best of four trials that wrote both layers ended at 55.6 %, the best of
  twelve that wrote the last alone at 77.8.)
- At the end of its period a level writes the mean gradient of the task's loss (Eq. 71), by
  `least_squares`: the step is small along keys that were often seen and goes where they are new,
  so a class is written without writing over others.
- Each level remembers its keys for `horizon` firings, one number for all: the fastest for that many
  steps, then those directions are free again; the next for 4 times, the slowest for 16 times as
  many. So fast levels adapt and slow ones keep, and their sum is what is read.
- Levels share the keys, they don't divide them: with the hidden units cut into one group a level
  (`nn.from_pretrained_mlps(split=True)`) each level solves with fewer keys and without what they
  have in common with the others', and more levels were worse.

A pilot of the last two on a linear map alone (10 domains, one seed; the fixed keys of a model of
400 steps, rate 16): with a horizon of 64 firings 1, 2 and 3 levels end at 68.6, 73.2 and 74.8 % and
know each task just after it at 87.7, 87.2 and 87.0 %; of 256 at 79.5, 79.4, 78.9 and 84.8, 85.0,
85.2. With keys divided (twice as many): 76.3, 75.9, 74.2 and 83.1, 82.2, 80.3 % at the end.

What each is worth can be read off the rows: "hope, 1 level" has the write on one clock, so its
distance from fine-tuning is the fixed keys' and the write's; what levels add is the distance from
there; "hope, 3 levels, adam" has fixed keys and clocks without the write. The memory of a level is
one Gram matrix of its keys: EWC has two numbers for each parameter of the whole model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool

from nlx import nn
from nlx.clock import Clock
from nlx_experiments import continual_language as language
from nlx_experiments import continual_prompt as prompt
from nlx_experiments import continual_rules as rules
from nlx_experiments.continual_model import Reader
from nlx_experiments.continual_rules import Batch
from nlx_experiments.continual_tasks import Kind, Rows, Scenario, Stage

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


def batch_of(rows: Rows, seen: Bool[np.ndarray, " c"]) -> Batch:
    """All rows."""
    return Batch(*map(jnp.asarray, (rows.tokens, rows.labels, rows.scored, seen)))


class Learner:
    """A method at work on one stream."""

    def __init__(
        self, method: Method, model: nn.LanguageModel, scenario: Scenario, plan: Plan, seed: int
    ):
        """Compiles nothing yet. model: pretrained, left as it is. seed: of the class vectors."""
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


def clocks_of(method: Method) -> list[Clock]:
    """Of its levels, in steps, fast to slow; none where all parameters learn."""
    return [Clock(period) for period in PERIODS[: method.levels]]


_COMPILED: dict[Any, dict[str, Any]] = {}


def functions(method: Method, graph: nnx.GraphDef, params: Any, kind: Kind) -> dict[str, Any]:
    """The compiled functions of a method: kept, so that seeds and tasks share them."""
    shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(params))
    what = (method.levels, method.adam, graph, shapes, kind)
    if what not in _COMPILED:
        if len(_COMPILED) > 15:
            _COMPILED.clear()
        made = rules.whole(graph, kind)
        if clocks := clocks_of(method):
            made = rules.hope(graph, kind, clocks, method.adam)
        _COMPILED[what] = made | rules.examinations(graph, kind)
    return _COMPILED[what]


def in_context(learner: Learner, rows: Rows, seen: Bool[np.ndarray, " c"]) -> float:
    """How well rows are answered by the model as it is, after examples in its prompt."""
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
