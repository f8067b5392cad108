# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: one sentence on the terminal, and nothing lost."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """Bad input, in one sentence that names it, says what it was and what it must be."""


@contextmanager
def as_sentence() -> Iterator[None]:
    """Turns the library's `ValueError` and `TypeError` about user input into `Refused`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Refused(" ".join(str(error).split())) from error
