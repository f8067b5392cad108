# SPDX-License-Identifier: Apache-2.0
"""The run: learns, resumes to the bit, falls back, reports, generates; all on a small model."""

import base64
import dataclasses
import functools
import json
import shutil
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nlx_experiments import (
    batching,
    checkpoints,
    config,
    console,
    data,
    demo,
    demo_check,
    evaluate,
    faults,
    generate,
    learner,
    loop,
    record,
    report,
    runs,
)
from nlx_experiments.errors import Refused, Stopped

from nlx import nn

STEPS = 6
compiled = functools.cache(learner.make)


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    """Stand-ins for the presets that compile in a second, once; Hope is in the slow tier."""
    small = dict(width=16, layers=1, heads=2, hidden=16, cms_periods=(1, 4))
    hope = dataclasses.replace(nn.PRESETS["hope-attention-tiny"], **small)
    rival = dataclasses.replace(nn.PRESETS["transformer++-tiny"], **small)
    monkeypatch.setitem(nn.PRESETS, "hope-tiny", hope)
    monkeypatch.setitem(nn.PRESETS, "transformer++-tiny", rival)
    anywhere = lambda config: compiled(dataclasses.replace(config, run=None))
    monkeypatch.setattr(learner, "make", anywhere)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"text {i}\n" + "".join(f"{j * j}, " for j in range(80)))
    return folder


@pytest.fixture
def chosen(texts, tmp_path):
    """A run of six steps with the deep optimizer and two clocks."""
    return config.make(
        "hope-tiny",
        optimizer="dmgd",
        data=(texts,),
        run=tmp_path / "run",
        steps=STEPS,
        batch=2,
        length=24,
        save_every=2,
        log_every=1,
        eval_bytes=200,
    )


@pytest.fixture(scope="module")
def unbroken(texts, tmp_path_factory):
    """Folder and result of the same run, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        small_presets.__wrapped__(patch)
        where = tmp_path_factory.mktemp("unbroken")
        whole = chosen.__wrapped__(texts, where)
        return whole, loop.train(whole)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal when `step` is logged."""

    class Interrupting(loop.display("", 1, 0).__class__):
        def show(self, now, *measured):
            super().show(now, *measured)
            if now == step:
                signal.raise_signal(number)

    monkeypatch.setattr(loop, "display", lambda name, steps, done: Interrupting(name, steps))


def test_a_run_leaves_its_record(unbroken):
    chosen, result = unbroken
    assert result == runs.read_json(chosen.folder / "result.json")
    assert 0 < result["bits_per_byte"] < 9
    assert set(result["ngram_bits_per_byte"]) == {"2", "3"}
    records = runs.read_lines(chosen.folder / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["bytes"] == 6 * 2 * 24
    assert {"outer", "cms_0", "cms_1"} == set(records[0]["updates"]) == set(records[0]["moved"])
    # The slow block, of period 4, moves once.
    assert [r["updates"]["cms_1"] > 0 for r in records] == [s == 4 for s in range(1, 7)]
    assert [r["moved"]["cms_1"] > 0 for r in records] == [s >= 4 for s in range(1, 7)]
    assert all(r["updates"]["outer"] > 0 for r in records)
    environment = runs.read_json(chosen.folder / "environment.json")
    assert {"jax", "devices", "revision", "python"} <= set(environment)
    assert config.of_run(chosen.folder) == chosen
    corpus = runs.read_json(chosen.folder / "corpus.json")
    assert len(corpus["files"]) == 9


def test_the_result_is_of_the_trained_weights_on_bytes_they_do_not_see(unbroken):
    """Scores recomputed from the last checkpoint, byte by byte, and from the bytes seen."""
    chosen, result = unbroken
    corpus = data.load(chosen.data)
    model = learner.load(chosen)
    starts = evaluate.scored_positions(corpus, chosen.length, chosen.eval_bytes)
    bits = []
    for row in starts:
        window = corpus.heldout[row[0] - 1 : row[-1] + 1].astype(np.int32)
        scores = np.asarray(model(window[None, :-1])[0][0], np.float64)
        chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        bits += list(-np.log2(chances[np.arange(chosen.length), window[1:]]))
    assert len(bits) == result["bytes_scored"]
    np.testing.assert_allclose(np.mean(bits), result["bits_per_byte"], rtol=1e-5)

    dataset = batching.training_data(
        corpus.train, length=chosen.length, batch=chosen.batch, seed=chosen.seed
    )
    batches = batching.batches(dataset)
    seen = np.zeros(corpus.train.size, bool)
    for _ in range(STEPS):
        for number in next(batches)["window"]:
            seen[number * chosen.length : (number + 1) * chosen.length + 1] = True
    assert 0 < seen.sum() < seen.size
    assert result["distinct_bytes_seen"] == seen.sum()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(int)))
    stretches = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
    for order, value in result["ngram_bits_per_byte"].items():
        assert value == evaluate.ngram_bits(corpus, int(order), starts, stretches)


def test_the_metrics_are_in_bits(unbroken):
    """The first step's loss, of the weights that the seed draws, on the first batch."""
    chosen, _ = unbroken
    dataset = batching.training_data(
        data.load(chosen.data).train, length=chosen.length, batch=chosen.batch, seed=chosen.seed
    )
    tokens = next(batching.batches(dataset))["tokens"].astype(np.int32)
    scores = np.asarray(learner.build(chosen)(tokens[:, :-1])[0], np.float64)
    chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    bits = -np.log2(np.take_along_axis(chances, tokens[:, 1:, None], -1))
    first = runs.read_lines(chosen.folder / "metrics.jsonl")[0]
    np.testing.assert_allclose(first["bits_per_byte"], bits.mean(), rtol=1e-5)


def test_what_nobody_reads_is_saved(chosen, monkeypatch):
    class Closed(loop.display("", 1, 0).__class__):
        def show(self, now, *measured):
            if now == 3:
                raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "display", lambda name, steps, done: Closed(name, steps))
        with pytest.raises(BrokenPipeError):
            loop.train(chosen)
    assert (chosen.folder / "checkpoints" / "3").is_dir()


def test_a_score_that_is_no_number_is_refused(chosen, monkeypatch):
    functions = learner.make(chosen)
    nothing = lambda params, tokens, segment_ids: jnp.full(tokens[:, 1:].shape, jnp.nan)
    monkeypatch.setattr(learner, "make", lambda config: functions._replace(bits=nothing))
    with pytest.raises(Refused, match="step 6 in .* scores held-out bytes with what is no number"):
        loop.train(chosen)
    assert not (chosen.folder / "result.json").exists()


def test_the_report_carries_its_pictures(unbroken):
    chosen, _ = unbroken
    page = (chosen.folder / "report.html").read_text()
    for name in ("loss.png", "levels.png"):
        png = (chosen.folder / name).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert base64.b64encode(png).decode() in page
    assert "order-3 Witten-Bell" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_resume_is_bitwise(chosen, unbroken, monkeypatch):
    for step, number in ((3, signal.SIGTERM), (5, signal.SIGINT), (6, signal.SIGINT)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            with pytest.raises(Stopped, match=f"step {step} of 6 is saved") as stopped:
                loop.train(chosen)
        assert stopped.value.signal == number
        assert (chosen.folder / "checkpoints" / str(step)).is_dir()
    assert loop.train(chosen) == unbroken[1]
    assert faults.differences(unbroken[0].folder, chosen.folder, STEPS) == []


def test_going_on_finds_the_step_compiled(chosen, unbroken):
    """What is restored lies as what is begun: else jax compiles another step for it."""
    functions = learner.make(chosen)
    lies = lambda array: (array.committed, array.sharding, array.weak_type, array.dtype)
    with checkpoints.Checkpoints(
        unbroken[0].folder / "checkpoints", keep=None, say=console.say
    ) as saved:
        restored, _ = loop._resume(chosen, functions, saved, console.say)
    assert jax.tree.map(lies, restored) == jax.tree.map(lies, functions.init())
    assert int(restored.step) == STEPS


def test_a_last_save_that_fails_is_told(chosen, monkeypatch):
    stop_at(monkeypatch, 3, signal.SIGTERM)

    def fail(self):
        if self._saved is not None:
            raise Refused("the checkpoint could not be written")

    monkeypatch.setattr(checkpoints.Checkpoints, "wait", fail)
    with pytest.raises(Refused, match="could not be written"):
        loop.train(chosen)


def test_time_that_is_over_stops_it_and_it_goes_on(chosen, unbroken, monkeypatch):
    limited = dataclasses.replace(chosen, time_limit=30.0)
    clock = [time.monotonic()]
    with monkeypatch.context() as patch:
        patch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
        add = loop.Log.add

        def adding(self, step, measured):
            clock[0] += 11 * 60
            add(self, step, measured)

        patch.setattr(loop.Log, "add", adding)
        with pytest.raises(Stopped, match="time limit: step 3 of 6 is saved") as stopped:
            loop.train(limited)
    assert stopped.value.code == 75
    assert loop.train(chosen) == unbroken[1]
    assert faults.differences(unbroken[0].folder, chosen.folder, STEPS) == []


def test_a_damaged_checkpoint_is_passed_over(chosen, unbroken, capsys):
    shutil.copytree(unbroken[0].folder, chosen.folder)
    (chosen.folder / "result.json").unlink()
    newest = chosen.folder / "checkpoints" / "6"
    for path in (newest / "memories").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    assert loop.train(chosen) == unbroken[1]
    said = capsys.readouterr().out
    assert "checkpoint of step 6 is damaged" in said
    assert "step 4 is used" in said
    assert "Going on from step 4 of 6" in said
    assert faults.differences(unbroken[0].folder, chosen.folder, STEPS) == []


def test_differences_are_seen(unbroken, tmp_path):
    one = unbroken[0].folder
    shutil.copytree(one, tmp_path / "other")
    metrics = tmp_path / "other" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 3', '"step": 33'))
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "6" / "weights")
    shutil.copytree(
        one / "checkpoints" / "4" / "weights", tmp_path / "other" / "checkpoints" / "6" / "weights"
    )
    found = faults.differences(one, tmp_path / "other", STEPS)
    assert "metrics.jsonl" in found
    assert any(name.startswith("weights") for name in found)


def test_a_finished_run_says_so(unbroken, capsys):
    assert loop.train(unbroken[0]) == unbroken[1]
    assert "is finished: 6 steps" in capsys.readouterr().out


def test_another_configuration_is_refused(unbroken, texts, tmp_path):
    chosen = unbroken[0]
    with pytest.raises(Refused, match=r"`batch` is 3, but .* was begun with 2"):
        loop.train(dataclasses.replace(chosen, batch=3))
    model = dataclasses.replace(chosen.model, hidden=17)
    with pytest.raises(Refused, match=r"`model.hidden` is 17, but .* was begun with 16"):
        loop.train(dataclasses.replace(chosen, model=model))
    shutil.copytree(texts, tmp_path / texts.name)
    (tmp_path / texts.name / "0.txt").write_text("something else\n" * 40)
    with pytest.raises(Refused, match="the text is no longer what"):
        loop.train(dataclasses.replace(chosen, data=(tmp_path / texts.name,)))
    with runs.Run(chosen.folder), pytest.raises(Refused, match="another process is training"):
        loop.train(chosen)
    kept = dataclasses.replace(chosen, save_every=3, keep=1)
    assert loop.train(kept) == unbroken[1]  # what changes nothing that is learned may change


def test_no_finite_gradient_gives_up(chosen, monkeypatch):
    monkeypatch.setattr(record, "SKIPS", 2)
    functions = learner.make(chosen)

    def step(state, start, batch):
        params = jax.tree.map(lambda x: x * jnp.nan, state.params)
        return functions.step(state._replace(params=params), start, batch)

    monkeypatch.setattr(learner, "make", lambda config: functions._replace(step=step))
    with pytest.raises(Refused, match="gradients of the last 2 steps, up to 2, were not finite"):
        loop.train(chosen)


def test_generation_streams_what_the_model_says(unbroken):
    model = learner.load(unbroken[0])
    settings = dict(length=12, temperature=0.0, seed=0)
    stream = generate.stream(model, "text", **settings)
    drawn = [next(stream)]  # one at a time
    drawn += list(stream)
    assert len(drawn) == 12
    whole, _ = model(jnp.asarray([[*b"text", *drawn]]))
    assert drawn == np.argmax(whole[0, 3:-1], axis=-1).tolist()
    warm = dict(length=12, temperature=1.0)
    once, again, other = (list(generate.stream(model, "", seed=seed, **warm)) for seed in (1, 1, 2))
    assert once == again != other
    flat = dict(length=32, temperature=99.0, seed=0)
    assert len(set(generate.stream(model, "", **flat))) > 8  # every byte is drawn anew


@pytest.mark.slow
def test_the_demonstration(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "FIELDS", {"batch": 2, "length": 24, "eval_bytes": 200})
    monkeypatch.setattr(demo, "SAMPLE_LENGTH", 10)
    settings = demo.Demo(folder=tmp_path / "demo", steps=2, data=(texts,))
    demo.main(settings)
    said = capsys.readouterr().out
    page = (tmp_path / "demo" / "report.html").read_text()
    for line in ("hope-tiny, adamw", "hope-tiny, dmgd", "transformer++-tiny", "order-2", "xz -9"):
        assert line in said
        assert line in page
    assert page.count("data:image/png;base64,") == 2
    demo.main(settings)
    assert capsys.readouterr().out.count("is finished") == 3


def test_the_demonstration_is_checked(texts, tmp_path, monkeypatch):
    offset = {"hope-tiny": 1.0, "transformer++-tiny": 0.0}
    result = lambda c: {
        "preset": c.preset,
        "optimizer": c.optimizer,
        "bits_per_byte": 2.0 + c.seed / 10 + abs(c.learning_rate - 2.5e-3) + offset[c.preset],
    }
    monkeypatch.setattr(demo_check.loop, "train", result)
    (tmp_path / "README.md").write_text(
        f"before\n{demo_check.BEGIN}\nold\n{demo_check.END}\nafter\n"
    )
    demo_check.main(demo_check.DemoCheck(runs=tmp_path / "runs", place=tmp_path))
    found = json.loads((tmp_path / "results" / "demo-check.json").read_text())
    assert len(found["runs"]) == 27
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith(f"before\n{demo_check.BEGIN}\n| model ")
    assert readme.endswith(f"{demo_check.END}\nafter\n")
    for optimizer in ("adamw", "dmgd"):
        row = f"| hope-tiny | {optimizer} | 0.0025 | 3.100 | 0.100 | 3.000, 3.100, 3.200 |"
        assert row in readme
    assert "hope-tiny with adamw 3.100 at 0.0025;" in readme
    assert "+47.6 %" in readme
    assert "old" not in readme


def test_tables():
    table = report.Table("Scores", ("model", "bits"), [("a|b", 1.23456), ("c", 1200)])
    assert table.text().splitlines() == [
        "Scores",
        "  model  bits",
        "  a|b    1.235",
        "  c      1,200",
    ]
    assert table.markdown().splitlines()[2:] == ["| a|b | 1.235 |", "| c | 1,200 |"]
