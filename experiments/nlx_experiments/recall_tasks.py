# SPDX-License-Identifier: Apache-2.0
"""Recall: the five tasks of MAD (Poli et al., 2024, section 3.1) and multi-query recall.

Rows have one length, given as both the shortest and the longest. Answers at t are what follows t.
"""

import numpy as np
from jaxtyping import Bool, Int

from nlx_experiments.sequence_tasks import Batch, Task


def _distinct(generator: np.random.Generator, rows: int, of: int, count: int):
    """Rows of `count` different integers below `of`."""
    if count > of:
        raise ValueError(f"`count` is {count}; it must be at most the {of} there are to draw from.")
    return np.argsort(generator.random((rows, of)), 1)[:, :count]


def recall(symbols: int = 16) -> Task:
    """In-context recall: pairs of a key and its value, each key's the same all through a row.

    Scored is the value of every key that stood before.
    """
    half = symbols // 2

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        values = half + generator.integers(0, half, (rows, half))  # of each key
        keys = generator.integers(0, half, (rows, longest // 2))
        seen = np.stack([keys == k for k in range(half)], 2).cumsum(1)
        before = np.take_along_axis(seen, keys[:, :, None], 2)[:, :, 0] > 1
        answers = np.take_along_axis(values, keys, 1)
        return _pairs(keys, answers, before, longest)

    return Task("in-context recall", symbols, symbols, draw, graded="tokens")


def _pairs(
    keys: Int[np.ndarray, "b n"],
    values: Int[np.ndarray, "b n"],
    scored: Bool[np.ndarray, "b n"],
    length: int,
) -> Batch:
    """key value key value ...; the value is the answer at its key."""
    rows, count = keys.shape
    tokens = np.stack([keys, values], 2).reshape(rows, 2 * count)
    answers = np.stack([values, np.zeros_like(values)], 2).reshape(rows, 2 * count)
    where = np.stack([scored, np.zeros_like(scored)], 2).reshape(rows, 2 * count)
    fill = lambda x: np.pad(x, ((0, 0), (0, length - 2 * count)))
    return Batch(fill(tokens), fill(answers * where), fill(where.astype(np.float32)))


def fuzzy_recall(symbols: int = 16, known: int = 8, most: int = 3) -> Task:
    """Fuzzy recall: keys and values are 1 to 3 symbols long; each row has `known` pairs.

    Scored are all symbols of the value of every key that stood before.
    """
    half = symbols // 2

    def row(generator: np.random.Generator, length: int) -> np.ndarray:
        keys: list[tuple[int, ...]] = []
        while len(keys) < known:
            key = tuple(generator.integers(0, half, generator.integers(1, most + 1)))
            if key not in keys:
                keys.append(key)
        values = [
            tuple(half + generator.integers(0, half, generator.integers(1, most + 1))) for _ in keys
        ]
        tokens, scored, met = [], [], set()
        while len(tokens) <= length:
            n = int(generator.integers(0, known))
            key, value = keys[n], values[n]
            tokens += [*key, *value]
            # At the last symbol of the key, and at all of the value but its last.
            scored += [0] * (len(key) - 1) + [n in met] * len(value) + [0]
            met.add(n)
        return np.asarray([tokens[:length], tokens[1 : length + 1], scored[:length]])

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        tokens, answers, scored = np.stack([row(generator, longest) for _ in range(rows)], 1)
        return Batch(tokens, answers * scored, scored.astype(np.float32))

    return Task("fuzzy recall", symbols, symbols, draw, graded="tokens")


def selective_copying(symbols: int = 16, copied: int = 8) -> Task:
    """Selective copying: `copied` symbols among blanks; after a mark they are to be said in order.

    Symbol 0 is the blank, 1 the mark. A row ends with the mark and copied - 1 blanks.
    """

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        room = longest - copied
        content = generator.integers(2, symbols, (rows, copied))
        places = np.sort(_distinct(generator, rows, room, copied), 1)
        tokens = np.zeros((rows, longest), int)
        np.put_along_axis(tokens, places, content, 1)
        tokens[:, room] = 1
        answers, scored = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        answers[:, room:], scored[:, room:] = content, 1
        return Batch(tokens, answers, scored)

    return Task("selective copying", symbols, symbols, draw, graded="tokens")


def memorization(keys: int = 48, values: int = 16, seed: int = 0) -> Task:
    """Memorization: one table of keys and values for all rows, so it must be kept in the weights.

    Values never stand in a row: after every key comes a blank, at which the value is asked.
    """
    table = np.random.default_rng(seed).integers(0, values, keys)

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        asked = 1 + generator.integers(0, keys, (rows, longest // 2))
        tokens, answers = np.zeros((2, rows, longest), int)
        scored = np.zeros((rows, longest), np.float32)
        ends = slice(1, 2 * asked.shape[1], 2)
        tokens[:, 0 : 2 * asked.shape[1] : 2] = asked
        answers[:, ends], scored[:, ends] = table[asked - 1], 1
        return Batch(tokens, answers, scored)

    return Task("memorization", keys + 1, values, draw, graded="tokens")


def compression(symbols: int = 16) -> Task:
    """Compression: a row of symbols and a mark; a decoder says all of them from the mark alone.

    The mark is symbol `symbols`. The decoder is `sequence_learner.Decoder`: answers stand at the
    places of the symbols.
    """

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        tokens = generator.integers(0, symbols, (rows, longest))
        scored = np.ones(tokens.shape, np.float32)
        tokens[:, -1], scored[:, -1] = symbols, 0
        return Batch(tokens, tokens * (scored > 0), scored)

    return Task("compression", symbols + 1, symbols, draw, compressed=True, graded="tokens")


def multi_query(pairs: int, keys: int = 64, values: int = 64) -> Task:
    """Multi-query associative recall: `pairs` pairs, then every key once more, among other values.

    How far behind the last pair a key is asked follows a power law: most are near.

    Source: Arora et al. (2023), Zoology, appendix C (exponent 0.1).
    """

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        room = longest - 2 * pairs
        known = _distinct(generator, rows, keys, pairs)
        told = generator.integers(0, values, (rows, pairs))
        tokens = keys + generator.integers(0, values, (rows, longest))
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = known, keys + told
        likely = np.arange(1, room + 1) ** (0.1 - 1)
        draws = np.log(likely) + generator.gumbel(size=(rows, room))  # without replacement
        gaps = np.argsort(-draws, 1)[:, :pairs]
        places = 2 * pairs + gaps
        np.put_along_axis(tokens, places, known, 1)
        answers, scored = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        np.put_along_axis(answers, places, keys + told, 1)
        np.put_along_axis(scored, places, np.ones_like(scored[:, :pairs]), 1)
        return Batch(tokens, answers, scored)

    return Task(f"{pairs} pairs", keys + values, keys + values, draw, graded="tokens")
