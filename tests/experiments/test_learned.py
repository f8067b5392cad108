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
    exam = Exam(STEEP, 3, 3, objective, 4)
    found = contest.curves(SGD, exam, {"rate": jnp.float32(0.5)}, contest.REPORTED, 3, 4)
    np.testing.assert_allclose(found, share * 0.25 ** np.arange(1, 5)[None].repeat(3, 0))


def test_the_best_rate_is_taken_and_an_edge_is_told():
    found = contest.tuned(SGD, Exam(STEEP, 2, 2, steps=3))
    assert found["rate"] == 1
    assert not found["edge"]
    assert found["reached"]["1e-05"] == pytest.approx(0.5, rel=1e-3)
    uphill = contest.by_rate(lambda rate: optax.sgd(-rate))
    found = contest.tuned(uphill, Exam(STEEP, 2, 2, steps=3))
    assert found["rate"] == contest.RATES[0]
    assert found["edge"]


def test_what_diverges_is_no_number():
    exam = Exam(STEEP, 2, 2, longer=200)
    found = contest.examined(SGD, exam, {"rate": jnp.float32(1e3)})
    assert found["costs"] == [None, None]
    assert contest.points(exam)[[0, -1]].tolist() == [1, 200]
    assert len(found["curve"]) == len(contest.points(exam))
    assert found["curve"][0] == pytest.approx(999**2 / 2, rel=1e-4)
    assert found["curve"][-1] is None
    assert table.mean(found["costs"]) == np.inf


def test_problems_that_choose_are_not_those_that_are_told():
    exam, theta = Exam(tasks.quadratics(3), 4, 4, steps=1), {"rate": jnp.float32(1e-3)}
    of = lambda part, count: contest.curves(SGD, exam, theta, part, count, 1)
    assert not np.intersect1d(of(contest.CHOSEN, 4), of(contest.REPORTED, 4)).size
    np.testing.assert_array_equal(of(contest.REPORTED, 4)[:2], of(contest.REPORTED, 2))


RULE = learned.momentum_rule(1e-3)
PLAN = contest.Plan("pes", 32, 60, 0.1, truncation=10, looks=6)
QUADRATICS = Exam(tasks.quadratics(3), 8, 8, steps=20)


def test_the_best_theta_is_kept_and_comes_back_from_a_file(tmp_path):
    theta, told = contest.meta_trained(RULE, QUADRATICS, PLAN, 0, lambda: None)
    assert len(told["looks"]) == 7
    assert told["pieces"] == 10 * int(np.argmin(told["looks"]))
    assert min(told["looks"]) < 0.5 * told["looks"][0]
    path = tmp_path / "theta.safetensors"
    contest.kept(path, theta, told)
    back, again = contest.restored(path, RULE.init(jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, back, theta)
    assert again == told
    assert contest.looked(RULE, QUADRATICS, back) == pytest.approx(min(told["looks"]), rel=1e-4)
    other = learned.adam_rule().init(jax.random.key(0))
    with pytest.raises(Refused, match=r"`theta` is .*it is of another rule"):
        weights.read(path, other, argument="theta", of="rule")


def test_the_theta_that_did_best_is_kept(monkeypatch):
    scores, seen = iter([5.0, 3.0, 1.0, 2.0, 4.0, 6.0, 7.0]), []
    look = lambda rule, exam, theta: (seen.append(theta), next(scores))[1]
    monkeypatch.setattr(contest, "looked", look)
    theta, told = contest.meta_trained(RULE, QUADRATICS, PLAN, 0, lambda: None)
    assert told["pieces"] == 20
    jax.tree.map(np.testing.assert_array_equal, theta, seen[2])
    assert theta["log_rate"] != seen[3]["log_rate"]


@pytest.mark.parametrize("estimator", ["backpropagation", "pes"])
def test_meta_training_that_was_left_goes_on_to_the_bit_from_its_file(estimator, tmp_path):
    """Runs under way, their keys, the outer rule and the best theta so far are all in the file."""
    plan = PLAN._replace(estimator=estimator, runs=4, pieces=12)
    theta, told = contest.meta_trained(RULE, QUADRATICS, plan, 0, lambda: None)
    path, calls = tmp_path / "under-way.safetensors", []

    def leave():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contest.meta_trained(RULE, QUADRATICS, plan, 0, leave, path)
    assert path.exists()
    calls.clear()
    more = lambda: calls.append(1)
    back, again = contest.meta_trained(RULE, QUADRATICS, plan, 0, more, path)
    assert len(calls) == 3  # of six: three were done
    jax.tree.map(np.testing.assert_array_equal, back, theta)
    assert again["looks"] == told["looks"]
    assert again["pieces"] == told["pieces"]


def test_digits_that_are_held_out_are_not_trained_on():
    known = learned_tasks.digits()
    assert len(known.labels) == 1438
    assert len(known.heldout_labels) == 359
    rows = lambda x: {row.tobytes() for row in np.asarray(x)}
    assert not rows(known.inputs) & rows(known.heldout_inputs)


def cell(name, costs, seed=0, task="quadratics", **more):
    by_hand = {"plan": None, "rate": 0.1, "edge": False, "reached": {}}
    exams = {"quadratics": {"costs": costs, "curve": [9.0, 1.0]}}
    return {"task": task, "name": name, "seed": seed, "exams": exams, **by_hand, **more}


def trained(name, costs, seed=0):
    plan = experiment.plan(name, "quadratics")._asdict()
    found = {"plan": plan, "seconds": 1.0, "pieces": 10, "looks": [2.0, 1.0]}
    return cell(name, costs, seed, **found)


EXAMS = {"quadratics": Exam(tasks.quadratics(2), 4, 4)}


def test_verdicts_go_by_problem():
    hard = np.array([0.0, 10.0, 100.0, 1000.0])  # problems differ more than optimizers
    ours = [trained("LSTM", (hard + 1 + 0.01 * n * np.arange(4)).tolist(), n) for n in range(3)]
    cells = [*ours, cell("heavy ball", (hard + 2).tolist()), cell("Adam", hard.tolist())]
    said = table.shown(cells, EXAMS)
    ball, adam = said.split("heavy ball -0.98")[1], said.split("Adam +1.0")[1]
    assert ball.split(";")[0].endswith("ahead, better on 100 %")
    assert adam.split(".\n")[0].endswith("behind, better on 0 %")
    assert "| LSTM | backpropagation, 5,000 pieces | 278.5 (278.5 to 278.5) | 56" in said


def test_what_was_learned_is_told_apart_from_what_is_tuned_by_hand():
    hand = cell("DMGD, coordinates", [3.0, 4.0, 5.0, 7.0], task="bandit")
    two = trained("DMGD, rate and decay learned", [2.0, 3.0, 4.0, 6.1]) | {"task": "bandit"}
    said = table.shown([hand, two], EXAMS)
    assert (
        "| DMGD, rate and decay learned | DMGD, coordinates | bandit | -0.975 ± 0.025, ahead |"
        in said
    )
    lost = trained("DMGD, learned", [None, 3.0, 4.0, 6.0]) | {"task": "bandit"}
    lost["looks"] = [None, None]
    said = table.shown([hand, lost], EXAMS)
    assert "| DMGD, learned | DMGD, coordinates | bandit | learned one diverges |" in said
    assert "| 10 | 1,000 | diverges | diverges |" in said


def test_an_edge_and_a_divergence_are_in_the_table():
    cells = [cell("SGD", [1.0, 2.0, 3.0, 4.0], edge=True), cell("Adam", [None, 1.0, 1.0, 1.0])]
    longer = {"quadratics": EXAMS["quadratics"]._replace(longer=1_000)}
    said = table.shown(cells, longer)
    assert "| mean after 100 | median | mean of the first 4 after 1,000 |" in said
    assert "| SGD | rate 0.1, on the edge | 2.5 | 2.5 | 1 |" in said
    assert "| Adam | rate 0.1 | diverges | 1 | 1 |" in said
    said = table.shown(cells, EXAMS)  # whose runs are not made longer
    assert "| SGD | rate 0.1, on the edge | 2.5 | 2.5 |\n" in said


def test_the_same_runs_scored_anew_are_no_kind_of_their_own():
    exams = EXAMS | {"quadratics, held out": EXAMS["quadratics"]}
    costs = [1.0, 2.0, 3.0, 4.0]
    cells = [cell("DMGD, coordinates", costs), trained("DMGD, learned", costs)]
    for one in cells:
        one["exams"] |= {"quadratics, held out": one["exams"]["quadratics"]}
    said = table.shown(cells, exams)
    assert "| DMGD, learned | DMGD, coordinates | quadratics | set by it | set by it |" in said


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
    thetas = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    assert [name[:18] for name in thetas] == ["DMGD,-learned-quad", "LSTM-quadratics-0-"]
    monkeypatch.setattr(contest, "curves", None)
    assert experiment.main(options) == made
    capsys.readouterr()
    with pytest.raises(Refused, match="`models` holds 'Adamm'; it must be one of SGD"):
        experiment.main(dataclasses.replace(options, models=("Adamm",)))


def test_fewer_than_one_seed_is_refused():
    with pytest.raises(ValueError, match="`seeds` is 0; it must be an integer >= 1"):
        experiment.Learned(seeds=0, runs=pathlib.Path("x"))
