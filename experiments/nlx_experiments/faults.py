# SPDX-License-Identifier: Apache-2.0
"""kill -9 a training run, again and again, and demand the bits of a run that nothing disturbed.

    python -m nlx_experiments.faults --kills 20

Trains a small Hope with the deep optimizer on a small text once undisturbed, then once more while
killing it: at steps chosen by the seed, every third time during a save (as soon as a half-written
checkpoint is seen), every third while it is still starting. Then every array of the two last
checkpoints, the position in the data and `metrics.jsonl` must be equal, bit by bit.
Takes about 6 s a kill on two cores.
"""

import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

from nlx_experiments import runs

POLL = 0.001
PATIENCE = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """Kills a training run and compares it with an undisturbed one."""

    kills: int = 20
    """How often to kill."""
    seed: int = 0
    """Chooses the moments."""
    folder: pathlib.Path | None = None
    """Where to work; a temporary folder that is removed afterwards by default."""

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.kills < 1:
            raise ValueError(f"`kills` must be at least 1, got {self.kills}.")


def compare(folder: pathlib.Path, kills: int, seed: int) -> list[str]:
    """Runs both; returns what differs, nothing if all is well."""
    steps = 20 + 12 * kills
    _write_texts(folder / "text")
    start = time.monotonic()
    _finish(_start(folder, "undisturbed", steps))
    print(f"undisturbed: {steps} steps in {time.monotonic() - start:.0f} s", flush=True)
    shutil.copytree(folder / "undisturbed" / "compiled", folder / "killed" / "compiled")
    rng = random.Random(seed)
    for i in range(kills):
        kind = ("step", "save", "start")[i % 3]
        _kill(folder, steps, i, kills, kind, rng)
    _finish(_start(folder, "killed", steps))
    return differences(folder / "undisturbed", folder / "killed", steps)


def differences(one: pathlib.Path, other: pathlib.Path, step: int) -> list[str]:
    """Names of the files and arrays of two finished runs that are not bitwise equal."""
    found = [
        name
        for name in ("metrics.jsonl", "result.json", f"checkpoints/{step}/progress/metadata")
        if (one / name).read_bytes() != (other / name).read_bytes()
    ]
    for item in ("weights", "memories", "rest"):
        arrays = [_arrays(run / "checkpoints" / str(step) / item) for run in (one, other)]
        if arrays[0].keys() != arrays[1].keys():
            found.append(f"the names in {item}")
            continue
        for name, array in arrays[0].items():
            same = array.dtype == arrays[1][name].dtype and array.shape == arrays[1][name].shape
            if not same or array.tobytes() != arrays[1][name].tobytes():
                found.append(f"{item}{name}")
    return found


def _arrays(item: pathlib.Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(item.absolute())
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def command(folder: pathlib.Path, name: str, steps: int) -> list[str]:
    """The training command, the same every time."""
    options = {
        "--data": folder / "text",
        "--run": folder / name,
        "--steps": steps,
        "--optimizer": "dmgd",
        "--batch": 2,
        "--length": 48,
        "--save-every": 2,
        "--log-every": 1,
        "--eval-bytes": 500,
    }
    flags = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "nlx_experiments.run", "train", "hope-tiny", *flags]


def _start(folder: pathlib.Path, name: str, steps: int) -> subprocess.Popen:
    (folder / name).mkdir(exist_ok=True)
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(command(folder, name, steps), stdout=log, stderr=log)


def _finish(process: subprocess.Popen) -> None:
    if process.wait(PATIENCE):
        raise RuntimeError(f"the training command failed with code {process.returncode}")


def _kill(
    folder: pathlib.Path, steps: int, i: int, kills: int, kind: str, rng: random.Random
) -> None:
    run = folder / "killed"
    before = _last_step(run)
    target = before + rng.randint(1, max(1, (steps - before) // (kills - i + 1)))
    process = _start(folder, "killed", steps)
    begun = time.monotonic()
    delay = rng.uniform(0.5, 5.0)
    moments: dict[str, Callable[[], bool]] = {
        "step": lambda: _last_step(run) >= target,
        "save": lambda: _last_step(run) >= target and _half_written(run),
        "start": lambda: time.monotonic() - begun > delay,
    }
    while not moments[kind]():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before kill {i + 1} (code {process.returncode})")
        time.sleep(POLL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saved = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())
    where = {"save": "during a save", "start": f"{delay:.1f} s after its start", "step": ""}[kind]
    print(
        f"kill {i + 1}/{kills}: at step {_last_step(run)} {where}, "
        f"newest checkpoint {saved[-1] if saved else 'none'}",
        flush=True,
    )


def _last_step(run: pathlib.Path) -> int:
    lines = runs.read_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def _half_written(run: pathlib.Path) -> bool:
    try:
        return any("tmp" in p.name for p in (run / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def _write_texts(folder: pathlib.Path) -> None:
    folder.mkdir()
    for i in range(12):
        lines = (f"line {j} of text {i}: {j * j % 97} bottles\n" for j in range(60 + i))
        (folder / f"{i}.txt").write_text("".join(lines))


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if every bit agrees."""
    config = tyro.cli(Faults, args=argv, prog="python -m nlx_experiments.faults")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(config.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = compare(folder, config.kills, config.seed)
    if found:
        print(f"{len(found)} things differ: {', '.join(found[:20])}")
        return 1
    print(f"{config.kills} kills: weights, memories, data position and metrics are bitwise equal.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
