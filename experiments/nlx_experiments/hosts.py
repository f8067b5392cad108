# SPDX-License-Identifier: Apache-2.0
"""Several processes that are one training: who they are, and what they do together.

    nlx train hope-tiny --hosts.coordinator localhost:8476 --hosts.count 2 --hosts.index 0 &
    nlx train hope-tiny --hosts.coordinator localhost:8476 --hosts.count 2 --hosts.index 1

All run the same program on one mesh of all their devices (`jax.distributed`), and see one run
folder. The first of them, of index 0, writes there; what it refuses, all refuse. With one process
everything here does what it says on its own.
"""

import ctypes
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nlx_experiments.errors import Lost, Refused

T = TypeVar("T")
CHILD = "NLX_SUPERVISED"  # in the environment of the process that a supervisor began
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, of Linux's prctl
PATIENCE = 60  # seconds without a sign of life after which a process counts as lost


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """The processes of a training; see `nlx_experiments.hosts`."""

    coordinator: str | None = None
    """ADDRESS:PORT of the first process, or auto: as the cluster says (Slurm, GKE, Cloud TPU)."""
    count: int | None = None
    """How many there are."""
    index: int | None = None
    """Which one this is, from 0."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that don't belong together."""
        numbers = {"hosts.count": self.count, "hosts.index": self.index}
        for name, number in numbers.items():
            alone = self.coordinator in (None, "auto")
            if alone and number is not None:
                raise ValueError(
                    f"`{name}` is {number} and `hosts.coordinator` is {self.coordinator}; it must "
                    "be ADDRESS:PORT of the first process."
                )
            if not alone and number is None:
                raise ValueError(f"`{name}` is missing; each process must be told it.")
        if self.count is not None and self.index is not None:
            if self.count < 1:
                raise ValueError(f"`hosts.count` is {self.count}; it must be an integer >= 1.")
            if not 0 <= self.index < self.count:
                raise ValueError(
                    f"`hosts.index` is {self.index}; it must be in [0, {self.count}), the number "
                    "of processes."
                )


def join(config: HostsConfig) -> None:
    """Meets the other processes; before anything else asks jax for its devices.

    Raises Refused where they don't come together.
    """
    if config.coordinator is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given: dict[str, Any] = {}
    if config.coordinator != "auto":
        given = dict(
            coordinator_address=config.coordinator,
            num_processes=config.count,
            process_id=config.index,
        )
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=PATIENCE, initialization_timeout=300
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise Refused(
            f"`hosts.coordinator` is {config.coordinator}, where the processes did not come "
            f"together ({reason})."
        ) from error


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the one that writes."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """Of all processes; all wait for each other."""
    if count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.array(number))))


def any_of(flag: bool) -> bool:
    """Whether it holds in any process; all wait for each other."""
    if count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def by_first(run: Callable[[], T]) -> T | None:
    """What the first process makes of it, None in the others, which wait for it.

    Raises what it raises; in the others Refused.
    """
    error: Exception | None = None
    made = None
    if first():
        try:
            made = run()
        except Exception as found:
            error = found
    failed = any_of(error is not None)
    if error is not None:
        raise error
    if failed:
        raise Refused("the first process cannot go on; it says why.")
    return made


def agree(name: str, value: Any) -> None:
    """Raises Refused, in all processes, unless they all hold the same value, as JSON has it."""
    if count() == 1:
        return
    text = json.dumps(value, sort_keys=True, default=str)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    found = multihost_utils.process_allgather(np.array(number, np.uint32))
    if len(set(found.tolist())) > 1:
        raise Refused(f"the processes have different {name}; they must be told the same.")


def supervised(config: HostsConfig, argv: Sequence[str]) -> int | None:
    """Runs the command in a process below this one; its exit code, or None: this is that process.

    jax ends a process whose fellow is lost in the middle of things, with SIGABRT and a long trace:
    whoever stands above can still say in a sentence what happened. Signals are handed on.

    Where this process is killed, that one is asked to stop (on Linux).

    Raises Lost where that happened.
    """
    if above := os.environ.get(CHILD):
        _end_with(int(above))
    if config.coordinator is None or above:
        return None
    held: list[subprocess.Popen] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, frame: [one.send_signal(got) for one in held])
    command = [sys.executable, "-m", "nlx_experiments.run", *argv]
    # In a session of its own: what a terminal sends to all comes once, from here.
    environment = os.environ | {CHILD: str(os.getpid())}
    held.append(subprocess.Popen(command, env=environment, start_new_session=True))
    code = held[0].wait()
    if code == -signal.SIGABRT:
        raise Lost(
            "this process was aborted, most likely because another one of the training is lost. "
            "What was saved is whole: start all processes again, as many as before or not."
        )
    return 128 - code if code < 0 else code


def _end_with(parent: int) -> None:
    """Lets the system send this process SIGTERM when its parent ends; ends it if that is so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
