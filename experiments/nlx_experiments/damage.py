# SPDX-License-Identifier: Apache-2.0
"""What can go wrong beside a kill: what must be said of it, and that nothing is lost.

A run that was killed half-way is harmed in one way, and the same command is given again: it says
one sentence, and goes on or refuses. What was refused is undone and goes on. In the end every bit
must be that of a run that nothing disturbed.
"""

import pathlib
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import NamedTuple

Undo = Callable[[], None]


class Places(NamedTuple):
    """Of a harmed run."""

    run: pathlib.Path
    texts: pathlib.Path
    patches: pathlib.Path  # on the path of the process: a sitecustomize.py there is run first


class Fault(NamedTuple):
    """One way of harm.

    harm(places) does it, and returns how it is undone, or None where nothing must be. says: what
    the command then prints. code: its exit code.
    """

    harm: Callable[[Places], Undo | None]
    says: str
    code: int = 0


def newest(run: pathlib.Path) -> pathlib.Path:
    """The last checkpoint."""
    steps = [p for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    return max(steps, key=lambda path: int(path.name))


def _biggest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncated(places: Places) -> None:
    path = _biggest(newest(places.run) / "weights")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(places: Places) -> None:
    path = _biggest(newest(places.run) / "memories")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _half_deleted(places: Places) -> None:
    shutil.rmtree(newest(places.run) / "memories")


def _emptied(places: Places) -> None:
    for path in newest(places.run).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _half_a_line(places: Places) -> None:
    path = places.run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def _text_gone(places: Places) -> Undo:
    path = places.texts / "3.txt"
    content = path.read_bytes()
    path.unlink()
    return lambda: _put(path, content)


def _text_changed(places: Places) -> Undo:
    path = places.texts / "3.txt"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"bottles", b"battles"))
    return lambda: _put(path, content)


def _no_json(places: Places) -> Undo:
    path = places.run / "config.json"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return lambda: _put(path, content)


def _clock_jumps(places: Places) -> Undo:
    """Three days ahead before a save, then, perhaps during one, to thirty days ago."""
    return _patched(
        places,
        """
        import time
        real, days = time.time, [0]
        time.time = lambda: real() + 86400 * days[0]
        from nlx_experiments import record
        add = record.Log.add

        def jumping(log, step, measured):
            days[0] = {13: 3, 18: -30}.get(step, days[0])
            add(log, step, measured)

        record.Log.add = jumping
        """,
    )


def _disk_full(places: Places) -> Undo:
    """No file can be larger than 20,000 bytes: a save begins, and fails while it is written."""
    return _patched(
        places,
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        """,
    )


def not_a_number(patches: pathlib.Path, step: int) -> None:
    """Loss and gradients of one step, the first being 1, are no numbers."""
    _patch(
        patches,
        f"""
        import jax.numpy as jnp
        from nlx import train
        made = train.make_train_step

        def make(loss, *rest, **options):
            def harmed(params, batch):
                told = {{name: value for name, value in batch.items() if name != "step"}}
                return loss(params, told) * jnp.where(batch["step"] + 1 == {step}, jnp.nan, 1)

            step = made(harmed, *rest, **options)
            return lambda state, batch: step(state, {{**batch, "step": state.step}})

        train.make_train_step = make
        """,
    )


def _patched(places: Places, code: str) -> Undo:
    return _patch(places.patches, code).unlink


def _patch(patches: pathlib.Path, code: str) -> pathlib.Path:
    patches.mkdir(parents=True, exist_ok=True)
    path = patches / "sitecustomize.py"
    path.write_text(textwrap.dedent(code))
    return path


def _put(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)


FAULTS: dict[str, Fault] = {
    "a truncated checkpoint": Fault(_truncated, r"checkpoint of step \d+ is damaged"),
    "a flipped bit in a checkpoint": Fault(_flipped, r"checkpoint of step \d+ is damaged"),
    "a half-deleted checkpoint": Fault(_half_deleted, r"checkpoint of step \d+ is damaged"),
    "an emptied checkpoint": Fault(_emptied, r"checkpoint of step \d+ is damaged"),
    "half a line of metrics": Fault(_half_a_line, "Going on from step"),
    "a text that is gone": Fault(_text_gone, "the text is no longer what", 2),
    "a text that changed": Fault(_text_changed, "the text is no longer what", 2),
    "half a configuration": Fault(_no_json, "config.json is damaged", 2),
    "a clock that jumps": Fault(_clock_jumps, "Going on from step"),
    "a disk that fills up during a save": Fault(
        _disk_full, r"could not be written .* the last good one is of step \d+", 2
    ),
}
SOME = (
    "a truncated checkpoint", "a flipped bit in a checkpoint", "a half-deleted checkpoint",
    "a text that is gone", "a disk that fills up during a save",
)  # fmt: skip


def missing(fault: Fault, code: int, printed: str) -> str | None:
    """What is wrong with how a harmed run ended, or None."""
    if code != fault.code:
        return f"ended with {code}, not {fault.code}: {printed[-300:]}"
    if not re.search(fault.says, printed):
        return f"did not say {fault.says!r}: {printed[-300:]}"
    if "Traceback" in printed:
        return f"showed a trace: {printed[-300:]}"
    return None
