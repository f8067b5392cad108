# SPDX-License-Identifier: Apache-2.0
"""The users of one model: who they are, and their memories in the host's memory and on disk.

A user is known by a token of 256 random bits alone, given once. The name of a user's files is a
digest of it, so no name comes from outside, none can leave the folder, and who lists the folder
learns no token. No other account reads the files, nor a folder that is made here. Of the newest
memories so many are held in the host's memory; the others lie in files until they are asked for.

folder/NAME.user       who: a second digest of the token     NAME.memory  saved, and lasting
folder/swapped/NAME    what did not fit in memory, gone with the process
"""

import collections
import fcntl
import hashlib
import hmac
import json
import pathlib
import secrets
import shutil
import threading
from collections.abc import Iterator
from typing import IO, Any

from nlx_experiments import user_files
from nlx_experiments.errors import Refused
from nlx_experiments.user_memory import Memory

ABSENT = "0" * 64
GONE = "the user is no more."
LOST = "what was read and not saved is lost, for its file in `swapped` is missing"


class Full(Exception):
    """There are as many users as there may be."""


class Users:
    """Who there is, and what each has in memory. Its methods may be called from any thread."""

    def __init__(
        self,
        folder: pathlib.Path,
        start: Memory,
        model: str,
        *,
        held: int = 256,
        limit: int = 10_000,
    ):
        """Opens a folder and locks it.

        start: the memory before the first token. model: see `user_files.write`. held: memories in
        the host's memory at most, >= 1. limit: users at most.
        Raises Refused: the folder can't be written, is in use, or holds a damaged file of a user.
        """
        self.folder, self.start, self.model = folder, start, model
        self.held, self.limit = held, limit
        self.swapped = folder / "swapped"
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            self._file = _locked(folder / ".lock")
            shutil.rmtree(self.swapped, ignore_errors=True)
            self.swapped.mkdir(0o700)
        except BlockingIOError:
            raise Refused(f"`memories` is {folder}, where another process serves.") from None
        except OSError as error:
            raise Refused(
                f"`memories` is {folder}, which cannot be written ({error.strerror}); it must be a "
                "folder that can be created and written."
            ) from None
        for half in folder.glob(f"*{user_files.HALF}"):
            half.unlink()
        self._lock = threading.Lock()
        self._proofs = {path.stem: _proof(path) for path in sorted(folder.glob("*.user"))}
        for path in folder.glob("*.memory"):  # of who was removed when the process was killed
            if path.stem not in self._proofs:
                path.unlink()
        self._near: collections.OrderedDict[str, Memory] = collections.OrderedDict()
        self._unsaved: set[str] = set()

    def __enter__(self) -> "Users":
        """Returns itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Gives the folder back."""
        shutil.rmtree(self.swapped, ignore_errors=True)
        self._file.close()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._proofs)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(list(self._proofs))

    def create(self) -> str:
        """A new user; returns the token. Raises Full, OSError."""
        token = secrets.token_urlsafe(32)
        name, proof = digests(token)
        with self._lock:
            if len(self._proofs) >= self.limit:
                raise Full
            path, content = self._path(name, "user"), json.dumps({"proof": proof}).encode()
            try:
                user_files.write_bytes(path, content)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            self._proofs[name] = proof
        return token

    def named(self, token: str) -> str | None:
        """The name of the user with this token; None: there is none."""
        name, proof = digests(token)
        known = self._proofs.get(name, ABSENT)
        return name if hmac.compare_digest(known, proof) else None

    def get(self, name: str) -> Memory:
        """The user's memory as it is now: what was put last, else what was saved, else the start.

        Raises Refused where its file is damaged, or the user is no more.
        """
        with self._lock:
            if name not in self._proofs:
                raise Refused(GONE)
            if name in self._near:
                self._near.move_to_end(name)
                return self._near[name]
            memory = self._from_disk(name)
            self._hold(name, memory)
            return memory

    def put(self, name: str, memory: Memory, *, saved: bool = False) -> None:
        """What the user has in memory from now on. saved: whether it lies in the file, too."""
        with self._lock:
            if name in self._proofs:
                self._unsaved.discard(name) if saved else self._unsaved.add(name)
                self._hold(name, memory)

    def unsaved(self, name: str) -> bool:
        """Whether the user's memory holds what its file does not."""
        return name in self._unsaved

    def save(self, name: str, memory: Memory) -> None:
        """Writes a memory to the user's file, and makes it the user's.

        Raises OSError: nothing has changed, unless it is Unsettled, when it is the user's but not
        known to last. Raises Refused: the user is no more.
        """
        if name not in self._proofs:
            raise Refused(GONE)
        try:
            user_files.write(self._path(name, "memory"), memory, self.model)
        except user_files.Unsettled:
            self.put(name, memory)
            raise
        self.put(name, memory, saved=True)

    def load(self, name: str) -> Memory:
        """Goes back to what was saved last. Raises Refused: nothing was, or it is damaged."""
        memory = user_files.read(self._path(name, "memory"), self.start, self.model)
        self.put(name, memory, saved=True)
        return memory

    def forget(self, name: str) -> None:
        """Back to the start, the file removed: when this returns nothing is left of it.

        Raises OSError: the memory is as it was, unless it is Unsettled, see `save`.
        """
        with self._lock:
            self._drop(name)
            user_files.settle(self.folder)

    def remove(self, name: str) -> None:
        """The user is no more, and what was remembered neither. Raises as `forget` does."""
        with self._lock:
            self._path(name, "user").unlink(missing_ok=True)
            self._drop(name)
            self._proofs.pop(name, None)
            user_files.settle(self.folder)

    def save_all(self) -> list[str]:
        """Saves what is not saved yet; returns sentences of what could not be."""
        wrong = []
        for name in sorted(self._unsaved):
            try:
                self.save(name, self.get(name))
            except (OSError, Refused) as error:
                wrong.append(f"The memory of {name} could not be saved: {error}")
        return wrong

    def _drop(self, name: str) -> None:
        self._path(name, "memory").unlink(missing_ok=True)
        (self.swapped / name).unlink(missing_ok=True)
        self._near.pop(name, None)
        self._unsaved.discard(name)

    def _hold(self, name: str, memory: Memory) -> None:
        """Into the host's memory; what was asked for longest ago leaves it.

        What no disk takes stays, be there more than `held`.
        """
        self._near[name] = memory
        self._near.move_to_end(name)
        for oldest in list(self._near)[: -self.held]:
            if oldest in self._unsaved:
                try:
                    path = self.swapped / oldest
                    user_files.write(path, self._near[oldest], self.model, lasting=False)
                except OSError:
                    return
            del self._near[oldest]

    def _from_disk(self, name: str) -> Memory:
        if name in self._unsaved:
            path = self.swapped / name
            if not path.exists():
                raise Refused(f"{LOST}; load what was saved, or forget.")
        else:
            path = self._path(name, "memory")
            if not path.exists():
                return self.start
        return user_files.read(path, self.start, self.model)

    def _path(self, name: str, kind: str) -> pathlib.Path:
        return self.folder / f"{name}.{kind}"


def digests(token: str) -> tuple[str, str]:
    """The name of the user's files, and what proves the token."""
    made = token.encode(errors="replace")
    return hashlib.sha256(b"name " + made).hexdigest()[:32], hashlib.sha256(made).hexdigest()


def _locked(path: pathlib.Path) -> IO:
    """An open file that no other process has locked. Raises OSError."""
    opened = open(path, "w")  # noqa: SIM115
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        opened.close()
        raise
    return opened


def _proof(path: pathlib.Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["proof"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is damaged: it doesn't say who the user is ({error}).") from None
