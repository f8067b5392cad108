# SPDX-License-Identifier: Apache-2.0
"""Delta gradient descent: the exact minimiser, the taps that feed it, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nlx
from nlx import optim

RANDOM = np.random.default_rng(0)
X, D, W = (RANDOM.normal(size=shape) for shape in ((7, 4), (7, 3), (4, 3)))
GRAM, GRADIENT = X.T @ X / 7, X.T @ D / 7


def step(tx, weight, gradient, gram, state=None):
    weight, gradient, gram = jax.tree.map(jnp.asarray, (weight, gradient, gram))
    state = tx.init(weight) if state is None else state
    update, state = tx.update(gradient, state, weight, input_gram=gram)
    return np.asarray(weight + update), state


@pytest.mark.parametrize(("eta", "gamma"), [(0.3, 1.0), (5.0, 1.0), (0.7, 0.01)])
def test_is_the_minimiser_for_a_batch(x64, eta, gamma):
    """Eq. 56 with u = -d, summed over the batch; its quadratic form solved by least squares."""
    ours, _ = step(optim.dgd(eta, gamma=gamma), W, GRADIENT, GRAM)

    def objective(w):
        recalled = X @ w
        size = 0.5 * gamma * jnp.mean(jnp.sum(jnp.square(recalled), -1))
        error = jnp.mean(jnp.sum(recalled * D, -1))
        return size + error + jnp.sum(jnp.square(w - W)) / (2 * eta)

    np.testing.assert_allclose(jax.grad(objective)(ours), 0, atol=1e-12)
    rows = np.concatenate([np.sqrt(gamma / 7) * X, np.eye(4) / np.sqrt(eta)])
    values = np.concatenate([-D / np.sqrt(gamma * 7), W / np.sqrt(eta)])
    np.testing.assert_allclose(ours, np.linalg.lstsq(rows, values, rcond=None)[0], rtol=1e-12)


@pytest.mark.parametrize("norm", [1.0, 0.3, 4.0])
def test_is_eq_57_for_one_input_of_any_norm(x64, norm):
    x = norm * X[:1] / np.linalg.norm(X[0])
    g, eta = x.T @ D[:1], 0.7
    ours, _ = step(optim.dgd(eta, gamma=1.0), W, g, x.T @ x)
    rate = eta / (1 + eta * norm**2)
    np.testing.assert_allclose(ours, W - rate * x.T @ (x @ W) - rate * g, rtol=1e-12)
    if norm == 1:  # the printed rate
        np.testing.assert_allclose(rate, eta / (1 + eta))


def test_for_one_input_it_is_a_level_that_erases(x64):
    """The write of Hope's memories: rate and erase eta / (1 + eta |x|^2) along the key."""
    x, d, eta = jnp.asarray(X[0]), jnp.asarray(D[0]), 0.7
    rate = eta / (1 + eta * x @ x)
    memory = nlx.memories.linear(4, 3)
    write = nlx.writes.gated(memory.inputs, momentum=False)
    level = nlx.associative_memory(memory, nlx.objectives.dot_product, write, nlx.Clock(1))
    state = level.step(level.start(jnp.asarray(W)), nlx.Association(x, -d, rate, erase=rate))
    ours, _ = step(optim.dgd(eta, gamma=1.0), W, np.outer(x, d), np.outer(x, x))
    np.testing.assert_allclose(ours, state.params, rtol=1e-12)


def test_scalars_act_as_multiples_of_the_identity(x64):
    eta, gamma = 0.5, 0.2
    for c in (0.0, 1.0, 3.0):
        ours, _ = step(optim.dgd(eta, gamma=gamma), W, GRADIENT, c)
        matrix, _ = step(optim.dgd(eta, gamma=gamma), W, GRADIENT, c * np.eye(4))
        np.testing.assert_allclose(ours, (W - eta * GRADIENT) / (1 + eta * gamma * c), rtol=1e-12)
        np.testing.assert_allclose(ours, matrix, rtol=1e-12)


def test_without_gamma_it_is_gradient_descent(x64):
    ours, _ = step(optim.dgd(0.3, gamma=0.0), W, GRADIENT, GRAM)
    np.testing.assert_allclose(ours, W - 0.3 * GRADIENT, rtol=1e-12)


def test_the_rate_may_be_a_schedule_or_injected(x64):
    schedule = optax.linear_schedule(0.8, 0.2, 2)
    tx, injected = (
        optim.dgd(schedule, gamma=1.0),
        optax.inject_hyperparams(optim.dgd)(schedule, gamma=1.0),
    )
    state = other = None
    for eta in (0.8, 0.5, 0.2, 0.2):
        want, _ = step(optim.dgd(eta, gamma=1.0), W, GRADIENT, GRAM)
        ours, state = step(tx, W, GRADIENT, GRAM, state)
        theirs, other = step(injected, W, GRADIENT, GRAM, other)
        np.testing.assert_allclose(ours, want, rtol=1e-6)  # optax's schedules are of float32
        np.testing.assert_allclose(theirs, want, rtol=1e-6)


def test_weight_decay_is_decoupled(x64):
    plain, _ = step(optim.dgd(0.3), W, GRADIENT, GRAM)
    ours, _ = step(optim.dgd(0.3, weight_decay=0.1), W, GRADIENT, GRAM)
    np.testing.assert_allclose(ours, plain - 0.03 * W, rtol=1e-12)


def test_extremes_are_finite():
    for size in (0.0, 1e-30, 1e30):
        for gram in (0.0, 1e-30, 1e20):
            weight = jnp.ones((3, 2), jnp.bfloat16)
            updates, _ = optim.dgd(0.1).update(
                size * weight, optim.dgd(0.1).init(weight), weight, input_gram=gram * jnp.eye(3)
            )
            assert updates.dtype == jnp.bfloat16
            assert bool(jnp.all(jnp.isfinite(updates))), (size, gram)


# the taps


def network(params, taps, x):
    hidden = jnp.tanh(optim.tap(x, taps["in"]["w"]) @ params["in"]["w"] + params["in"]["b"][None])
    return optim.tap(hidden, taps["out"]["w"]) @ params["out"]["w"]


def parameters():
    draw = lambda *shape: jnp.asarray(RANDOM.normal(size=shape))
    return {"in": {"w": draw(4, 5), "b": draw(5)}, "out": {"w": draw(5, 3)}}


def loss(params, taps, x, d):
    return jnp.mean(jnp.sum(jnp.square(network(params, taps, x) - d), -1))


@pytest.mark.parametrize("wrap", ["plain", "remat", "scan"])
def test_a_tap_gives_the_gram_matrix_with_the_gradient(x64, wrap):
    params = parameters()
    taps, x, d = optim.input_taps(params), jnp.asarray(X), jnp.asarray(D)
    assert jax.tree.map(jnp.shape, taps) == {"in": {"w": (4, 4), "b": ()}, "out": {"w": (5, 5)}}
    objective = jax.checkpoint(loss) if wrap == "remat" else loss
    if wrap == "scan":  # two halves of a batch, so the sum of two means
        halves = (X[:6].reshape(2, 3, 4), D[:6].reshape(2, 3, 3))
        objective = lambda params, taps, x, d: jnp.sum(
            jax.lax.scan(lambda _, h: ((), loss(params, taps, *h)), (), halves)[1]
        )
    gradients, grams = jax.jit(jax.grad(objective, (0, 1)))(params, taps, x, d)
    untapped = jax.grad(lambda p: objective(p, jax.lax.stop_gradient(taps), x, d))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), gradients, untapped)
    hidden = np.tanh(X @ np.asarray(params["in"]["w"]) + np.asarray(params["in"]["b"]))
    if wrap == "scan":
        want = X[:6].T @ X[:6] / 3, hidden[:6].T @ hidden[:6] / 3
    else:
        want = GRAM, hidden.T @ hidden / 7
    np.testing.assert_allclose(grams["in"]["w"], want[0], rtol=1e-12)
    np.testing.assert_allclose(grams["out"]["w"], want[1], rtol=1e-12)
    assert grams["in"]["b"] == 0


def test_a_tap_is_the_identity_and_wide():
    x = jnp.ones((2, 5, 3), jnp.bfloat16)
    gram = jnp.zeros((3, 3))
    assert np.array_equal(optim.tap(x, gram), x)
    got = jax.grad(lambda g: jnp.sum(optim.tap(x, g).astype(jnp.float32)))(gram)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.ones((3, 3)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return self.scale[None] * self.last(jnp.tanh(self.first(x)))


def test_a_flax_model_is_tapped_in_place():
    x, d = (jnp.asarray(a, jnp.float32) for a in (X, D))
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    optim.tap_inputs(model)
    optim.tap_inputs(model)  # once is enough
    np.testing.assert_array_equal(model(x), plain(x))
    squares = lambda model: jnp.mean(jnp.square(model(x) - d))
    optimizer = nnx.Optimizer(model, optim.dgd(0.1, gamma=1.0), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        of = nnx.DiffState(0, (nnx.Param, optim.InputTap))
        gradients, grams = optim.split_taps(nnx.grad(squares, argnums=of)(model))
        optimizer.update(model, gradients, input_gram=grams)
        return gradients, grams

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    gradients, grams = (nnx.to_pure_dict(tree) for tree in train(model, optimizer))
    want = nnx.to_pure_dict(nnx.grad(squares)(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradients, want)
    np.testing.assert_allclose(grams["first"]["kernel"], GRAM, rtol=1e-5)
    assert grams["last"]["kernel"].shape == (5, 5)
    assert grams["scale"].shape == grams["first"]["bias"].shape == ()
    moved, _ = step(
        optim.dgd(0.1, gamma=1.0), before["first"]["kernel"], want["first"]["kernel"], GRAM
    )
    np.testing.assert_allclose(model.first.kernel[...], moved, rtol=1e-5)
    assert not np.any(model.first.input_tap[...])
    losses = [float(squares(model)) for _ in range(5) if train(model, optimizer)]
    assert losses[-1] < losses[0]


def test_composes_with_masks_and_partitions(x64):
    params = parameters()
    x, d = jnp.asarray(X), jnp.asarray(D)
    gradients, grams = jax.grad(loss, (0, 1))(params, optim.input_taps(params), x, d)
    tx = optim.dgd(0.3)
    want, _ = tx.update(gradients, tx.init(params), params, input_gram=grams)
    labels = {"in": "delta", "out": "plain"}
    mixed = optax.partition({"delta": optim.dgd(0.3), "plain": optax.sgd(0.3)}, labels)
    masked = optax.masked(optim.dgd(0.3), {"in": True, "out": False})
    for tx in (mixed, optax.chain(optax.identity(), masked)):
        got, _ = tx.update(gradients, tx.init(params), params, input_gram=grams)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got["in"], want["in"]
        )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: optim.dgd(0.1, gamma=-1), "`gamma` must be >= 0, got -1"),
        (lambda: step(optim.dgd(0.1), W, W, None), "`input_gram` must be the Gram matrices"),
        (lambda: step(optim.dgd(0.1), W, W, np.eye(3)), r"scalar or \[in, in\] for a parameter"),
        (lambda: optim.dgd(0.1).update(W, optim.dgd(0.1).init(W), input_gram=0), "`params` must"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()
