"""Tasks: what they cost, what they hold out, and the same in other units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlx import learned, nn
from nlx.learned import tasks

KEY = jax.random.key(0)


def heldout(task):
    assert task.heldout is not None
    return task.heldout


def images():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(60, 4, 4)), jnp.float32)
    y = jnp.asarray((x.mean((1, 2)) > 0).astype(np.int32))
    return tasks.Labelled(x[:40], y[:40], x[40:], y[40:])


def flat():
    held = images()
    return held._replace(
        inputs=held.inputs.reshape(40, 16), heldout_inputs=held.heldout_inputs.reshape(20, 16)
    )


ALL = {
    "quadratics": lambda: tasks.quadratics(4),
    "logistic": lambda: tasks.logistic(4, 16),
    "mlp": lambda: tasks.mlp(flat(), (5,), batch=16),
    "convolution": lambda: tasks.convolution(images(), 3, batch=16),
    "bandit": lambda: tasks.bandit(4),
}


@pytest.mark.parametrize("name", ALL)
def test_gradient_descent_lowers_what_a_task_is_trained_for(name):
    task, rule = ALL[name](), learned.momentum_rule(0.02 if name == "quadratics" else 0.2, 0.5)
    theta = rule.init(KEY)

    def cost(trained):
        if task.heldout is not None:
            return heldout(task)(trained.params, trained.instance)
        return task.loss(trained.params, trained.instance, KEY)

    def both(key):
        first = learned.start(rule, task, theta, key)
        return cost(first), cost(learned.train(rule, task, theta, first, 60)[0])

    before, after = jax.jit(jax.vmap(both))(jax.random.split(KEY, 8))
    assert after.mean() < 0.8 * before.mean()


def test_a_quadratic_is_the_equation():
    task = tasks.quadratics(3)
    a, y = task.draw(KEY)
    w = task.init((a, y), jax.random.key(1))
    want = np.sum((np.asarray(a) @ np.asarray(w) - np.asarray(y)) ** 2)
    np.testing.assert_allclose(task.loss(w, (a, y), KEY), want, rtol=1e-5)
    assert not np.array_equal(task.draw(jax.random.key(2))[0], a)


def test_a_convolution_is_one():
    """As jax has it, of the held-out images."""
    held, task = images(), ALL["convolution"]()
    params = task.init((), KEY)
    x = held.heldout_inputs[..., None]
    for name in ("first", "second"):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x)
    scores = jax.nn.log_softmax(x.mean((1, 2)) @ params["output"] + params["bias"][None])
    want = -scores[jnp.arange(20), held.heldout_labels].mean()
    np.testing.assert_allclose(heldout(task)(params, ()), want, rtol=1e-5)


def test_windows_that_are_trained_on_hold_nothing_of_the_last_tenth(monkeypatch):
    read = lambda graph: lambda params, batch: batch["tokens"]
    monkeypatch.setattr(tasks.train, "language_model_loss", read)
    model = nn.ModelConfig(
        mixer="attention", feed_forward="swiglu", width=4, layers=1, heads=1, hidden=4
    )
    task = tasks.language(jnp.arange(400), model, batch=64, length=8)
    trained = np.concatenate([task.loss({}, (), jax.random.key(n)) for n in range(30)])
    assert trained.shape == (1920, 9)
    assert (trained.min(), trained.max()) == (0, 359)
    assert (heldout(task)({}, ()).min(), heldout(task)({}, ()).max()) == (360, 399)


def test_a_bandits_gradient_is_the_gradient_of_its_expected_pay():
    """The mean over many draws; a baseline among the pulls themselves takes 1 / episodes of it."""
    task = tasks.bandit(3, episodes=8)
    arms, params = jnp.array([1.0, -1.0, 0.5]), jnp.array([0.3, 0.1, -0.2])
    keys = jax.random.split(KEY, 20_000)
    drawn = jax.vmap(lambda k: jax.grad(task.loss)(params, arms, k))(keys)
    want = jax.grad(heldout(task))(params, arms) * (1 - 1 / 8)
    error = drawn.std(0) / len(keys) ** 0.5
    assert np.all(np.abs(drawn.mean(0) - want) < 4 * error)
    assert np.all(error < 0.1 * np.abs(want).max())
    np.testing.assert_allclose(heldout(task)(100 * jnp.array([1.0, 0, 0]), arms), 0, atol=1e-5)


def test_held_out_data_is_never_trained_on():
    held = flat()
    poisoned = held._replace(heldout_inputs=held.heldout_inputs * jnp.nan)
    for make in (lambda d: tasks.mlp(d, (5,), batch=16),):
        one, two = make(held), make(poisoned)
        params = one.init((), KEY)
        assert one.loss(params, (), KEY) == two.loss(params, (), KEY)
        assert np.isnan(heldout(two)(params, ()))
    task = tasks.logistic(3, 8)
    x, y = task.draw(KEY)
    params = task.init((x, y), KEY)
    other = (x.at[1].set(7), y.at[1].set(-1))
    assert task.loss(params, (x, y), KEY) == task.loss(params, other, KEY)
    assert heldout(task)(params, (x, y)) != heldout(task)(params, other)


def test_batches_are_drawn_by_the_key():
    task = tasks.mlp(flat(), (5,), batch=8)
    params = task.init((), KEY)
    costs = {float(task.loss(params, (), jax.random.key(n))) for n in range(8)}
    assert len(costs) == 8


@pytest.mark.parametrize("name", ["quadratics", "mlp"])
def test_a_task_in_other_units_costs_the_same(name):
    task = ALL[name]()
    other = tasks.augmented(task, 4.0)
    instance = other.draw(KEY)
    own, scales = instance
    params = other.init(instance, jax.random.key(1))
    plain = task.init(own, jax.random.key(1))
    for p, q, c in zip(*map(jax.tree.leaves, (plain, params, scales)), strict=True):
        np.testing.assert_allclose(p, c * q, rtol=1e-5)
        assert 1 / 4 <= c.min()
        assert c.max() <= 4
        assert c.size < 4 or c.std() > 0.1
    np.testing.assert_allclose(
        other.loss(params, instance, KEY), task.loss(plain, own, KEY), rtol=1e-4
    )
    a, b = (
        jax.grad(t.loss)(p, i, KEY) for t, p, i in ((other, params, instance), (task, plain, own))
    )
    for g, h, c in zip(*map(jax.tree.leaves, (a, b, scales)), strict=True):
        np.testing.assert_allclose(g, c * h, rtol=1e-3, atol=1e-5)
    if task.heldout is not None:
        np.testing.assert_allclose(
            heldout(other)(params, instance), heldout(task)(plain, own), rtol=1e-4
        )


@pytest.mark.slow
def test_a_small_transformer_learns():
    model = nn.ModelConfig(
        mixer="attention", feed_forward="swiglu", width=16, layers=1, heads=2, hidden=16,
        vocabulary=8, context=16,
    )  # fmt: skip
    task = tasks.language(jnp.arange(800) % 7, model, batch=4, length=16)
    rule = learned.adam_rule(0.02)
    theta = rule.init(KEY)
    first = learned.start(rule, task, theta, KEY)
    after, _ = jax.jit(lambda t: learned.train(rule, task, theta, t, 60))(first)
    assert heldout(task)(after.params, ()) < 0.3 * heldout(task)(first.params, ())


def test_bad_input_gets_a_sentence():
    for make, said in (
        (lambda: tasks.quadratics(0), "`size` is 0; it must be an integer >= 1"),
        (lambda: tasks.mlp(flat(), batch=41), r"`batch` is 41; it must be in \[1, 40\]"),
        (lambda: tasks.bandit(1), "`arms` is 1; it must be an integer >= 2"),
        (lambda: tasks.augmented(tasks.quadratics(), 0.5), "`spread` is 0.5; it must be >= 1"),
        (
            lambda: tasks.language(jnp.zeros(100, int), nn.preset("hope-tiny")),
            "`tokens` are 100; they must be more",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            make()
