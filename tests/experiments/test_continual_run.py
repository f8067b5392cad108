"""`nlx run continual`: its tables and verdicts, the tiny run from end to end, bad input."""

import json

import numpy as np
import pytest
from nlx_experiments import continual, continual_streams, continual_table, run
from nlx_experiments import continual_tasks as tasks
from nlx_experiments.continual_methods import CHOSEN_AS, EQUAL, METHODS


def entry(matrices, **more):
    record = lambda n, m: {
        "part": n, "matrix": m, "untrained": [0.0] * len(m), "choice": {"rate": 1.0},
        "stages": ["a", "b"], "chance": [0.5, 0.25], "carried": 2048,
    }  # fmt: skip
    return {"seeds": [record(n, m) for n, m in enumerate(matrices)], "tried": [], **more}


def test_the_verdict_compares_as_it_says():
    of = lambda learned, kept: [[learned, 0.0], [kept, learned]]
    found = {
        "fine-tuning": entry([of(0.9, 0.1)] * 3),
        "ewc": entry([of(0.9, 0.2)] * 3),
        "hope, 1 level": entry([of(0.85, 0.60), of(0.85, 0.62), of(0.85, 0.64)]),
        "hope, 2 levels": entry([of(0.86, 0.59), of(0.86, 0.63), of(0.86, 0.62)]),
        "hope, 3 levels": entry([of(0.86, 0.49), of(0.86, 0.53), of(0.86, 0.52)]),
    }
    (said,) = continual_table.verdict(found)
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines] == ["* Shown"] * 5 + ["* Not shown"]
    assert "hope, 3 levels, fine-tuning forget 34.7, 80.0" in lines[0]
    assert "hope, 3 levels after 2 bring -5.0 (standard error 0.0) at the end, +0.0" in lines[5]
    failing = {
        0: {"hope, 3 levels": entry([of(0.86, 0.45)] * 3)},
        1: {"fine-tuning": entry([of(0.9, 0.7)] * 3)},
        2: {"fine-tuning": entry([of(0.92, 0.1)] * 3)},
        3: {"ewc": entry([of(0.9, 0.7)] * 3)},
        4: {"hope, 2 levels": entry([of(0.86, 0.54)] * 3)},
    }
    for n, other in failing.items():
        (told,) = continual_table.verdict(found | other)
        assert told.splitlines()[n].startswith("* Not shown"), n
    one = {name: {**e, "seeds": e["seeds"][1:2]} for name, e in found.items()}
    (told,) = continual_table.verdict(found | {"hope, 2 levels": one["hope, 2 levels"]})
    assert len(told.splitlines()) == 4  # one pair of seeds says nothing of more levels
    (told,) = continual_table.verdict(
        found | {"fine-tuning, rate 0.001": entry([of(0.92, 0.1)] * 3)}
    )
    assert told.splitlines()[5].startswith("* Not shown: hope, 3 levels, fine-tuning, rate 0.001 ")
    alone = {name: entry([[[0.5]]] * 3) for name in found}
    for e in alone.values():
        for record in e["seeds"]:
            record["stages"] = ["a"]
    assert continual_table.verdict(alone) == []  # of one task nothing is forgotten
    assert continual_table.gained(found, "hope, 1 level", "hope, 2 levels", "final")[0] < 0.01
    assert continual_table.verdict({"fine-tuning": found["fine-tuning"]}) == []
    text = continual_table.shown(
        {"clinc150": found}, {"file": "no `--file` was given"}, "continual"
    )
    assert "| fine-tuning | 50.0 | 70.0 | 90.0 | 80.0 | -80.0 | 0.0 | 0.0 | 2 | rate 1 |" in text
    assert "Skipped: file (no `--file` was given)." in text


@pytest.mark.slow
def test_the_tiny_run_is_of_all_methods(tmp_path):
    folder = ["--runs", str(tmp_path), "--place", str(tmp_path)]
    assert run.main(["run", "continual-tiny", *folder]) == 0
    text = (tmp_path / "results" / "continual.md").read_text()
    assert all(f"| {name} |" in text for name in METHODS)
    assert "hope, 3 levels, fine-tuning forget" in text


def test_the_tiny_run_goes_on_where_it_stopped_and_damage_is_told(tmp_path, capsys):
    folder = ["--runs", str(tmp_path), "--place", str(tmp_path)]
    some = ["--models", "fine-tuning"]
    assert run.main(["run", "continual-tiny", *folder, *some]) == 0
    (model,) = tmp_path.glob("model-*.npz")
    written = model.stat().st_mtime_ns
    held = json.loads((tmp_path / "results" / "continual.json").read_text())
    assert {r["part"] for r in held["cells"]} == {"try 0", "try 1", "try 2", "try 3", 0}
    assert "| fine-tuning |" in (tmp_path / "results" / "continual.md").read_text()
    assert (tmp_path / "results" / "continual-digits.png").exists()
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    (tmp_path / "cells.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    capsys.readouterr()
    assert run.main(["run", "continual-tiny", *folder, *some]) == 0
    assert len(capsys.readouterr().out.split("% at the end")) - 1 == 1
    again = json.loads((tmp_path / "results" / "continual.json").read_text())
    assert [r.get("matrix") for r in again["cells"]] == [r.get("matrix") for r in held["cells"]]
    assert model.stat().st_mtime_ns == written  # trained once
    model.write_bytes(model.read_bytes()[:1000])
    assert run.main(["run", "continual-tiny", *folder, *some]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_bad_input_gets_a_sentence(tmp_path, capsys, monkeypatch):
    said = lambda *argv: (run.main(["run", *argv]), capsys.readouterr().err)
    code, error = said("continual-tiny", "--only", "jokes")
    assert (code, "`only` holds 'jokes'; it must be one of digits" in error) == (2, True)
    code, error = said("continual-tiny", "--models", "luck")
    assert (code, "`models` holds 'luck'; it must be one of fine-tuning" in error) == (2, True)
    code, error = said("continual", "--seeds", "0")
    assert (code, "`seeds` is 0; it must be an integer >= 1" in error) == (2, True)


def test_a_stream_without_its_data_is_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("NLX_DATA", raising=False)
    rows = continual_streams.full(continual_streams.Continual())
    for name in ("clinc150", "banking77", "file", "kalamang", "kalamang after another"):
        with pytest.raises(tasks.Absent):
            rows[name].made(np.random.default_rng(0))
    assert len(rows["permuted digits"].made(np.random.default_rng(0)).stages) == 50


def test_levels_by_least_squares_have_the_setting_that_three_of_them_choose():
    """Cells are stand-ins: of three levels the last setting is best, of all others the first."""
    contest = object.__new__(continual.Contest)
    stages = tuple(tasks.Stage(str(n), *[None] * 3) for n in range(4))
    contest.drawn = lambda seed: tasks.Scenario("classes", stages)
    asked = []

    def cell(method, part, choice, scenario):
        asked.append((method, len(scenario.stages)))
        order = 1 if method == EQUAL else -1
        return {"validation": order * int(part.split()[1])}

    contest.cell = cell
    last = METHODS[EQUAL].grid[-1]
    for method in [*CHOSEN_AS, EQUAL]:
        assert contest.choose(method) == last
    assert set(asked) == {(EQUAL, 3)}
    assert contest.choose("fine-tuning") == METHODS["fine-tuning"].grid[0]
    assert contest.choose("fine-tuning, rate 0.001") == {"rate": 1e-3}
