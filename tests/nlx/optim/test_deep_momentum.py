# SPDX-License-Identifier: Apache-2.0
"""Deep momentum: its equations, that its memory learns, and what it does at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx.optim import dmgd, scale_by_deep_momentum
from nlx.optim.deep_momentum import _cosines


def run(tx, gradients, params=None):
    """All updates, stacked, and the states after each step, stacked, under one compilation."""
    first = jax.tree.map(lambda g: g[0], gradients)
    state = tx.init(first if params is None else params)

    def body(state, gradient):
        update, state = tx.update(gradient, state, params)
        return state, (update, state)

    return jax.jit(lambda s, g: jax.lax.scan(body, s, g)[1])(state, gradients)


class Oracle:
    """The equations for one leaf in NumPy, with explicit gradients and bias corrections."""

    def __init__(
        self, shape, weights, decay, inner_lr, retention, nesterov, scale_decay, clip, robust=None
    ):
        self.weights = [np.array(w) for w in weights]
        self.mu, self.square, self.t = np.zeros(shape), 0.0, 0
        self.decay, self.inner_lr, self.retention = decay, inner_lr, retention
        self.nesterov, self.scale_decay, self.clip = nesterov, scale_decay, clip
        self.robust = robust

    def shortened(self, u):
        """Rows above `robust` times the scale so far; at first, the median's."""
        size = np.mean(u**2, -2, keepdims=True)
        usual = (
            np.median(size) if self.t == 1 else self.square / (1 - self.scale_decay ** (self.t - 1))
        )
        return u * np.sqrt(np.minimum(1, self.robust**2 * usual / size))

    def step(self, u):
        self.t += 1
        t, b = self.t, self.decay
        u = u if self.robust is None else self.shortened(u)
        self.square = self.scale_decay * self.square + (1 - self.scale_decay) * np.mean(u**2)
        s = np.sqrt(self.square / (1 - self.scale_decay**t))
        before = self.mu / (1 - b ** (t - 1)) if t > 1 else self.mu
        self.learn(self.rows(np.clip(before / s, -self.clip, self.clip)),
                   self.rows(np.clip(u / s, -self.clip, self.clip)))  # fmt: skip
        self.mu = b * self.mu + (1 - b) * u
        query = self.mu / (1 - b**t)
        if self.nesterov:
            query = (b * self.mu + (1 - b) * u) / (1 - b ** (t + 1))
        read = self.forward(self.rows(query / s))[1]
        return s * np.moveaxis(read.reshape(np.moveaxis(u, -2, -1).shape), -1, -2)

    @staticmethod
    def rows(x):
        return np.moveaxis(x, -2, -1).reshape(-1, x.shape[-2])

    def forward(self, z):
        layers = [z]
        for w in self.weights[:-1]:
            layers.append(np.tanh(layers[-1] @ w))
        return layers, z + layers[-1] @ self.weights[-1]

    def learn(self, key, value):
        layers, output = self.forward(key)
        power = sum(np.mean(np.sum(layer**2, -1)) for layer in layers)
        eta = 0.0 if self.t == 1 else self.inner_lr / (1 + power)
        error, gradients = (output - value) / len(key), []
        for layer, w in zip(layers[::-1], self.weights[::-1], strict=True):
            gradients.append(layer.T @ error)
            error = (error @ w.T) * (1 - layer**2)
        for i, gradient in enumerate(gradients[::-1]):
            self.weights[i] = self.retention * self.weights[i] - eta * gradient


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 7), {}),
        ((5, 7), {"hidden": (), "nesterov": False, "retention": 0.97, "inner_lr": 0.4}),
        ((2, 3, 5, 4), {"hidden": (3, 4), "decay": 0.6, "scale_decay": 0.8, "retention": 0.9}),
        ((4, 3), {"decay": 0.0, "clip": 0.7, "inner_lr": 1.0}),
        ((5, 7), {"robust": 1.1, "hidden": (), "inner_lr": 0.5, "scale_decay": 0.9}),
    ],
)
def test_equals_the_equations(x64, shape, options):
    gradients = 3 * np.random.default_rng(0).normal(size=(9, *shape)) ** 3
    tx = scale_by_deep_momentum(**options)
    defaults = {"decay": 0.9, "inner_lr": 0.1, "retention": 1.0, "nesterov": True}
    defaults |= {"scale_decay": 0.999, "clip": 10.0}
    settings = defaults | {k: v for k, v in options.items() if k != "hidden"}
    oracle = Oracle(shape, tx.init(jnp.zeros(shape)).phi, **settings)
    updates, states = run(tx, jnp.asarray(gradients))
    for t, gradient in enumerate(gradients):
        np.testing.assert_allclose(updates[t], oracle.step(gradient), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(states.phi, oracle.weights, strict=True):
            np.testing.assert_allclose(ours[t], theirs, rtol=1e-12, atol=1e-12)
        debiased = oracle.mu / (1 - settings["decay"] ** (t + 1))
        np.testing.assert_allclose(states.mu[t], debiased, rtol=1e-12, atol=1e-12)


def test_first_step_is_plain_momentum():
    gradient = jax.random.normal(jax.random.key(0), (6, 4))
    update, state = scale_by_deep_momentum().update(
        gradient, scale_by_deep_momentum().init(gradient)
    )
    np.testing.assert_allclose(update, gradient, rtol=1e-6)
    assert np.all(np.asarray(state.phi[1]) == 0)


def test_alias_is_the_chain(x64):
    key = jax.random.key(1)
    params = {"w": jax.random.normal(key, (4, 3)), "b": jnp.ones(3)}
    gradients = jax.tree.map(lambda p: jax.random.normal(key, (5, *p.shape)) * 1e-3, params)
    schedule = optax.linear_schedule(1.0, 0.1, 4)
    options = {"decay": 0.8, "inner_lr": 0.3}
    chain = optax.chain(
        optax.scale_by_adam(b1=0.0, b2=0.999),
        scale_by_deep_momentum(**options),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(schedule),
    )
    ours, _ = run(dmgd(schedule, weight_decay=0.1, **options), gradients, params)
    theirs, _ = run(chain, gradients, params)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
    raw, _ = run(dmgd(1.0, precondition=False, **options), gradients, params)
    plain, _ = run(scale_by_deep_momentum(**options), gradients, params)
    np.testing.assert_allclose(raw["w"], -plain["w"], rtol=1e-12)


def turning(steps, width=6, rows=12):
    """A stationary stream that an average can't predict but a map of rows can: a fixed rotation."""
    blocks = [0.4, 1.1, 2.0]
    turn = np.zeros((width, width))
    for i, angle in enumerate(blocks):
        c, s = np.cos(angle), np.sin(angle)
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    stream = [np.random.default_rng(0).normal(size=(width, rows))]
    for _ in range(steps - 1):
        stream.append(turn @ stream[-1])
    return jnp.asarray(np.stack(stream))


def inner_losses(stream, states):
    """The memory's objective on each tick, read with the weights it had before that tick."""
    read = nlx.memories.mlp((6, 16, 6), jnp.tanh).read
    key, value, scale = states.mu[:-1], stream[1:], jnp.sqrt(states.scale[1:])
    phi = jax.tree.map(lambda w: w[:-1], states.phi)
    rows = lambda x: jnp.clip(jnp.moveaxis(x, -2, -1) / scale[:, None, None], -10, 10)
    error = jax.vmap(read)(phi, rows(key)) - rows(value)
    return np.asarray(jnp.mean(jnp.sum(jnp.square(error), -1), -1) / 2)


def test_memory_learns_on_a_stationary_stream(x64):
    stream = turning(400)
    learning, states = run(scale_by_deep_momentum(inner_lr=0.5), stream)
    frozen, still = run(scale_by_deep_momentum(inner_lr=0.0), stream)
    losses, unlearned = inner_losses(stream, states), inner_losses(stream, still)
    assert losses[-50:].mean() < 0.2 * losses[5:20].mean()
    assert losses[-50:].mean() < 0.2 * unlearned[-50:].mean()
    moved = [float(jnp.max(jnp.abs(w[-1] - w[0]))) for w in states.phi]
    assert min(moved) > 1e-2
    assert all(np.array_equal(w[-1], w[0]) for w in still.phi)
    assert float(jnp.max(jnp.abs(learning - frozen))) > 0.1


@pytest.mark.parametrize("nesterov", [True, False])
def test_frozen_memory_is_momentum(x64, nesterov):
    stream = jax.random.normal(jax.random.key(2), (30, 5, 4))
    updates, _ = run(scale_by_deep_momentum(0.7, inner_lr=0.0, nesterov=nesterov), stream)
    mean = np.zeros((5, 4))
    for t, u in enumerate(np.asarray(stream), 1):
        mean = 0.7 * mean + 0.3 * u
        wanted = mean / (1 - 0.7**t)
        if nesterov:
            wanted = (0.7 * mean + 0.3 * u) / (1 - 0.7 ** (t + 1))
        np.testing.assert_allclose(updates[t - 1], wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("curvature", [1.0, 3.0, 10.0])
def test_tends_to_the_implicit_step(x64, curvature):
    """On lambda/2 w^2 it learns the gradient where it lands: a step of g / (1 + lr lambda)."""
    lr = 0.5
    tx = scale_by_deep_momentum(
        0.0, hidden=(), inner_lr=0.3, nesterov=False, scale_decay=0.0, clip=1e3
    )

    def body(carry, _):
        w, state = carry
        update, state = tx.update(curvature * w, state)
        return (w - lr * update, state), jnp.mean(update / (curvature * w))

    w = jnp.array([[1.0, -2.0, 0.5]])
    _, shares = jax.lax.scan(body, (w, tx.init(w)), length=120)
    np.testing.assert_allclose(shares[-1], 1 / (1 + lr * curvature), rtol=1e-6)


LEAVES = {
    "matrix": (4, 3), "kernel": (2, 2, 3, 4), "bias": (5,), "scalar": (), "row": (1, 6),
    "column": (6, 1), "none": (0,), "no_rows": (0, 3), "no_columns": (3, 0),
}  # fmt: skip


def test_only_leaves_with_rows_learn():
    leaves = {name: jnp.zeros(shape) for name, shape in LEAVES.items()}
    state = scale_by_deep_momentum().init(leaves)
    first, last = (jax.tree.map(jnp.shape, layer) for layer in state.phi)
    assert [name for name in LEAVES if first[name]] == ["matrix", "kernel", "row"]
    assert (first["kernel"], last["kernel"]) == ((3, 16), (16, 3))
    updates, _ = jax.jit(dmgd(0.1).update)(leaves, dmgd(0.1).init(leaves), leaves)
    jax.tree.map(np.testing.assert_array_equal, updates, leaves)


@pytest.mark.parametrize(
    ("dtype", "precondition"), [("float32", True), ("float32", False), ("bfloat16", True)]
)
def test_extreme_gradients_give_finite_updates(dtype, precondition):
    params = {name: jnp.ones(LEAVES[name], dtype) for name in ("matrix", "scalar", "no_rows")}
    sizes = jnp.array([0.0, 1e-30, 1.0, 1e30, -1e30, 0.0, 1e-3, -1e30, 1.0])
    gradients = jax.vmap(lambda size: optax.tree.scale(size.astype(dtype), params))(sizes)
    updates, states = run(dmgd(0.1, precondition=precondition), gradients, params)
    for leaf in jax.tree.leaves((updates, states)):
        assert bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))), leaf
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)


def test_tiny_gradients_keep_their_momentum():
    gradient = jnp.full((3, 4), 1e-30)
    updates, _ = run(scale_by_deep_momentum(), jnp.stack([gradient] * 3))
    np.testing.assert_allclose(updates[-1], gradient, rtol=1e-5)


def test_memory_is_at_least_float32():
    state = scale_by_deep_momentum().init(jnp.zeros((3, 4), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("f4"), jnp.dtype("i4")}


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 5), (7, 7), (3, 16)])
def test_first_layer_is_spread_evenly(x64, inputs, outputs):
    weights = _cosines(inputs, outputs, jnp.dtype("f8"))
    if outputs <= inputs:
        np.testing.assert_allclose(weights.T @ weights, np.eye(outputs), atol=1e-12)
    assert len(np.unique(np.round(np.asarray(weights), 9), axis=1).T) == outputs
    assert 0.5 < float(jnp.mean(jnp.square(weights))) * inputs < 1.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decay": 1.1}, r"`decay` must be in \[0, 1\], got 1.1"),
        ({"inner_lr": -1.0}, "`inner_lr` must be >= 0, got -1.0"),
        ({"retention": 2}, r"`retention` must be in \[0, 1\], got 2"),
        ({"scale_decay": -0.1}, r"`scale_decay` must be in \[0, 1\], got -0.1"),
        ({"clip": -1}, "`clip` must be >= 0, got -1"),
        ({"hidden": 16}, "`hidden` must be a sequence of integers >= 1, got 16"),
        ({"hidden": (0,)}, r"`hidden` must be a sequence of integers >= 1, got \(0,\)"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dmgd(0.1, **options)


class PrintedOracle:
    """Eq. 50 to the letter: phi <- alpha phi - eta grad <m_phi(u), 1>, W += m_phi(u)."""

    def __init__(self, weights, inner_lr, retention):
        self.weights, self.inner_lr, self.retention = (
            [np.array(w) for w in weights],
            inner_lr,
            retention,
        )

    def step(self, rows):
        first, last = self.weights
        hidden, ones = np.tanh(rows @ first), np.ones_like(rows)
        slope = (ones @ last.T) * (1 - hidden**2)
        self.weights = [
            self.retention * w - self.inner_lr * g
            for w, g in zip(self.weights, (rows.T @ slope, hidden.T @ ones), strict=True)
        ]
        return np.tanh(rows @ self.weights[0]) @ self.weights[1]


@pytest.mark.parametrize("memory", ["rows", "coordinates"])
def test_dot_is_the_printed_rule(x64, memory):
    """In optax's sign: the update is minus what is added to the weights."""
    gradients = 0.3 * np.random.default_rng(1).normal(size=(6, 4, 3))
    tx = scale_by_deep_momentum(
        memory=memory, objective="dot", inner_lr=0.05, retention=0.9, hidden=(5,)
    )
    oracle = PrintedOracle(tx.init(jnp.zeros((4, 3))).phi, 0.05, 0.9)
    updates, _ = run(tx, jnp.asarray(gradients))
    for ours, u in zip(updates, gradients, strict=True):
        rows = u.T if memory == "rows" else u.reshape(-1, 1)
        want = oracle.step(rows)
        want = want.T if memory == "rows" else want.reshape(4, 3)
        np.testing.assert_allclose(ours, -want, rtol=1e-12)


def test_coordinates_are_rows_of_one(x64):
    """A memory R -> R of all entries is the row memory of a kernel with one input."""
    gradients = np.random.default_rng(2).normal(size=(8, 2, 3, 2)) ** 3
    flat = jnp.asarray(gradients.reshape(8, 1, 12))
    by_entry, states = run(scale_by_deep_momentum(memory="coordinates"), jnp.asarray(gradients))
    by_row, wanted = run(scale_by_deep_momentum(memory="rows"), flat)
    np.testing.assert_allclose(by_entry.reshape(8, 1, 12), by_row, rtol=1e-12)
    for ours, theirs in zip(states.phi, wanted.phi, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert np.any(ours[-1] != ours[0])
    state = scale_by_deep_momentum(memory="coordinates").init(
        {"b": jnp.zeros(5), "s": jnp.zeros(())}
    )
    assert jax.tree.map(jnp.shape, state.phi) == ({"b": (1, 16), "s": ()}, {"b": (16, 1), "s": ()})


def test_l2_learns_the_subspace_of_the_gradients(x64):
    """Gradients in a plane: what it lets through lies there, and comes to have their size."""
    random = np.random.default_rng(3)
    plane = np.linalg.qr(random.normal(size=(6, 2)))[0]
    stream = plane @ random.normal(size=(600, 2, 8))
    tx = scale_by_deep_momentum(0.0, objective="l2", inner_lr=0.5, nesterov=False)
    updates, states = run(tx, jnp.asarray(stream))
    assert np.all(updates[0] == updates[0])
    errors = np.mean(np.square(updates - stream), (1, 2)) / np.mean(np.square(stream))
    assert errors[-50:].mean() < 0.1 * errors[:5].mean()
    outside = updates - plane @ (plane.T @ np.asarray(updates))
    assert np.mean(np.square(outside[-50:])) < 0.05 * np.mean(np.square(updates[-50:]))
    still, _ = run(
        scale_by_deep_momentum(0.0, objective="l2", inner_lr=0.0), jnp.asarray(stream[:3])
    )
    assert not np.any(still)  # without learning the memory is empty


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"memory": "columns"}, '`memory` must be one of "rows", "coordinates", got \'columns\''),
        ({"objective": 3}, '`objective` must be one of "predictive", "l2", "dot", got 3'),
    ],
)
def test_bad_forms(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dmgd(0.1, **options)
