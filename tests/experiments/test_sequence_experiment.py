# SPDX-License-Identifier: Apache-2.0
"""Tables of models x sequence tasks: what is run, kept and shown."""

import dataclasses
import json

import numpy as np
import pytest
from nlx_experiments import run, sequence_contest, sequence_experiment, sequence_table
from nlx_experiments.errors import Refused, Stopped
from nlx_experiments.sequence_contest import Plan
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_tasks import Batch, Task

from nlx import nn

CONFIG = nn.ModelConfig(
    mixer="attention", feed_forward="swiglu", vocabulary=4, width=8, heads=2, layers=1, hidden=8
)
PLAN = Plan(
    bins={"short": (2, 4), "long": (5, 8)}, shortest=2, stages=((0, 8),), steps=200, seeds=2,
    rates=(1e-6, 3e-2), round_to=8,
)  # fmt: skip


def plus_one(generator, rows, shortest, longest):
    """The answer is the symbol and one, modulo 4."""
    tokens = generator.integers(0, 4, (rows, longest))
    return Batch(tokens, (tokens + 1) % 4, np.ones(tokens.shape, np.float32))


EASY = Task("plus one", 4, 4, plus_one)


@pytest.fixture
def record():
    """What a cell holds whose trainings at the second rate have learned the task."""
    shares = lambda x: {name: [x, x] for name in sequence_contest.MEASURES}
    rate = lambda x: {"validation": x, "validations": [x, x], **{b: shares(x) for b in PLAN.bins}}
    rates = {"1e-06": rate(0.0), "0.03": rate(1.0)}
    chance = dict.fromkeys(PLAN.bins, 0.25)
    return {"rates": rates, "rate": "0.03", "steps": 90, "seconds": 1.0, "chance": chance}


def test_what_decides_a_cell_is_in_its_name():
    row = Row(EASY, PLAN, {})
    where = ("plus one", "model", "")
    names = {
        sequence_experiment.identity(where, row, CONFIG),
        sequence_experiment.identity(
            where, row._replace(plan=dataclasses.replace(PLAN, steps=9)), CONFIG
        ),
        sequence_experiment.identity(where, row, dataclasses.replace(CONFIG, hidden=9)),
        sequence_experiment.identity(("plus two", "model", ""), row, CONFIG),
    }
    for changed in (lambda x: x, lambda x: 3 - x):  # the same task, and one of other answers
        draw = lambda *a, f=changed: dataclasses.replace(b := plus_one(*a), answers=f(b.answers))
        task = dataclasses.replace(EASY, draw=draw)
        names.add(sequence_experiment.identity(where, row._replace(task=task), CONFIG))
    exam = sequence_contest.Exam("grid", lambda config, weights, leave: None)
    names.add(sequence_experiment.identity(where, row._replace(exam=exam), CONFIG))
    assert len(names) == 6


@pytest.fixture
def rows(record, monkeypatch):
    """Two models, the second with two variants; measuring them is a stub that counts."""
    measured = []

    def measure(name, task, config, plan, stop, watch, exam):
        measured.append(name)
        if len(measured) == 2 and stop.received == "now":
            raise Stopped("stopped", 15)
        shift = 0.3 * (config.hidden == 8)
        rate = dict(record["rates"]["0.03"])
        rate["validation"] -= shift
        rate["long"] = dict(rate["long"], rows=[1 - shift, 1.0])
        return record | {"rates": {"0.03": rate}}

    monkeypatch.setattr(sequence_experiment.contest, "measure", measure)
    other = dataclasses.replace(CONFIG, hidden=9)
    models = {"one": {"": CONFIG}, "two": {"narrow": CONFIG, "wide": other}}
    return {"plus one": Row(EASY, PLAN, models)}, measured


def table(results):
    cell = lambda task, model, found: sequence_table.interval(found["long"]["rows"])
    return sequence_table.table(results, cell).markdown()


def test_an_experiment_runs_what_is_missing_and_shows_the_best_variant(rows, tmp_path, capsys):
    made, measured = rows
    options = Options(runs=tmp_path / "runs", place=tmp_path / "out", models=("one",))
    sequence_experiment.run(options, "trial", made, table)
    assert measured == ["plus one, one"]
    options = dataclasses.replace(options, models=())
    results = sequence_experiment.run(options, "trial", made, table)
    assert measured == ["plus one, one", "plus one, two, narrow", "plus one, two, wide"]
    again = sequence_experiment.run(options, "trial", made, table)
    assert len(measured) == 3
    assert again == results
    assert (tmp_path / "out/results/trial.md").read_text().splitlines()[2:] == [
        "| one | 85 (70 to 100) |",
        "| two | 100 |",
    ]
    written = json.loads((tmp_path / "out/results/trial.json").read_text())
    assert set(written["tasks"]["plus one"]["models"]["two"]) == {"narrow", "wide"}
    assert (tmp_path / "out/results/trial.png").stat().st_size > 5_000
    grid = sequence_table.grid(results).markdown()
    assert "| plus one | two | wide | 0.03 | **100 / 100** |" in grid
    assert "| plus one | two | narrow | 0.03 | 100 / 85 (70 to 100) |" in grid
    fewer = {"plus one": made["plus one"]._replace(models={"one": {"": CONFIG}})}
    part = sequence_experiment.run(options, "trial", fewer, table, table=made)
    assert (len(measured), part) == (3, results)
    elsewhere = dataclasses.replace(options, runs=tmp_path / "other", models=("one",))
    kept = sequence_experiment.run(elsewhere, "trial", made, table)
    assert measured[3:] == ["plus one, one"]
    assert kept["plus one"]["models"]["two"] == results["plus one"]["models"]["two"]
    assert "left out" not in capsys.readouterr().out
    other = {"plus one": made["plus one"]._replace(plan=dataclasses.replace(PLAN, steps=300))}
    sequence_experiment.run(elsewhere, "trial", other, table)
    said = capsys.readouterr().out
    assert "3 cells of results/trial.json are left out, for" in said
    assert "not those of this run: plus one." in said


def test_the_control_is_trained_on_answers_of_other_rows(record, tmp_path, monkeypatch):
    """One rate, few steps, shuffled answers; told beside the most frequent answer's share."""
    seen = []

    def measure(name, task, config, plan, stop, watch, exam):
        seen.append((name, task.name, plan.rates, plan.steps, exam))
        return record

    monkeypatch.setattr(sequence_experiment.contest, "measure", measure)
    exam = sequence_contest.Exam("grid", lambda config, weights, leave: None)
    row = Row(
        EASY, dataclasses.replace(PLAN, steps=900), {"one": {"": CONFIG}}, {}, CONFIG, exam
    )  # fmt: skip
    options = Options(runs=tmp_path / "runs", place=tmp_path / "out")
    results = sequence_experiment.run(options, "trial", {"plus one": row}, table)
    assert seen == [
        ("plus one, one", "plus one", PLAN.rates, 900, exam),
        ("plus one, control", "plus one, shuffled", PLAN.rates[-1:], 200, None),
    ]
    assert results["plus one"]["scored"] == {"short": 512 * 4, "long": 512 * 8}
    (text,) = sequence_table.control(results)
    chance = "/".join(f"{100 * record['chance'][b]:.1f}" for b in ("short", "long"))
    assert f"plus one 100.0/100.0 ({chance})." in text
    assert text.endswith("above it: plus one.")
    found = record["rates"]["0.03"] | {b: {"tokens": [0.3, 0.3]} for b in PLAN.bins}
    told = record | {"rates": {"0.03": found}}
    plan = dataclasses.asdict(PLAN)
    (text,) = sequence_table.control({"a": {"plan": plan, "control": told}, "b": {}})
    assert text.endswith("above it: none. Not run for b.")  # 512 answers, as many as rows
    counts = dict.fromkeys(PLAN.bins, 4096)
    (text,) = sequence_table.control({"a": {"plan": plan, "control": told, "scored": counts}})
    assert text.endswith("above it: a.")
    (text,) = sequence_table.control({"plus one": {"plan": {"bins": {}}}})
    assert text == "Control on shuffled answers: not run for plus one."
    options = Options(runs=tmp_path / "other", place=tmp_path / "elsewhere", models=("one",))
    results = sequence_experiment.run(options, "trial", {"plus one": row}, table)
    assert len(seen) == 3
    assert "control" not in results["plus one"]


def test_unknown_tasks_and_models_are_one_sentence(rows, tmp_path):
    made, _ = rows
    options = Options(runs=tmp_path, place=tmp_path, only=("plus two",))
    with pytest.raises(Refused, match="`only` holds 'plus two'; it must be one of plus one"):
        sequence_experiment.run(options, "trial", made, table)
    options = Options(runs=tmp_path, place=tmp_path, models=("three",))
    with pytest.raises(Refused, match="`models` holds 'three'; it must be one of one, two"):
        sequence_experiment.run(options, "trial", made, table)


def test_percent_is_100_only_where_every_row_is_right():
    assert sequence_table.percent([1, 1]) == "100"
    assert sequence_table.percent([1, 0.9999]) == "99.9"
    assert sequence_table.percent([0.5, 0.25]) == "37.5"


@pytest.mark.parametrize(
    "name",
    [
        "state-tracking",
        "recall",
        "ablation",
    ],
)
@pytest.mark.slow
def test_the_tiny_experiment_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main(["run", f"{name}-tiny"]) == 0
    folder = tmp_path / f"runs/{name}-tiny/results"
    assert json.loads((folder / f"{name}.json").read_text())["tasks"]
    ending = "All rows alike:" if name == "ablation" else "The whole grid:"
    assert ending in (folder / f"{name}.md").read_text()
    assert (folder / f"{name}.png").stat().st_size > 5_000


def test_trainings_that_tie_on_validation_rows_are_shown_by_their_mean(record):
    found = record["rates"]["0.03"] | {"long": {"rows": [1, 0.5], "tokens": [1, 0.75]}}
    variants = {"one": record | {"rates": {"0.03": found}}}
    assert sequence_table.best_training(variants)["long"] == {"rows": 0.75, "tokens": 0.875}
    found["validations"] = [1.0, 1.1]
    assert sequence_table.best_training(variants)["long"] == {"rows": 0.5, "tokens": 0.75}


def test_solved_are_the_trainings_that_are_right_in_all_bins(record):
    variants = {"one": record, "two": record}
    assert sequence_table.solved(variants, ["short", "long"]) == "4 of 8"
    late = record["rates"]["0.03"] | {"long": {"rows": [1, 0.999]}}
    variants["two"] = record | {"rates": {"0.03": late}}
    assert sequence_table.solved(variants, ["short", "long"]) == "3 of 6"
    assert sequence_table.solved(variants, ["short"]) == "4 of 6"
