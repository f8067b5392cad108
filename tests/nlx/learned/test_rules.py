"""Learned rules against plain loops, and as optax transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlx import learned, optim

RULES = {
    "lstm": learned.lstm_rule(hidden=3),
    "mlp": learned.mlp_rule(),
    "momentum": learned.momentum_rule(),
    "adam": learned.adam_rule(),
    "hypergradient": learned.hypergradient_rule(),
    "dmgd": learned.dmgd_rule(hidden=3),
}
SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": ()}


def drawn(seed, shapes=SHAPES, dtype: Any = np.float64):
    generator = np.random.default_rng(seed)
    return {name: jnp.asarray(generator.normal(size=s), dtype) for name, s in shapes.items()}


def theta_of(name, seed=0):
    """A theta that is nowhere the first one."""
    theta, generator = RULES[name].init(jax.random.key(seed)), np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * generator.normal(size=np.shape(x)), theta)


def updates_of(transformation, gradients, params):
    state, found = transformation.init(params), []
    for gradient in gradients:
        update, state = transformation.update(gradient, state, params)
        found.append(update)
        params = optax.apply_updates(params, update)
    return found


def test_gradients_of_all_sizes_become_two_numbers_of_the_size_one():
    given = np.array([1.0, -np.exp(-5), 0.0, np.exp(-11), -np.exp(-11)])
    found = learned.log_and_sign(jnp.asarray(given), 10.0)
    want = [[0, 1], [-0.5, -1], [-1, 0], [-1, np.exp(-1)], [-1, -np.exp(-1)]]
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_the_lstm_is_the_equation_coordinate_by_coordinate(x64):
    theta = jax.tree.map(np.asarray, theta_of("lstm"))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    gradients = [drawn(n) for n in range(3)]
    found = updates_of(
        learned.as_transformation(RULES["lstm"], theta),
        gradients,
        jax.tree.map(jnp.zeros_like, drawn(9)),
    )
    for name, shape in SHAPES.items():
        for place in np.ndindex(shape):
            h, c = np.zeros((2, 3)), np.zeros((2, 3))
            for n, gradient in enumerate(gradients):
                g = float(gradient[name][place])
                x = np.array([np.log(abs(g)) / 10, np.sign(g)])
                for l in range(2):
                    w = theta[f"layer_{l}"]
                    gates = x @ w["input"] + h[l] @ w["recurrent"] + w["bias"]
                    i, f, o, z = gates.reshape(4, 3)
                    c[l] = sigmoid(f) * c[l] + sigmoid(i) * np.tanh(z)
                    h[l] = x = sigmoid(o) * np.tanh(c[l])
                want = 0.1 * (x @ theta["output"]["kernel"] + theta["output"]["bias"])[0]
                np.testing.assert_allclose(found[n][name][place], want, rtol=1e-9)


def test_the_mlp_reads_the_features_that_it_says(x64):
    theta = jax.tree.map(np.asarray, theta_of("mlp"))
    gradients, weights = [drawn(n) for n in range(3)], drawn(9)
    found = updates_of(learned.as_transformation(RULES["mlp"], theta), gradients, weights)
    decays, root = np.array([0.9, 0.99, 0.999]), lambda x: 1 / np.sqrt(x + 1e-8)
    for name in SHAPES:
        w = np.asarray(weights[name])
        m, v = np.zeros((*w.shape, 3)), np.zeros(w.shape)
        full = np.zeros((*w.shape, 3))  # averages of squares, of which rows and columns are means
        for n, gradient in enumerate(gradients):
            g = np.asarray(gradient[name])
            m = decays * m + (1 - decays) * g[..., None]
            v = 0.999 * v + 0.001 * g**2
            full = decays * full + (1 - decays) * g[..., None] ** 2
            if g.ndim == 2:
                by_row, by_column = full.mean(1, keepdims=True), full.mean(0, keepdims=True)
                factor = root(by_row / full.mean((0, 1))) * root(by_column)
                by_row, by_column = by_row + 0 * full, by_column + 0 * full
            else:
                by_row = by_column = full
                factor = root(full)
            one = lambda x: x[..., None]
            x = np.concatenate(
                [one(g), one(w), m, one(v), one(root(v)), m * one(root(v)), by_row, by_column,
                 root(by_row), root(by_column), one(g) * factor, m * factor], -1,
            )  # fmt: skip
            x = x / np.sqrt((x**2).mean(tuple(range(g.ndim)), keepdims=True) + 1e-5)
            horizons = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
            clock = np.tanh((n + 1) / np.array(horizons))
            x = np.concatenate([x, np.broadcast_to(clock, (*g.shape, 11))], -1)
            for l in range(3):
                x = x @ theta[f"layer_{l}"]["kernel"] + theta[f"layer_{l}"]["bias"]
                x = np.maximum(x, 0) if l < 2 else x
            want = -1e-3 * x[..., 0] * np.exp(1e-3 * x[..., 1])
            np.testing.assert_allclose(found[n][name], want, rtol=1e-8)
            w = w + want


@pytest.mark.parametrize(
    ("rule", "known"),
    [
        (learned.momentum_rule(0.02, 0.8), optax.sgd(0.02, momentum=0.8)),
        (learned.adam_rule(0.02, 0.8, 0.95, 1e-4), optax.adam(0.02, 0.8, 0.95, 1e-4)),
        (
            learned.dmgd_rule(0.02, inner_lr=0.2, retention=0.9, decay=0.8, hidden=4),
            optim.dmgd(0.02, 0.8, memory="coordinates", hidden=(4,), inner_lr=0.2, retention=0.9),
        ),
        (
            learned.dmgd_rule(0.02, hidden=4, precondition=False),
            optim.dmgd(
                0.02, 0.9, memory="coordinates", hidden=(4,), retention=0.999, precondition=False
            ),
        ),
    ],
)
def test_where_learning_begins_rules_are_the_known_ones(x64, rule, known):
    given = [drawn(n) for n in range(4)]
    theta = rule.init(jax.random.key(0))
    ours, theirs = (
        updates_of(t, given, drawn(9)) for t in (learned.as_transformation(rule, theta), known)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)


def test_a_rate_descends_by_its_hypergradient(x64):
    rule = learned.hypergradient_rule(0.1, 0.5)
    given = [drawn(n) for n in range(4)]
    theta = rule.init(jax.random.key(0))
    found = updates_of(learned.as_transformation(rule, theta), given, drawn(9))
    log_rate, before = np.log(0.1), None
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    for gradient, update in zip(given, found, strict=True):
        g = flat(gradient)
        if before is not None:
            log_rate += 0.5 * g @ before / np.linalg.norm(g) / np.linalg.norm(before)
        np.testing.assert_allclose(flat(update), -np.exp(log_rate) * g, rtol=1e-5)
        before = g


def test_all_leaves_begin_with_the_memory_of_theta():
    rule = learned.dmgd_rule(hidden=3)
    theta = theta_of("dmgd")
    state = learned.as_transformation(rule, theta).init(drawn(0, dtype=np.float32))
    phi = optax.tree.get(state, "phi")
    for layer, name in ((phi[0], "layer_0"), (phi[1], "layer_1")):
        np.testing.assert_array_equal(layer["kernel"], layer["bias"])
        np.testing.assert_array_equal(layer["kernel"], theta["memory"][name].astype(np.float32))
        assert layer["scale"].shape == ()  # one entry can't teach a map


@pytest.mark.parametrize("name", RULES)
def test_theta_moves_what_a_rule_does(name):
    """Every number of theta counts, from the second step on; gradients that are 0 spoil nothing."""
    zero = lambda g: g.at[(0,) * g.ndim].set(0) if g.ndim else g
    given = [jax.tree.map(zero, drawn(n, dtype=np.float32)) for n in range(3)]
    theta = theta_of(name)

    def moved(theta):
        rule = learned.as_transformation(RULES[name], theta)
        last = updates_of(rule, given, drawn(9, dtype=np.float32))[-1]
        size = jax.tree.map(lambda x: jnp.abs(jax.lax.stop_gradient(x)).max() + 1e-30, last)
        parts = jax.tree.map(lambda x, s: jnp.sum(jnp.sin(7 * x / s)), last, size)
        return sum(jax.tree.leaves(parts))

    slopes = jax.tree_util.tree_leaves_with_path(jax.grad(moved)(theta))
    for path, slope in slopes:
        assert np.isfinite(slope).all(), path
        assert np.abs(slope).max() > 0, path


@pytest.mark.parametrize("name", RULES)
def test_rules_compose(name):
    """In a chain, masked, in MultiSteps, vmapped, with None and empty leaves, in every dtype."""
    rule = learned.as_transformation(RULES[name], theta_of(name))
    chain = optax.chain(optax.clip_by_global_norm(1.0), rule, optax.scale(0.5))
    for dtype in (jnp.bfloat16, jnp.float32):
        params = drawn(0, dtype=dtype) | {"none": None, "empty": jnp.zeros((0, 2), dtype)}
        for transformation in (
            chain,
            optax.masked(rule, jax.tree.map(lambda x: x.ndim > 1, params)),
            optax.MultiSteps(rule, 2).gradient_transformation(),
        ):
            step = jax.jit(transformation.update)
            state = transformation.init(params)
            for _ in range(2):
                update, after = step(jax.tree.map(jnp.sin, params), state, params)
                assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
                    lambda x: (x.shape, x.dtype), state
                )
                assert all(x.dtype == dtype for x in jax.tree.leaves(update))
                assert all(np.isfinite(x).all() for x in jax.tree.leaves(update))
                state = after
        many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), drawn(0, dtype=dtype))
        states = jax.vmap(rule.init)(many)
        both, _ = jax.vmap(rule.update)(many, states, many)
        one = jax.tree.map(lambda x: x[1], many)
        alone, _ = rule.update(one, rule.init(one), one)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.asarray(a[1], np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=1e-6
            ), both, alone,
        )  # fmt: skip


def test_a_memory_of_another_size_is_refused():
    theta = learned.dmgd_rule(hidden=3).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"`theta` has a memory of .*; it must be of .*16"):
        learned.as_transformation(learned.dmgd_rule(hidden=16), theta)


def test_bad_input_gets_a_sentence():
    for make, said in (
        (lambda: learned.lstm_rule(0), "`hidden` is 0; it must be an integer >= 1"),
        (lambda: learned.lstm_rule(scale=0.0), "`scale` is 0.0; it must be > 0"),
        (lambda: learned.mlp_rule(layers=0), "`layers` is 0; it must be an integer >= 1"),
        (lambda: learned.mlp_rule(step=-1.0), "`step` is -1.0; it must be > 0"),
        (lambda: learned.momentum_rule(decay=1.0), r"`decay` is 1.0; it must be in \(0, 1\)"),
        (lambda: learned.adam_rule(eps=0.0), "`eps` is 0.0; it must be > 0"),
        (lambda: learned.dmgd_rule(retention=0.0), r"`retention` is 0.0; it must be in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
