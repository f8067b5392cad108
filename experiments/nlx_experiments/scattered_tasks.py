# SPDX-License-Identifier: Apache-2.0
"""Stories scattered among text, rows of any length made piece by piece: as BABILong has them.

The sentences of a story (`facts_tasks.py`) stand in their order anywhere in a row, its question at
the end; all between is text. A row of ten million symbols is made as it is read: what is kept is
where its sentences stand.

A story's words are symbols of their own, which no text holds: BABILong's are English, as its text
is. Rows that are trained on have questions in the story too, as many as facts where one can be, for
a row with one answer teaches little.

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
from nlx_experiments.sequence_tasks import Batch, Draw, Task, padded, row_by_row

SENTENCE = 3  # symbols
FACTS = 2, 12  # facts of a story, fewest and most
ASKED = 0.5  # share of the sentences before the last that are questions, in training


class Story(NamedTuple):
    """Rows before they are written: sentences in their order, and where each stands."""

    tokens: Int[np.ndarray, "b n 3"]
    answers: Int[np.ndarray, "b n 3"]
    scored: Float[np.ndarray, "b n 3"]
    starts: Int[np.ndarray, "b n"]  # before the row where a story has fewer sentences
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
    """Draws stories for rows of `length` symbols.

    Each row has an even chance of every number of sentences that its length has room for.

    Args:
      supporting: facts an answer needs, 1 to 3.
      generator: of the stories, then of where their sentences stand.
      rows: how many.
      length: in symbols, the question at its end; >= 3 (supporting + 2).
      text: of the background, read round and round from anywhere.
      asked: share of other sentences that are questions too, where they can be, below 1; 0 is
        BABILong.

    Raises:
      ValueError: a length without room, another share. Refused: no text.
    """
    fewest = max(FACTS[0], supporting + 1)
    if not 0 <= asked < 1:
        raise ValueError(f"`asked` is {asked}; it must be from 0 to below 1.")
    if length < SENTENCE * (fewest + 1):
        raise ValueError(
            f"`length` is {length}; it must be at least {SENTENCE * (fewest + 1)}: {fewest} facts "
            "and the question."
        )
    if not text.size:
        raise Refused("`--data` leaves no text for the background.")
    most = max(fewest, min(round(FACTS[1] / (1 - asked)), length // SENTENCE - 1))
    told = facts_tasks.facts(supporting, asked=asked).draw(
        generator, rows, SENTENCE * (fewest + 1), SENTENCE * (most + 1)
    )
    apart = lambda x: x.reshape(rows, most + 1, SENTENCE)
    tokens, answers, scored = (apart(x) for x in (told.tokens, told.answers, told.scored))
    lack = np.argmax(scored[:, ::-1, -1] > 0, 1)[:, None]  # sentences behind the question
    # Stories end together: what shorter ones lack stands before them, outside of the row.
    place = np.arange(most + 1)
    order, missing, behind = (place - lack) % (most + 1), place < lack, place - lack
    tokens, answers, scored = (
        np.take_along_axis(x, order[:, :, None], 1) for x in (tokens, answers, scored)
    )
    room = length - SENTENCE * (most + 1 - lack)
    gaps = np.floor(generator.random((rows, most)) * (room + 1)).astype(int)
    gaps = np.sort(np.where(missing[:, :-1], -1, gaps), 1)
    gaps = np.concatenate([gaps, room], 1)  # the question ends the row
    starts = np.where(missing, -SENTENCE, gaps + SENTENCE * behind)
    offsets = generator.integers(0, text.size, rows)
    return Story(VOCABULARY + tokens, answers, scored, starts, offsets, length)


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

    A batch that is trained on has one length; of others each row has its own.

    supporting: facts an answer needs, 1 to 3. train, validation, test: text of the backgrounds.
    """
    facts = facts_tasks.facts(supporting)

    def drawing(text: Bytes, asked: float) -> Draw:
        def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
            length = int(generator.integers(shortest, longest + 1))
            story = stories(supporting, generator, rows, length, text, asked)
            return padded(next(pieces(story, text, length)), longest)

        return draw

    return dataclasses.replace(
        facts,
        symbols=VOCABULARY + facts.symbols,
        draw=drawing(train, ASKED),
        validation=row_by_row(drawing(validation, 0.0)),
        test=row_by_row(drawing(test, 0.0)),
    )
