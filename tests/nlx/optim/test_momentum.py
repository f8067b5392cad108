# SPDX-License-Identifier: Apache-2.0
"""Momentum and its relatives: to the bit where optax has them, else a transcription in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx import optim

SHAPES = {"w": (5, 3), "k": (2, 3, 4), "b": (4,), "s": ()}


def stream(steps=6, shapes=SHAPES, scale=1.0):
    draw = lambda s: scale * np.random.default_rng(sum(s)).normal(size=(steps, *s))
    return {name: jnp.asarray(draw(shape)) for name, shape in shapes.items()}


def updates(tx, gradients, params=None):
    """All updates, stacked, under one compilation."""

    def body(state, gradient):
        update, state = tx.update(gradient, state, params)
        return state, update

    start = tx.init(jax.tree.map(lambda g: g[0], gradients))
    return jax.jit(lambda s, g: jax.lax.scan(body, s, g)[1])(start, gradients)


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def close(ours, theirs, rtol=1e-12):
    tight = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12)
    jax.tree.map(tight, ours, theirs)


@pytest.mark.parametrize("decay", [0.8, 1.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_optax_trace_to_the_bit(x64, nesterov, decay):
    ours = optim.momentum(0.1, decay, nesterov=nesterov)
    same(updates(ours, stream()), updates(optax.sgd(0.1, decay, nesterov), stream()))


def test_preconditioned_momentum_is_the_chain(x64):
    gradients = stream()
    chain = lambda first: optax.chain(first, optax.trace(0.8))
    own = optax.stateless(lambda u, _: jax.tree.map(lambda g: 3 * g, u))
    same(updates(optim.scale_by_preconditioned_momentum(own, 0.8), gradients),
         updates(chain(own), gradients))  # fmt: skip
    rms = optax.scale_by_adam(b1=0.0, b2=0.999)
    close(
        updates(optim.preconditioned_momentum(0.5), gradients),
        jax.tree.map(lambda u: -0.5 * u, updates(optax.chain(rms, optax.trace(0.9)), gradients)),
    )


def delta(u_by_step, decay, erase, nesterov, literal):
    """m <- (decay I - c u u^T) m + u, kernel by kernel, transcribed."""
    m, seen = np.zeros_like(u_by_step[0]), []
    for u in u_by_step:
        kernels = u.reshape(-1, *u.shape[-2:]) if u.ndim > 1 else u.reshape(1, 1, -1)
        held = m.reshape(kernels.shape).copy()
        for n, k in enumerate(kernels):
            c = erase if literal else erase / np.linalg.norm(k) ** 2
            held[n] = (decay * np.eye(len(k)) - c * k @ k.T) @ held[n] + k
        m = held.reshape(u.shape)
        seen.append(u + decay * m if nesterov and not literal else m)
    return np.stack(seen)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.7, "erase": 1.5, "nesterov": False},
        {"decay": 0.8, "erase": 1.0, "literal": True},
    ],
)
def test_delta_momentum_is_its_transcription(x64, options):
    gradients = stream(scale=0.3)
    ours = updates(optim.scale_by_delta_momentum(**options), gradients)
    settings = {"decay": 0.9, "erase": 1.0, "nesterov": True, "literal": False} | options
    close(ours, {n: delta(np.array(u), **settings) for n, u in gradients.items()}, 1e-11)


def test_delta_momentum_descends_on_the_l2_objective(x64):
    """Eqs. 48-49: at one rate it is a gradient step on 1/2 ||m g^T + P||^2, in [out, in] layout."""
    rate, g = 0.2, stream()["w"]
    ours = updates(optim.scale_by_delta_momentum(1.0, erase=rate, literal=True), rate * g / rate)
    m = jnp.zeros((3, 5))
    target = -jnp.eye(3)
    objective = lambda m, u: nlx.objectives.l2(m @ u, target)  # u = g^T
    for n, u in enumerate(g):
        m = m - rate * jax.grad(objective)(m, u)
        np.testing.assert_allclose(ours[n], -m.T / rate, rtol=1e-12)


def test_delta_momentum_without_erase_is_momentum(x64):
    for nesterov in (False, True):
        same(
            updates(optim.scale_by_delta_momentum(0.8, erase=0.0, nesterov=nesterov), stream()),
            updates(optim.scale_by_momentum(0.8, nesterov=nesterov), stream()),
        )


def test_delta_momentum_alias_is_preconditioned_unless_literal(x64):
    gradients, params = stream(), jax.tree.map(lambda u: u[0], stream())
    inner = optim.scale_by_delta_momentum()
    chain = optax.chain(optim.scale_by_second_moment(), inner, optax.add_decayed_weights(0.1))
    want = jax.tree.map(lambda u: -0.5 * u, updates(chain, gradients, params))
    close(updates(optim.delta_momentum(0.5, weight_decay=0.1), gradients, params), want)
    literal = updates(optim.scale_by_delta_momentum(literal=True), gradients)
    close(updates(optim.delta_momentum(0.5, literal=True), gradients),
          jax.tree.map(lambda u: -0.5 * u, literal))  # fmt: skip


def test_delta_momentum_keeps_what_does_not_come_back(x64):
    """A direction met every step is erased, one met once only decays."""
    u = jnp.zeros((8, 2, 1)).at[:, 0].set(1.0).at[0, 1].set(1.0)
    tx = optim.scale_by_delta_momentum(0.9, nesterov=False)
    last = updates(tx, {"w": u})["w"][-1, :, 0]
    plain = updates(optim.scale_by_momentum(0.9), {"w": u})["w"][-1, :, 0]
    assert last[0] < 0.2 * plain[0]
    assert last[1] > 0.4 * plain[1]


@pytest.mark.parametrize("nesterov", [False, True])
def test_feature_momentum_is_momentum_of_features(x64, nesterov):
    features = lambda u: u + u**3
    gradients = stream()
    ours = updates(optim.scale_by_feature_momentum(features, 0.7, nesterov=nesterov), gradients)
    close(ours, updates(optax.trace(0.7, nesterov), jax.tree.map(features, gradients)))
    alias = updates(optim.feature_momentum(0.5, features, 0.7, nesterov=nesterov), gradients)
    close(alias, jax.tree.map(lambda u: -0.5 * u, ours))


def test_orthogonal_momentum_is_muons_step(x64):
    gradients = stream(shapes={"w": (5, 3), "v": (3, 4)})
    ours = updates(optim.orthogonal_momentum(0.1, 0.8, nesterov=False), gradients)
    muon = optax.contrib.muon(0.1, beta=0.8, nesterov=False, consistent_rms=0.2, eps=0.0)
    muon = optax.with_extra_args_support(muon)
    zeros = jax.tree.map(lambda u: jnp.zeros_like(u[0]), gradients)
    close(ours, updates(muon, gradients, zeros), 1e-11)


def test_orthogonal_momentum_looks_ahead_as_muon_was_written(x64):
    u_by_step = np.array(stream()["w"])
    ours = updates(
        optim.scale_by_orthogonal_momentum(0.8, ns_steps=3), {"w": jnp.asarray(u_by_step)}
    )
    m = np.zeros((5, 3))
    for n, u in enumerate(u_by_step):
        m = 0.8 * m + u
        x = u + 0.8 * m
        x = x / np.linalg.norm(x)
        for _ in range(3):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        np.testing.assert_allclose(ours["w"][n], 0.2 * 5**0.5 * x, rtol=1e-12)


def test_orthogonal_momentum_leaves_the_rest_to_adam(x64):
    gradients = {name: u for name, u in stream().items() if name != "w"}
    close(updates(optim.scale_by_orthogonal_momentum(), gradients),
          updates(optim.scale_by_adam_memory(), gradients))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: optim.momentum(0.1, 1.5), r"`decay` must be in \[0, 1\], got 1.5"),
        (lambda: optim.delta_momentum(0.1, -1), r"`decay` must be in \[0, 1\], got -1"),
        (lambda: optim.delta_momentum(0.1, erase=-1), "`erase` must be >= 0, got -1"),
        (lambda: optim.scale_by_second_moment(2.0), r"`decay` must be in \[0, 1\], got 2.0"),
        (lambda: optim.feature_momentum(0.1, jnp.sign, 3), r"`decay` must be in \[0, 1\], got 3"),
        (lambda: optim.orthogonal_momentum(0.1, 3), r"`decay` must be in \[0, 1\], got 3"),
    ],
)
def test_bad_arguments(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
