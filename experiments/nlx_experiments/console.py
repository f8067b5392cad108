# SPDX-License-Identifier: Apache-2.0
"""What a person sees while it learns, and how they stop it."""

import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, Protocol

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from nlx_experiments import hosts

AT_ONCE = 0.5  # seconds within which two signals are one request
COMPILING = "compiling the training step, if it is not kept; Ctrl-C saves after the first step"


def say(sentence: str) -> None:
    """Prints one line, at once."""
    print(sentence, flush=True)


class Display(Protocol):
    """Shows one logged step; a context manager."""

    def __enter__(self) -> "Display":
        """Starts showing."""
        ...

    def __exit__(self, *error: Any) -> None:
        """Stops showing."""
        ...

    def show(self, step: int, bits: float, speed: float, updates: Mapping[str, float]) -> None:
        """After `step` steps: training bits per byte, tokens/s, update norm of each level."""
        ...


def display(name: str, steps: int, done: int) -> Display:
    """A progress bar on a terminal, plain lines elsewhere."""
    return Bar(name, steps, done) if sys.stdout.isatty() else Lines(name, steps)


class Lines:
    """One plain line for each logged step."""

    def __init__(self, name: str, steps: int):
        """Of the run called `name`, which ends after `steps`."""
        self.name, self.steps = name, steps

    def __enter__(self) -> "Lines":
        """Says why nothing comes for a while."""
        say(f"{self.name}  {COMPILING}")
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing to clear."""

    def show(self, step: int, bits: float, speed: float, updates: Mapping[str, float]) -> None:
        """Prints the line."""
        say(f"{self.name}  step {step}/{self.steps}  {_summary(bits, speed, updates)}")


class Silent:
    """Shows nothing: another process does."""

    def __enter__(self) -> "Silent":
        """Returns itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing to clear."""

    def show(self, step: int, bits: float, speed: float, updates: Mapping[str, float]) -> None:
        """Nothing."""


class Bar:
    """A progress bar, and under it the same numbers."""

    def __init__(self, name: str, steps: int, done: int):
        """Of the run called `name`, which ends after `steps` and has `done` behind it."""
        shown = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self.progress = Progress(*shown, TimeRemainingColumn())
        self.task = self.progress.add_task(name, total=steps, completed=done)
        self.live = Live(Group(self.progress, Text(COMPILING)), refresh_per_second=4)

    def __enter__(self) -> "Bar":
        """Draws the bar."""
        self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leaves the bar as it is."""
        self.live.stop()

    def show(self, step: int, bits: float, speed: float, updates: Mapping[str, float]) -> None:
        """Moves the bar."""
        self.progress.update(self.task, completed=step)
        self.live.update(Group(self.progress, Text(_summary(bits, speed, updates))))


def _summary(bits: float, speed: float, updates: Mapping[str, float]) -> str:
    levels = "  ".join(f"{name} {norm:.1e}" for name, norm in updates.items())
    return f"{bits:.3f} bits/byte  {speed:,.0f} tokens/s  updates: {levels}"


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, and a second one into KeyboardInterrupt.

    Time that is over is a request too, without a signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, minutes: float | None = None) -> None:
        """No request so far. minutes: after which there is one; None: never."""
        self.received: signal.Signals | None = None
        self.at = 0.0
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def asked(self) -> bool:
        """Whether to save and leave."""
        return self.received is not None or time.monotonic() > self.end

    def __enter__(self) -> "StopRequest":
        """Takes the signals over."""
        self.before = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        """Gives them back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            soon = time.monotonic() - self.at < AT_ONCE
            if soon and os.environ.get(hosts.CHILD):  # the same one, by two ways
                return
            raise KeyboardInterrupt
        self.at = time.monotonic()
        self.received = signal.Signals(number)
        say(f"{self.received.name}: saving after this step, then leaving; once more to leave now.")
