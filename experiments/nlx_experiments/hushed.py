# SPDX-License-Identifier: Apache-2.0
"""Silence for what Orbax's background threads print of a failure that is told in one sentence.

When one array of a checkpoint can't be read or written, Orbax raises what went wrong and leaves the
other arrays' coroutines behind: each prints a trace when it ends after its event loop, or is thrown
away. The failure itself arrives where it is caught, and what is printed there is one sentence.
"""

import functools
import logging
import sys
from types import TracebackType
from typing import Any

LEFT = "Event loop is closed"


@functools.cache
def hush() -> None:
    """Drops those traces from here on in this process, and what absl and asyncio log as errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    raised, unraisable = sys.excepthook, sys.unraisablehook

    def of_threads(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> Any:
        if not _is_left(error):
            raised(kind, error, trace)

    def of_garbage(found: Any) -> Any:
        if not (_is_left(found.exc_value) or _is_read(found.exc_traceback)):
            unraisable(found)

    sys.excepthook, sys.unraisablehook = of_threads, of_garbage


def _is_left(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and LEFT in str(error)


def _is_read(trace: TracebackType | None) -> bool:
    """Whether it was raised in Orbax's reading or writing of an array."""
    files = []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return bool(files) and "orbax" in files[-1] and "serialization" in files[-1]
