# SPDX-License-Identifier: Apache-2.0
"""Users' streams are their own, and the experiment measures what it says."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import personalisation as experiment
from nlx_experiments import personalisation_streams as streams
from nlx_experiments import run as command
from nlx_experiments.personalisation import Size, Tiny
from nlx_experiments.user_memory import Reader

from nlx import nn


@pytest.mark.parametrize("task", streams.TASKS)
def test_a_user_is_the_same_every_time_and_no_other(task):
    made = streams.TASKS[task]
    one = made.user(7, 300, True)
    np.testing.assert_array_equal(made.user(7, 300, True), one)
    np.testing.assert_array_equal(made.user(7, 200, True), one[:200])
    assert one.shape == (300,)
    assert 0 <= one.min() <= one.max() < made.vocabulary
    assert (made.user(8, 300, True) != one).mean() > 0.5
    assert (made.user(7, 300, False) != one).mean() > 0.5
    np.testing.assert_array_equal(made.users(7, 2, 300, True)[0], one)


def test_text_shows_its_user_s_habits():
    rng = np.random.default_rng(0)
    change = streams.habits(rng)
    name = streams.frequent()[0]
    lines = [f'    {name} = "a"', "        zyzzyva = 'b'"] * 20
    text = change(lines)
    again = change(lines)
    assert text == again
    assert name not in streams.WORD.findall(text)
    assert len(set(re.findall("[\"']", text))) == 1
    assert len(re.findall("^# ", text, re.MULTILINE)) >= 3
    assert "zyzzyva" in text
    assert streams.habits(rng)(lines) != text


def test_tastes_drift():
    made = streams.TASKS["items"].users(0, 40, 600, True)
    near = streams.points() @ streams.points().T
    apart = lambda lag: near[made[:, :-lag], made[:, lag:]].mean()
    assert apart(1) > apart(100) + 0.2
    assert apart(1) > 0.5


def test_the_kinds_of_memory_are_what_they_say():
    size = Tiny.size
    chosen = experiment.config("items", "deltanet", size)
    model = nn.LanguageModel(chosen, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(model)
    exam = experiment.examining(graph, size)
    tokens = streams.TASKS["items"].users(0, 8, size.session * size.sessions + 1, True)

    def nats(rows):
        scores, _ = model(rows[:, :-1], model.init_state(len(rows)))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), rows[:, 1:, None], -1)
        return -np.asarray(chosen)[..., 0]

    t = size.session
    kept = nats(tokens).reshape(8, size.sessions, t).mean((0, 2))
    np.testing.assert_allclose(exam(weights, tokens, "kept"), kept, rtol=1e-4)
    reset = [nats(tokens[:, s * t : (s + 1) * t + 1]).mean() for s in range(size.sessions)]
    np.testing.assert_allclose(exam(weights, tokens, "reset"), reset, rtol=1e-4)
    order = [tokens[n, s * t : (s + 1) * t] for s in range(size.sessions) for n in range(8)]
    scores, _ = model(np.concatenate(order)[None], model.init_state(1))
    wanted = [
        tokens[n, s * t + 1 : (s + 1) * t + 1] for s in range(size.sessions) for n in range(8)
    ]
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(scores), np.concatenate(wanted)[None, :, None], -1
    )
    shared = -np.asarray(chosen).reshape(size.sessions, -1).mean(1)
    np.testing.assert_allclose(exam(weights, tokens, "shared"), shared, rtol=1e-4)


def test_frequencies_of_a_user_s_own_are_worth_more():
    lines = experiment.lines("items", Size(users=16))
    everyone, own = lines.values()
    assert own[-1] < everyone[-1] - 0.2
    assert everyone[0] == pytest.approx(np.log(streams.ITEMS), abs=0.3)


class Leaking(Reader):
    """What is put into a slot is felt in the one before."""

    def put(self, slot, state):
        super().put(slot, state)
        other = slot - 1
        self.state = jax.tree.map(lambda x: x.at[other].add(x.dtype.type(1)), self.state)


def test_a_leak_between_users_is_found(monkeypatch):
    size, made = Tiny.size, streams.TASKS["items"]
    model = nn.LanguageModel(experiment.config("items", "deltanet", size), rngs=nnx.Rngs(0))
    monkeypatch.setattr(experiment, "Reader", Leaking)
    differ, served = experiment.interference(model, made, size)
    assert served == 6
    assert differ >= 3


def test_the_tiny_experiment_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["run", "personalisation-tiny"]) == 0
    place = tmp_path / "runs" / "personalisation-tiny"
    found = json.loads((place / "results" / "personalisation.json").read_text())
    record = found["tasks"]["items"]["models"]["deltanet"]
    assert (record["served"], record["differ"]) == (6, 0)
    assert np.array(record["loss"]["kept"]).shape == (2, 3)
    assert (place / "results" / "personalisation.png").stat().st_size > 5_000
    said = capsys.readouterr().out
    assert "0 of 6 got other bits" in said
    monkeypatch.setattr(experiment, "cell", None)
    assert command.main(["run", "personalisation-tiny"]) == 0
    assert command.main(["run", "personalisation-tiny", "--models", "gpt"]) == 2
