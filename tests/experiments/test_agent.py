"""Agents: one code path however a lifetime is cut, and a GRU that is Cho et al.'s."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import agent as agents
from nlx_experiments.agent import GRU, Agent, Recurrent

from nlx import nn

SIZES = dict(vocabulary=1, width=8, heads=2, layers=1, hidden=6, memory_hidden=4)
CONFIGS = {
    "gru": Recurrent(width=8, layers=2, hidden=6),
    "transformer": nn.ModelConfig(mixer="attention", feed_forward="swiglu", **SIZES),
    "hope": nn.ModelConfig(
        mixer="self_modifying",
        feed_forward="cms",
        cms_periods=(1, 4),
        chunk_size=4,
        projection_chunk_size=4,
        **SIZES,
    ),
    "deltanet": nn.ModelConfig(mixer="deltanet", feed_forward="swiglu", **SIZES),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_is_in_pieces_is_step_by_step(name, x64):
    agent = Agent(CONFIGS[name], 5, 3, rngs=nnx.Rngs(0))
    if name == "gru":  # flax draws float32 whatever is enabled
        cast = lambda leaf: leaf.astype(jnp.float64)
        nnx.update(agent, jax.tree.map(cast, nnx.state(agent)))
    percepts = jax.random.normal(jax.random.key(1), (2, 9, 5))
    read = nnx.jit(lambda agent, percepts, state: agent(percepts, state))
    empty = agent.init_state(2, 9)
    if name == "gru":
        empty = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), empty)
    whole = read(agent, percepts, empty)
    assert whole[0].shape == (2, 9, 3)
    assert whole[1].shape == (2, 9)
    for size in (4, 1):
        state, found = empty, []
        for first in range(0, 9, size):
            *now, state = read(agent, percepts[:, first : first + size], state)
            found.append(now)
        parts = [jnp.concatenate(part, 1) for part in zip(*found, strict=True)]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), whole[:2], (*parts,)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), whole[2], state)
    assert not np.allclose(whole[0][:, 5:], read(agent, percepts[:, 5:], empty)[0])


def test_a_gru_is_what_its_equations_say():
    gru = GRU(3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 3))
    y, state = gru(x)
    inward, outward = gru.cell.dense_i, gru.cell.dense_h
    h, sigmoid = np.zeros(3), lambda z: 1 / (1 + np.exp(-z))
    for t in range(4):
        a = np.split(np.asarray(x[0, t] @ inward.kernel[...] + inward.bias[...]), 3)
        b = np.split(h @ np.asarray(outward.kernel[...]), 3)
        reset, update = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
        h = (1 - update) * np.tanh(a[2] + reset * b[2]) + update * h
        np.testing.assert_allclose(y[0, t], h, atol=1e-6)
    np.testing.assert_allclose(state.hidden[0], h, atol=1e-6)


def test_a_gru_begins_anew_with_a_segment_and_refuses_as_mixers_do():
    gru = GRU(3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 3))
    y, _ = gru(x, None, jnp.array([[0, 0, 1, 1]]))
    np.testing.assert_allclose(y[:, 2:], gru(x[:, 2:])[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"`x` has shape \(1, 4, 2\); it must be \[b, t, 3\]"):
        gru(x[..., :2])
    with pytest.raises(ValueError, match="`width` is 0; it must be an integer >= 1"):
        GRU(0, rngs=nnx.Rngs(0))


def test_an_agent_is_what_its_equations_say():
    agent = Agent(CONFIGS["gru"], 5, 3, rngs=nnx.Rngs(0))
    percepts = jax.random.normal(jax.random.key(0), (1, 4, 5))
    scores, values, _ = agent(percepts, agent.init_state(1, 4))
    told = np.asarray(percepts)
    both = told @ np.asarray(agent.encoder[...])
    both = (both / (1 + np.exp(-both))) @ np.asarray(agent.encoded.kernel[...])
    x = jnp.asarray(told @ np.asarray(agent.told[...]) + both)
    for block in agent.blocks:
        x, _ = block(x)
    x = np.asarray(agent.norm(x))
    np.testing.assert_allclose(scores, x @ np.asarray(agent.policy[...]), atol=1e-6)
    np.testing.assert_allclose(values, (x @ np.asarray(agent.value[...]))[..., 0], atol=1e-6)


def test_a_new_agent_tries_all_actions_alike():
    agent = Agent(CONFIGS["gru"], 5, 3, rngs=nnx.Rngs(0))
    scores, values, _ = agent(jnp.ones((1, 6, 5)), agent.init_state(1, 6))
    assert float(jnp.abs(scores).max()) < 0.1
    assert float(jnp.abs(values).max()) < 0.1
    assert float(jnp.ptp(scores)) > 0


def test_agents_are_brought_to_one_size():
    for config in CONFIGS.values():
        found = agents.equal(config, 5, 3, 1_800)
        assert abs(agents.count(found, 5, 3) - 1_800) <= 18
    with pytest.raises(ValueError, match="`parameters` is 100; it must be at least .* for Recurr"):
        agents.equal(CONFIGS["gru"], 5, 3, 100)
