# SPDX-License-Identifier: Apache-2.0
"""Sequence tasks: symbols in, an answer at some positions, drawn without end from a generator."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from nlx_experiments.data import Bytes
from nlx_experiments.errors import Refused


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
      graded: what weights and rates are chosen by: the share right of "rows" or of "tokens".
      curve: whether records keep the share right at each scored place, the same in every row.
      examined: bins that are drawn otherwise; never are weights or rates chosen by them.
    """

    name: str
    symbols: int
    classes: int
    draw: Draw
    compressed: bool = False
    validation: Draw | None = None
    test: Draw | None = None
    graded: Literal["rows", "tokens"] = "rows"
    curve: bool = False
    examined: Mapping[str, Draw] = dataclasses.field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """Scores that a model must give: the first `classes` of them are the answers'."""
        return max(self.symbols, self.classes)


def shuffled(task: Task) -> Task:
    """The control: a batch's answers change places among its scored positions, from row to row.

    What is left to learn is how often each answer comes, so nothing beats the share of the most
    frequent one. (Within rows they would tell more: a row with one question would keep its answer.)
    """

    def control(of: Draw) -> Draw:
        def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
            batch = of(generator, rows, shortest, longest)
            answers, scored = batch.answers.copy(), batch.scored > 0
            answers[scored] = generator.permutation(answers[scored])
            return dataclasses.replace(batch, answers=answers)

        return draw

    exams = {"validation": task.validation, "test": task.test}
    return dataclasses.replace(
        task,
        name=f"{task.name}, shuffled",
        draw=control(task.draw),
        examined={name: control(of) for name, of in task.examined.items()},
        **{name: of and control(of) for name, of in exams.items()},
    )


def windows(train: Bytes, validation: Bytes, test: Bytes) -> Task:
    """Text: windows of bytes, the answer to each byte the next one; every one is scored.

    Draws raise Refused where a part is shorter than a window.
    """

    def draw(source: Bytes) -> Draw:
        def windows(
            generator: np.random.Generator, rows: int, shortest: int, longest: int
        ) -> Batch:
            if source.size <= longest:
                raise Refused(
                    f"`--data` leaves {source.size} bytes to one part of the text; there must be "
                    f"more than {longest}, a window's, in what is trained on and twice that in "
                    "what is held out."
                )
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


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of one length."""
    join = lambda of: np.concatenate([getattr(batch, of) for batch in batches])
    return Batch(join("tokens"), join("answers"), join("scored"))


def row_by_row(draw: Draw) -> Draw:
    """Rows drawn one at a time: where a batch has one length, each gets its own."""

    def rows(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        return joined([draw(generator, 1, shortest, longest) for _ in range(rows)])

    return rows
