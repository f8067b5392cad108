"""The tiny runs of long context, from end to end, and that they go on where they were left."""

import json

import pytest
from nlx_experiments import run
from nlx_experiments.long_context import aim
from nlx_experiments.paired import Difference

WORDS = {
    "needle": ["S-NIAH-1:", "| transformer | 16,392 | 0 |", "needle-map.png"],
    "babilong": ["1 fact, by the length of the row", "| 1 fact | deltanet |"],
    "context": ["| model | state | 1 to 16 | 17 to 32 | 33 to 64 |", "context-curves.png"],
    "forecasting": ["| *persistence* | 1.323 |", "| 6 | transformer | 0.01 |"],
}
PICTURES = {"needle": "-map", "babilong": "-lengths", "context": "-curves", "forecasting": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_runs_from_end_to_end_and_goes_on(tmp_path, name):
    given = ["--runs", str(tmp_path / "runs"), "--place", str(tmp_path)]
    assert run.main(["run", f"{name}-tiny", *given]) == 0
    cells = tmp_path / "runs" / "cells.jsonl"
    first, whole = cells.read_text(), (tmp_path / "results" / f"{name}.json").read_text()
    assert len(first.splitlines()) == 1
    assert run.main(["run", f"{name}-tiny", *given]) == 0
    assert cells.read_text() == first
    again = (tmp_path / "results" / f"{name}.json").read_text()
    assert json.loads(again)["tasks"] == json.loads(whole)["tasks"]
    text = (tmp_path / "results" / f"{name}.md").read_text()
    assert all(word in text for word in WORDS[name])
    picture = tmp_path / "results" / f"{name}{PICTURES[name]}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_input_gets_a_sentence(tmp_path, capsys):
    given = ["--runs", str(tmp_path / "runs"), "--place", str(tmp_path)]
    for argv, said in (
        (["needle-tiny", "--models", "hop"], "`models` holds 'hop'; it must be one of transformer"),
        (["forecasting-tiny", "--only", "7"], "`only` holds '7'; it must be one of 6."),
        (["babilong-tiny", "--data", "nowhere"], "`--data` holds nowhere, which does not exist"),
        (["needle-tiny", "--longest", "9"], "`longest` is 9; it must be from 1,024 to 16,384."),
        (["needle", "--data", "here"], "--data"),
    ):
        assert run.main(["run", *argv, *given]) == 2
        assert said in capsys.readouterr().err


def test_the_aim_is_met_in_the_mean_and_above_linear_rivals_for_sure():
    behind, ahead = Difference(-1.0, 9.0, 2), Difference(1.0, 9.0, 2)
    sure = Difference(1.0, 0.01, 2)
    told = lambda titans, linear, **more: aim({"titans": titans, "deltanet": linear}, **more)
    assert told(behind, sure) == (
        "The aim: at least level with Titans in the mean: no; above deltanet: yes."
    )
    assert told(ahead, ahead) == (
        "The aim: at least level with Titans in the mean: yes; above deltanet: no."
    )
    assert "in the mean: yes" in told(behind, sure, less=True)
    assert "in the mean: no" in told(ahead, sure, less=True)
