# SPDX-License-Identifier: Apache-2.0
"""Sequence tasks: symbols in, an answer at some positions, drawn without end from a generator."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from nlx_experiments.data import Bytes


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one length, those that end before it filled up with symbol 0."""

    tokens: Int[np.ndarray, "b t"]
    answers: Int[np.ndarray, "b t"]
    scored: Float[np.ndarray, "b t"]  # 1 where an answer counts, else 0


Draw = Callable[[np.random.Generator, int, int, int], Batch]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is drawn, and how many symbols and answers there are.

    Attributes:
      name: as tables show it.
      symbols: tokens are integers in [0, symbols).
      classes: answers are integers in [0, classes).
      draw: (generator, rows, shortest, longest) -> batch, lengths in [shortest, longest].
      compressed: whether a decoder answers everywhere from what the model made of the last symbol.
      validation, test: what is drawn to choose by, and to report, where those are other rows than
        the ones trained on; None: `draw`, from streams of their own.
    """

    name: str
    symbols: int
    classes: int
    draw: Draw
    compressed: bool = False
    validation: Draw | None = None
    test: Draw | None = None

    @property
    def vocabulary(self) -> int:
        """Scores that a model must give: the first `classes` of them are the answers'."""
        return max(self.symbols, self.classes)


def shuffled(task: Task) -> Task:
    """The control: every row's answers change places among its scored positions.

    What is left to learn is how often each answer comes, so nothing beats the share of the most
    frequent one.
    """

    def mixed(draw: Draw) -> Draw:
        def shuffle(
            generator: np.random.Generator, rows: int, shortest: int, longest: int
        ) -> Batch:
            batch = draw(generator, rows, shortest, longest)
            answers = batch.answers.copy()
            for row, scored in zip(answers, batch.scored > 0, strict=True):
                row[scored] = generator.permutation(row[scored])
            return dataclasses.replace(batch, answers=answers)

        return shuffle

    exams = {"validation": task.validation, "test": task.test}
    others = {name: draw and mixed(draw) for name, draw in exams.items()}
    return dataclasses.replace(task, name=f"{task.name}, shuffled", draw=mixed(task.draw), **others)


def windows(train: Bytes, validation: Bytes, test: Bytes) -> Task:
    """Text: windows of bytes, the answer to each byte the next one; every one is scored."""

    def draw(source: Bytes) -> Draw:
        def windows(
            generator: np.random.Generator, rows: int, shortest: int, longest: int
        ) -> Batch:
            starts = generator.integers(0, source.size - longest, rows)
            text = source[starts[:, None] + np.arange(longest + 1)].astype(int)
            return Batch(text[:, :-1], text[:, 1:], np.ones((rows, longest), np.float32))

        return windows

    return Task("text", 256, 256, draw(train), validation=draw(validation), test=draw(test))


def chance(batch: Batch) -> float:
    """The share of scored positions that the most frequent answer gets right."""
    counts = np.bincount(batch.answers[batch.scored > 0])
    return float(counts.max() / counts.sum())


def padded(batch: Batch, length: int) -> Batch:
    """The batch with rows filled up to a length, with what is not scored."""
    fill = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1])))
    return Batch(fill(batch.tokens), fill(batch.answers), fill(batch.scored))
