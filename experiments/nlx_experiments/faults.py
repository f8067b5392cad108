# SPDX-License-Identifier: Apache-2.0
"""Kills a training run, harms it in every other way, and demands the bits of an undisturbed one.

    python -m nlx_experiments.faults --kills 100 --harms all

Trains a small Hope with the deep optimizer on a small text once undisturbed, then once more while
killing it: at steps chosen by the seed, every third time during a save (as soon as a half-written
checkpoint is seen), every third while it is still starting. Then every array of the two last
checkpoints, the position in the data and `metrics.jsonl` must be equal, bit by bit. In both the
gradients of one step, chosen by the seed, are no numbers: it alone must be skipped, and said to be.
Harms: see `damage`. Takes a minute to compile and about 10 s a kill or a harm on two idle cores.
"""

import dataclasses
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

from nlx_experiments import damage, runs

POLL = 0.001
HARMED = 30  # steps of a run that is harmed
PATIENCE = 1200.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """Kills a training run and compares it with an undisturbed one."""

    kills: int = 20
    """How often to kill."""
    harms: Literal["none", "some", "all"] = "none"
    """Which other harm is done: none, five kinds, or all."""
    seed: int = 0
    """Chooses the moments."""
    preset: str = "hope-tiny"
    """What to train."""
    folder: pathlib.Path | None = None
    """Where to work; a temporary folder that is removed afterwards by default."""

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.kills < 0:
            raise ValueError(f"`kills` is {self.kills}; it must be an integer >= 0.")


def compare(folder: pathlib.Path, preset: str, kills: int, seed: int) -> list[str]:
    """Runs both; returns what differs, nothing if all is well."""
    steps = 20 + 10 * kills
    folder.mkdir(parents=True, exist_ok=True)
    _write_texts(folder / "text")
    begun = time.monotonic()
    rng = random.Random(seed)
    poor = rng.randint(2, steps)
    damage.not_a_number(folder / "patches", poor)
    start = functools.partial(_start, folder, preset, steps)
    _finish(start("undisturbed"))
    print(f"undisturbed: {steps} steps in {time.monotonic() - begun:.0f} s", flush=True)
    shutil.copytree(folder / "undisturbed" / "compiled", folder / "killed" / "compiled")
    for i in range(kills):
        moment = ("save", "step", "start")[i % 3]
        _kill(start, folder / "killed", steps, (i, kills), moment, rng)
    _finish(start("killed"))
    found = differences(folder / "undisturbed", folder / "killed", steps)
    metrics = runs.read_lines(folder / "killed" / "metrics.jsonl")
    if [line["step"] for line in metrics if line["skipped"]] != [poor]:
        found.append(f"the skipped steps: step {poor} alone should have been")
    if f"Step {poor} was skipped" not in (folder / "killed.log").read_text():
        found.append(f"the sentence about step {poor}")
    return found


def harmed(folder: pathlib.Path, preset: str, names: Sequence[str]) -> list[str]:
    """Harms a run that was killed half-way, in each of these ways; returns what is wrong."""
    places = damage.Places(folder / "harmed", folder / "text", folder / "patches")
    places.patches.mkdir(parents=True)
    _write_texts(places.texts)
    start = functools.partial(_start, folder, preset, HARMED)
    _finish(start("undisturbed"))
    shutil.copytree(folder / "undisturbed" / "compiled", folder / "half" / "compiled")
    process = start("half")
    while _last_step(folder / "half") < HARMED // 2 + 2:  # three checkpoints are there
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it was killed (code {process.returncode})")
        time.sleep(POLL)
    process.kill()
    process.wait()
    wrong = []
    for name in names:
        fault = damage.FAULTS[name]
        shutil.rmtree(places.run, ignore_errors=True)
        shutil.copytree(folder / "half", places.run)
        undo = fault.harm(places)
        code, printed = _printed(folder, preset, places)
        if undo is not None:
            undo()
        found = damage.missing(fault, code, printed)
        if fault.code and found is None:
            code, printed = _printed(folder, preset, places)
            found = printed[-300:] if code else None
        differ = [] if found else differences(folder / "undisturbed", places.run, HARMED)
        said = found or (f"{len(differ)} things differ: {differ[:3]}" if differ else "nothing lost")
        print(f"{name}: {said}", flush=True)
        wrong += [name] if found or differ else []
    return wrong


def _printed(folder: pathlib.Path, preset: str, places: damage.Places) -> tuple[int, str]:
    """Gives the command to its end; exit code, and all it printed."""
    done = subprocess.run(
        command(folder, preset, HARMED, places.run.name),
        env=_with(places.patches),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


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


def command(folder: pathlib.Path, preset: str, steps: int, name: str) -> list[str]:
    """The training command of a small model, the same every time."""
    options = {
        "data": folder / "text",
        "run": folder / name,
        "steps": steps,
        "optimizer": "dmgd",
        "batch": 2,
        "length": 48,
        "save-every": 5,
        "log-every": 1,
        "eval-bytes": 500,
    }
    sizes = {"width": 32, "layers": 1, "heads": 2, "hidden": 32, "memory-hidden": 8}
    sizes |= {"chunk-size": 8, "projection-chunk-size": 16}
    options |= {f"model.{size}": number for size, number in sizes.items()}
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    flags += ["--model.cms-periods", "1", "3"]
    return [sys.executable, "-m", "nlx_experiments.run", "train", preset, *flags]


def _with(patches: pathlib.Path) -> dict[str, str]:
    """The environment of a process that runs what lies in `patches` first."""
    searched = os.pathsep.join([str(patches.absolute()), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": searched}


def _start(folder: pathlib.Path, preset: str, steps: int, name: str) -> subprocess.Popen:
    (folder / name).mkdir(exist_ok=True)
    with open(folder / f"{name}.log", "a") as log:
        arguments = command(folder, preset, steps, name)
        return subprocess.Popen(arguments, stdout=log, stderr=log, env=_with(folder / "patches"))


def _finish(process: subprocess.Popen) -> None:
    if process.wait(PATIENCE):
        raise RuntimeError(f"the training command failed with code {process.returncode}")


def _kill(
    start: Callable[[str], subprocess.Popen],
    run: pathlib.Path,
    steps: int,
    count: tuple[int, int],
    moment: str,
    rng: random.Random,
) -> None:
    """Starts the run, waits for the moment, kills it."""
    i, kills = count
    before = _last_step(run)
    target = before + rng.randint(1, max(1, (steps - before) // (kills - i + 1)))
    delay = rng.uniform(0.5, 5.0)
    process, begun = start(run.name), time.monotonic()
    come: dict[str, Callable[[], bool]] = {
        "save": lambda: _last_step(run) >= target and _half_written(run),
        "step": lambda: _last_step(run) >= target,
        "start": lambda: time.monotonic() - begun > delay,
    }
    while not come[moment]():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before kill {i + 1} (code {process.returncode})")
        time.sleep(POLL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    doing = {"save": "during a save", "step": "while learning", "start": "while starting"}[moment]
    print(f"kill {i + 1}/{kills}: after step {_last_step(run)} of {steps}, {doing}", flush=True)


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
        found = []
        if config.kills:
            found = compare(folder / "kills", config.preset, config.kills, config.seed)
            same = f"{config.kills} kills: weights, memories, data position and metrics are bitwise"
            differ = f"{len(found)} things differ: {', '.join(found[:20])}"
            print(differ if found else f"{same} equal.", flush=True)
        names = {"none": (), "some": damage.SOME, "all": tuple(damage.FAULTS)}[config.harms]
        wrong = harmed(folder / "harms", config.preset, names) if names else []
        if names:
            print(f"{len(names)} harms, {len(wrong)} of them with loss or without a sentence.")
    return 1 if found or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
