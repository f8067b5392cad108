# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: one sentence on the terminal, and nothing lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """Bad input, in one sentence that names it, says what it was and what it must be."""


class Diverged(Refused):
    """A training whose numbers are none any more; the same one again would end there too."""


class Stopped(Exception):
    """A signal asked the run to stop, and everything is saved; says where."""

    def __init__(self, message: str, number: signal.Signals):
        """With what to tell the user, and the signal that asked."""
        super().__init__(message)
        self.signal = number


@contextmanager
def as_sentence() -> Iterator[None]:
    """Turns the library's `ValueError` and `TypeError` about user input into `Refused`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Refused(" ".join(str(error).split())) from error
