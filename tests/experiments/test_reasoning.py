"""Levels that learn in the context, how they are examined, and the tiny run from end to end."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import facts_tasks, function_tasks, reasoning, run, sequence_levels
from nlx_experiments import sequence_contest as contest
from nlx_experiments.sequence_levels import InContext
from nlx_experiments.sequence_tasks import Task, shuffled

from nlx import nn

SMALL = nn.ModelConfig(
    mixer="deltanet", feed_forward="cms", vocabulary=6, width=8, heads=1, layers=1, hidden=4,
    cms_periods=(1, 1, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return nn.LanguageModel(SMALL, rngs=nnx.Rngs(0))


@functools.cache
def reader(periods, rate):
    config = InContext(SMALL, periods, rate, 4)
    graph = nnx.graphdef(nnx.eval_shape(lambda: nn.LanguageModel(SMALL, rngs=nnx.Rngs(0))))
    return jax.jit(lambda p, x: sequence_levels.answer(config, nnx.merge(graph, p), x))


def scores(model, tokens, periods, rate):
    return np.asarray(reader(periods, rate)(nnx.state(model), tokens))


def test_levels_write_on_their_clocks_and_others_stand_still(model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 6, (2, 32)))
    still = np.asarray(model(tokens)[0])
    one = scores(model, tokens, (2, None, None), 0.5)
    two = scores(model, tokens, (2, 4, None), 0.5)
    close = lambda a, b: np.isclose(a, b, atol=1e-5).all((0, 2)).reshape(8, 4)
    assert close(one, still)[:2].all()
    assert not close(one, still)[2:].any()
    assert close(two, one)[:4].all()
    assert not close(two, one)[4:].any()
    np.testing.assert_allclose(scores(model, tokens, (2, 4, 8), 0.0), still, atol=1e-5)


def test_a_row_learns_what_comes_next_from_itself_alone(model):
    """A row that repeats itself is foretold better; the other row learns nothing of it."""
    again = jnp.asarray([[1, 4] * 16, [0, 2, 3, 5] * 8])
    said = lambda s: np.asarray(jax.nn.log_softmax(s))[0, -4:][np.arange(4), [4, 1, 4, 1]].mean()
    learned = scores(model, again, (2, 4, None), 0.5)
    assert said(learned) > 0.9 * said(model(again)[0])
    other = scores(model, again.at[0].set(3), (2, 4, None), 0.5)
    np.testing.assert_allclose(other[1], learned[1], atol=1e-6)


def test_training_differentiates_through_all_writes_of_a_row(model, monkeypatch):
    """`nlx.nn.stream` has the gradients; what it is asked for decides whether they flow."""
    asked, stream = [], nn.stream

    def spy(*given, **options):
        asked.append(options)
        return stream(*given, **options)

    monkeypatch.setattr(sequence_levels.nn, "stream", spy)
    config = InContext(SMALL, (1, 2, None), 0.5, 4)
    read = lambda tokens: sequence_levels.answer(config, model, tokens)
    assert jax.eval_shape(read, jnp.zeros((2, 32), int)).shape == (2, 32, 6)
    assert asked == [{"chunk_size": 4, "window": 8}]


def test_held_out_bins_choose_nothing_and_are_examined():
    draw = lambda symbol: (
        lambda generator, rows, shortest, longest: contest.Batch(
            np.full((rows, longest), symbol),
            np.full((rows, longest), symbol),
            np.ones((rows, longest)),
        )
    )
    task = Task("same", 3, 3, draw(1), graded="tokens", curve=True, examined={"other": draw(2)})
    bins = {"fresh": (4, 4), "other": (4, 4)}
    plan = contest.Plan(
        bins=bins,
        shortest=4,
        stages=((0, 4),),
        steps=80,
        every=20,
        seeds=1,
        rates=(1e-2,),
        rows=4,
        validated=4,
        tested=4,
        round_to=4,
    )
    config = dataclasses.replace(SMALL, vocabulary=3, feed_forward="swiglu")
    seen = []
    record = contest.measure("it", task, config, plan, watch=lambda step, s: seen.append(set(s)))
    assert seen
    assert all(bins == {"fresh"} for bins in seen)
    found = record["rates"]["0.01"]
    assert found["fresh"]["tokens"] == [1.0]
    assert found["other"]["tokens"][0] < 1
    assert found["fresh"]["curve"] == [1.0] * 4
    assert np.mean(found["other"]["curve"]) == found["other"]["tokens"][0]
    assert record["steps"] < 80  # it ends once all is right, whatever the held-out bin says


@pytest.mark.parametrize(
    "size", [reasoning.FULL, pytest.param(reasoning.OF_GPU, marks=pytest.mark.slow)]
)
def test_levels_are_one_architecture_of_equal_parameters(size):
    rows = reasoning.full(10, (0.1, 1.0), size)
    told = rows["functions"].models
    for mixer in ("hope", "deltanet"):
        alone = told[f"{mixer}, 1 level"][""]
        for n in (2, 3, 4):
            for variant in told[f"{mixer}, {n} levels"].values():
                assert isinstance(variant, InContext)
                assert variant.config == alone
                assert sum(p is not None for p in variant.periods) == n - 1
    for row in rows.values():
        counts = [
            contest.sequence_learner.count(getattr(config, "config", config))
            for variants in row.models.values()
            for config in variants.values()
        ]
        assert max(counts) < 1.02 * min(counts)
        assert list(row.plan.bins)[-1] in row.task.examined


FEW = ("transformer", "transformer, 1 level")
ALL = (*FEW, "transformer, 2 levels")


@pytest.mark.parametrize("models", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_runs_from_end_to_end_and_goes_on(tmp_path, capsys, models):
    given = ["--runs", str(tmp_path / "runs"), "--place", str(tmp_path), "--models", *models]
    assert run.main(["run", "reasoning-tiny", *given]) == 0
    cells = tmp_path / "runs" / "cells.jsonl"
    first = cells.read_text().splitlines()
    assert len(first) == len(models)
    cells.write_text("\n".join([*first[:-1], first[-1][:40]]))  # killed while it wrote the last
    assert run.main(["run", "reasoning-tiny", *given]) == 0
    drop = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}
    assert [drop(line) for line in cells.read_text().splitlines()] == [drop(r) for r in first]
    results = json.loads((tmp_path / "results" / "reasoning.json").read_text())["tasks"]
    assert list(results) == ["2 facts", "functions"]
    assert list(results["functions"]["models"]) == list(models[1:])
    for variants in results["functions"]["models"].values():
        found = next(iter(variants.values()))["rates"]["0.01"]
        assert [len(found[b]["curve"]) for b in ("fresh", "linear", "xor")] == [8, 8, 8]
    assert len(results["functions"]["lines"]["nearest examples"]["xor"]) == 8
    for name in ("reasoning.png", "reasoning-curves.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "results" / "reasoning.md").read_text()
    words = ["| transformer, 1 level |", "*Bayes, the class itself*", "*most frequent answer*"]
    words += ["*where somebody went last*", "held-out classes: xor", "| task | model |"]
    if models == ALL:
        words += ["* transformer, 2 levels against transformer, 1 level: fresh "]
    assert all(word in text for word in words)
    assert "functions, transformer, 1 level:" in capsys.readouterr().out


def test_the_place_told_last_is_not_that_of_the_question():
    task = facts_tasks.facts(1)
    batch = task.draw(np.random.default_rng(0), 40, 30, 60)
    guesses = []
    for tokens, answers, scored in zip(batch.tokens, batch.answers, batch.scored, strict=True):
        for t in np.flatnonzero(scored):
            places = [c for c in tokens[2 : t + 1 : 3] if c < 6]
            guesses.append(places[-1] == answers[t])
    assert reasoning.told_last(batch, 6) == pytest.approx(np.mean(guesses))


def test_further_levels_are_compared_with_one_level_seed_by_seed():
    def model(tokens, curve):
        found = {"validation": 1.0, "fresh": {"tokens": tokens, "curve": curve}}
        return {"": {"rate": "1", "rates": {"1": found}}}

    models = {
        "hope, 1 level": model([0.5, 0.7], [0.5] * 8),
        "hope, 3 levels": model([0.6, 0.6], [0.5] * 6 + [0.7, 0.9]),
        "ttt": model([0.1, 0.1], [0.1] * 8),
    }
    said = reasoning.verdicts({"plan": {"bins": {"fresh": (8, 8)}}, "models": models})
    line = "* hope, 3 levels against hope, 1 level: fresh +0.0 (-10.0 to +10.0), late +30.0."
    assert said[1:] == [line]


def test_bad_input_gets_a_sentence(tmp_path, capsys, model):
    with pytest.raises(ValueError, match=r"`periods` is \(1, 2\); there must be one for each of"):
        InContext(SMALL, (1, 2), 0.1, 4)
    with pytest.raises(ValueError, match="the first must fire"):
        InContext(SMALL, (None, None, None), 0.1, 4)
    with pytest.raises(ValueError, match="`rate` is -1; it must be >= 0"):
        InContext(SMALL, (1, 2, 4), -1, 4)
    with pytest.raises(ValueError, match="`chunk_size` is 0; it must be an integer >= 1"):
        InContext(SMALL, (1, 2, 4), 0.1, 0)
    with pytest.raises(ValueError, match="`noise` is 0.1 and `decoded` is 0; .* both must be 0"):
        sequence_levels.make(InContext(SMALL, (1, 2, 4), 0.1, 4), steps=1, noise=0.1)
    with pytest.raises(ValueError, match="must be one more than a multiple of chunk_size = 4"):
        sequence_levels.answer(InContext(SMALL, (1, 2, 4), 0.1, 4), model, jnp.zeros((1, 6), int))
    assert run.main(["run", "reasoning-tiny", "--only", "jokes", "--runs", str(tmp_path)]) == 2
    assert "`only` holds 'jokes'; it must be one of 2 facts, functions." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "bins"),
    [
        (facts_tasks.facts(1), {"fresh": (12, 24)}),
        (function_tasks.functions(("conjunction",), 4), {"fresh": (24, 24)}),
    ],
)
def test_a_trained_model_learns_the_task_and_nothing_of_its_control(task, bins):
    shortest, longest = bins["fresh"]
    plan = contest.Plan(
        bins=bins,
        shortest=shortest,
        stages=((0, longest),),
        steps=300,
        every=100,
        seeds=1,
        rates=(1e-2,),
        rows=16,
        validated=64,
        tested=512,
        round_to=24,
    )
    config = nn.ModelConfig(
        mixer="deltanet",
        feed_forward="swiglu",
        vocabulary=task.vocabulary,
        width=32,
        heads=1,
        layers=1,
        hidden=32,
    )
    shares = []
    for given in (task, shuffled(task)):
        record = contest.measure("it", given, config, plan)
        shares.append(np.mean(record["rates"]["0.01"]["fresh"]["tokens"]))
        chance = record["chance"]["fresh"]
    assert shares[0] > chance + 0.1
    assert abs(shares[1] - chance) < 0.05
