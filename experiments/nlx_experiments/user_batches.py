# SPDX-License-Identifier: Apache-2.0
"""One thread that owns the device, and reads for many users at once, each in a slot of a batch.

A user's jobs are done one after the other, in the order they came; jobs of several users share
every call of the batch. A job happens wholly or not at all: the user's memory changes when all of
it is done (and, where it must last, on disk), so a job that fails or comes too late leaves the
memory as it was.
"""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int

from nlx_experiments.user_memory import Memory, Reader, firings
from nlx_experiments.users import Users


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
    """What a job has done; memory: the user's after it, or what it would be."""

    bits: list[float]
    drawn: list[int]
    levels: list[dict[str, Any]]
    memory: Memory


class _Active:
    """A job in a slot."""

    def __init__(self, job: Job, future: Future, memory: Memory):
        self.job, self.future = job, future
        self.bits: list[float] = []
        self.drawn: list[int] = []
        self.levels: list[dict[str, Any]] = []
        self.last, self.position = int(memory.last), int(memory.position)
        self.asked = 0  # tokens of the last call

    @property
    def done(self) -> bool:
        return len(self.bits) == self.job.text.size and len(self.drawn) == self.job.length


class Batches:
    """Takes jobs from any thread and answers by futures; `with` starts and stops its thread."""

    def __init__(self, reader: Reader, users: Users, *, waiting: int = 64):
        """waiting: jobs at most that have no slot yet."""
        self.reader, self.users, self.waiting = reader, users, waiting
        self._come: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: collections.deque = collections.deque()
        self._slots: list[_Active | None] = [None] * reader.slots
        self._busy: set[str] = set()  # users with a job in a slot or on its way to disk
        self._count = 0  # jobs without a slot
        self._lock = threading.Lock()
        self._closing = False
        self._files = ThreadPoolExecutor(2, "files")
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> "Batches":
        """Compiles, then begins."""
        self.reader.read(self.reader.nothing())
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        """Takes no more jobs, finishes those it has, leaves."""
        with self._lock:
            self._closing = True
        self._come.put(None)
        self._thread.join()
        self._files.shutdown()

    def submit(self, job: Job) -> "Future[Done]":
        """The job's future: a `Done`, or raises what went wrong. Raises Busy, Closing at once."""
        return self._enter(job.name, job)

    def do(self, name: str, action: Callable[[], Any]) -> Future:
        """Calls a function, in a thread for files, when the user's earlier jobs are done."""
        return self._enter(name, action)

    def _enter(self, name: str, thing: Any) -> Future:
        with self._lock:
            if self._closing:
                raise Closing
            if self._count >= self.waiting:
                raise Busy
            self._count += 1
            future: Future = Future()
            self._come.put((name, thing, future))
        return future

    def _run(self) -> None:
        while not (self._closing and self._idle() and self._come.empty()):
            self._collect(block=not any(self._slots) and not self._ready())
            self._admit()
            if any(self._slots):
                self._advance()

    def _idle(self) -> bool:
        """Whether there is nothing under way and nothing that waits."""
        return not (any(self._slots) or self._waiting or self._busy)

    def _ready(self) -> bool:
        """Whether some waiting job could begin now."""
        return any(name not in self._busy for name, _, _ in self._waiting)

    def _collect(self, block: bool) -> None:
        """Takes what has come; what is None only wakes."""
        try:
            come = self._come.get(block)
            while True:
                if come is not None:
                    if isinstance(come, str):  # a user whose file is written
                        self._busy.discard(come)
                    else:
                        self._waiting.append(come)
                come = self._come.get_nowait()
        except queue.Empty:
            return

    def _admit(self) -> None:
        """Gives slots to jobs of users that have none under way, oldest first."""
        left: collections.deque = collections.deque()
        held: set[str] = set()  # users one of whose jobs must stay, so that order is kept
        free = [n for n, active in enumerate(self._slots) if active is None]
        while self._waiting:
            name, thing, future = come = self._waiting.popleft()
            stays = name in self._busy or name in held or (isinstance(thing, Job) and not free)
            if stays and not self._over(thing):
                held.add(name)
                left.append(come)
                continue
            with self._lock:
                self._count -= 1
            if not future.set_running_or_notify_cancel():
                continue
            if self._over(thing):
                future.set_exception(Late())
            elif isinstance(thing, Job):
                self._begin(free, thing, future)
            else:
                self._busy.add(name)
                self._files.submit(self._act, name, thing, future)
        self._waiting = left

    def _over(self, thing: Any) -> bool:
        return isinstance(thing, Job) and time.monotonic() > thing.deadline

    def _begin(self, free: list[int], job: Job, future: Future) -> None:
        """Puts the user's memory into a slot."""
        try:
            memory = self.reader.start if job.blank else self.users.get(job.name)
            room, more = self.reader.capacity, job.text.size + job.length
            if room is not None and int(memory.position) + more > room:
                raise TooLong(room - int(memory.position))
            active = _Active(job, future, memory)
            if active.done:
                self._finish(active, memory)
                return
            self.reader.put(free[0], memory.state)
        except Exception as error:
            future.set_exception(error)
            return
        self._slots[free.pop(0)] = active
        self._busy.add(job.name)

    def _advance(self) -> None:
        """One call of the batch: every job reads a piece of text or draws a token."""
        asked = self.reader.nothing()
        for n, active in enumerate(self._slots):
            if active is not None:
                self._ask(asked, n, active)
        try:
            answer = self.reader.read(asked)
        except Exception as error:  # of the device: nothing of these jobs has happened
            self.reader.clear()
            for n in range(len(self._slots)):
                self._leave(n, error)
            return
        for n, active in enumerate(self._slots):
            if active is None:
                continue
            self._note(active, answer, n)
            if active.done:
                memory = Memory(
                    self.reader.take(n), np.int32(active.last), np.int32(active.position)
                )
                self._slots[n] = None
                self._finish(active, memory)
            elif self._over(active.job):
                self._leave(n, Late())

    def _ask(self, asked: Any, n: int, active: _Active) -> None:
        """What slot n is to read next."""
        job, read = active.job, len(active.bits)
        asked.watched[n] = job.every is not None
        if read < job.text.size:
            size = min(self.reader.piece, job.every or self.reader.piece)
            targets = job.text[read : read + size]
            asked.targets[n, : targets.size] = targets
            asked.tokens[n, : targets.size] = [active.last, *targets[:-1]]
            asked.count[n] = active.asked = targets.size
        else:
            asked.tokens[n, 0], asked.count[n] = active.last, 1
            active.asked = 1
            asked.seed[n], asked.index[n] = job.seed, len(active.drawn)
            asked.temperature[n] = job.temperature

    def _note(self, active: _Active, answer: Any, n: int) -> None:
        """What slot n has read or drawn."""
        job, count, read = active.job, active.asked, len(active.bits)
        if read < job.text.size:
            active.bits += [float(b) for b in answer.bits[n, :count]]
            active.last = int(job.text[read + count - 1])
        else:
            active.last = int(answer.drawn[n])
            active.drawn.append(active.last)
        if job.every is not None:
            levels = self.reader.levels
            fired = [firings(active.position, count, level.period) for level in levels]
            moved, update = (x[n, : len(levels)].tolist() for x in (answer.moved, answer.update))
            at = len(active.bits) + len(active.drawn)
            active.levels.append({"read": at, "moved": moved, "update": update, "fired": fired})
        active.position += count

    def _finish(self, active: _Active, memory: Memory) -> None:
        """The user has this in memory; or first writes it."""
        job, future = active.job, active.future
        done = Done(active.bits, active.drawn, active.levels, memory)
        if job.save and not job.blank:
            self._busy.add(job.name)

            def save() -> Done:
                self.users.save(job.name, memory)
                return done

            self._files.submit(self._act, job.name, save, future)
            return
        self._busy.discard(job.name)
        try:
            if job.keep and not job.blank:
                self.users.put(job.name, memory)
        except Exception as error:
            future.set_exception(error)
            return
        future.set_result(done)

    def _leave(self, n: int, error: Exception) -> None:
        active, self._slots[n] = self._slots[n], None
        if active is not None:
            self._busy.discard(active.job.name)
            active.future.set_exception(error)

    def _act(self, name: str, action: Callable[[], Any], future: Future) -> None:
        """In a thread for files."""
        try:
            result = action()
        except BaseException as error:
            self._come.put(name)
            future.set_exception(error)
        else:
            self._come.put(name)
            future.set_result(result)
