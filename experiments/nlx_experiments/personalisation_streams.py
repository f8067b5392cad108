# SPDX-License-Identifier: Apache-2.0
"""Streams of users: text with habits of their own, and choices among items by a taste that drifts.

Text. A user's stream is source code, files of the standard library one after the other in the
user's own order, from a random line of each, rewritten by the user's habits: the most frequent
names are called by words that the user has made up, quotes are single or double, indentation is of
1, 2 or 4 spaces, and every few lines a phrase of the user's stands as a comment.

Items. Item i is a point v_i on a sphere in d dimensions, the same for all users. A user's taste
moves on the sphere, u_t = unit(u_{t-1} + drift n_t), n_t normal, and the t-th choice is drawn from
softmax(v_i . u_t / temperature). The stream is what was chosen; taste and points are never shown.
"""

import functools
import keyword
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nlx_experiments import data

NAMES = 40  # frequent names that every user calls by words of their own
ITEMS, DIMENSIONS, DRIFT, TEMPERATURE = 64, 4, 0.06, 0.15
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]{2,}")


class Streams(NamedTuple):
    """Where users come from. Those of training and those examined have no number in common."""

    vocabulary: int

    def user(self, number: int, length: int, heldout: bool) -> Int[np.ndarray, " t"]:
        """The first tokens of a user's stream. number: who. heldout: from what is held out."""
        raise NotImplementedError

    def users(self, first: int, count: int, length: int, heldout: bool) -> Int[np.ndarray, "b t"]:
        """Those of users with consecutive numbers."""
        made = [self.user(first + n, length, heldout) for n in range(count)]
        return np.stack(made).astype(np.int32)


class Text(Streams):
    """Source code by users' habits."""

    def user(self, number: int, length: int, heldout: bool) -> Int[np.ndarray, " t"]:
        """See the module."""
        rng = np.random.default_rng([number, 1])
        change, parts, size = habits(rng), [], 0
        files = sources()[heldout]
        while size < length:
            lines = files[rng.integers(len(files))]
            begin = int(rng.integers(max(1, len(lines) - 40)))
            parts.append(change(lines[begin : begin + 40]).encode())
            size += len(parts[-1])
        return np.frombuffer(b"".join(parts)[:length], np.uint8).astype(int)


class Items(Streams):
    """Choices by users' tastes."""

    def user(self, number: int, length: int, heldout: bool) -> Int[np.ndarray, " t"]:
        """See the module; taste draws the same way in both parts."""
        rng = np.random.default_rng([number, 2, heldout])
        taste = rng.normal(size=DIMENSIONS)
        made = np.zeros(length, int)
        for t in range(length):
            taste = taste + DRIFT * rng.normal(size=DIMENSIONS)
            taste = taste / np.linalg.norm(taste)
            weights = np.exp(points() @ taste / TEMPERATURE)
            made[t] = rng.choice(ITEMS, p=weights / weights.sum())
        return made


TASKS: dict[str, Streams] = {"text": Text(256), "items": Items(ITEMS)}


@functools.cache
def points() -> Float[np.ndarray, "i d"]:
    """Where the items are."""
    drawn = np.random.default_rng(0).normal(size=(ITEMS, DIMENSIONS))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@functools.cache
def sources() -> tuple[list[list[str]], list[list[str]]]:
    """Lines of the files to train on, and of those held out; of ASCII alone."""
    corpus = data.load()
    found = []
    for part in (corpus.train, corpus.heldout):
        texts = bytes(part).decode("ascii", errors="ignore").split("\0")
        found.append([lines for text in texts if len(lines := text.splitlines()) >= 60])
    return found[0], found[1]


@functools.cache
def frequent() -> tuple[str, ...]:
    """The names that users rename, most frequent first."""
    count: Counter[str] = Counter()
    for lines in sources()[0]:
        count.update(WORD.findall("\n".join(lines)))
    names = (name for name, _ in count.most_common(400) if not keyword.iskeyword(name))
    return tuple(name for name in names if name not in ("and", "the", "not"))[:NAMES]


def habits(rng: np.random.Generator):
    """A user's habits, as a function from lines to text."""
    words = {name: made_up(rng, len(name)) for name in frequent()}
    quote, other = ("'", '"') if rng.random() < 0.5 else ('"', "'")
    indent = " " * int(rng.choice([1, 2, 4]))
    phrase = "# " + " ".join(made_up(rng, int(rng.integers(3, 8))) for _ in range(3))
    every = int(rng.integers(5, 12))

    def change(lines: list[str]) -> str:
        text = "\n".join(lines).replace(other, quote)
        text = WORD.sub(lambda found: words.get(found[0], found[0]), text)
        made = []
        for n, line in enumerate(text.split("\n")):
            body = line.lstrip(" ")
            made.append(indent * ((len(line) - len(body)) // 4) + body)
            if n % every == every - 1:
                made.append(phrase)
        return "\n".join(made) + "\n"

    return change


def made_up(rng: np.random.Generator, length: int) -> str:
    """A word of consonants and vowels in turn."""
    letters = [rng.choice(list((CONSONANTS, VOWELS)[n % 2])) for n in range(length)]
    return "".join(letters)
