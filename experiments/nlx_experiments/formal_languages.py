# SPDX-License-Identifier: Apache-2.0
"""Formal languages and word problems: what may come next, or where one stands, at every symbol.

Six languages of Irie et al. (2023), whose answers are the sets of symbols that may come next, the
end among them; and the running value of a word in a group (S5, A5) or in arithmetic modulo 5.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from nlx_experiments.sequence_tasks import Batch, Task

Rows = tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]  # symbols, answers


def _lengths(generator: np.random.Generator, rows: int, shortest: int, longest: int, step: int):
    """Multiples of `step` in [shortest, longest], drawn evenly."""
    first, last = -(-shortest // step), longest // step
    if first > last:
        raise ValueError(
            f"`longest` is {longest}; there must be a multiple of {step} from {shortest} to it."
        )
    return step * generator.integers(first, last + 1, rows)


def _prefixes(name: str, symbols: int, classes: int, make: Callable, step: int = 1) -> Task:
    """Words whose every prefix has an answer of its own: make(generator, shape) -> both."""

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        lengths = _lengths(generator, rows, shortest, longest, step)
        tokens, answers = make(generator, (rows, longest))
        scored = np.arange(longest) < lengths[:, None]
        return Batch(tokens * scored, answers * scored, scored.astype(np.float32))

    return Task(name, symbols, classes, draw)


def _parity(generator: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Bits; the word may end where their sum is even."""
    bits = generator.integers(0, 2, shape)
    return bits, np.cumsum(bits, 1) % 2


def _even(generator: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """a a a ...; the word may end after an even number."""
    del generator
    return np.zeros(shape, int), np.broadcast_to((1 + np.arange(shape[1])) % 2, shape)


def _abab(generator: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """a b a b ...; after each symbol one other, and after every fourth also the end."""
    del generator
    place = np.arange(shape[1])
    answers = np.where(place % 2 == 0, 0, 1 + (place % 4 == 3))  # b; a; a or the end
    return np.broadcast_to(place % 2, shape), np.broadcast_to(answers, shape)


def _counting(letters: int) -> Callable:
    """a^n b^n, or a^n b^n c^n: while a's come anything goes, then all is known."""

    def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
        lengths = _lengths(generator, rows, max(shortest, letters), longest, letters)[:, None]
        n = lengths // letters
        place = np.arange(longest)[None]
        tokens = np.minimum(place // n, letters - 1)
        # After a: a or b. After the j-th of a later letter: the same, the next letter, or the end.
        answers = np.where(place < n, 0, np.minimum(1 + (place + 1) // n - 1, letters))
        scored = place < lengths
        return Batch(tokens * scored, answers * scored, scored.astype(np.float32))

    return draw


def _shuffle(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
    """Two kinds of brackets, each balanced, in any order among each other."""
    lengths = _lengths(generator, rows, shortest, longest, 2)
    left = np.stack([2 * generator.binomial(lengths // 2, 0.5)], 1)
    left = np.concatenate([left, lengths[:, None] - left], 1)  # symbols to come, of each kind
    depth = np.zeros((rows, 2), int)
    tokens, answers = np.zeros((rows, longest), int), np.zeros((rows, longest), int)
    every = np.arange(rows)
    for t in range(longest):
        total = left.sum(1)
        alive = total > 0
        kind = (generator.random(rows) * np.maximum(total, 1) >= left[:, 0]).astype(int)
        height, rest = depth[every, kind], np.maximum(left[every, kind], 1)
        up = (height + 2) * (rest - height) / (2 * rest * (height + 1))  # words evenly likely
        opens = generator.random(rows) < up
        tokens[:, t] = np.where(alive, 2 * kind + ~opens, 0)
        depth[every, kind] += np.where(alive, np.where(opens, 1, -1), 0)
        left[every, kind] -= alive
        answers[:, t] = np.where(alive, (depth[:, 0] > 0) + 2 * (depth[:, 1] > 0), 0)
    scored = np.arange(longest) < lengths[:, None]
    return Batch(tokens, answers, scored.astype(np.float32))


def _word_problem(elements: list[tuple[int, ...]], generators: list[tuple[int, ...]]) -> Callable:
    """Words in permutations: the product so far, later ones applied after earlier ones."""
    number = {element: n for n, element in enumerate(elements)}
    after = lambda g, e: tuple(g[i] for i in e)  # first e, then g
    table = np.array([[number[after(g, e)] for e in elements] for g in generators])
    identity = number[tuple(range(len(elements[0])))]

    def make(generator: np.random.Generator, shape: tuple[int, int]) -> Rows:
        tokens = generator.integers(0, len(generators), shape)
        answers = np.zeros(shape, int)
        product = np.full(shape[0], identity)
        for t in range(shape[1]):
            answers[:, t] = product = table[tokens[:, t], product]
        return tokens, answers

    return make


def _even_permutation(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i, j in itertools.combinations(range(len(p)), 2)) % 2 == 0


def _arithmetic(generator: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Numbers modulo 5 joined by +, - and *, read from left to right; the value so far.

    A symbol is an operation and a number, 5 operation + number; the value before all is 0.
    """
    tokens = generator.integers(0, 15, shape)
    answers, value = np.zeros(shape, int), np.zeros(shape[0], int)
    for t in range(shape[1]):
        operation, number = tokens[:, t] // 5, tokens[:, t] % 5
        results = np.stack([value + number, value - number, value * number])
        answers[:, t] = value = results[operation, np.arange(shape[0])] % 5
    return tokens, answers


S5 = list(itertools.permutations(range(5)))
A5 = [p for p in S5 if _even_permutation(p)]
SWAPS = [p for p in S5 if sum(p[i] != i for i in range(5)) == 2]

LANGUAGES: dict[str, Task] = {
    task.name: task
    for task in (
        _prefixes("parity", 2, 2, _parity),
        _prefixes("(aa)*", 1, 2, _even),
        _prefixes("(abab)*", 2, 3, _abab),
        Task("a^n b^n", 2, 3, _counting(2)),
        Task("a^n b^n c^n", 3, 4, _counting(3)),
        Task("shuffle-2", 4, 4, _shuffle),
    )
}
WORD_PROBLEMS: dict[str, Task] = {
    task.name: task
    for task in (
        _prefixes("S5", 120, 120, _word_problem(S5, S5)),
        _prefixes("S5 by swaps", 10, 120, _word_problem(S5, SWAPS)),
        _prefixes("A5", 60, 60, _word_problem(A5, A5)),
        _prefixes("arithmetic mod 5", 15, 5, _arithmetic),
    )
}
