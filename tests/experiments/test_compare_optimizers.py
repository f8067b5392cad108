"""The comparison of optimizers: it runs, goes on, chooses fairly, and says what it found."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nlx_experiments import compare_optimizers, compare_rows, compare_search, run, runs
from nlx_experiments import compare_rules as rules
from nlx_experiments import compare_tasks as tasks
from nlx_experiments.compare_rules import Rule
from nlx_experiments.compare_search import Cell, Contest, Row, Store, best
from nlx_experiments.compare_tasks import Task
from nlx_experiments.console import StopRequest
from nlx_experiments.errors import Refused, Stopped


def bowl(steps: int = 4) -> Task:
    """1/2 |w|^2 from 1, or near it."""

    def init(data, key):
        return {"w": 1 + 0.01 * jax.random.normal(key, 2)}, data

    value = lambda params: 0.5 * jnp.sum(params["w"] ** 2)
    return Task(
        steps,
        2,
        jnp.zeros(()),
        init,
        lambda fixed, params, taps, key, step: value(params) + fixed,
        lambda fixed, params, step: {"loss": value(params)},
    )


def row(rules, **fields) -> Row:
    given = {"grid": (-1.0, 0.0), "seeds": 3, "tuning": 2, "batch": 2}
    return Row(bowl(), rules, {"constant": ("ours", 1.0)}, **{**given, **fields})


SGD = Rule(lambda rate: optax.sgd(rate), [{}])


@pytest.fixture
def contest(tmp_path):
    """A function that makes a contest of one rule, all with one folder."""
    with runs.Run(tmp_path) as opened, StopRequest() as stop:
        yield lambda of, name="sgd": Contest("bowl", of, name, Store(opened), stop)


@pytest.mark.slow
def test_tiny_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(["run", "optimizers-tiny"]) == 0
    results = tmp_path / "runs" / "optimizers-tiny" / "results"
    content = json.loads((results / "optimizers.json").read_text())
    assert list(content["rows"]) == list(compare_rows.TINY)
    for found in content["rows"].values():
        assert {name for name, _ in found["declared"].values()} <= set(found["optimizers"])
        for entry in found["optimizers"].values():
            assert all(len(entry[s]["losses"]) == 2 for s in found["schedules"])
    assert (results / "optimizers.png").read_bytes().startswith(b"\x89PNG")
    written = (results / "optimizers.md").read_text()
    assert "toy, constant: delta momentum was meant first: **" in written

    def compile_(self):
        raise AssertionError("something was run again")

    monkeypatch.setattr(Contest, "_compile", compile_)
    assert run.main(["run", "optimizers-tiny"]) == 0
    assert (results / "optimizers.md").read_text() == written
    capsys.readouterr()


def test_a_training_is_the_loop_it_stands_for(contest):
    cell = Cell("cosine", -4, 0)
    made = row({"sgd": SGD}, tuning=3)
    losses = contest(made).measure([cell])[cell]["losses"]
    for seed, ours in enumerate(losses):
        start, _ = jax.random.split(jax.random.key(seed))
        w = np.asarray(made.task.init(jnp.zeros(()), start)[0]["w"])
        for step in range(4):
            w = w - 0.1 * 0.5 * (1 + np.cos(np.pi * step / 4)) * w
        assert ours == pytest.approx(0.5 * np.sum(w**2), rel=1e-5)


def test_rates_are_chosen_on_other_seeds_than_are_reported(contest):
    made = contest(row({"sgd": SGD}))
    assert set(made._seeds(Cell("constant", 0, 0))).isdisjoint(
        made._seeds(Cell("constant", 0, 0, fresh=True))
    )


def test_the_best_inside_the_grid_is_no_edge(contest):
    cell, edge = contest(row({"sgd": SGD})).choose("constant")  # one step at rate 1 ends at 0
    assert (cell.exponent, edge) == (0, False)


def test_a_grid_that_misses_is_extended(contest):
    cell, edge = contest(row({"sgd": SGD}, grid=(-2.0, -1.0))).choose("constant")
    assert (cell.exponent, edge) == (0, False)


def test_what_is_still_on_the_edge_is_flagged(contest):
    slow = Rule(lambda rate: optax.chain(optax.scale(1e-6), optax.sgd(rate)), [{}])
    cell, edge = contest(row({"sgd": slow})).choose("constant")
    assert edge
    result = {"rate": cell.rate, "setting": {"momentum": 0.9}, "edge": edge}
    assert compare_optimizers.where(result).endswith("!, momentum 0.9")


def test_every_setting_is_tried(contest):
    scaled = Rule(
        lambda rate, by: optax.chain(optax.scale(by), optax.sgd(rate)), [{"by": 0.0}, {"by": 1.0}]
    )
    cell, _ = contest(row({"sgd": scaled})).choose("constant")
    assert cell.setting == 1


def test_what_diverges_is_last_and_written_as_null(contest):
    made = contest(row({"sgd": SGD}))
    found = made.measure([Cell("constant", 0, 0), Cell("constant", 40, 0)])
    assert None in found[Cell("constant", 40, 0)]["losses"]
    assert best(found) == Cell("constant", 0, 0)
    assert compare_optimizers.loss(found[Cell("constant", 40, 0)]) == "diverged"
    assert "NaN" not in made.store.path.read_text()


def test_a_stop_keeps_what_is_finished(contest):
    made = contest(row({"sgd": SGD}, tuning=2))
    cells = [Cell("constant", e, 0) for e in range(-40, 0)]

    def stopping(batch, _run=made._run):
        if batch[0][0].exponent == -30:
            made.stop.received = 15
        return _run(batch)

    made._run = stopping
    with pytest.raises((Stopped, AttributeError)):
        made.measure(cells)
    kept = len(made.store.known)
    assert 1 <= kept < len(cells)
    assert len(runs.read_lines(made.store.path)) == kept


def test_a_damaged_or_unfinished_line_is_dropped_alone(tmp_path):
    whole = [f'{{"what": "{name}", "losses": [1.0]}}' for name in "ac"]
    text = "\n".join((whole[0], '{"what": "b", "lo\0\0', whole[1], '{"what": "d", "los'))
    (tmp_path / "cells.jsonl").write_text(text)
    with runs.Run(tmp_path) as opened:
        assert list(Store(opened).known) == ["a", "c"]
    assert (tmp_path / "cells.jsonl").read_text().splitlines() == whole
    (tmp_path / "lines.jsonl").write_text(text)
    assert len(runs.read_lines(tmp_path / "lines.jsonl")) == 1


def entry(losses, **fields):
    curve = [3.0, 2.0, sum(losses) / len(losses)]
    found = {"losses": losses, "curve": curve, "rate": 0.1, "setting": {}, "edge": False}
    own = {name: fields.pop(name, value) for name, value in (("seconds", 1.0), ("aside", False))}
    return {"deep": False, "bytes": 8, **own, "constant": {**found, **fields}}


def test_the_table_says_who_won_and_who_did_not():
    known = {
        "steps": 30,
        "stretch": 10,
        "log": True,
        "declared": {"constant": ["ours", 1.0]},
        "schedules": ["constant"],
        "optimizers": {
            "adamw": entry([2.0, 2.2]),
            "ours": entry([1.0, 1.2], seconds=3.0, edge=True),
        },
    }
    assert compare_optimizers.verdict("bowl", known) == [
        "bowl, constant: ours was meant first: **yes**, 1.1 against 2.1 of adamw, "
        "7.1 standard errors apart."
    ]
    known["optimizers"]["averaged"] = entry([0.1, 0.1], aside=True)
    (said,) = compare_optimizers.verdict("bowl", known)
    assert "first: **yes**, 1.1 against 2.1 of adamw" in said
    del known["optimizers"]["averaged"]
    known["optimizers"]["adamw"] = entry([1.0, 1.0])
    (said,) = compare_optimizers.verdict("bowl", known)
    assert "first: **no**" in said
    known["declared"]["constant"] = ["ours", 1.2]
    (said,) = compare_optimizers.verdict("bowl", known)
    assert "within 20 % of the best: **yes**" in said
    first, second = compare_optimizers.table({"bowl": known}).rows
    assert first[:5] == ("bowl", "adamw", "1 ± 0", "0.1", "30")
    assert second[:5] == ("bowl", "**ours**", "1.1 ± 0.1", "0.1!", "-")
    assert second[-2:] == ("3.0", "1.00")


def test_bad_input_gets_one_sentence(tmp_path):
    options = compare_optimizers.CompareOptimizers
    with pytest.raises(Refused, match="`only` holds 'tyo'; it must be one of toy, "):
        compare_optimizers.main(options(only=("tyo",), place=tmp_path))
    with pytest.raises(Refused, match="which holds no README.md"):
        compare_optimizers.main(options(place=tmp_path))


def test_cells_of_other_code_are_not_reused(tmp_path, monkeypatch):
    """An optimizer edited under its old name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_rows, "TINY", {})
    options = compare_optimizers.Tiny(runs=tmp_path, place=tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "optimizers.md").write_text("")
    compare_optimizers.main(options)
    compare_optimizers.main(options)
    monkeypatch.setattr(compare_optimizers, "code", lambda: {"m3.py": "edited"})
    with pytest.raises(Refused, match="begun with"):
        compare_optimizers.main(options)


def test_every_declared_optimizer_competes():
    for name, make in compare_rows.FULL.items():
        made = make()
        rivals = {"sgd", "momentum", "nesterov", "nadam", "adamw", "muon", "schedule_free"}
        assert rivals | {"shampoo", "soap"} <= set(made.rules), name
        for declared, _ in made.declared.values():
            assert made.rules[declared].deep, name
            assert not made.rules[declared].aside, name


def test_labels_are_permuted_and_forgotten():
    """Each stretch has an order of its own, which the loss and both scores go by."""
    task = tasks.permuted(3, 5, 4)
    params, fixed = task.init(task.data, jax.random.key(0))
    labels = np.asarray(fixed["labels"])
    assert labels.shape == (3, 10)
    assert all(sorted(row) == list(range(10)) for row in labels.tolist())
    assert len({tuple(row) for row in labels.tolist()}) == 3
    key = jax.random.key(1)
    losses = [float(task.loss(fixed, params, None, key, step)) for step in (0, 4, 5, 10)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    other = {**fixed, "labels": fixed["labels"][jnp.array([1, 0, 2])]}
    now, swapped = task.score(fixed, params, 10), task.score(other, params, 10)
    assert float(now["accuracy"]) == float(swapped["accuracy before"])
    assert float(now["accuracy before"]) == float(swapped["accuracy"])


def _columns(task, fixed, best):
    """Norms of a gradient's columns over the usual one, of 64 gradients."""
    gradient = jax.jit(jax.grad(lambda w, key: task.loss(fixed, {"w": w}, None, key, 0)))
    keys = jax.random.split(jax.random.key(1), 64)
    columns = np.concatenate([np.linalg.norm(gradient(best, k), axis=0) for k in keys])
    return columns / np.median(columns)


def test_the_noises_are_what_they_are_called():
    """Sizes of the columns of a gradient at the optimum, over its usual size."""
    sizes = {}
    for noise in tasks.NOISES:
        task = tasks.quadratic(noise)
        _, fixed = task.init(task.data, jax.random.key(0))
        best = fixed[1]
        sizes[noise] = _columns(task, fixed, best)
    assert sizes["gaussian"].max() < 3
    assert 0.03 < np.mean(sizes["outliers"] > 8) < 0.07
    assert sizes["heavy-tailed"].max() > 15
    assert 0.001 < np.mean(sizes["heavy-tailed"] > 8) < 0.05


def test_scores_are_of_data_that_is_not_trained_on():
    digits = tasks.digits(40, 4)
    train, test = (np.asarray(digits.data[n]) for n in ("x", "test_x"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}
    params, fixed = digits.init(digits.data, jax.random.key(0))
    scores = digits.score(fixed, params, 40)
    as_train = {**fixed, "test_x": fixed["x"], "test_y": fixed["y"]}
    assert float(digits.score(as_train, params, 40)["test"]) == float(scores["loss"])
    assert float(scores["test"]) != float(scores["loss"])
    text = tasks.transformer(10, width=16, layers=1, batch=2)
    stream = text.data["train"].tobytes()
    inside = [row.tobytes() in stream for row in np.asarray(text.data["heldout"])]
    assert np.mean(inside) < 0.2  # lines of code come back


@pytest.mark.parametrize("name", rules.rivals())
@pytest.mark.parametrize("settings", [rules.MOMENTA, compare_rows.DECAYS])
def test_every_setting_of_a_rival_counts(name, settings):
    rule = rules.rivals(settings)[name]
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
    ends = []
    for setting in rule.settings:
        tx, w = optax.with_extra_args_support(rule.make(lambda step: 0.1, **setting)), params
        state = tx.init(w)
        for step in range(3):
            gradient = jax.tree.map(lambda p, s=step: jnp.sin(3 * p + s), w)
            updates, state = tx.update(gradient, state, w)
            w = optax.apply_updates(w, updates)
        ends.append(np.asarray(rule.weights(state, w)["w"]).tobytes())
    assert len(set(ends)) == len(rule.settings)


def test_forgetting_is_counted():
    scores = {
        "accuracy": jnp.array([0.9, 0.8, 0.7]),
        "accuracy before": jnp.array([0.9, 0.1, 0.2]),
    }
    found = compare_search._outcome(bowl()._replace(online=True), jnp.ones((3, 2)), scores)
    assert float(found["plasticity"]) == pytest.approx(0.8)
    assert float(found["forgetting"]) == pytest.approx((0.8 + 0.6) / 2)
    assert float(found["loss"]) == 1


def test_the_toy_is_the_equation():
    task = tasks.toy(k=5.0, alpha=0.5, omega=5.0)
    weights, _ = task.init((), jax.random.key(0))
    r, theta = np.asarray(weights["w"], float)
    assert abs(r + 3.5) < 0.5
    assert abs(theta - 2) < 0.5
    want = r**2 + 5 * (r - theta + 0.5 * np.sin(5 * r)) ** 2
    got = task.loss((), weights, None, jax.random.key(1), 0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
