# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its configuration, environment, metrics, and who may write there.

config.json        the resolved configuration     corpus.json    the files trained on and held out
environment.json   versions, device, revision     checkpoints/   see `checkpoints`
metrics.jsonl      one line a step; a function of the configuration alone, so that a run that
                   was stopped and resumed leaves the same bytes as one that was not
speed.jsonl        what depends on the machine    result.json    what the finished run reached
time.json          where the time went            probe.jsonl    what memories did, see `probe`
saved.json         the newest checkpoint that was read back
"""

import fcntl
import json
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any, TextIO

import jax

from nlx_experiments.errors import Refused

# What may differ when a run goes on: it changes nothing that is learned, but for last bits where
# devices sum in another order.
FREE = ("run", "save_every", "keep", "log_every", "accumulate")
FREE += ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "keep_every", "time_limit")
FREE += ("hosts.coordinator", "hosts.count", "hosts.index", "log", "probe_every", "profile_at")
FREE += ("profile_steps", "workers", "init_from")  # of that its content counts
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Run:
    """An open run folder, locked against a second writer."""

    def __init__(self, folder: pathlib.Path, writes: bool = True):
        """Creates and locks `folder`.

        writes: False for all but the first of the processes of one training: nothing is locked,
        and what would be written is not.

        Raises:
          Refused: it cannot be written, or another process is at work there.
        """
        self.folder, self.writes = folder, writes
        self._streams: list[TextIO] = []
        if not writes:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise Refused(
                f"`run` is {folder}, which cannot be written ({error.strerror}); "
                "it must be a folder that can be created and written."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise Refused(f"`run` is {folder}, where another process is training.") from error
        self._streams.append(self._lock)

    def __enter__(self) -> "Run":
        """Returns itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Closes its files and gives the lock back."""
        for stream in self._streams:
            stream.close()

    def agree(
        self, name: str, value: Mapping[str, Any], new: Mapping[str, Any] | None = None
    ) -> None:
        """Writes `name`.json, or checks that it says the same where it must.

        new: what fields stood for before there were such fields.

        Raises:
          Refused: the folder belongs to a run of another configuration or corpus.
        """
        before = self.read(name)
        if before is None:
            self.write(name, value)
            return
        then, now = _flat({**(new or {}), **before}), _flat(json.loads(json.dumps(value)))
        for key in {**then, **now}:
            if then.get(key) != now.get(key) and key not in FREE:
                raise Refused(
                    f"`{key}` is {now.get(key)!r}, but {self.folder} was begun with "
                    f"{then.get(key)!r}; give that run its old values, or this one another "
                    "folder."
                )

    def read(self, name: str) -> Any:
        """The content of `name`.json, or None."""
        return read_json(self.folder / f"{name}.json")

    def write(self, name: str, value: Any) -> None:
        """Writes `name`.json, whole or not at all."""
        if self.writes:
            write_json(self.folder / f"{name}.json", value)

    def stream(
        self, name: str, upto: int, say: Callable[[str], None] = lambda sentence: None
    ) -> TextIO:
        """Opens `name`.jsonl to append, cut back to the lines of steps up to `upto`.

        say: receives a sentence where lines before the last are damaged; a copy is then kept.
        """
        path = self.folder / f"{name}.jsonl"
        if not self.writes:
            self._streams.append(open(os.devnull, "w"))  # closed with the others
            return self._streams[-1]
        found = _lines(path)
        damaged = [n for n, record in enumerate(found[:-1], 1) if record is None]
        if damaged:
            aside = path.with_name(path.name + ".damaged")
            shutil.copyfile(path, aside)
            say(
                f"{path} is damaged in line {', '.join(map(str, damaged[:5]))} of {len(found)}; as "
                f"it was it now lies in {aside}, and the other lines are kept."
            )
        kept = [r for r in found if r is not None and r["step"] <= upto]
        write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))
        stream = open(path, "a", buffering=1)  # noqa: SIM115
        self._streams.append(stream)
        return stream


def environment() -> dict[str, Any]:
    """Versions, device, and the revision of the sources if they are in a checkout."""
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        revision = ""
    return {
        "nlx": metadata.version("nlx"),
        "revision": revision or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        **{name: metadata.version(name) for name in PACKAGES},
    }


def note_environment(run: Run, say: Callable[[str], None]) -> None:
    """Writes environment.json; says so when a run goes on in another environment."""
    now, before = environment(), run.read("environment")
    changed = [k for k in now if before is not None and before.get(k) != now[k]]
    if changed:
        say(
            f"The environment is no longer that of the first steps ({', '.join(changed)}); "
            "what follows may differ in the last bits."
        )
    if changed or before is None:
        run.write("environment", now)


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file, or None where there is none.

    Raises:
      Refused: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Refused(f"{path} is damaged: it is not JSON any more ({error}).") from error


def read_lines(path: pathlib.Path, past_damage: bool = False) -> list[dict[str, Any]]:
    """The records of a JSONL file, up to a line that a killed process left unfinished.

    past_damage: also those after a line that is no record, where records do not follow each other.
    """
    found = _lines(path)
    if not past_damage and None in found:
        found = found[: found.index(None)]
    return [record for record in found if record is not None]


def _lines(path: pathlib.Path) -> list[dict[str, Any] | None]:
    """The records of a JSONL file, None for a line that is none."""
    records: list[dict[str, Any] | None] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line) if line else None
        except ValueError:
            record = None
        if line:
            records.append(record if isinstance(record, dict) else None)
    return records


def append(stream: TextIO, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records and hands them to the operating system, which keeps them if we die."""
    for record in records:
        stream.write(json.dumps(record) + "\n")
    stream.flush()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path: pathlib.Path, content: str) -> None:
    """Writes a file so that it has its old content or the new one, never half of it."""
    half = path.with_name(path.name + ".half")
    try:
        half.write_text(content)
        os.replace(half, path)
    except OSError:
        half.unlink(missing_ok=True)
        raise


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        nested = isinstance(inner, dict)
        flat |= _flat(inner, f"{prefix}{key}.") if nested else {f"{prefix}{key}": inner}
    return flat
