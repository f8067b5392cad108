# SPDX-License-Identifier: Apache-2.0
"""Needles in haystacks, as RULER has them: what was said somewhere far back is asked at the end.

A needle tells a value of a key. Rows have one length, to the symbol: an instruction, a haystack
with needles in it, a question, the answer. Values come in the order of the keys asked, and those of
one key in the order in which they stand. Each symbol is answered after the right ones before it, so
each value of several after the right values before it. Whole answers are right where greedy
decoding would say them; the share of values is not what it would say, for after a wrong one it
would go on from that.

    kind         haystack   keys  asked  values  key    value
    S-NIAH-1     noise         1      1       1  word   number
    S-NIAH-2     text          1      1       1  word   number
    S-NIAH-3     text          1      1       1  word   uuid
    MK-NIAH-1    text          4      1       1  word   number
    MK-NIAH-2    needles       1      1       1  word   number
    MK-NIAH-3    needles       1      1       1  uuid   uuid
    MV-NIAH      text          1      1       4  word   number
    MQ-NIAH      text          4      4       1  word   number

Noise is one passage over and over; text is what the `Writing` holds; needles are others, of other
keys.

Source: Hsieh et al. (2024), RULER, section 3 and appendix B.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from nlx_experiments.needle_writing import Symbols, Writing
from nlx_experiments.sequence_tasks import Batch

TRIES = 100  # draws of what must differ, before that is called impossible


class Kind(NamedTuple):
    """What is hidden in what, and asked."""

    haystack: str  # "noise", "text" or "needles"
    keys: int = 1  # that needles tell a value of
    asked: int = 1  # of them
    values: int = 1  # of each key, a needle each
    key: str = "word"
    value: str = "number"


KINDS: Mapping[str, Kind] = {
    "S-NIAH-1": Kind("noise"),
    "S-NIAH-2": Kind("text"),
    "S-NIAH-3": Kind("text", value="uuid"),
    "MK-NIAH-1": Kind("text", keys=4),
    "MK-NIAH-2": Kind("needles"),
    "MK-NIAH-3": Kind("needles", key="uuid", value="uuid"),
    "MV-NIAH": Kind("text", values=4),
    "MQ-NIAH": Kind("text", keys=4, asked=4),
}


class Rows(NamedTuple):
    """Rows, and what is hidden where in them."""

    batch: Batch
    starts: Int[np.ndarray, "b n"]  # of the needles, in the order in which they stand
    keys: Int[np.ndarray, "b n k"]
    values: Int[np.ndarray, "b n v"]
    asked: Int[np.ndarray, "b q k"]  # keys, those of one question after those of another


def room(kind: Kind, writing: Writing, length: int, questions: int = 1) -> int:
    """Symbols of the haystack in rows of a length.

    Raises ValueError where there is none.
    """
    needles = kind.keys * kind.values * needle_size(kind, writing)
    taken = writing.instruction.size + needles + questions * question_size(kind, writing)
    if length <= taken:
        raise ValueError(
            f"`length` is {length}; it must be more than {taken}, what needles, question and "
            "answer take."
        )
    return length - taken


def compose(
    kind: Kind,
    writing: Writing,
    generator: np.random.Generator,
    rows: int,
    length: int,
    depth: float | None = None,
    questions: int = 1,
) -> Rows:
    """Rows of exactly `length` symbols, scored at those before each symbol of a value asked for.

    depth: share of the haystack that stands before the first needle asked for, 0 to 1; None: any.
        Other needles stand anywhere.
    questions: with their answers, one after the other; those after the first ask for any keys.

    Raises:
      ValueError: another depth, no room for a haystack, or too few keys or values to be different.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"`depth` is {depth}; it must be from 0 to 1, or None.")
    free, needles = room(kind, writing, length, questions), kind.keys * kind.values
    keys = _different(generator, writing.alphabets[kind.key], rows, kind.keys, "keys")
    told = _different(generator, writing.alphabets[kind.value], rows, needles, "values")
    hay, may = _haystack(kind, writing, generator, rows, free, keys)
    depths = generator.random((rows, needles))
    # The first key has the first `values` needles; the one at `depth` is the first in the row.
    if depth is not None:
        depths[:, 0] = depth
        depths[:, 1 : kind.values] = depth + (1 - depth) * depths[:, 1 : kind.values]
    wanted = np.round(depths * free).astype(int)
    may[:, 0] = True
    before = np.maximum.accumulate(np.where(may, np.arange(free + 1), 0), 1)
    places = np.take_along_axis(before, wanted, 1)
    order = np.argsort(places, 1, kind="stable")
    places = np.take_along_axis(places, order, 1)
    whose = np.repeat(np.arange(kind.keys), kind.values)[order]  # key of each needle
    named = np.take_along_axis(keys, whose[:, :, None], 1)
    needle = _written(writing, named, told)
    width = needle.shape[2]
    starts = places + width * np.arange(needles)
    body = np.zeros((rows, free + needles * width), int)
    taken = np.zeros(body.shape, bool)
    spots = (starts[:, :, None] + np.arange(width)).reshape(rows, -1)
    np.put_along_axis(body, spots, needle.reshape(rows, -1), 1)
    np.put_along_axis(taken, spots, True, 1)
    body[~taken] = hay.ravel()
    repeat = lambda part: np.broadcast_to(part, (rows, part.size))
    parts, asked = [(repeat(writing.instruction), 0), (body, 0)], []  # symbols; whether graded
    for which in _asked(kind, generator, rows, questions):
        asked.append(np.take_along_axis(keys, which[:, :, None], 1))
        values = np.concatenate([_of_key(told, whose, key, kind.values) for key in which.T], 1)
        graded = _joined(np.ones_like(values), np.zeros_like(writing.between))
        parts += [
            (repeat(writing.question[0]), 0),
            (_joined(asked[-1], writing.between), 0),
            (repeat(writing.question[1]), 0),
            (_joined(values, writing.between), graded),
        ]
    tokens = np.concatenate([part for part, _ in parts], 1)
    graded = np.concatenate([np.broadcast_to(of, part.shape) for part, of in parts], 1)
    after = lambda x: np.pad(x, ((0, 0), (0, 1)))[:, 1:]  # what follows each symbol
    batch = Batch(tokens, after(tokens * graded), after(graded).astype(np.float32))
    starts = starts + writing.instruction.size
    return Rows(batch, starts, named, told, np.concatenate(asked, 1))


def right_values(right: Bool[np.ndarray, "*b n"], kind: Kind, writing: Writing) -> np.ndarray:
    """Which values are right in all of their symbols, [*b, asked values].

    right: of every scored symbol of a row.
    """
    size = len(writing.alphabets[kind.value])
    return right.reshape(*right.shape[:-1], -1, size).all(-1)


def chance(kind: Kind, writing: Writing) -> float:
    """The share of values that are right when each symbol is drawn from those that may stand."""
    return float(np.prod([1 / alphabet.size for alphabet in writing.alphabets[kind.value]]))


def guesses(kind: Kind) -> dict[str, float]:
    """The share of values that are right for who knows all needles' values but not which is due.

    "any needle's value": one of them, whichever; "any not said yet": one of those that the right
    values before it are not, where the answer has several. None, where there is one needle, or a
    haystack of them.
    """
    needles, answers = kind.keys * kind.values, kind.asked * kind.values
    if needles == 1 or kind.haystack == "needles":
        return {}
    left = [1 / (needles - said) for said in range(answers)]
    found = {"any needle's value": 1 / needles}
    return found if answers == 1 else {**found, "any not said yet": sum(left) / answers}


def question_size(kind: Kind, writing: Writing) -> int:
    """Symbols of a question and its answer."""
    between, answers = writing.between.size, kind.asked * kind.values
    return (
        sum(part.size for part in writing.question)
        + kind.asked * len(writing.alphabets[kind.key]) + (kind.asked - 1) * between
        + answers * len(writing.alphabets[kind.value]) + (answers - 1) * between
    )  # fmt: skip


def _asked(kind: Kind, generator: np.random.Generator, rows: int, questions: int):
    """Of each question which keys it asks for, [b, asked]: the first ones, then any."""
    yield np.broadcast_to(np.arange(kind.asked), (rows, kind.asked))
    for _ in range(questions - 1):
        yield generator.random((rows, kind.keys)).argsort(1)[:, : kind.asked]


def needle_size(kind: Kind, writing: Writing) -> int:
    """Symbols of a needle."""
    alphabets = writing.alphabets[kind.key], writing.alphabets[kind.value]
    return sum(part.size for part in writing.needle) + sum(map(len, alphabets))


def _drawn(generator: np.random.Generator, alphabet: tuple[Symbols, ...], shape: tuple[int, ...]):
    """Keys or values, [*shape, places]."""
    places = [symbols[generator.integers(0, symbols.size, shape)] for symbols in alphabet]
    return np.stack(places, -1)


def _different(generator, alphabet, rows: int, count: int, what: str) -> np.ndarray:
    """`count` in each row, all different."""
    drawn = _drawn(generator, alphabet, (rows, count))
    for _ in range(TRIES):
        same = (drawn[:, :, None] == drawn[:, None]).all(-1) & np.tri(count, k=-1, dtype=bool)
        again = same.any(2)
        if not again.any():
            return drawn
        drawn[again] = _drawn(generator, alphabet, (int(again.sum()),))
    raise ValueError(f"`writing` has too few {what} for {count} different ones in a row.")


def _haystack(kind: Kind, writing: Writing, generator, rows: int, length: int, keys: np.ndarray):
    """Symbols [b, t], and before which of them, or after the last, a needle may stand."""
    if kind.haystack == "text":
        return writing.text(generator, rows, length)
    if kind.haystack == "noise":
        hay = np.broadcast_to(np.resize(writing.noise, length), (rows, length))
        return hay, np.broadcast_to(np.arange(length + 1) % writing.noise.size == 0, (
            rows, length + 1,
        )).copy()  # fmt: skip
    width = needle_size(kind, writing)
    count, rest = divmod(length, width)
    others = _drawn(generator, writing.alphabets[kind.key], (rows, count))
    for _ in range(TRIES):
        clash = (others[:, :, None] == keys[:, None]).all(-1).any(2)
        if not clash.any():
            break
        others[clash] = _drawn(generator, writing.alphabets[kind.key], (int(clash.sum()),))
    else:
        raise ValueError("`writing` has too few keys for other needles.")
    told = _drawn(generator, writing.alphabets[kind.value], (rows, count))
    hay = _written(writing, others, told).reshape(rows, count * width)
    filler = np.broadcast_to(np.resize(writing.noise[::-1], rest)[::-1], (rows, rest))
    may = np.zeros((rows, length + 1), bool)
    may[:, rest::width] = True
    return np.concatenate([filler, hay], 1), may


def _written(writing: Writing, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Needles [b, n, width]."""
    shape = keys.shape[:2]
    a, b, c = (np.broadcast_to(part, (*shape, part.size)) for part in writing.needle)
    return np.concatenate([a, keys, b, values, c], 2)


def _joined(parts: np.ndarray, between: Symbols) -> np.ndarray:
    """[b, n, size] -> [b, symbols], with what stands between two."""
    rows, count, _ = parts.shape
    gaps = np.broadcast_to(between, (rows, count, between.size))
    whole = np.concatenate([parts, gaps], 2).reshape(rows, -1)
    return whole[:, : whole.shape[1] - between.size]


def _of_key(
    told: np.ndarray, whose: np.ndarray, key: Int[np.ndarray, " b"], values: int
) -> np.ndarray:
    """The values of each row's key in the order in which they stand, [b, values, size]."""
    rows, _, size = told.shape
    return told[whose == key[:, None]].reshape(rows, values, size)
