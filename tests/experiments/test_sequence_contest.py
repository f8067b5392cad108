# SPDX-License-Identifier: Apache-2.0
"""The one protocol of the sequence experiments, and the tables made of it."""

import dataclasses
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import (
    ablation,
    formal_languages,
    recall,
    run,
    sequence_contest,
    sequence_experiment,
    sequence_learner,
    state_tracking,
)
from nlx_experiments.errors import Refused, Stopped
from nlx_experiments.sequence_contest import Plan
from nlx_experiments.sequence_experiment import Options, Row
from nlx_experiments.sequence_tasks import Batch, Task

from nlx import nn

CONFIG = nn.ModelConfig(
    mixer="attention", feed_forward="swiglu", vocabulary=4, width=8, heads=2, layers=1, hidden=8
)
PLAN = Plan(
    bins={"short": (2, 4), "long": (5, 8)}, shortest=2, stages=((0, 4), (20, 8)), steps=200,
    every=10, seeds=2, rows=16, rates=(1e-6, 3e-2), validated=16, tested=64, round_to=8,
)  # fmt: skip


def plus_one(generator, rows, shortest, longest):
    """The answer is the symbol and one, modulo 4: a task that every model learns."""
    lengths = generator.integers(shortest, longest + 1, rows)
    scored = (np.arange(longest) < lengths[:, None]).astype(np.float32)
    tokens = generator.integers(0, 4, (rows, longest)) * (scored > 0)
    return Batch(tokens, (tokens + 1) % 4 * (scored > 0), scored)


EASY = Task("plus one", 4, 4, plus_one)


@pytest.fixture(scope="module")
def record():
    return sequence_contest.measure("plus one", EASY, CONFIG, PLAN)


def test_a_task_that_can_be_learned_is_learned_and_ends_early(record):
    best = record["rates"][record["rate"]]
    assert record["rate"] == "0.03"
    assert best["short"]["rows"] == best["long"]["rows"] == best["long"]["tokens"] == [1, 1]
    assert max(best["long"]["loss"]) < 0.5
    assert 20 < record["steps"] < 200
    assert record["rates"]["1e-06"]["validation"] < best["validation"]
    assert record["parameters"] == sequence_learner.count(CONFIG)
    assert abs(record["chance"]["long"] - 0.25) < 0.1


def stub(monkeypatch, score, models=4):
    """Learners whose weights are the steps taken: scored by score(weights, batch)."""
    state = lambda w: types.SimpleNamespace(params=w)
    learners = sequence_learner.Learners(
        lambda seeds: state(jnp.zeros(len(seeds))),
        lambda s, rates, keys, batches: (state(s.params + len(batches[0])), None),
        lambda params, batch: score(np.asarray(params), batch),
        7,
    )
    monkeypatch.setattr(sequence_learner, "make", lambda *_, **__: learners)


def scores(shares, loss=None):
    shares = np.asarray(shares, float)
    return sequence_learner.Scores(shares, shares, 1 - shares if loss is None else loss, shares)


def test_weights_are_those_of_the_best_validation_and_rows_are_fresh(monkeypatch):
    """Best after 10 of 30 steps; and of equally right weights those of the lowest loss."""
    seen = []

    def score(params, batch):
        seen.append((params, batch.tokens))
        return scores([{0: 0.1, 10: 0.9, 20: 0.3, 30: 0.5}[int(w)] for w in params])

    stub(monkeypatch, score)
    plan = dataclasses.replace(PLAN, steps=30)
    record = sequence_contest.measure("stub", EASY, CONFIG, plan)
    assert [w.tolist() for w, _ in seen[-2:]] == [[10] * 4] * 2
    assert record["rates"]["0.03"]["long"]["rows"] == [0.9, 0.9]
    assert record["rates"]["0.03"]["validations"] == pytest.approx([1.80089] * 2)
    (_, checked), (_, examined) = seen[1], seen[-1]
    assert (checked != examined[: len(checked)]).any()

    losses = {10: 0.3, 20: 0.1, 30: 0.2}
    lower = lambda w: np.asarray([losses[int(x)] for x in w])
    stub(monkeypatch, lambda w, batch: seen.append((w, 0)) or scores([0.5] * 4, lower(w)))
    sequence_contest.measure("stub", EASY, CONFIG, plan)
    assert [w.tolist() for w, _ in seen[-2:]] == [[20] * 4] * 2


def test_a_training_without_a_finite_loss_is_never_the_best(monkeypatch):
    def score(params, batch):
        loss = np.where(params == 10, 0.5, np.nan) * [1, 1, 1, np.nan]
        return scores([0.5, 0.5, 0.9, 0.9], loss)

    stub(monkeypatch, score)
    record = sequence_contest.measure("stub", EASY, CONFIG, dataclasses.replace(PLAN, steps=20))
    assert record["rate"] == "1e-06"
    assert record["rates"]["0.03"]["validations"][1] == -np.inf


@pytest.mark.parametrize(
    ("wrong_until", "steps"), [((10, 20, 90, 90), 50), ((10, 90, 90, 40), 120)]
)
def test_a_cell_ends_after_three_validations_with_all_seeds_of_a_rate_right(
    monkeypatch, wrong_until, steps
):
    """Seeds of the first rate are two, of the second two; one wrong row in 16 is not right."""
    score = lambda w, batch: scores(np.where(w > np.asarray(wrong_until), 1, 15 / 16))
    stub(monkeypatch, score)
    record = sequence_contest.measure("stub", EASY, CONFIG, PLAN)
    assert record["steps"] == steps


def test_rows_to_choose_by_may_be_shorter_than_those_reported():
    plan = dataclasses.replace(PLAN, chosen={"long": (5, 6)}, validated=200)
    lengths = lambda stream: sequence_contest.rows(EASY, plan, stream, "long").scored.sum(1)
    assert set(lengths(sequence_contest.VALIDATED)) == {5, 6}
    assert set(lengths(sequence_contest.TESTED)) == {5, 6, 7, 8}
    with pytest.raises(ValueError, match="`chosen` holds {'longer'}; it must hold bins"):
        dataclasses.replace(PLAN, chosen={"longer": (5, 6)})


def test_stages_begin_where_a_validation_ends():
    for stages in ((), ((10, 4),), ((0, 4), (15, 8))):
        with pytest.raises(
            ValueError, match="`stages` is .*, and all from multiples of `every`, 10"
        ):
            dataclasses.replace(PLAN, stages=stages)


def test_nothing_is_learned_from_answers_of_other_rows():
    """The control: with answers that belong to other rows the same training stays at chance."""

    def broken(generator, rows, shortest, longest):
        batch = plus_one(generator, rows, shortest, longest)
        return dataclasses.replace(batch, answers=generator.permuted(batch.answers, axis=0))

    task = dataclasses.replace(EASY, draw=broken)
    found = sequence_contest.measure("control", task, CONFIG, PLAN)
    tokens = [v for r in found["rates"].values() for v in r["long"]["tokens"]]
    assert max(tokens) < 0.5
    assert found["steps"] == PLAN.steps


def test_trainings_of_a_batch_do_not_touch_each_other():
    """One seed at one rate learns the same alone and among others."""
    learners = sequence_learner.make(CONFIG, steps=8, noise=0.1)
    stream = np.random.default_rng(0)
    batches = sequence_learner.stacked([plus_one(stream, 4, 8, 8) for _ in range(3)])

    def weights(seeds, rates):
        seeds, rates = jnp.asarray(seeds, jnp.uint32), jnp.asarray(rates, jnp.float32)
        state, losses = learners.learn(
            learners.init(seeds), rates, jax.vmap(jax.random.key)(seeds), batches
        )
        return jax.tree.leaves(state.params), losses

    (many, losses), (alone, loss) = weights([0, 1, 1], [1e-2, 1e-2, 3e-2]), weights([1], [3e-2])
    for together, own in zip(many, alone, strict=True):
        np.testing.assert_allclose(together[2], own[0], atol=1e-6)
        assert np.abs(together[1] - together[2]).max() > 1e-4 or together[1].size <= 8
    np.testing.assert_allclose(losses[2], loss[0], rtol=1e-5)
    assert np.abs(losses[0] - losses[1]).max() > 1e-3


def test_the_schedule_rises_then_stands_or_falls():
    for decay, last in ((False, 1.0), (True, 0.1)):
        curve = sequence_learner.schedule(400, decay)
        assert float(curve(0)) == 0
        assert float(curve(25)) == pytest.approx(0.5)
        assert float(curve(50)) == pytest.approx(1)
        assert float(curve(400)) == pytest.approx(last)


def test_weights_that_did_better_are_kept():
    now, before = {"w": jnp.ones((3, 2))}, {"w": jnp.zeros((3, 2))}
    kept, values = sequence_learner.better(
        (now, np.asarray([0.5, 2.0, 1.0])), (before, np.asarray([1.0, 1.0, 1.0]))
    )
    np.testing.assert_array_equal(kept["w"], [[0, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(values, [1, 2, 1])


def test_noise_is_added_while_training_only():
    model = sequence_learner.SequenceModel(CONFIG, rngs=nnx.Rngs(0))
    tokens, key = jnp.zeros((1, 4), jnp.int32), jax.random.key(0)
    plain = model(tokens)
    np.testing.assert_array_equal(plain, model(tokens, key, 0.0))
    np.testing.assert_array_equal(plain, model(tokens, None, 0.5))
    assert np.abs(plain - model(tokens, key, 0.5)).max() > 1e-2


def test_a_decoder_sees_the_last_symbol_alone():
    """Scores at all places are functions of what the model made of the mark."""
    model = sequence_learner.SequenceModel(CONFIG, 3, rngs=nnx.Rngs(0))
    tokens = jnp.asarray([[0, 1, 3], [2, 1, 3]])
    scores = model(tokens)
    assert scores.shape == (2, 3, 4)
    x, _ = model.model.mix(model.model.embed(tokens))
    assert model.decoder is not None
    np.testing.assert_allclose(scores, model.decoder(model.model.norm(x[:, -1])), atol=1e-6)
    assert np.abs(scores[:, 0] - scores[:, 1]).max() > 1e-3  # places differ


@pytest.mark.parametrize("mixer", ["attention", "deltanet", "self_modifying"])
def test_parameters_are_made_equal(mixer):
    config = dataclasses.replace(CONFIG, mixer=mixer, memory_hidden=4)
    made = sequence_contest.equal(config, 4000)
    each = sequence_learner.count(dataclasses.replace(made, hidden=made.hidden + 1))
    each -= sequence_learner.count(made)
    assert abs(sequence_learner.count(made) - 4000) <= each / 2
    decoded = sequence_contest.equal(config, 8000, decoded=3)
    assert abs(sequence_learner.count(decoded, 3) - 8000) <= each / 2
    assert sequence_learner.count(decoded, 3) - sequence_learner.count(decoded) == 24 + 128 + 64
    with pytest.raises(ValueError, match="`parameters` is 9; it must be at least [0-9]+ for "):
        sequence_contest.equal(config, 9)


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
    assert len(names) == 5


@pytest.fixture
def rows(record, monkeypatch):
    """Two models, the second with two variants; measuring them is a stub that counts."""
    measured = []

    def measure(name, task, config, plan, stop, watch):
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
    cell = lambda task, model, found: sequence_experiment.interval(found["long"]["rows"])
    return sequence_experiment.table(results, cell).markdown()


def test_an_experiment_runs_what_is_missing_and_shows_the_best_variant(rows, tmp_path):
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
    grid = sequence_experiment.grid(results).markdown()
    assert "| plus one | two | wide | 0.03 | **100 / 100** |" in grid
    assert "| plus one | two | narrow | 0.03 | 100 / 85 (70 to 100) |" in grid
    elsewhere = dataclasses.replace(options, runs=tmp_path / "other", models=("one",))
    kept = sequence_experiment.run(elsewhere, "trial", made, table)
    assert measured[3:] == ["plus one, one"]
    assert kept["plus one"]["models"]["two"] == results["plus one"]["models"]["two"]


def test_the_control_is_trained_on_answers_of_other_rows(record, tmp_path, monkeypatch):
    """One rate, few steps, shuffled answers; told beside the most frequent answer's share."""
    seen = []

    def measure(name, task, config, plan, stop, watch):
        seen.append((name, task.name, plan.rates, plan.steps))
        return record

    monkeypatch.setattr(sequence_experiment.contest, "measure", measure)
    row = Row(EASY, dataclasses.replace(PLAN, steps=900), {"one": {"": CONFIG}}, control=CONFIG)
    options = Options(runs=tmp_path / "runs", place=tmp_path / "out")
    results = sequence_experiment.run(options, "trial", {"plus one": row}, table)
    assert seen == [
        ("plus one, one", "plus one", PLAN.rates, 900),
        ("plus one, control", "plus one, shuffled", PLAN.rates[-1:], 200),
    ]
    (text,) = sequence_experiment.control(results)
    chance = "/".join(f"{100 * record['chance'][b]:.1f}" for b in ("short", "long"))
    assert f"plus one 100.0/100.0 ({chance})." in text
    assert text.endswith("above it: plus one.")
    found = record["rates"]["0.03"] | {b: {"tokens": [0.3, 0.2]} for b in PLAN.bins}
    told = record | {"rates": {"0.03": found}}
    plan = dataclasses.asdict(PLAN)
    (text,) = sequence_experiment.control({"a": {"plan": plan, "control": told}, "b": {}})
    assert text.endswith("above it: none. Not run for b.")
    assert sequence_experiment.control({"plus one": {"plan": {"bins": {}}}}) == []
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


def test_a_cell_that_was_stopped_is_not_there():
    class Stop:
        received = signal.SIGTERM

    with pytest.raises(Stopped, match="plus one was not finished and begins anew"):
        sequence_contest.measure("plus one", EASY, CONFIG, PLAN, Stop())


def test_percent_is_100_only_where_every_row_is_right():
    assert sequence_experiment.percent([1, 1]) == "100"
    assert sequence_experiment.percent([1, 0.9999]) == "99.9"
    assert sequence_experiment.percent([0.5, 0.25]) == "37.5"


def test_the_same_models_compete_everywhere_with_as_many_parameters():
    """Within 1 % where `hidden` can do it, and the variants of Hope are what they are called."""
    tracking, recalled = state_tracking.full(), recall.full()
    for row in (tracking["parity"], tracking["a^n b^n"], tracking["S5"], recalled["compression"]):
        decoded = 64 if row.task.compressed else 0
        counts = {
            (model, variant): sequence_learner.count(config, decoded)
            for model, variants in row.models.items()
            for variant, config in variants.items()
        }
        middle = np.median(list(counts.values()))
        assert max(abs(c / middle - 1) for c in counts.values()) < 0.01, counts
    hope = state_tracking.full()["a^n b^n"].models["hope"]["additive, C = 128"]
    assert (hope.erase, hope.retain, hope.momentum, hope.chunk_size) == (False,) * 3 + (128,)


def test_states_are_equal_where_they_are_said_to_be():
    for name, row in recall.full().items():
        told = 2**10 * int(name.split()[-2]) if "KiB" in name else recall.STATE
        for model, variants in row.models.items():
            for config in variants.values():
                if model != "transformer":
                    assert abs(recall.state_bytes(config) / told - 1) < 0.2, (name, model)


def test_a_state_is_counted_once_and_without_what_stands_still():
    """Hope: four streams' convolutions of 3 tokens, then weights of each memory that learns."""
    size = lambda **fields: recall.state_bytes(
        nn.ModelConfig(
            mixer="self_modifying", feed_forward="cms", vocabulary=2, width=8, heads=2, layers=1,
            hidden=4, memory_hidden=5, cms_periods=(1,), chunk_size=4, projection_chunk_size=4,
            **fields,
        )
    )  # fmt: skip
    memory = 2 * 2 * 4 * 5  # two heads, two matrices
    rest = 4 * 3 * 8 + 1  # and where the row stands
    assert size() == 4 * (rest + 2 * 5 * memory)
    assert size(momentum=False) == 4 * (rest + 5 * memory)
    assert size(momentum=False, retain=False) == 4 * (rest + 4 * memory)


def test_an_ablation_without_the_whole_shows_what_there_is():
    found = {"held out": {"rows": [0.0] * 2, "loss": [1.0, 2.0]}, "validation": -1}
    record = {"rates": {"0.005": found}, "rate": "0.005", "steps": 1}
    plan = {"bins": {"held out": (4, 4)}}
    text = ablation.shown({"text": {"plan": plan, "models": {"w/o DGD": {"": record}}}})
    assert "| w/o DGD | 2.164 |  | 13.41 (+1.17) |  |" in text


def test_every_row_of_the_ablation_takes_one_thing_away():
    made = ablation.variants(256, tiny=False)
    assert list(made) == list(ablation.PAPER)
    whole = dataclasses.asdict(made["Hope"])
    for row, config in made.items():
        changed = {k for k, v in dataclasses.asdict(config).items() if whole[k] != v} - {"hidden"}
        assert changed == set(ablation.REMOVED[row])


def test_a_sign_is_only_told_beyond_the_noise():
    assert ablation.verdict(0.1, 0.01, 1.2) == "yes"
    assert ablation.verdict(-0.1, 0.01, 1.2) == "no"
    assert ablation.verdict(-0.1, 0.01, -0.05) == "yes"
    assert ablation.verdict(0.01, 0.01, 1.2) == "within the noise"
    assert ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == (1, 0)


@pytest.mark.parametrize(
    "name",
    [
        "state-tracking",
        pytest.param("recall", marks=pytest.mark.slow),
        pytest.param("ablation", marks=pytest.mark.slow),
    ],
)
def test_the_tiny_experiment_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main(["run", f"{name}-tiny"]) == 0
    folder = tmp_path / f"runs/{name}-tiny/results"
    assert json.loads((folder / f"{name}.json").read_text())["tasks"]
    assert "The whole grid:" in (folder / f"{name}.md").read_text()
    assert (folder / f"{name}.png").stat().st_size > 5_000


def test_the_papers_table_is_beside_ours():
    shares = {"rows": [1.0, 0.5], "tokens": [1.0, 0.9], "loss": [0.0, 0.1]}
    found = {"a": shares, "b": shares, "validation": 1.5, "validations": [2.0, 1.0]}
    record = {"rates": {"0.01": found}, "rate": "0.01", "steps": 1}
    task = {"plan": {"bins": {"a": (2, 50), "b": (51, 100)}}, "chance": {"a": 0.5, "b": 0.5}}
    names = list(formal_languages.LANGUAGES)
    results = {n: task | {"models": {"deltanet": {"": record}}} for n in names}
    text = state_tracking.shown(results)
    assert "| deltanet | 75/75 [100/100] (98.2/10.1) | 75/75 [100/100] (0/0) |" in text
    assert "not run here: LSTM 100/100, 100/100," in text
