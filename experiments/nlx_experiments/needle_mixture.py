# SPDX-License-Identifier: Apache-2.0
"""What models are trained on before needles are asked of them: all kinds, and drills of them.

An answer has few symbols: rows as they are examined teach two to eight a row. So most batches that
are trained on have more keys, and ask one question after another about what was said.
"""

from collections.abc import Mapping

import numpy as np

from nlx_experiments.needle_tasks import KINDS, Kind, compose, needle_size, question_size
from nlx_experiments.needle_writing import Writing
from nlx_experiments.sequence_tasks import Batch, Draw, Task, joined, padded, row_by_row

DRILLS = 0.75  # share of the batches trained on
KEYS = 4  # of a drill, if its kind has fewer and half of the row holds their needles
QUESTIONS = 0.75  # of what the needles leave, the share that questions and answers take


def drill(kind: Kind, writing: Writing, length: int) -> tuple[Kind, int]:
    """Of rows that ask as often as they can: the kind, with more keys, and how many questions.

    length: of the rows, in symbols; enough for the kind itself.
    """
    question = question_size(kind, writing)
    of_key = kind.values * needle_size(kind, writing)
    left = length - writing.instruction.size
    more = kind._replace(keys=max(kind.keys, min(KEYS, (left - question) // (2 * of_key))))
    left -= more.keys * of_key
    return more, max(1, int(QUESTIONS * left) // question)


def mixture(names: tuple[str, ...], writings: Mapping[str, Writing]) -> Task:
    """Rows to train on, to choose by and to report on; what is graded is the whole answer.

    Batches trained on have one kind and one length, and are mostly a `drill`. Validation and test
    hold every kind, each row of a length of its own.

    names: of KINDS. writings: "train", "validation" and "test", whose texts may be different ones.

    Raises ValueError for other names; draws do for rows that are too short.
    """
    for name in names:
        if name not in KINDS:
            raise ValueError(f"`names` holds {name!r}; it must be one of {', '.join(KINDS)}.")

    def training(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        kind, writing = KINDS[names[generator.integers(len(names))]], writings["train"]
        length, questions = int(generator.integers(shortest, longest + 1)), 1
        if generator.random() < DRILLS:
            kind, questions = drill(kind, writing, length)
        drawn = compose(kind, writing, generator, rows, length, questions=questions)
        return padded(drawn.batch, longest)

    def every(part: str) -> Draw:
        def one(name: str) -> Draw:
            def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int):
                length = int(generator.integers(shortest, longest + 1))
                drawn = compose(KINDS[name], writings[part], generator, rows, length)
                return padded(drawn.batch, longest)

            return row_by_row(draw)

        def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
            counts = [len(range(n, rows, len(names))) for n in range(len(names))]
            return joined(
                [
                    one(name)(generator, count, shortest, longest)
                    for name, count in zip(names, counts, strict=True)
                    if count
                ]
            )

        return draw

    symbols = writings["train"].symbols
    return Task(
        ", ".join(names), symbols, symbols, training, validation=every("validation"),
        test=every("test"),
    )  # fmt: skip
