# SPDX-License-Identifier: Apache-2.0
"""The one protocol of the sequence experiments."""

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
    sequence_contest,
    sequence_learner,
)
from nlx_experiments.errors import Stopped
from nlx_experiments.sequence_contest import Plan
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


def test_an_exam_is_given_the_weights_kept_at_the_best_rate(monkeypatch):
    """The second rate is the better one, and best after 10 steps; the first after 20."""
    shares = lambda w: np.where(w == [20, 20, 10, 10], 0.9, 0.5) * [0.5, 0.5, 1, 1]
    stub(monkeypatch, lambda w, batch: scores(shares(w)))
    given = []

    def measure(config, weights, leave):
        leave()
        given.append((config, weights.tolist()))
        return {"it": 7}

    exam = sequence_contest.Exam("it", measure)
    plan = dataclasses.replace(PLAN, steps=30, every=10)
    record = sequence_contest.measure("stub", EASY, CONFIG, plan, exam=exam)
    assert record["rate"] == "0.03"
    assert record["exam"] == {"it": 7}
    assert given == [(CONFIG, [10.0, 10.0])]
    assert "exam" not in sequence_contest.measure("stub", EASY, CONFIG, plan)


def test_a_training_without_a_finite_loss_is_never_the_best(monkeypatch):
    def score(params, batch):
        loss = np.where(params == 10, 0.5, np.nan) * [1, 1, 1, np.nan]
        return scores([0.5, 0.5, 0.9, 0.9], loss)

    stub(monkeypatch, score)
    record = sequence_contest.measure("stub", EASY, CONFIG, dataclasses.replace(PLAN, steps=20))
    assert record["rate"] == "1e-06"
    assert record["rates"]["0.03"]["validations"][1] == sequence_contest.WORTHLESS
    assert record["rates"]["0.03"]["long"]["loss"] == [0.5, None]
    json.dumps(record, allow_nan=False)


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


def test_a_cell_that_was_stopped_is_not_there():
    class Stop:
        received = signal.SIGTERM

    with pytest.raises(Stopped, match="plus one was not finished and begins anew"):
        sequence_contest.measure("plus one", EASY, CONFIG, PLAN, Stop())
