# SPDX-License-Identifier: Apache-2.0
"""How a row with needles is written: in bytes, nearly in RULER's words, or in few symbols.

Source: Hsieh et al. (2024), RULER, section 3 and appendix B; words are made of syllables here.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int

from nlx_experiments.data import Bytes
from nlx_experiments.errors import Refused

Symbols = Int[np.ndarray, " n"]
Haystack = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a row is written: parts as symbols, keys and values by the symbols of each place.

    Attributes:
      symbols: all are integers in [0, symbols).
      instruction: before the haystack.
      needle: before the key, between key and value, after the value.
      question: before the keys asked, after them.
      between: keys asked, and values answered.
      alphabets: of "word", "number" and "uuid": which symbols may stand at each of its places.
      noise: a passage.
      text: (generator, rows, length) -> symbols [b, t], and where a needle may stand before one.
    """

    symbols: int
    instruction: Symbols
    needle: tuple[Symbols, Symbols, Symbols]
    question: tuple[Symbols, Symbols]
    between: Symbols
    alphabets: Mapping[str, tuple[Symbols, ...]]
    noise: Symbols
    text: Haystack


def in_symbols(words: int = 16, letters: int = 32, digits: int = 10) -> Writing:
    """Of few symbols: a mark before a needle and one before what is asked.

    Words are of one letter, numbers of two digits, uuids of four letters. Noise says the symbols
    of the haystack in turn; text draws them, letters and digits, so only the mark tells a needle.

    words: symbols of haystacks alone. letters, digits: of keys and values. All >= 2.
    """
    for name, count in dict(words=words, letters=letters, digits=digits).items():
        if not isinstance(count, int) or count < 2:
            raise ValueError(f"`{name}` is {count!r}; it must be an integer >= 2.")
    letter, digit = words + np.arange(letters), words + letters + np.arange(digits)
    mark = words + letters + digits
    none, one = np.zeros(0, int), lambda symbol: np.array([symbol])

    def text(generator: np.random.Generator, rows: int, length: int):
        return generator.integers(0, mark, (rows, length)), np.ones((rows, length + 1), bool)

    alphabets = {"word": (letter,), "number": (digit,) * 2, "uuid": (letter,) * 4}
    return Writing(
        mark + 2, none, (one(mark), none, none), (one(mark + 1), none), none, alphabets,
        np.arange(words), text,
    )  # fmt: skip


def in_bytes(text: Bytes) -> Writing:
    """Of bytes, nearly in RULER's words; a needle in text stands before a line, or is the first.

    What RULER calls "numbers" and "uuids" are "values" here, in one form for one and for many.

    text: stretches of it are the haystacks of text.
    """
    code = lambda words: np.frombuffer(words.encode(), np.uint8).astype(int)
    any_of = lambda letters: code(letters)
    hexadecimal, dash = any_of("0123456789abcdef"), any_of("-")
    syllables = (any_of("bdfgklmnprstvz"), any_of("aeiou")) * 4
    groups = [(hexadecimal,) * size for size in (8, 4, 4, 4, 12)]
    uuid = tuple(itertools.chain(groups[0], *((dash, *group) for group in groups[1:])))

    def stretches(generator: np.random.Generator, rows: int, length: int):
        if text.size <= length:
            raise Refused(
                f"`--data` leaves {text.size} bytes to one part of the text; there must be more "
                f"than {length} for a haystack."
            )
        starts = generator.integers(1, text.size - length + 1, rows)
        hay = text[starts[:, None] - 1 + np.arange(length + 1)].astype(int)
        return hay[:, 1:], hay == ord("\n")

    return Writing(
        256,
        code(
            "Some special magic values are hidden within the following text. Make sure to memorize "
            "them. I will quiz you about the values afterwards.\n"
        ),
        (code("One of the special magic values for "), code(" is: "), code(".\n")),
        (
            code("\nWhat are all the special magic values for "),
            code(" mentioned in the provided text? They are: "),
        ),
        code(", "),
        {"word": syllables, "number": (any_of("0123456789"),) * 7, "uuid": uuid},
        code(
            "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
            "again.\n"
        ),
        stretches,
    )
