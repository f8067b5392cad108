# SPDX-License-Identifier: Apache-2.0
"""Questions on stories of random facts, in the manner of bAbI's first three tasks.

A sentence is three symbols: PERSON moves PLACE, PERSON takes THING, PERSON drops THING, or a
question, asks WHEN WHAT, whose answer is a place and is due at its last symbol. WHEN is `now` or a
place, WHAT a thing or a person:

    1 fact     where is the person?                   where they last went
    2 facts    where is the thing?                    who took it, and where they are
    3 facts    where was the thing before the place?  who took it, the move there, the one before

Source: Weston et al. (2015), Towards AI-Complete Question Answering, tasks 1, 2 and 3.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from nlx_experiments.sequence_tasks import Batch, Task

MOVES, TAKES, DROPS, ASKS, NOW = range(5)  # after places, people and things
OFTEN = (0.5, 0.3, 0.2)  # of moves, takes and drops, where all three are possible
ASKED = 0.2  # share of sentences before the last that are questions


def facts(
    supporting: int, people: int = 4, things: int = 4, places: int = 6, asked: float = ASKED
) -> Task:
    """Stories whose answers need so many facts; symbols: places, people, things, the five words.

    A row has an even chance of every number of sentences that its length allows, and ends with a
    question; others stand anywhere in it. A thing is taken where it lies (at first: anywhere), by
    somebody whose place was told. "Before the place" means the last time the thing came there.

    supporting: facts an answer needs, 1 to 3. people, things, places: how many there are, >= 2.
    asked: share of the sentences before the last that are questions, where one can be; 0 to 1.

    Raises ValueError for other numbers, and where no row that short can hold a question.
    """
    if supporting not in (1, 2, 3):
        raise ValueError(f"`supporting` is {supporting!r}; it must be 1, 2 or 3.")
    for name, count in dict(people=people, things=things, places=places).items():
        if not isinstance(count, int) or count < 2:
            raise ValueError(f"`{name}` is {count!r}; it must be an integer >= 2.")
    if not 0 <= asked <= 1:
        raise ValueError(f"`asked` is {asked}; it must be from 0 to 1.")

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        fewest, most = max(-(-shortest // 3), supporting + 1), longest // 3
        if most < fewest:
            raise ValueError(
                f"`longest` is {longest}; it must be at least {3 * fewest} symbols: a sentence is "
                f"3, an answer needs {supporting} of them and the question."
            )
        counts = generator.integers(fewest, most + 1, rows)
        tokens, answers = np.zeros((rows, most, 3), int), np.zeros((rows, most, 3), int)
        scored = np.zeros((rows, most, 3), np.float32)
        left = np.arange(rows)
        while len(left):  # stories in which nothing can be asked at the end are told anew
            told = _Told(len(left), people, things, places)
            for t in range(most):
                ends = t == counts[left] - 1
                wanted = ends | (generator.random(len(left)) < asked)
                can, question, answer = _question(generator, told, supporting)
                asks = wanted & can & (t < counts[left])
                sentence = told.happens(generator, ~asks)
                tokens[left, t] = np.where(asks[:, None], question, sentence)
                answers[left, t, 2] = np.where(asks, answer, 0)
                scored[left, t, 2] = asks
            left = left[scored[left, counts[left] - 1, 2] == 0]
        within = (np.arange(most) < counts[:, None])[:, :, None]
        fill = lambda x: np.pad((x * within).reshape(rows, -1), ((0, 0), (0, longest - 3 * most)))
        return Batch(fill(tokens), fill(answers), fill(scored).astype(np.float32))

    name = f"{supporting} fact{'s' * (supporting > 1)}"
    return Task(name, places + people + things + 5, places, draw, graded="tokens")


class _Told:
    """What the stories of some rows have told so far; -1: nothing."""

    def __init__(self, rows: int, people: int, things: int, places: int):
        self.sizes = people, things, places
        self.at = np.full((rows, people), -1)  # the place of each person
        self.held = np.full((rows, things), -1)  # by whom
        self.lies = np.full((rows, things), -1)  # the place of each thing, held or not
        self.came = np.full((rows, things, places), -1)  # from where, when it last came there

    def word(self, which: int) -> int:
        """A word's symbol."""
        return sum(self.sizes) + which

    def person(self, which: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """People's symbols."""
        return self.sizes[2] + which

    def thing(self, which: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """Things' symbols."""
        return self.sizes[2] + self.sizes[0] + which

    def happens(
        self, generator: np.random.Generator, rows: Bool[np.ndarray, " b"]
    ) -> Int[np.ndarray, "b 3"]:
        """Draws a fact for every row and makes it so in some of them."""
        people, things, places = self.sizes
        who = np.arange(people)[:, None]
        moves = self.at[:, :, None] != np.arange(places)
        here = (self.lies < 0)[:, None] | (self.lies[:, None] == self.at[:, :, None])
        takes = here & (self.at >= 0)[:, :, None] & (self.held < 0)[:, None]
        drops = self.held[:, None] == who
        kinds = [x.reshape(len(x), -1) for x in (moves, takes, drops)]
        likely = np.concatenate(
            [
                o * x / np.maximum(x.sum(1, keepdims=True), 1)
                for o, x in zip(OFTEN, kinds, strict=True)
            ],
            1,
        )
        chosen = _drawn(generator, likely)
        kind = np.searchsorted([people * places, people * (places + things)], chosen, "right")
        place = np.where(kind == 0, chosen, 0) % places
        rest = np.where(kind == 0, 0, chosen - people * places) % (people * things)
        someone = np.where(kind == 0, chosen // places, rest // things)
        something = rest % things
        for which, of in enumerate((self._move, self._take, self._drop)):
            some = np.flatnonzero(rows & (kind == which))
            of(some, someone[some], (place if which == 0 else something)[some])
        last = np.where(kind == 0, place, self.thing(something))
        return np.stack([self.person(someone), self.word(MOVES) + kind, last], 1)

    def _move(self, rows, person, place) -> None:
        some, thing = np.nonzero(self.held[rows] == person[:, None])
        carried, to = rows[some], place[some]
        self.came[carried, thing, to] = self.lies[carried, thing]
        self.lies[carried, thing] = to
        self.at[rows, person] = place

    def _take(self, rows, person, thing) -> None:
        self.held[rows, thing] = person
        self.lies[rows, thing] = self.at[rows, person]

    def _drop(self, rows, person, thing) -> None:
        del person
        self.held[rows, thing] = -1


def _question(generator: np.random.Generator, told: _Told, supporting: int):
    """For every row: whether anything can be asked, a question that can, its answer."""
    known = {1: told.at, 2: told.lies, 3: told.came.reshape(len(told.came), -1)}[supporting]
    chosen = _drawn(generator, (known >= 0).astype(float))
    answer = known[np.arange(len(known)), chosen]
    things, places = told.sizes[1:]
    what = {1: told.person(chosen), 2: told.thing(chosen), 3: told.thing(chosen // places)}
    when = chosen % places if supporting == 3 else np.full_like(chosen, told.word(NOW))
    asks = np.full_like(chosen, told.word(ASKS))
    return answer >= 0, np.stack([asks, when, what[supporting]], 1), answer


def _drawn(
    generator: np.random.Generator, likely: Float[np.ndarray, "b n"]
) -> Int[np.ndarray, " b"]:
    """One of n by their weights; where all are 0 the first."""
    late = generator.exponential(size=likely.shape) / np.maximum(likely, 1e-300)
    return np.where(likely > 0, late, np.inf).argmin(1)
