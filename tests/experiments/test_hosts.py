# SPDX-License-Identifier: Apache-2.0
"""Two processes of four simulated devices learn what one with eight does, and end together."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from nlx_experiments import batching, hosts, runs
from nlx_experiments.config import TrainConfig
from nlx_experiments.errors import Refused
from nlx_experiments.hosts import HostsConfig

STEPS = 12
SIZES = {
    "model.width": 32, "model.layers": 1, "model.heads": 4, "model.hidden": 16, "steps": STEPS,
    "batch": 8, "length": 16, "eval-bytes": 500, "log-every": 1, "save-every": 4,
    "mesh.data": 4, "mesh.fsdp": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for n in range(9):
        lines = (f"{n} times {i} is {n * i}\n" for i in range(60))
        (folder / f"{n}.txt").write_text("".join(lines))
    return folder


def begin(texts, run, devices, *flags):
    """A process that trains."""
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "nlx_experiments.run", "train", "hope-attention-tiny", *sizes]
    command += ["--model.cms-periods", "1", "2", "--data", str(texts), "--run", str(run), *flags]
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's alarms, on a busy machine, are not what is tested
        "JAX_COMPILATION_CACHE_DIR": str(run.parent / "compiled"),
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT)


def two(texts, run, *flags, second=(), count=2):
    """So many processes; `second` is told the second one alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = [f"--hosts.coordinator=localhost:{port}", f"--hosts.count={count}", *flags]
    of = lambda n: [*common, f"--hosts.index={n}", *(second if n else ())]
    return [begin(texts, run, 4, *of(n)) for n in range(count)]


def ended(processes, timeout=400):
    """Exit codes and what was printed."""
    printed = [p.communicate(timeout=timeout)[0].decode() for p in processes]
    return [p.returncode for p in processes], printed


def without_figures(printed):
    """Lines of it."""
    return {re.sub(r"\d+", "", line).strip() for line in printed.splitlines()} - {""}


def losses(run):
    return [line["bits_per_byte"] for line in runs.read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory):
    """One process with eight devices, to the end."""
    run = tmp_path_factory.mktemp("alone") / "run"
    codes, printed = ended([begin(texts, run, 8)])
    assert codes == [0], printed
    return run


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(texts, alone, tmp_path):
    codes, printed = ended(two(texts, tmp_path / "run"))
    assert codes == [0, 0], printed
    assert len(losses(tmp_path / "run")) == STEPS
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)
    scores = [json.loads((r / "result.json").read_text()) for r in (alone, tmp_path / "run")]
    assert scores[0]["bits_per_byte"] == pytest.approx(scores[1]["bits_per_byte"], rel=1e-5)
    assert "bits per held-out byte" in printed[0]
    of_both = without_figures(printed[0]) & without_figures(printed[1])
    assert not {line for line in of_both if not line.startswith("[Gloo]")}, printed[1]


def killed(texts, run, index):
    """Two processes, of which one is killed after a checkpoint; exit codes and what they said."""
    processes = two(texts, run, "--steps", "100000")
    until(lambda: (run / "checkpoints" / "4").exists(), processes)
    (child,) = children(processes[index].pid)
    os.kill(child, signal.SIGKILL)
    return ended(processes)


def children(pid):
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in listed.split()]


def until(holds, processes, patience=300):
    end = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < end
        assert all(p.poll() is None for p in processes), ended(processes)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_one_is_killed_and_the_other_leaves_with_a_sentence(texts, tmp_path, index):
    codes, printed = killed(texts, tmp_path / "run", index)
    assert codes[index] == 128 + signal.SIGKILL
    assert codes[1 - index] == os.EX_UNAVAILABLE, printed
    assert "another one of the training is lost" in printed[1 - index]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_it_goes_on_with_one_or_two(texts, alone, tmp_path, processes):
    run = tmp_path / "run"
    began = two(texts, run)
    until(lambda: (run / "checkpoints" / "8").exists() or len(losses(run)) > 8, began)
    for process in began:
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
    ended(began)
    rest = two(texts, run) if processes == 2 else [begin(texts, run, 8)]
    codes, printed = ended(rest)
    assert set(codes) == {0}, printed
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_a_damaged_part_of_one_process_is_passed_over_by_both(texts, alone, tmp_path):
    run, shared = tmp_path / "run", ("--mesh.data", "1", "--mesh.fsdp", "8")  # both hold parts
    codes, printed = ended(two(texts, run, *shared))
    assert codes == [0, 0], printed
    (run / "result.json").unlink()
    of_second = [*(run / "checkpoints" / str(STEPS)).rglob("ocdbt.process_1/d/*")]
    assert of_second
    for path in of_second:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    codes, printed = ended(two(texts, run, *shared))
    assert codes == [0, 0], printed
    assert f"checkpoint of step {STEPS} is damaged" in printed[0]
    assert (run / "damaged" / str(STEPS)).exists()
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_stops_both(texts, tmp_path):
    run = tmp_path / "run"
    processes = two(texts, run, "--steps", "100000")
    until(lambda: len(losses(run)) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, printed = ended(processes)
    assert codes == [143, 143], printed
    assert "SIGTERM: step" in printed[0]
    last = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert last == len(losses(run))


@pytest.mark.slow
def test_who_is_started_and_killed_leaves_nobody_behind(texts, tmp_path):
    """The process that trains is below the one that was started, and saves when that is killed."""
    run = tmp_path / "run"
    (process,) = two(texts, run, "--steps", "100000", "--mesh.fsdp", "1", count=1)
    until(lambda: len(losses(run)) > 2, [process])
    (child,) = children(process.pid)
    process.kill()
    until(lambda: not pathlib.Path(f"/proc/{child}").exists(), [])
    ended([process])
    last = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert last == len(losses(run))


@pytest.mark.slow
def test_processes_that_are_told_different_things_refuse(texts, tmp_path):
    codes, printed = ended(two(texts, tmp_path / "run", second=["--learning-rate", "0.5"]))
    assert codes == [2, 2], printed
    for text in printed:
        assert "nlx: the processes have different configurations; they must be told the sam" in text
    assert not (tmp_path / "run" / "config.json").exists()


def test_each_process_reads_its_rows():
    stream = np.arange(1000, dtype=np.int32) % 250
    whole = batching.training_data(stream, length=9, batch=4, seed=0)
    part = batching.training_data(stream, length=9, batch=4, seed=0, rows=(1, 3))
    for n in (0, 1, 40):
        wanted, found = whole[n], part[n]
        np.testing.assert_array_equal(found["tokens"][[1, 3]], wanted["tokens"][[1, 3]])
        assert not found["tokens"][[0, 2]].any()
    batches = batching.batches(part)
    read = [next(batches)["tokens"] for _ in range(3)]
    state = batches.get_state()
    after = next(batches)["tokens"]
    np.testing.assert_array_equal(read[2], part[2]["tokens"])
    np.testing.assert_array_equal(next(batching.batches(part, state))["tokens"], after)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(count=2), "`hosts.count` is 2 and `hosts.coordinator` is None; it must be ADDRESS:"),
        (dict(coordinator="auto", index=0), "`hosts.index` is 0 and .* is auto"),
        (dict(coordinator="a:1", count=2), "`hosts.index` is missing"),
        (dict(coordinator="a:1", count=2, index=2), r"`hosts.index` is 2; it must be in \[0, 2\)"),
        (dict(coordinator="a:1", count=0, index=0), "`hosts.count` is 0; it must be an integer"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        HostsConfig(**fields)


def test_one_process_does_all_on_its_own():
    assert hosts.first()
    assert hosts.any_of(True)
    assert not hosts.any_of(False)
    assert hosts.by_first(lambda: 3) == 3
    with pytest.raises(Refused, match="no"):
        hosts.by_first(lambda: (_ for _ in ()).throw(Refused("no")))
    assert TrainConfig.hosts == HostsConfig()
