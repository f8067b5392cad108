# SPDX-License-Identifier: Apache-2.0
"""The experiment on language: its protocol, its table, and the tiny run from end to end."""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
import pytest
from nlx_experiments import (
    data,
    language,
    language_table,
    loop,
    multiple_choice,
    run,
    runs,
    tokenization,
)
from nlx_experiments.errors import Diverged, Refused

from nlx import nn

RATES = {1.25e-3: 2.0, 2.5e-3: 1.2, 5e-3: 1.5, 1e-2: None}


def seed(bits, words=2.0, **more):
    return {
        "parameters": 1000, "bits_per_byte": bits, "word_perplexity": words, "steps": 3,
        "bytes_trained_on": 99, "bytes_scored": 9, "words_scored": 2, **more,
    }  # fmt: skip


@pytest.fixture
def trainings(monkeypatch):
    """Stands in for training: what was trained; losses end at those of RATES."""
    done = []

    def train(chosen):
        done.append((chosen.preset, chosen.learning_rate, chosen.seed))
        late = RATES[chosen.learning_rate]
        losses = [9.0] * 8 + [late] * 2
        chosen.folder.mkdir(parents=True)
        lines = "".join(json.dumps({"bits_per_byte": bits}) + "\n" for bits in losses)
        (chosen.folder / "metrics.jsonl").write_text(lines)
        return seed(1 + chosen.seed / 10 + len(chosen.preset) / 100)

    monkeypatch.setattr(loop, "train", train)
    return done


def options(tmp_path, **fields):
    of_all = dict(
        runs=tmp_path / "runs", place=tmp_path, data=(pathlib.Path(argparse.__file__),),
        models=("hope", "titans-lmm"), vocabulary=300,
    )  # fmt: skip
    return language.Language(**of_all | fields)


def test_a_pilot_of_its_own_seed_chooses_the_rate(trainings, tmp_path):
    found = language.main(options(tmp_path))
    for preset in ("hope-tiny", "titans-lmm-tiny"):
        of_model = [(rate, s) for name, rate, s in trainings if name == preset]
        assert of_model == [(r, 1000) for r in RATES] + [(2.5e-3, s) for s in (0, 1, 2)]
    assert found["hope"]["rate"] == 2.5e-3
    assert found["hope"]["pilot"] == {"0.00125": 2.0, "0.0025": 1.2, "0.005": 1.5, "0.01": None}
    text = (tmp_path / "results" / "language.md").read_text()
    assert "| hope | 1,000 | 0.0025 | 1.190 (1.090 to 1.290) | 2.0 | 18.68 |" in text
    assert "Hope against titans-lmm: -0.060 ± 0.000 bits per byte, ahead" in text
    assert "0.01 no number; 0.0025 was taken.\n" in text
    done = len(trainings)
    assert language.main(options(tmp_path)) == found  # nothing is trained twice
    assert len(trainings) == done
    with pytest.raises(Refused, match="`vocabulary` is 310, but .* was begun with 300"):
        language.main(dataclasses.replace(options(tmp_path), vocabulary=310))
    more = language.main(options(tmp_path, models=("retnet",)))
    assert more.keys() == {"hope", "titans-lmm", "retnet"}  # the table keeps those before
    other = options(tmp_path, models=("retnet",), vocabulary=310, runs=tmp_path / "other")
    assert language.main(other).keys() == {"retnet"}  # those of another plan are no rivals


def test_a_pilot_that_diverges_is_no_number_and_a_seed_says_so(trainings, tmp_path, monkeypatch):
    train = loop.train

    def fails(chosen):
        result = train(chosen)
        if chosen.learning_rate == diverging:
            raise Diverged("no number any more")
        return result

    monkeypatch.setattr(loop, "train", fails)
    diverging = 5e-3
    found = language.main(options(tmp_path, models=("hope",)))
    assert found["hope"]["pilot"] == {"0.00125": 2.0, "0.0025": 1.2, "0.005": None, "0.01": None}
    done = len(trainings)
    language.main(options(tmp_path, models=("hope",)))
    assert len(trainings) == done
    diverging = 2.5e-3
    with runs.Run(tmp_path / "again") as folder:
        plan, store = language.Plan("bytes", 256, None, 2, ""), language.Store(folder)
        chosen = language.training(options(tmp_path / "again"), plan, "hope", diverging, 0)
        with pytest.raises(Diverged, match="no number any more"):
            language.trained(chosen, plan, store)


def planned(options):
    with runs.Run(options.runs) as folder:
        return language.planned(options, folder)


def test_steps_are_those_of_the_bytes(tmp_path):
    """A megabyte, whatever the tokens: bytes one each, BPE as many as the text's mean says."""
    source = pathlib.Path(argparse.__file__).read_text()
    (tmp_path / "long.txt").write_text(source * (1_200_000 // len(source) + 1))
    long = options(tmp_path, data=(tmp_path / "long.txt",))
    plan = planned(
        dataclasses.replace(long, runs=tmp_path / "a", tokenizer="bytes", vocabulary=None)
    )
    assert (plan.tokenizer, plan.vocabulary, plan.pieces) == ("bytes", 256, None)
    assert plan.steps == round(1_000_000 / 512)
    plan = planned(long)
    assert plan == planned(long)
    assert plan.vocabulary == 300
    assert 1_000_000 / 512 / 2 < plan.steps < 1_000_000 / 512 / 1.2
    short = options(tmp_path, runs=tmp_path / "c", tokenizer="bytes", vocabulary=None)
    plan = planned(short)  # seen once
    assert plan.steps == (data.load(short.data).train.size - 1) // 128 // 4 < 1_000_000 / 512
    with pytest.raises(Refused, match="`vocabulary` is 300; it must be left out with bytes"):
        planned(options(tmp_path, tokenizer="bytes"))


def test_token_files_are_read_and_their_tokenizer_kept(tmp_path):
    made = tokenization.train(["the cat and the hat\n" * 9] * 3, 262)
    (tmp_path / "made.json").write_text(made.json)
    np.save(tmp_path / "a.npy", made.encode("the cat and the hat\n" * 200))
    of_file = options(
        tmp_path, tokenizer=str(tmp_path / "made.json"), data=(tmp_path / "a.npy",), vocabulary=None
    )
    plan = planned(of_file)
    assert (plan.vocabulary, plan.pieces) == (262, made.sha256)
    assert pathlib.Path(plan.tokenizer).parent == of_file.runs
    assert pathlib.Path(plan.tokenizer).read_text() == made.json


def test_trainings_read_the_text_of_the_plan(trainings, tmp_path):
    """Also where the folder of the experiment lies in that of the text."""
    for n in range(3):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{n}.txt").write_text(pathlib.Path(argparse.__file__).read_text())
    chosen = options(tmp_path, data=(tmp_path / "text",), runs=tmp_path / "text" / "runs")
    language.main(chosen)
    plan = json.loads((tmp_path / "results" / "language.json").read_text())
    assert (chosen.runs / "cells.jsonl").exists()
    assert data.load(chosen.data, without=chosen.runs / "hope-0.01-0").sha256 == plan["text"]


@pytest.mark.parametrize("kind", [language.Language, language.Gpu, language.Gpu340m])
def test_every_preset_is_there(kind):
    assert {f"{model}-{kind.size.presets}" for model in kind().models} <= set(nn.PRESETS)
    assert f"<!-- {kind.name} -->" in (language.PLACE / "README.md").read_text()


def test_the_table_shows_what_was_given():
    items = {
        "boolq": [multiple_choice.item("a", ["no", "yes"], 0)],
        "winogrande": [multiple_choice.item("a", ["b", "c"], 0)],
        "lambada": [multiple_choice.item("a", ["b"], 0)],
    }
    scores = {
        "boolq": {"acc": 0.5, "acc_norm": 0.75, "perplexity": None},
        "winogrande": {"acc": 0.25, "acc_norm": 0.0, "perplexity": None},
        "lambada": {"acc": 0.0, "acc_norm": None, "perplexity": 1234567.0},
    }
    results = {"samba": {"rate": 0.01, "pilot": {}, "seeds": [seed(1.0, None, choices=scores)]}}
    text = language_table.shown(results, items)
    assert "boolq acc (chance 50.0) | boolq acc_norm | winogrande acc (chance 50.0) | lam" in text
    assert "1.000 | beyond all numbers | 50.0 | 75.0 | 25.0 | 0.0 | 1.23e+06 | 21.07 |" in text
    assert "pilot" not in text


def test_hope_is_ahead_or_behind_where_students_t_is_sure():
    made = lambda *bits: {"seeds": [seed(b) for b in bits]}
    rival = 1.0, 1.1, 1.2
    said = lambda *bits: language_table.verdicts(
        {"hope": made(*bits), "transformer++": made(*rival[: len(bits)])}
    )[0]
    assert "+0.000 ± 0.058 bits per byte, level" in said(1.1, 1.0, 1.2)
    assert "+0.100 ± 0.006 bits per byte, behind" in said(1.11, 1.19, 1.3)
    assert "-0.100 ± 0.006 bits per byte, ahead" in said(0.91, 0.99, 1.1)
    # 3.5 standard errors, of two degrees of freedom: 4.3 would be sure.
    assert "-0.100 ± 0.029 bits per byte, level" in said(0.95, 1.0, 1.05)
    assert "-0.300 bits per byte, one seed: no error known" in said(0.7)
    assert language_table.verdicts({"hope": made(1.0)}) == []


def test_a_vocabulary_that_is_refused_is_called_as_its_flag_is(tmp_path, capsys):
    given = ["--runs", str(tmp_path / "runs"), "--place", str(tmp_path)]
    for size, said in (("200", "200; it must be at least 256"), ("99999", "99999, but the text")):
        assert run.main(["run", "language-tiny", "--vocabulary", size, *given]) == 2
        assert f"`vocabulary` is {said}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tiny_experiment_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.jsonl").write_text('{"text": "raise the error"}\n{"text": "the parser"}\n')
    words = ["run", "language-tiny", "--models", "transformer++"]
    assert run.main([*words, "--choices", "lambada=l.jsonl"]) == 0
    folder = tmp_path / "runs" / "language-tiny" / "results"
    found = json.loads((folder / "language.json").read_text())
    (model,) = found["models"].values()
    assert [s["words_scored"] > 0 for s in model["seeds"]] == [True, True]
    assert model["seeds"][0]["choices"]["lambada"]["items"] == 2
    assert (folder / "language.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert run.main(words) == 0  # everything is known
    said = capsys.readouterr().out
    assert "step" not in said.split("After")[0]
    assert "| transformer++ |" in said


def test_what_decides_a_cell_is_told_without_defaults():
    @dataclasses.dataclass
    class Known:
        rate: float
        rows: int = 4

    @dataclasses.dataclass
    class Grown(Known):
        devices: int = 1

    assert language._told(Known(0.1)) == language._told(Grown(0.1)) == {"rate": 0.1}
    assert language._told(Grown(0.1, 4, 2)) == {"devices": 2, "rate": 0.1}
