# SPDX-License-Identifier: Apache-2.0
"""Shampoo and SOAP, transcribed from their algorithms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx import optim

SHAPES = {"w": (4, 3), "k": (2, 3, 3), "row": (1, 2)}
STREAM = {
    name: np.random.default_rng(len(name)).normal(size=(8, *shape))
    for name, shape in SHAPES.items()
}
CLOCK = nlx.Clock(3, phase=1)


def updates(tx, gradients=STREAM):
    gradients = jax.tree.map(jnp.asarray, gradients)

    def body(state, gradient):
        update, state = tx.update(gradient, state)
        return state, update

    start = tx.init(jax.tree.map(lambda g: g[0], gradients))
    return jax.jit(lambda s, g: jax.lax.scan(body, s, g)[1])(start, gradients)


def power(statistic, exponent, ridge):
    values, vectors = np.linalg.eigh(statistic)
    return (vectors * (np.maximum(values, 0) + ridge * values[-1]) ** exponent) @ vectors.T


def shampoo(stream, b1, b2, ridge, sides):
    """One matrix [in, out]; `sides` of "LR" are preconditioned."""
    m, v = np.zeros_like(stream[0]), np.zeros_like(stream[0])
    i, o = m.shape
    left, right = np.zeros((i, i)), np.zeros((o, o))
    exponent = -0.5 / len(sides)
    for t, u in enumerate(stream):
        m, v = b1 * m + (1 - b1) * u, b2 * v + (1 - b2) * u**2
        left = b2 * left + (1 - b2) * u @ u.T / o
        right = b2 * right + (1 - b2) * u.T @ u / i
        if t % 3 == 0:
            roots = power(left, exponent, ridge), power(right, exponent, ridge)
        x = roots[0] @ m if "L" in sides else m
        x = x @ roots[1] if "R" in sides else x
        adam = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
        yield x * np.linalg.norm(adam) / np.linalg.norm(x)


def soap(stream, b1, b2, sides):
    """Algorithm 3 for one matrix, with eigenvectors for its power iteration; first step in I."""
    m, v = np.zeros_like(stream[0]), np.zeros_like(stream[0])
    i, o = m.shape
    left, right, ql, qr = np.zeros((i, i)), np.zeros((o, o)), np.eye(i), np.eye(o)
    for t, u in enumerate(stream):
        m = b1 * m + (1 - b1) * u
        v = b2 * v + (1 - b2) * (ql.T @ u @ qr) ** 2
        mean, square = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        yield ql @ (ql.T @ mean @ qr / (np.sqrt(square) + 1e-8)) @ qr.T
        left, right = b2 * left + (1 - b2) * u @ u.T, b2 * right + (1 - b2) * u.T @ u
        if t % 3 == 0:
            ql = np.linalg.eigh(left)[1] if "L" in sides else ql
            qr = np.linalg.eigh(right)[1] if "R" in sides else qr


def compare(ours, oracle, rtol):
    np.testing.assert_allclose(ours["w"], list(oracle(STREAM["w"], "LR")), rtol=rtol, atol=1e-9)
    np.testing.assert_allclose(ours["row"], list(oracle(STREAM["row"], "R")), rtol=rtol, atol=1e-9)
    for n in range(2):  # leading axes hold matrices of their own
        want = list(oracle(STREAM["k"][:, n], "LR"))
        np.testing.assert_allclose(ours["k"][:, n], want, rtol=rtol, atol=1e-9)


def test_shampoo_is_its_transcription(x64):
    ours = updates(optim.scale_by_shampoo(0.8, 0.9, ridge=1e-3, clock=CLOCK))
    compare(ours, lambda stream, sides: shampoo(stream, 0.8, 0.9, 1e-3, sides), 1e-9)


def test_soap_is_its_transcription(x64):
    ours = updates(optim.scale_by_soap(0.8, 0.9, clock=CLOCK))
    compare(ours, lambda stream, sides: soap(stream, 0.8, 0.9, sides), 1e-7)


@pytest.mark.parametrize("make", [optim.scale_by_shampoo, optim.scale_by_soap])
def test_the_first_step_has_the_size_of_adams(x64, make):
    ours, adam = updates(make()), updates(optax.scale_by_adam(eps=1e-8))
    for name, update in ours.items():
        sizes = (np.linalg.norm(x[0]) for x in (update, adam[name]))
        np.testing.assert_allclose(*sizes, rtol=1e-6)


def test_soap_starts_as_adam(x64):
    first = updates(optim.scale_by_soap(0.9, 0.99))
    adam = updates(optax.scale_by_adam(0.9, 0.99))
    for name, update in first.items():
        np.testing.assert_allclose(update[0], adam[name][0], rtol=1e-12)


@pytest.mark.parametrize("make", [optim.shampoo, optim.soap])
def test_vectors_have_adam(x64, make):
    vectors = {"b": STREAM["row"][:, 0], "s": STREAM["row"][:, 0, 0]}
    adam = updates(optax.adam(0.1, 0.9, 0.99, eps=0.0), vectors)
    ours = updates(make(0.1, 0.9, 0.99, eps=1e-12), vectors)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), ours, adam)


@pytest.mark.parametrize("make", [optim.scale_by_shampoo, optim.scale_by_soap])
def test_long_sides_are_left_alone(make):
    shapes = jax.eval_shape(make().init, {"w": jnp.zeros((3, 4096)), "v": jnp.zeros((4096, 4096))})
    levels = shapes.inner_states["matrix"].inner_state.levels
    assert levels["left"].params["w"].shape == (3, 3)
    assert levels["right"].params["w"].shape == ()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: optim.shampoo(0.1, b1=2), r"`b1` must be in \[0, 1\], got 2"),
        (lambda: optim.shampoo(0.1, ridge=-1), "`ridge` must be >= 0, got -1"),
        (lambda: optim.soap(0.1, eps=-1), "`eps` must be >= 0, got -1"),
        (lambda: optim.soap(0.1, clock=10), "`clock` must be an nlx.Clock with a period, got 10"),
    ],
)
def test_bad_arguments(make, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()
