# SPDX-License-Identifier: Apache-2.0
"""A method of `continual_methods` at work on a stream: it learns tasks and is examined."""

from typing import Any

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
from nlx_experiments.continual_methods import (
    EQUAL,
    METHODS,
    Choice,
    Method,
    Plan,
    clocks_of,
    stretches,
)
from nlx_experiments.continual_model import Reader
from nlx_experiments.continual_rules import Batch
from nlx_experiments.continual_tasks import Kind, Rows, Scenario, Stage

FISHER = 64
HELD: dict[str, rules.Held] = {
    "levels by adam": "units by adam",
    "values by adam": "values by adam",
}
ASKED = 1
EXAMINED, WRITTEN = 64, 16  # rows at a time


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
        if method.levels:
            model = nn.from_pretrained_mlps(model, [*clocks_of(method), Clock(None)], split=True)
        reader = Reader(model, classes, rngs=nnx.Rngs(1000 + seed))
        self.method, self.kind, self.plan, self.texts = method, scenario.kind, plan, scenario.texts
        self.graph, self.params = nnx.split(reader)
        self.seen = np.zeros(classes, bool)
        self.held: list[Rows] = []
        self.steps = 0
        self.generator = np.random.default_rng((1, seed))
        self.functions = functions(method, self.graph, self.params, scenario.kind)
        self.memories = self.functions["begin"](self.params)
        self.penalized = "strength" in method.grid[0]
        self.room = equal_bytes(model, classes, scenario.kind) if method.replay == "equal" else 0
        self.room //= len(scenario.stages)

    def learn(self, stage: Stage, choice: Choice) -> None:
        """Learns one task: `epochs` passes over its rows, in batches of `batch`."""
        self.seen[list(stage.classes)] = True
        if self.method.learns == "nothing":
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
        if self.penalized:
            places = self.generator.permutation(len(stage.train))[:FISHER]
            key = jax.random.key(int(self.generator.integers(2**31)))
            rows = batch_of(stage.train.take(places), self.seen)
            self.memories = self.functions["remember"](self.params, self.memories, rows, key)
        if self.method.replay != "no":
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
        if self.method.replay == "equal":
            return stage.train.take(order[: max(1, self.room // row_bytes(stage.train))])
        labels = stage.train.labels[order]
        places = [order[labels == c][: self.plan.kept] for c in np.unique(labels)]
        return stage.train.take(np.concatenate(places))

    def carried(self) -> int:
        """Bytes taken from task to task; rows that stand in prompts are among them."""
        rows = sum(len(held) * row_bytes(held) for held in self.held)
        if self.method.learns == "nothing":
            return rows
        return rows + rules.carried(self.memories, self.penalized)

    def examine(self, stage: Stage, rows: Rows) -> float:
        """How well a task is done, in [0, 1]: among classes seen so far and the task's own."""
        seen = self.seen.copy()
        seen[list(stage.classes)] = True
        if self.method.learns == "nothing":
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


def row_bytes(rows: Rows) -> int:
    """Of one that is kept: a byte each, and a label."""
    return rows.tokens.shape[1] + 4


def equal_bytes(model: nn.LanguageModel, classes: int, kind: Kind) -> int:
    """What `EQUAL` carries, of the same model."""
    levels = [*clocks_of(METHODS[EQUAL]), Clock(None)]
    model = nn.from_pretrained_mlps(model, levels, split=True)
    graph, params = nnx.split(Reader(model, classes, rngs=nnx.Rngs(0)))
    return rules.carried(jax.eval_shape(rules.stacked(graph, kind)["begin"], params))


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
    what = (method.levels, method.learns, graph, shapes, kind)
    if what not in _COMPILED:
        if len(_COMPILED) > 15:
            _COMPILED.clear()
        if method.levels:
            held = HELD.get(method.learns, "values")
            made = rules.stacked(graph, kind, held, stretches(method))
        else:
            made = rules.whole(graph, kind)
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
