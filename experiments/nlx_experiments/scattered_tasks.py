# SPDX-License-Identifier: Apache-2.0
"""Stories scattered among text, rows of any length made piece by piece: as BABILong has them.

The sentences of a story (`facts_tasks.py`) stand in their order anywhere in a row, its question at
the end; all between is text. A row of ten million symbols is made as it is read: what is kept is
where its sentences stand.

Source: Kuratov et al. (2024), BABILong, section 2; Weston et al. (2015), bAbI.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nlx_experiments import facts_tasks
from nlx_experiments.data import VOCABULARY, Bytes
from nlx_experiments.errors import Refused
from nlx_experiments.sequence_tasks import Batch, Task

SENTENCE = 3  # symbols
FACTS = 2, 12  # sentences of a story before its question, fewest and most


class Story(NamedTuple):
    """Rows before they are written: sentences in their order, and where each stands."""

    tokens: Int[np.ndarray, "b n 3"]
    answers: Int[np.ndarray, "b n 3"]
    scored: Float[np.ndarray, "b n 3"]
    starts: Int[np.ndarray, "b n"]
    offsets: Int[np.ndarray, " b"]  # of the background in the text
    length: int  # of the rows


def stories(
    supporting: int,
    generator: np.random.Generator,
    rows: int,
    length: int,
    text: Bytes,
    asked: float = 0.0,
) -> Story:
    """Draws stories for rows of `length` symbols, places 0 to 5 first; see `symbols`.

    Args:
      supporting: facts an answer needs, 1 to 3.
      generator: all rows of a call have one number of sentences, which it draws.
      rows: how many.
      length: in symbols, the question at its end; >= 3 (supporting + 2).
      text: of the background, read round and round from anywhere.
      asked: share of other sentences that are questions too, where they can be; 0 is BABILong.

    Raises:
      ValueError: a length without room. Refused: no text.
    """
    fewest = max(FACTS[0], supporting + 1)
    if length < SENTENCE * (fewest + 1):
        raise ValueError(
            f"`length` is {length}; it must be at least {SENTENCE * (fewest + 1)}: {fewest} facts "
            "and the question."
        )
    if not text.size:
        raise Refused("`--data` leaves no text for the background.")
    most = max(fewest, min(FACTS[1], length // SENTENCE - 1))
    sentences = 1 + int(generator.integers(fewest, most + 1))
    told = facts_tasks.facts(supporting, asked=asked).draw(
        generator, rows, SENTENCE * sentences, SENTENCE * sentences
    )
    apart = lambda x: x.reshape(rows, sentences, SENTENCE)
    room = length - SENTENCE * sentences
    gaps = np.sort(generator.integers(0, room + 1, (rows, sentences - 1)), 1)
    gaps = np.concatenate([gaps, np.full((rows, 1), room)], 1)  # the question ends the row
    starts = gaps + SENTENCE * np.arange(sentences)
    offsets = generator.integers(0, text.size, rows)
    tokens = VOCABULARY + apart(told.tokens)
    return Story(tokens, apart(told.answers), apart(told.scored), starts, offsets, length)


def pieces(story: Story, text: Bytes, size: int) -> Iterator[Batch]:
    """The rows written out, `size` symbols at a time; the last piece may be shorter."""
    rows, sentences = story.starts.shape
    spots = (story.starts[:, :, None] + np.arange(SENTENCE)).reshape(rows, -1)
    flat = lambda x: x.reshape(rows, -1)
    for first in range(0, story.length, size):
        count = min(size, story.length - first)
        place = first + np.arange(count)
        # Sentences begun before a place: the text goes on behind each as if it were not there.
        before = np.stack([np.searchsorted(row, place, "right") for row in story.starts])
        where = story.offsets[:, None] + place - SENTENCE * before
        tokens = text[where % text.size].astype(int)
        answers, scored = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        row, column = np.nonzero((spots >= first) & (spots < first + count))
        at = row, spots[row, column] - first
        for out, of in ((tokens, story.tokens), (answers, story.answers), (scored, story.scored)):
            out[at] = flat(of)[row, column]
        yield Batch(tokens, answers, scored)


def scattered(supporting: int, train: Bytes, validation: Bytes, test: Bytes) -> Task:
    """Rows of any length with a question at the end; those trained on have others before it.

    supporting: facts an answer needs, 1 to 3. train, validation, test: text of the backgrounds.
    """
    facts = facts_tasks.facts(supporting)

    def drawing(text: Bytes, asked: float):
        def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
            length = int(generator.integers(shortest, longest + 1))
            story = stories(supporting, generator, rows, length, text, asked)
            batch = next(pieces(story, text, length))
            fill = lambda x: np.pad(x, ((0, 0), (0, longest - length)))
            return Batch(fill(batch.tokens), fill(batch.answers), fill(batch.scored))

        return draw

    return dataclasses.replace(
        facts,
        symbols=VOCABULARY + facts.symbols,
        draw=drawing(train, facts_tasks.ASKED),
        validation=drawing(validation, 0.0),
        test=drawing(test, 0.0),
    )
