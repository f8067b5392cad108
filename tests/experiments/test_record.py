# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself: norms of levels, time, shares of peak, memories, loggers, profiles."""

import dataclasses
import hashlib
import json
import os
import sys
import types

import jax
import numpy as np
import pytest
from nlx_experiments import chips, config, learner, ledger, loggers, loop, record, runs
from nlx_experiments.chips import Chip
from nlx_experiments.errors import Refused
from nlx_experiments.ledger import Ledger

from nlx import nn


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for n in range(9):
        (folder / f"{n}.txt").write_text("".join(f"{n} and {i}, " for i in range(90)))
    return folder


@pytest.fixture(scope="module")
def told():
    """What a stand-in for TensorBoard was told."""
    return []


@pytest.fixture(scope="module")
def finished(texts, told, tmp_path_factory):
    """A run of four steps with everything switched on, on a device of a known peak."""
    small = dict(width=16, layers=1, heads=2, hidden=8)
    model = dataclasses.replace(nn.preset("deltanet-tiny"), **small)
    made = config.make(
        "deltanet-tiny", model=model, run=tmp_path_factory.mktemp("record") / "run", data=(texts,),
        steps=4, batch=2, length=8, eval_bytes=100, log_every=2, probe_every=2, profile_at=3,
        profile_steps=1, log=("tensorboard",), spike=50.0,
    )  # fmt: skip

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append("closed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
        patch.setattr(chips, "of", lambda kind: Chip(1e9, 1e9, 1e9, 1e9))
        loop.train(made)
    return made


def lines(made, name):
    return runs.read_lines(made.folder / f"{name}.jsonl")


def test_every_level_has_its_norms(finished):
    for line in lines(finished, "metrics"):
        for kind in ("gradients", "updates", "parameters", "moved"):
            assert set(line[kind]) == {"outer"}
            assert line[kind]["outer"] > 0
        assert line["gradients"]["outer"] == pytest.approx(line["gradient_norm"], rel=1e-5)
        assert (line["skipped"], line["spiked"]) == (0, 0)


def test_the_share_of_the_peak_is_tokens_times_operations(finished):
    for line in lines(finished, "speed"):
        wanted = line["tokens_per_s"] * learner.flops_a_token(finished) / 1e9 / jax.device_count()
        assert line["mfu"] == pytest.approx(wanted, abs=1e-3)


def test_time_is_told_by_what_it_went_to(finished):
    time = json.loads((finished.folder / "time.json").read_text())
    assert set(time["seconds"]) == {*ledger.KINDS, "rest"}
    assert all(time["seconds"][kind] > 0 for kind in ("compile", "step", "save", "evaluation"))
    assert sum(time["seconds"].values()) == pytest.approx(time["total"], abs=0.05)
    assert time["goodput"] == pytest.approx(time["seconds"]["step"] / time["total"], abs=1e-3)


def test_a_ledger_goes_on_where_it_was(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ledger, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    first = Ledger()
    with first.spent("step"):
        clock[0] += 3
    clock[0] += 1
    told = first.told()
    assert told == {"seconds": dict.fromkeys(ledger.KINDS, 0) | {"step": 3, "rest": 1}} | {
        "total": 4, "goodput": 0.75,
    }  # fmt: skip
    clock[0] += 1000
    again = Ledger(told)
    with again.spent("save"):
        clock[0] += 4
    assert again.told()["seconds"] == told["seconds"] | {"save": 4}
    assert (again.told()["total"], again.told()["goodput"]) == (8, 0.375)
    killed = Ledger(told, lost=2.0).told()
    assert killed["seconds"] == told["seconds"] | {"lost": 2}
    assert (killed["total"], killed["goodput"]) == (6, 0.5)


def test_what_a_kill_lost_is_read_from_the_ages_of_files(tmp_path):
    with runs.Run(tmp_path) as run:
        assert loop._lost(run) == 0

        def write(name, second):
            (tmp_path / name).write_text("{}")
            os.utime(tmp_path / name, (second, second))

        write("corpus.json", 100)
        (tmp_path / "config.json.half").symlink_to("gone")  # another process is writing it
        assert loop._lost(run) == 0
        write("metrics.jsonl", 130)
        assert loop._lost(run) == 30  # killed before it was saved
        write("time.json", 125)
        assert loop._lost(run) == 5
        write("time.json", 131)  # saved, then left
        assert loop._lost(run) == 0


def test_a_streak_of_skipped_steps_rolls_no_good_checkpoint_away(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SKIPS", 6)
    small = dict(width=16, layers=1, heads=2, hidden=8)
    model = dataclasses.replace(nn.preset("deltanet-tiny"), **small)
    made = config.make(
        "deltanet-tiny", model=model, run=tmp_path / "run", data=(texts,), steps=12, batch=2,
        length=8, eval_bytes=100, log_every=2, save_every=2, keep=1,
    )  # fmt: skip
    functions = learner.make(made)

    def step(state, start, batch):
        state, measured = functions.step(state, start, batch)
        if int(state.step) > 4:
            measured |= {"skipped": np.int32(1)}
        return state, measured

    monkeypatch.setattr(learner, "make", lambda config: functions._replace(step=step))
    with pytest.raises(Refused, match="up to 10, .*last good checkpoint is of step 4 in"):
        loop.train(made)
    there = sorted(p.name for p in (made.folder / "checkpoints").iterdir() if p.name.isdigit())
    assert there == ["4"]


def test_what_all_processes_must_hold_is_told_by_content(texts, tmp_path, monkeypatch):
    told, file = {}, tmp_path / "weights.safetensors"
    file.write_bytes(b"some weights")

    def agree(name, value):
        told.update(value)
        raise Refused("far enough")

    monkeypatch.setattr(loop.hosts, "agree", agree)
    made = config.make(
        "deltanet-tiny", run=tmp_path / "run", data=(texts,), steps=2, init_from=file
    )
    with pytest.raises(Refused, match="far enough"):
        loop.train(made)
    assert told["init_from"] == hashlib.sha256(b"some weights").hexdigest()
    assert {"text", "tokenizer", "learning_rate"} <= told.keys()


def test_what_went_by_before_is_the_start(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ledger, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    made = Ledger({"seconds": {"start": 2.0, "step": 3.0}, "total": 6.0}, since=90.0)
    with made.spent("step"):
        clock[0] += 4
    told = made.told()
    assert (told["seconds"]["start"], told["seconds"]["step"], told["seconds"]["rest"]) == (
        12,
        7,
        1,
    )
    assert told["total"] == 20


def damaged(path):
    content = path.read_bytes().split(b"\n")
    content[1] = b"\xf0" + content[1][5:]
    path.write_bytes(b"\n".join(content) + b'{"step": 5, "lo')
    return path.read_bytes()


def test_one_damaged_line_costs_no_other(tmp_path):
    """A byte that is no character, in the second of four lines; and the last one is half."""
    path, said = tmp_path / "metrics.jsonl", []
    with runs.Run(tmp_path) as run:
        runs.append(run.stream("metrics", 0), [{"step": n} for n in range(1, 5)])
    before = damaged(path)
    with runs.Run(tmp_path) as run:
        run.stream("metrics", 4, said.append)
    assert [line["step"] for line in runs.read_lines(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert len(said) == 1
    assert "is damaged in line 2 of 5" in said[0]
    with runs.Run(tmp_path) as run:
        run.stream("metrics", 3, said.append)  # what is cut off is no damage
    assert len(said) == 1


def test_memories_are_looked_at(finished):
    seen = lines(finished, "probe")
    assert [line["step"] for line in seen] == [2, 4]
    (level,) = seen[0]["levels"]
    assert level == "blocks.0.mixer.memory"
    assert set(seen[0]["levels"][level]) == {"surprise", "update", "retain"}
    assert seen[0]["levels"][level]["retain"] == 1  # DeltaNet keeps all
    assert seen[0]["levels"] != seen[1]["levels"]


def test_the_profiler_wrote_its_step(finished):
    written = [p for p in (finished.folder / "profile").rglob("*") if p.is_file()]
    assert any(p.stat().st_size > 0 for p in written)


def test_a_logger_is_told_every_number(finished, told):
    metrics = lines(finished, "metrics")
    numbers = {(name, step): value for name, value, step in told[:-1]}
    assert told[-1] == "closed"
    for line in metrics:
        assert numbers["bits_per_byte", line["step"]] == line["bits_per_byte"]
        assert numbers["updates/outer", line["step"]] == line["updates"]["outer"]
    assert ("tokens_per_s", 4) in numbers


@pytest.mark.parametrize("name", loggers.NAMES)
def test_a_logger_that_is_not_there_is_refused(name, tmp_path, monkeypatch):
    for package in ("tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Refused, match=rf'not installed: pip install "nlx\[{name}\]"'):
        loggers.make(name, tmp_path, {})


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("trackio", "trackio")])
def test_the_others_are_begun_once_and_gone_on_with(name, package, tmp_path, monkeypatch):
    calls = []
    note = lambda kind: lambda *args, **named: calls.append((kind, args, named)) or made
    made = types.SimpleNamespace(log=note("log"), finish=note("finish"), init=note("init"))
    monkeypatch.setitem(sys.modules, package, made)
    logger = loggers.make(name, tmp_path / "run", {"a": 1})
    logger.tell(3, {"x": 0.5})
    logger.close()
    kinds = [kind for kind, _, _ in calls]
    assert kinds == ["init", "log", "finish"]
    assert calls[0][2]["resume"] == "allow"
    assert calls[0][2]["config"] == {"a": 1}
    assert calls[1][1:] == (({"x": 0.5},), {"step": 3})


def test_names_of_nested_numbers():
    given = {"step": 3, "a": 1, "b": {"c": 0.5, "d": None}, "e": "text"}
    assert loggers.flat(given) == {"a": 1, "b/c": 0.5}


def test_spikes_end_a_run_and_name_the_last_checkpoint(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SKIPS", 2)
    small = dict(width=16, layers=1, heads=2, hidden=8)
    model = dataclasses.replace(nn.preset("deltanet-tiny"), **small)
    made = config.make(
        "deltanet-tiny", model=model, run=tmp_path / "run", data=(texts,), steps=8, batch=2,
        length=8, eval_bytes=100, log_every=3, save_every=3,
    )  # fmt: skip
    functions = learner.make(made)

    def step(state, start, batch):
        state, measured = functions.step(state, start, batch)
        if int(state.step) > 4:
            measured |= {"skipped": np.int32(1), "spiked": np.int32(1)}
        return state, measured

    monkeypatch.setattr(learner, "make", lambda config: functions._replace(step=step))
    with pytest.raises(
        Refused, match="up to 6, .* or were spikes.*last good checkpoint is of step 3 in"
    ):
        loop.train(made)
    assert [line["spiked"] for line in lines(made, "metrics")] == [0, 0, 0, 0, 1, 1]
