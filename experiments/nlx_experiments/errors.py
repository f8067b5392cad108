# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: one sentence on the terminal, and nothing lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """Bad input, in one sentence that names it, says what it was and what it must be."""


class Diverged(Refused):
    """A training whose numbers are none any more; the same one again would end there too."""


class Lost(Exception):
    """Another process of the training is gone; what was saved is whole."""


class Stopped(Exception):
    """A signal asked the run to stop, or its time is over, and everything is saved; says where."""

    def __init__(self, message: str, number: signal.Signals | None):
        """With what to tell the user, and the signal that asked; None: the time was over."""
        super().__init__(message)
        self.signal = number

    @property
    def code(self) -> int:
        """The exit code: as shells tell of a signal, or "try again later" of sysexits.h."""
        return os.EX_TEMPFAIL if self.signal is None else 128 + self.signal


@contextmanager
def as_sentence() -> Iterator[None]:
    """Turns the library's `ValueError` and `TypeError` about user input into `Refused`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Refused(" ".join(str(error).split())) from error
