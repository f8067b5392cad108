# SPDX-License-Identifier: Apache-2.0
"""What users ask of a model: jobs, what is done, and why a job is not."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from nlx_experiments.user_memory import Memory


class Busy(Exception):
    """More jobs are waiting than may."""


class Late(Exception):
    """The job was not done in time, and nothing of it happened."""


class Closing(Exception):
    """No more jobs are taken."""


class TooLong(Exception):
    """There is no room in the model's state for so many tokens; says how many there are."""


@dataclasses.dataclass
class Job:
    """Reads tokens, then continues them."""

    name: str
    """Of the user."""
    text: Int[np.ndarray, " n"]
    """Tokens to read; may be none."""
    length: int = 0
    """Tokens to draw after them."""
    temperature: float = 1.0
    seed: int = 0
    every: int | None = None
    """Levels are measured whenever so many tokens are read; None: not at all."""
    blank: bool = False
    """Begin at the start in place of the user's memory; then nothing is kept."""
    keep: bool = True
    """Whether the user has in memory what was read and drawn."""
    save: bool = False
    """Whether it must lie in the user's file before the job is done."""
    deadline: float = float("inf")
    """On `time.monotonic`."""


@dataclasses.dataclass
class Done:
    """What a job has done."""

    bits: list[float]
    drawn: list[int]
    levels: list[dict[str, Any]]
    memory: Memory
    """The user's after it, or what it would be."""
    position: int
    """Tokens in the user's own memory after it."""
