# SPDX-License-Identifier: Apache-2.0
"""`nlx run learned`: rates that are chosen, theta in files, the table and its verdicts."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nlx_experiments import learned_contest as contest
from nlx_experiments import learned_optimizers as experiment
from nlx_experiments import learned_table as table
from nlx_experiments import learned_tasks, runs, weights
from nlx_experiments.errors import Refused
from nlx_experiments.learned_tasks import Exam

from nlx import learned
from nlx.learned import tasks

STEEP = tasks.Task(  # |w|^2 / 2 from w = 1: gradient descent multiplies w by 1 - rate
    lambda key: (),
    lambda instance, key: jnp.ones(()),
    lambda params, instance, key: params**2 / 2,
    lambda params, instance: params**2,
)
SGD = contest.by_rate(optax.sgd)


@pytest.mark.parametrize(("objective", "share"), [("training", 0.5), ("held-out", 1.0)])
def test_curves_are_costs_after_each_step(objective, share):
    exam = Exam(STEEP, 3, objective, 4)
    found = contest.curves(SGD, exam, {"rate": jnp.float32(0.5)}, contest.EXAMINED)
    np.testing.assert_allclose(found, share * 0.25 ** np.arange(1, 5)[None].repeat(3, 0))


def test_the_best_rate_is_taken_and_an_edge_is_told():
    found = contest.tuned(SGD, Exam(STEEP, 2, steps=3))
    assert found["rate"] == 1
    assert not found["edge"]
    assert found["reached"]["1e-05"] == pytest.approx(0.5, rel=1e-3)
    uphill = contest.by_rate(lambda rate: optax.sgd(-rate))
    found = contest.tuned(uphill, Exam(STEEP, 2, steps=3))
    assert found["rate"] == contest.RATES[0]
    assert found["edge"]


def test_what_diverges_is_no_number():
    exam = Exam(STEEP, 2, steps=100)
    found = contest.examined(SGD, exam, {"rate": jnp.float32(1e3)})
    assert found["costs"] == [None, None]
    assert found["curve"][-1] is None
    assert table.mean(found["costs"]) == np.inf


def test_problems_that_choose_are_not_those_that_are_told():
    exam = Exam(tasks.quadratics(3), 4, steps=1)
    theta = {"rate": jnp.float32(1e-3)}
    a, b = (contest.curves(SGD, exam, theta, p) for p in (contest.CHOSEN, contest.EXAMINED))
    assert not np.intersect1d(a, b).size


def test_the_best_theta_is_kept_and_comes_back_from_a_file(tmp_path):
    exam, rule = Exam(tasks.quadratics(3), 8, steps=20), learned.momentum_rule(1e-3)
    plan = contest.Plan("pes", 32, 60, 0.1, truncation=10, looks=6)
    theta, told = contest.meta_trained(rule, exam, plan, 0, lambda: None)
    assert len(told["looks"]) == 7
    assert told["pieces"] == 10 * int(np.argmin(told["looks"]))
    assert min(told["looks"]) < 0.5 * told["looks"][0]
    again, _ = contest.meta_trained(rule, exam, plan, 0, lambda: None)
    jax.tree.map(np.testing.assert_array_equal, theta, again)
    path = tmp_path / "theta.safetensors"
    weights.write(path, theta, {})
    like = rule.init(jax.random.key(1))
    back = weights.read(path, like, argument="theta", of="rule")
    jax.tree.map(np.testing.assert_array_equal, back, theta)
    chosen = contest.curves(rule, exam, jax.tree.map(jnp.asarray, back), contest.CHOSEN)
    assert chosen[:, -1].mean() == pytest.approx(min(told["looks"]), rel=1e-4)
    other = learned.adam_rule().init(jax.random.key(0))
    with pytest.raises(Refused, match=r"`theta` is .*it is of another rule"):
        weights.read(path, other, argument="theta", of="rule")


def test_digits_that_are_held_out_are_not_trained_on():
    known = learned_tasks.digits()
    assert len(known.labels) == 1438
    assert len(known.heldout_labels) == 359
    rows = lambda x: {row.tobytes() for row in np.asarray(x)}
    assert not rows(known.inputs) & rows(known.heldout_inputs)


def cell(name, costs, seed=0, task="quadratics", **more):
    by_hand = {"plan": None, "rate": 0.1, "edge": False, "reached": {}}
    exams = {"quadratics": {"costs": costs, "at": [1, 100], "curve": [9.0, 1.0]}}
    return {"task": task, "name": name, "seed": seed, "exams": exams, **by_hand, **more}


def trained(name, costs, seed=0):
    plan = experiment.plan(name, "quadratics")._asdict()
    found = {"plan": plan, "seconds": 1.0, "pieces": 10, "looks": [2.0, 1.0]}
    return cell(name, costs, seed, **found)


EXAMS = {"quadratics": Exam(tasks.quadratics(2), 4)}


def test_verdicts_go_by_problem():
    hard = np.array([0.0, 10.0, 100.0, 1000.0])  # problems differ more than optimizers
    ours = [trained("LSTM", (hard + 1 + 0.01 * n * np.arange(4)).tolist(), n) for n in range(3)]
    cells = [*ours, cell("heavy ball", (hard + 2).tolist()), cell("Adam", hard.tolist())]
    said = table.shown(cells, EXAMS)
    assert "heavy ball -0.98" in said
    assert "0.0100, ahead" not in said.split("heavy ball -0.98")[0]
    assert said.split("heavy ball -0.98")[1].split(";")[0].endswith("ahead")
    assert "Adam +1.0" in said
    assert said.split("Adam +1.0")[1].split(".\n")[0].endswith("behind")


def test_an_edge_and_a_divergence_are_in_the_table():
    cells = [cell("SGD", [1.0, 2.0, 3.0, 4.0], edge=True), cell("Adam", [None, 1.0, 1.0, 1.0])]
    said = table.shown(cells, EXAMS)
    assert "| SGD | rate 0.1, on the edge | 2.5 | 1 |" in said
    assert "| Adam | rate 0.1 | diverges | 1 |" in said


@pytest.mark.slow
def test_the_tiny_run_writes_everything_and_runs_nothing_twice(tmp_path, monkeypatch, capsys):
    options = experiment.Tiny(runs=tmp_path / "run", place=tmp_path / "place")
    made = experiment.main(options)
    names = [f"{c['task']}, {c['name']}" for c in made["cells"]]
    assert names == [
        "quadratics, SGD", "quadratics, heavy ball", "bandit, SGD", "bandit, heavy ball",
        "quadratics, LSTM", "quadratics, DMGD, learned",
    ]  # fmt: skip
    assert all(set(c["exams"]) == {"quadratics", "bandit"} for c in made["cells"][4:])
    results = tmp_path / "place" / "results"
    assert (results / "learned.png").stat().st_size > 10_000
    assert "set by" in (results / "learned.md").read_text()
    assert runs.read_json(results / "learned.json")["cells"] == made["cells"]
    assert (tmp_path / "run" / "LSTM-quadratics-0.safetensors").exists()
    monkeypatch.setattr(contest, "curves", None)
    assert experiment.main(options) == made
    capsys.readouterr()
    with pytest.raises(Refused, match="`models` holds 'Adamm'; it must be one of SGD"):
        experiment.main(dataclasses.replace(options, models=("Adamm",)))


def test_fewer_than_one_seed_is_refused():
    with pytest.raises(ValueError, match="`seeds` is 0; it must be an integer >= 1"):
        experiment.Learned(seeds=0, runs=pathlib.Path("x"))
