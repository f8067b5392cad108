"""nlx run agents: a tiny run from end to end, what it measures by hand, tables and pictures."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from nlx_experiments import (
    agent,
    agents,
    agents_contest,
    agents_table,
    agents_tasks,
    environments,
    ppo,
    run,
)
from nlx_experiments.environments import Outcome
from nlx_experiments.errors import Refused, Stopped


def test_tasks_are_what_the_experiment_says():
    tasks = agents_tasks.full()
    assert [t.kind for t in tasks.values()] == ["switch"] * 5 + ["memory"] * 2 + ["skills"] * 2
    for task in tasks.values():
        for world in (*task.worlds, *task.exams.values()):
            environments.check(world)
        sizes = {environments.percept_size(world.environment) for world in task.worlds}
        assert len(sizes) == 1
    for name in ("bandit", "contexts", "goal", "compass", "cart-pole"):
        world = tasks[name].exams["switch"]
        assert world.switch == (world.length // 2,) * 2
    for name in ("t-maze", "memory chain"):
        assert list(tasks[name].exams) == ["10", "20", "50", "100"]
        longest = tasks[name].exams["100"]
        assert longest.draw(jnp.zeros(2, jnp.uint32))[0] == 100
        assert longest.length == 151


def test_models_of_a_task_are_of_one_size():
    for task in agents_tasks.full().values():
        world = task.worlds[0].environment
        for name, config in agents_tasks.models(task, agents.FULL).items():
            found = agent.count(config, environments.percept_size(world), world.actions)
            assert abs(found - agents.FULL.parameters) <= 0.01 * agents.FULL.parameters, name


def test_what_an_agent_carries_is_counted():
    """Of a GRU its width, of attention a key and a value a step and layer, of Hope its memories."""
    task = agents_tasks.full()["contexts"]
    configs = agents_tasks.models(task, agents.FULL)
    found = {name: agents_contest.carried(configs[name], task.worlds[0]) for name in configs}
    assert (found["gru"], found["wider gru"]) == (32, 40)
    assert 2 * 2 * 32 * 120 <= found["transformer"] <= 2 * 2 * 32 * 121
    memories = 2 * (5 * 2 * 2 * 16 * 16)  # weights, and where the chunk began
    assert memories <= found["hope"] <= memories + 4 * 3 * 32 + 1


def test_skills_lie_side_by_side_in_an_observation(key):
    worlds = agents_tasks.skills(60, agents_tasks.full()["skills"].plan).worlds
    assert [world.name for world in worlds] == ["bandit", "goal", "chain"]
    seen = [environments.begin(world, key).percept[:9] for world in worlds]
    assert [np.flatnonzero(x).tolist() for x in seen] == [[], [2, 5], [7]]


def _lived(reward, regret, done):
    array = lambda x: jnp.asarray(x)[None]
    return Outcome(array(reward), array(np.ones_like(regret)), array(regret), array(done))


def test_of_a_memory_the_first_walk_counts(monkeypatch):
    """Lifetimes: right at once, wrong and then right, never done, late and right; 4 steps each."""
    reward = np.array([[0, 1, 0, -1], [-1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1.0]]).T
    done = np.array([[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool).T
    found = agents_contest.first_right(_lived(reward, reward, done))
    assert found.tolist() == [0.5]


def test_regret_is_summed_on_both_sides_of_the_switch(monkeypatch):
    regret = np.array([[1.0, 2, 3, 5], [3, 2, 5, 7]]).T
    lived = _lived(regret, regret, regret > 9)
    monkeypatch.setattr(ppo, "examine", lambda *given: lambda weights, key: lived)
    kinds = types.SimpleNamespace(kind="switch"), types.SimpleNamespace(length=4)
    found = agents_contest.examined(None, *kinds, agents.TINY, None)
    assert found["regret"].tolist() == [10]
    assert found["before"].tolist() == [4]
    assert found["curve"].tolist() == [[2, 2, 4, 6]]


SIZE = agents.TINY._replace(rates=(1.0, 2.0), seeds=2, every=1)
PLAN = agents_tasks.tiny()["bandit"].plan._replace(updates=3)


class Trained:
    """Stands in for PPO: weights are numbers that grow by the rate; rewards are what is told."""

    def __init__(self, monkeypatch, worth):
        state = lambda w: types.SimpleNamespace(train=types.SimpleNamespace(params={"w": w}))
        grown = lambda s, rates, count: state(s.train.params["w"] + rates * count)
        made = types.SimpleNamespace(
            init=lambda seeds: state(jnp.zeros(len(seeds))),
            start=lambda seeds, weights: state(weights["w"]),
            learn=lambda s, rates, keys, count, kept: (grown(s, rates, count), None),
        )
        monkeypatch.setattr(ppo, "make", lambda *given: made)
        monkeypatch.setattr(ppo, "examine", lambda config, world, n: self.exam(worth, world))

    def exam(self, worth, world):
        def lived(weights, key):
            value = np.asarray(worth(world.name, np.asarray(weights["w"])), float)
            whole = np.broadcast_to(value[:, None, None], (len(value), world.length, 1))
            return Outcome(whole, np.ones_like(whole), 1 - whole, np.ones_like(whole, bool))

        return lived


def test_the_best_weights_and_the_best_rate_are_kept(monkeypatch):
    """Worth most at weight 2: rate 1 passes it at its second update, rate 2 at its first."""
    Trained(monkeypatch, lambda name, w: -abs(w - 2.2))
    task = agents_tasks.tiny()["bandit"]._replace(plan=PLAN)
    told = []
    record = agents_contest.measure(
        agents_tasks.models(task, SIZE)["gru"], task, SIZE, watch=lambda *now: told.append(now)
    )
    assert record["rates"]["1"]["validation"] == pytest.approx([-0.2, -0.2])
    assert [updates for updates, _ in told] == [1, 2, 3]
    assert told[1][1].tolist() == pytest.approx([-0.2, -0.2, -1.8, -1.8])
    assert record["rates"]["2"]["switch"]["curve"][0] == pytest.approx([1.2] * 6, abs=1e-3)
    assert record["rate"] == "1"
    assert record["updates"] == 3


def test_skills_go_on_from_each_other_and_fill_a_matrix(monkeypatch):
    """Skill n is worth what is near n + 1 times 3 updates, of rate 1 or 2."""
    at = {"bandit": 3, "goal": 6}
    Trained(monkeypatch, lambda name, w: 1 - 0.1 * abs(w - at[name]))
    task = agents_tasks.tiny()["skills"]._replace(plan=PLAN, keep=0.0)
    config = agents_tasks.models(task, SIZE)["gru"]
    record = agents_contest.measure(config, task, SIZE)
    first = record["rates"]["1"]
    np.testing.assert_allclose(first["matrix"], [[[1, 0.7], [0.7, 1]]] * 2, atol=1e-6)
    np.testing.assert_allclose(first["untrained"], [[0.7, 0.4]] * 2, atol=1e-6)
    assert first["validation"] == pytest.approx([0.85, 0.85])
    assert record["rate"] == "1"
    assert record["updates"] == 6


def test_a_signal_ends_a_cell_after_a_validation(monkeypatch):
    Trained(monkeypatch, lambda name, w: w)
    task = agents_tasks.tiny()["bandit"]._replace(plan=PLAN)
    calls = []

    def leave():
        calls.append(1)
        if len(calls) == 2:
            raise Stopped("now", None)

    config = agents_tasks.models(task, SIZE)["gru"]
    with pytest.raises(Stopped):
        agents_contest.measure(config, task, SIZE, leave)
    assert len(calls) == 2


def test_cells_are_told_apart_by_what_decides_them():
    task = agents_tasks.tiny()["bandit"]
    config = agents_tasks.models(task, agents.TINY)["gru"]
    what = lambda task, size: agents_contest.identity(("bandit", "gru"), task, size, config)
    same = what(task, agents.TINY)
    assert same == what(agents_tasks.tiny()["bandit"], agents.TINY)
    assert same.startswith("bandit; gru; ")
    others = [
        what(task._replace(plan=task.plan._replace(clip=0.3)), agents.TINY),
        what(task, agents.TINY._replace(seeds=3)),
        what(task._replace(exams={}), agents.TINY),
        what(task._replace(keep=1.0), agents.TINY),
        what(task._replace(worlds=(task.worlds[0]._replace(switch=(3, 3)),)), agents.TINY),
    ]
    assert len({same, *others}) == 6


def _results():
    """Two seeds of two models on one task of each kind."""

    def of(task, shift):
        if task == "bandit":
            regret = [2.0 + shift, 3.0 + shift]
            curve = [[0.1 + shift] * 30 + [0.5] * 30] * 2
            return {"switch": {"regret": regret, "before": [1.0, 1.0], "curve": curve}}
        if task == "t-maze":
            titles = agents_tasks.full()["t-maze"].exams
            return {title: {"right": [1.0 - shift, 0.9 - shift]} for title in titles}
        matrix = [[0.8, 0, 0], [0.6, 1, 0], [0.5 - shift, 0.9, 0.7]]
        return {"matrix": [matrix] * 2, "untrained": [[0.1, 0, 0]] * 2}

    def record(task, shift):
        found = {"validation": [0.5, 0.6]} | of(task, shift)
        told = {"rate": "0.01", "parameters": 12_000, "carried": 32, "seconds": 3.0}
        return {"rates": {"0.01": found}, **told}

    tasks = ("bandit", "t-maze", "skills")
    return {t: {"hope": record(t, 0.0), "gru": record(t, 0.25)} for t in tasks}


def test_tables_say_what_was_found(tmp_path):
    tasks = agents_tasks.full()
    results = _results()
    text = agents_table.shown(results, tasks)
    assert "| bandit | 2.50 (2.00 to 3.00) | 2.75 (2.25 to 3.25) | 1.00 / 1.00 |" in text
    assert "* bandit: gru -0.25 ± 0.00, ahead." in text
    assert "| t-maze | hope | 95 (90 to 100) |" in text
    assert "* t-maze, 100 steps: gru +25.0 ± 0.0 points, ahead." in text
    assert "| hope | 83 (83 to 83) | 70 (70 to 70) | -20 (-20 to -20) | 50 (50 to 50) |" in text
    assert "* at the end: gru +8.3 ± 0.0 points, ahead." in text
    assert "| bandit | gru | 0.01 | 0.550 | 12,000 | 32 | 3.000 |" in text
    agents_table.plot(tmp_path, "agents", results, tasks)
    for name in ("agents", "agents-skills"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_task_or_model_is_refused(tmp_path):
    told = ["agents-tiny", "--runs", str(tmp_path), "--place", str(tmp_path)]
    with pytest.raises(Refused, match="`only` holds 'maze'; it must be one of bandit, t-maze, sk"):
        run.experiment([*told, "--only", "maze"])
    with pytest.raises(Refused, match="`models` holds 'lstm'; it must be one of hope, gru, w"):
        run.experiment([*told, "--models", "lstm"])


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path):
    """A second run finds every cell and trains nothing."""
    told = ["--runs", str(tmp_path / "run"), "--place", str(tmp_path / "place")]
    told += ["--models", "gru"]
    run.experiment(["agents-tiny", *told])
    folder = tmp_path / "place" / "results"
    written = {path.name for path in folder.iterdir()}
    assert written == {"agents.json", "agents.md", "agents.png", "agents-skills.png"}
    before = (tmp_path / "run" / "cells.jsonl").read_bytes()
    assert before.count(b"\n") == 3
    run.experiment(["agents-tiny", *told])
    assert (tmp_path / "run" / "cells.jsonl").read_bytes() == before
