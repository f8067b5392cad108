# SPDX-License-Identifier: Apache-2.0
"""Sequence models of the literature as levels, against loops written from their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx import memories, objectives, writes

T, DK, DV = 13, 3, 2


@pytest.fixture
def tokens(x64):
    """Keys of unit length, values, queries and gates for T ticks, as NumPy arrays."""
    random = np.random.default_rng(0)
    k, q = random.normal(size=(2, T, DK))
    gates = {name: random.uniform(size=T) for name in ("rate", "retain", "momentum", "erase")}
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    return {"k": k, "q": q, "v": random.normal(size=(T, DV))} | gates


def run(level, memory, contexts, queries, params):
    """The outputs read after each write, by `Nest.scan`; `step` and the level alone must agree."""
    read = lambda working, output, context: memory.read(working["memory"], output)
    forward = lambda params, context: (context[1], {"memory": context[0]})
    nest = nlx.Nest({"memory": level}, forward, read=read)
    states, outputs = nest.scan(nest.start({"memory": params}), (contexts, queries))
    stepped = nest.start({"memory": params}, jnp.int32(0))
    _, again = jax.jit(lambda s, c: jax.lax.scan(nest.step, s, c))(stepped, (contexts, queries))
    np.testing.assert_allclose(outputs, again, rtol=1e-12, atol=1e-12)
    alone = level.scan(level.start(params), contexts)
    np.testing.assert_allclose(
        *map(np.asarray, (alone.params[0], states["memory"].params[0])), rtol=1e-12, atol=1e-12
    )
    return outputs


def linear_level(objective, erase=False):
    memory = memories.linear(DK, DV)
    write = writes.gated(memory.inputs if erase else None, momentum=False)
    return memory, nlx.associative_memory(memory, objective, write, nlx.Clock(1))


def test_linear_attention_with_decay(tokens):
    S, expected = np.zeros((DK, DV)), []
    for t in range(T):
        S = tokens["retain"][t] * S + np.outer(tokens["k"][t], tokens["v"][t])
        expected.append(tokens["q"][t] @ S)
    memory, level = linear_level(objectives.dot_product)
    contexts = nlx.Association(tokens["k"], tokens["v"], retain=tokens["retain"])
    got = run(level, memory, contexts, tokens["q"], jnp.zeros((DK, DV)))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["l2", "dot and erase"])
def test_delta_net(tokens, form):
    S, expected = np.zeros((DK, DV)), []
    for t in range(T):
        k, beta = tokens["k"][t], tokens["rate"][t]
        S = (np.eye(DK) - beta * np.outer(k, k)) @ S + beta * np.outer(k, tokens["v"][t])
        expected.append(tokens["q"][t] @ S)
    erases = form != "l2"
    memory, level = linear_level(objectives.dot_product if erases else objectives.l2, erases)
    contexts = nlx.Association(
        tokens["k"], tokens["v"], tokens["rate"], erase=tokens["rate"] if erases else None
    )
    got = run(level, memory, contexts, tokens["q"], jnp.zeros((DK, DV)))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_gated_delta_net(tokens):
    S, expected = np.zeros((DK, DV)), []
    alpha, beta = tokens["retain"], tokens["rate"]
    for t in range(T):
        k = tokens["k"][t]
        S = alpha[t] * (np.eye(DK) - beta[t] * np.outer(k, k)) @ S
        S = S + beta[t] * np.outer(k, tokens["v"][t])
        expected.append(tokens["q"][t] @ S)
    memory, level = linear_level(objectives.dot_product, erase=True)
    contexts = nlx.Association(tokens["k"], tokens["v"], beta, alpha, erase=alpha * beta)
    got = run(level, memory, contexts, tokens["q"], jnp.zeros((DK, DV)))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize("read", ["after_write", "chunk_start"])
def test_titans_with_momentum(tokens, chunk, read):
    """S = eta S - theta grad; M = (1 - alpha) M + S, gradients at the chunk's start (T13, T14)."""
    d, f = DK, 4
    memory = memories.mlp((d, f, d), "silu")
    params = memory.init(jax.random.key(1))
    start = [np.asarray(w) for w in params]
    values = np.random.default_rng(1).normal(size=(T, d))
    M, S, boundary, expected = list(start), [np.zeros((d, f)), np.zeros((f, d))], list(start), []
    for t in range(T):
        k, (w1, w2) = tokens["k"][t], boundary
        a = k @ w1
        h, sigmoid = silu(a), 1 / (1 + np.exp(-a))
        error = k + h @ w2 - values[t]
        slope = (error @ w2.T) * (sigmoid + a * sigmoid * (1 - sigmoid))
        for i, gradient in enumerate((np.outer(k, slope), np.outer(h, error))):
            S[i] = tokens["momentum"][t] * S[i] - tokens["rate"][t] * gradient
            M[i] = tokens["retain"][t] * M[i] + S[i]
        source = M if read == "after_write" else boundary
        q = tokens["q"][t]
        expected.append(q + silu(q @ source[0]) @ source[1])
        if (t + 1) % chunk == 0:
            boundary = list(M)
    level = nlx.associative_memory(memory, objectives.l2, writes.gated(), nlx.Clock(chunk))
    contexts = nlx.Association(
        tokens["k"], values, tokens["rate"], tokens["retain"], tokens["momentum"]
    )
    if read == "after_write":
        got = run(level, memory, contexts, tokens["q"], params)
    else:
        forward = lambda p, c: (memory.read(p["memory"], c[1]), {"memory": c[0]})
        nest = nlx.Nest({"memory": level}, forward)
        _, got = nest.scan(nest.start({"memory": params}), (contexts, tokens["q"]))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_under_momentum_sgd_is_a_level(x64):
    """Backpropagation stores (input, local error) associations: W + rule(sum x (x) u)."""
    rule, x, u = optax.sgd(0.1, momentum=0.9), *np.random.default_rng(0).normal(size=(2, 12, 3))
    level = nlx.associative_memory(
        memories.linear(3, 3), objectives.dot_product, writes.summed(rule, "sum"), nlx.Clock(4)
    )
    params = expected = jnp.eye(3)
    state = rule.init(params)
    for t in range(0, 12, 4):
        gradient = x[t : t + 4].T @ u[t : t + 4]
        updates, state = rule.update(gradient, state)
        expected = optax.apply_updates(expected, updates)
    got = level.scan(level.start(params), nlx.Association(x, -u))
    np.testing.assert_allclose(got.params, expected, rtol=1e-12)


def test_ticks_stay_python_integers_outside_jit():
    level = nlx.associative_memory(
        memories.linear(2, 2), objectives.l2, writes.gated(), nlx.Clock(3)
    )
    contexts = nlx.Association(jnp.ones((5, 2)), jnp.ones((5, 2)), jnp.full(5, 0.1))
    state = level.scan(level.start(jnp.eye(2), tick=2), contexts)
    assert type(state.tick) is int
    assert state.tick == 7
    state = level.step(state, jax.tree.map(lambda x: x[0], contexts))
    assert type(state.tick) is int
    assert state.tick == 8


def test_a_frozen_part_needs_neither_loss_nor_write():
    level = nlx.Level(lambda key: jnp.ones(2))
    state = level.step(level.start(level.init(jax.random.key(0))), None)
    np.testing.assert_array_equal(state.params, jnp.ones(2))
    assert state.tick == 1


def test_incomplete_levels_get_a_sentence():
    init = lambda key: jnp.ones(2)
    lonely = nlx.Level(init, None, writes.summed(optax.sgd(0.1)), nlx.Clock(2))
    with pytest.raises(
        ValueError, match="`loss` of level 'level' is None, but its clock has period 2"
    ):
        lonely.step(lonely.start(jnp.ones(2)), None)
    with pytest.raises(ValueError, match="`loss` of level 'level' is None"):
        lonely.scan(lonely.start(jnp.ones(2)), jnp.ones(3))
    mute = nlx.Level(init, lambda p, c: jnp.sum(p), None, nlx.Clock(2))
    with pytest.raises(ValueError, match="`write` of level 'level' is None, but the level learns"):
        mute.step(mute.start(jnp.ones(2)), None)
    level = lonely._replace(loss=lambda p, c: jnp.sum(p))
    for contexts in ((), jnp.float32(1), (jnp.ones(3), jnp.ones(4))):
        with pytest.raises(
            ValueError, match="`contexts` must be arrays with one leading tick axis"
        ):
            level.scan(level.start(jnp.ones(2)), contexts)


def test_what_is_no_state_write_or_clock_gets_a_sentence():
    memory, objective = memories.linear(2, 2), objectives.l2
    with pytest.raises(TypeError, match=r"`write` must be an nlx.writes.Write.* got <function"):
        nlx.associative_memory(memory, objective, writes.gated, nlx.Clock(4))
    with pytest.raises(TypeError, match=r"`clock` must be an nlx.Clock, got 4\."):
        nlx.associative_memory(memory, objective, writes.gated(), 4)
    level = nlx.associative_memory(memory, objective, writes.gated(), nlx.Clock(4))
    with pytest.raises(TypeError, match="`clock` must be an nlx.Clock, got 4"):
        nlx.Nest({"memory": level._replace(clock=4)}, lambda params, context: ((), {}))
    contexts = nlx.Association(jnp.ones((3, 2)), jnp.ones((3, 2)))
    for run in (level.scan, level.step):
        with pytest.raises(TypeError, match="`state` is of type ArrayImpl; it must be a state"):
            run(jnp.eye(2), contexts)
    nest = nlx.Nest({"memory": level}, lambda params, context: ((), {"memory": context}))
    for run in (nest.scan, nest.step):
        with pytest.raises(TypeError, match=r"`states\['memory'\]` is of type ArrayImpl; it must"):
            run({"memory": jnp.eye(2)}, contexts)
