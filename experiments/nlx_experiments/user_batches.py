# SPDX-License-Identifier: Apache-2.0
"""One thread that owns the device, and reads for many users at once, each in a slot of a batch.

A user's jobs are done one after the other, in the order they came; jobs of several users share
every call of the batch. A job happens wholly or not at all: the user's memory changes when all of
it is done (and, where it must last, on disk), so a job that fails or comes too late leaves the
memory as it was. Whatever goes wrong fails the jobs in the slots; the thread goes on with others.
"""

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from nlx_experiments.user_jobs import Busy, Closing, Done, Job, Late, TooLong
from nlx_experiments.user_memory import Memory, Reader, firings
from nlx_experiments.users import Users


class _Active:
    """A job in a slot."""

    def __init__(self, job: Job, future: Future, memory: Memory, position: int):
        """position: tokens in the user's own memory, which may be another than the job's."""
        self.job, self.future, self.own = job, future, position
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

    def cancel(self, future: Future) -> bool:
        """Whether a job has not begun, and now never does."""
        cancelled = future.cancel()
        self._come.put(None)
        return cancelled

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
            try:
                self._turn()
            except Exception as error:  # nothing of the jobs in the slots has happened
                self._fail(error)

    def _turn(self) -> None:
        self._collect(block=not any(self._slots) and not self._ready())
        self._admit()
        if any(self._slots):
            self._advance()

    def _fail(self, error: Exception) -> None:
        """Fails the jobs in the slots, and empties these."""
        for n in range(len(self._slots)):
            self._leave(n, error)
        with contextlib.suppress(Exception):  # then the next job fails here, too
            self.reader.clear()

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
        try:
            while self._waiting:
                name, thing, future = come = self._waiting.popleft()
                full = isinstance(thing, Job) and all(self._slots)
                stays = name in self._busy or name in held or full
                if stays and not self._over(thing) and not future.cancelled():
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
                    self._begin(thing, future)
                else:
                    self._to_files(name, thing, future)
        finally:
            left.extend(self._waiting)
            self._waiting = left

    def _over(self, thing: Any) -> bool:
        return isinstance(thing, Job) and time.monotonic() > thing.deadline

    def _begin(self, job: Job, future: Future) -> None:
        """Puts the user's memory into a slot."""
        try:
            own = self.users.get(job.name)
            memory = self.reader.start if job.blank else own
            room, more = self.reader.capacity, job.text.size + job.length
            if room is not None and int(memory.position) + more > room:
                raise TooLong(room - int(memory.position))
        except Exception as error:
            future.set_exception(error)
            return
        active = _Active(job, future, memory, int(own.position))
        if active.done:
            self._finish(active, memory)
            return
        n = self._slots.index(None)
        self._slots[n] = active
        self._busy.add(job.name)
        self.reader.put(n, memory.state)

    def _advance(self) -> None:
        """One call of the batch: every job reads a piece of text or draws a token."""
        asked = self.reader.nothing()
        for n, active in enumerate(self._slots):
            if active is not None:
                self._ask(asked, n, active)
        answer = self.reader.read(asked)
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
        self._busy.discard(job.name)
        keep = (job.keep or job.save) and not job.blank
        position = int(memory.position) if keep else active.own
        done = Done(active.bits, active.drawn, active.levels, memory, position)
        if job.save and keep:

            def save() -> Done:
                self.users.save(job.name, memory)
                return done

            self._to_files(job.name, save, future)
            return
        try:
            if keep:
                self.users.put(job.name, memory)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(done)

    def _leave(self, n: int, error: Exception) -> None:
        active, self._slots[n] = self._slots[n], None
        if active is not None:
            self._busy.discard(active.job.name)
            active.future.set_exception(error)

    def _to_files(self, name: str, action: Callable[[], Any], future: Future) -> None:
        """Calls a function of a user in a thread for files."""
        self._busy.add(name)
        try:
            self._files.submit(self._act, name, action, future)
        except Exception as error:  # there can be no more threads
            self._busy.discard(name)
            future.set_exception(error)

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
