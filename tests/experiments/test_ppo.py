"""PPO: advantages against a loop, the loss by hand, memory through segments, a bandit learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import bandits, environments, mazes, ppo
from nlx_experiments.agent import Agent, Recurrent
from nlx_experiments.environments import Environment, World
from nlx_experiments.ppo import Plan, Segment

from nlx import nn

GRU = Recurrent(width=8, layers=1, hidden=4)
SIZES = dict(vocabulary=1, width=8, heads=2, layers=1, hidden=4, memory_hidden=4)
HOPE = nn.ModelConfig(
    mixer="self_modifying",
    feed_forward="cms",
    cms_periods=(1, 4),
    chunk_size=4,
    projection_chunk_size=4,
    **SIZES,
)
CHAIN = mazes.walks("chain", mazes.memory_chain, (1, 3), 8)
PLAN = Plan(updates=4, lifetimes=4, segment=4, epochs=2, parts=2)


def test_advantages_are_those_of_a_plain_loop():
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(6, 3)), generator.normal(size=(7, 3))
    found = ppo.advantages(jnp.asarray(rewards), jnp.asarray(values), 0.9, 0.7)
    for t in range(6):
        surprises = [rewards[k] + 0.9 * values[k + 1] - values[k] for k in range(t, 6)]
        expected = sum((0.9 * 0.7) ** n * surprise for n, surprise in enumerate(surprises))
        np.testing.assert_allclose(found[t], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`values` has shape \(6, 3\); it must be that of rew"):
        ppo.advantages(jnp.asarray(rewards), jnp.asarray(values[1:]), 0.9, 0.7)


def test_the_clipped_loss_by_hand():
    """Ratios 2, 2, 1/2, 1/2, 1.1 under clip 0.2; the lesser of both products counts."""
    ratio = jnp.array([2.0, 2.0, 0.5, 0.5, 1.1])
    gained = jnp.array([1.0, -1.0, 1.0, -1.0, 3.0])
    before = jnp.array([-1.0, -2.0, -0.5, -1.5, -1.0])
    expected = -np.mean([1.2, -2.0, 0.5, -0.8, 3.3])
    loss = lambda chances: ppo.clipped_loss(chances, before, gained, 0.2)
    value, slope = jax.value_and_grad(loss)(before + jnp.log(ratio))
    assert float(value) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(slope, [0, 0.4, -0.1, 0, -0.66], atol=1e-6)


class Fixed:
    """An agent whose answers are given."""

    def __init__(self, scores, values):
        self.answer = scores, values

    def __call__(self, percepts, state):
        return *self.answer, state


def test_the_loss_is_the_sum_of_its_parts_by_hand():
    scores = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75]]]))
    agent = Fixed(scores, jnp.array([[1.0, 2.0]]))
    chances = jnp.log(jnp.array([[0.4, 0.75]]))
    segment = Segment(
        jnp.zeros((1, 2, 3)),
        jnp.array([[0, 1]]),
        chances,
        jnp.array([[3.0, 1.0]]),
        jnp.ones((1, 2)),
    )
    acting = -(1.2 * 1 + 1 * -1) / 2  # ratios 1.25 and 1, advantages 1 and -1
    entropy = -np.mean([np.log(0.5), 0.25 * np.log(0.25) + 0.75 * np.log(0.75)])
    plan = PLAN._replace(value=0.3, entropy=0.2)
    found = ppo.loss(agent, None, segment, plan)
    expected = acting + 0.3 * 0.5 * 0.5 - 0.2 * entropy
    assert float(found) == pytest.approx(expected, abs=1e-5)


@functools.cache
def learners():
    """Compiled once."""
    return ppo.make(GRU, CHAIN, PLAN)


def learned(made, updates, rates=(0.01,), seeds=(0,)):
    seeds = jnp.asarray(seeds, jnp.uint32)
    state = made.init(seeds)
    rates, keys = jnp.asarray(rates, jnp.float32), jax.vmap(jax.random.key)(seeds)
    for count in updates:
        state, rewards = made.learn(state, rates, keys, count)
    return state, rewards


def test_learning_is_the_same_to_the_bit_however_it_is_cut():
    made = learners()
    first, other = (learned(made, updates)[0] for updates in ((2,), (1, 1)))
    jax.tree.map(np.testing.assert_array_equal, first, other)


def test_models_side_by_side_learn_as_they_do_alone():
    made = learners()
    both, _ = learned(made, (1, 1), (0.01, 0.02), (0, 1))
    alone, _ = learned(made, (1, 1), (0.02,), (1,))
    close = lambda a, b: np.testing.assert_allclose(a[1], b[0], atol=1e-5)
    jax.tree.map(close, both.train.params, alone.train.params)
    assert not np.allclose(*(jax.tree.leaves(both.train.params)[0][n] for n in (0, 1)), atol=1e-3)


def test_memory_and_lifetimes_go_on_through_segments_and_begin_anew_after_them():
    made = learners()
    state, _ = learned(made, (1,))
    assert state.lives.tick.tolist() == [[4] * 4]
    assert float(jnp.abs(state.memory[0].mixer.hidden).max()) > 0
    after, _ = learned(made, (1, 1))
    assert after.lives.tick.tolist() == [[8] * 4]
    np.testing.assert_array_equal(after.lives.before, state.lives.before)
    third, _ = learned(made, (1, 1, 1))
    assert third.lives.tick.tolist() == [[4] * 4]
    assert third.lives.state.sign.shape == (1, 4)


def test_the_memory_is_that_of_the_whole_lifetime_so_far():
    """In a world where nothing happens, at rate 0: what was told is known, the weights stay."""
    nothing = lambda key, state, action, params: (jnp.zeros(1), state, 0.0, False, {})
    still = Environment(lambda key, params: (jnp.zeros(1), 0), nothing, 0, 1, 1)
    world = World("still", still, environments.constant(still), 8)
    made = ppo.make(GRU, world, PLAN._replace(epochs=1, parts=1))
    agent = ppo.agent_of(GRU, world, nnx.Rngs(jax.random.key(0)))
    told = jnp.array([[[0.0, 0, 0, 1], *[[0, 1, 0, 0]] * 7]])
    for updates, steps in (((1,), 4), ((1, 1), 8), ((1, 1, 1), 4)):
        state, _ = learned(made, updates, (0.0,))
        _, _, memory = agent(told[:, :steps], agent.init_state(1, 9))
        found = state.memory[0].mixer.hidden[0, :1]
        np.testing.assert_allclose(found, memory[0].mixer.hidden, atol=1e-5)


def test_a_segment_is_replayed_from_the_state_at_its_start():
    """With the weights that acted, replayed probabilities and values are those of then."""
    agent = Agent(HOPE, environments.percept_size(CHAIN.environment), 2, rngs=nnx.Rngs(0))
    lives = jax.vmap(lambda key: environments.begin(CHAIN, key))(
        jax.random.split(jax.random.key(0), 3)
    )
    act = nnx.jit(
        lambda agent, lives, memory: ppo.act(agent, CHAIN, jax.random.key(1), lives, memory, 4)
    )
    read = nnx.jit(lambda agent, percepts, memory: agent(percepts, memory))
    memory = agent.init_state(3, 9)
    for _ in range(2):
        lives, after, seen, outcomes = act(agent, lives, memory)
        assert outcomes.reward.shape == (4, 3)
        scores, values, _ = read(agent, jnp.swapaxes(seen.percepts, 0, 1), memory)
        policy = jax.nn.log_softmax(scores)
        chances = jnp.take_along_axis(policy, seen.actions.T[..., None], -1)[..., 0]
        np.testing.assert_allclose(chances, seen.chances.T, atol=1e-5)
        np.testing.assert_allclose(values, seen.values.T, atol=1e-5)
        memory = after


@pytest.mark.slow
def test_where_a_memory_begins_is_learned():
    """Hope's first weights get gradients where a lifetime begins."""
    made = ppo.make(HOPE, CHAIN, PLAN._replace(segment=8, epochs=1, parts=1))
    before = made.init(jnp.zeros(1, jnp.uint32)).train.params
    after, _ = learned(made, (1,))
    boxes = lambda params: params["blocks"][0]["mixer"]["boxes"]["memory"]["w1"][...]
    assert float(jnp.abs(boxes(after.train.params) - boxes(before)).max()) > 1e-4


def test_a_bandit_is_learned():
    """Always the same arm: the agent's reward goes from a half to nearly all."""
    odds = jnp.array([0.0, 1.0])
    world = World("bandit", bandits.bandit(2), environments.constant(None, odds), 4)
    plan = Plan(updates=30, lifetimes=8, segment=4)
    made = ppo.make(GRU, world, plan)
    _, rewards = learned(made, (30,), (0.03,), (0,))
    assert float(rewards[0, :2].mean()) < 0.7
    assert float(rewards[0, -5:].mean()) > 0.95


@pytest.mark.slow
def test_a_sign_is_remembered():
    """Without a memory half the answers are right, so that the mean reward is 0."""
    world = mazes.walks("chain", mazes.memory_chain, (2, 2), 6)
    made = ppo.make(GRU, world, Plan(updates=150, lifetimes=32, segment=6))
    state, rewards = learned(made, (150,), (0.01,), (0,))
    assert float(rewards[0, -10:].mean()) > 0.9 / 3
    outcomes = ppo.examine(GRU, world, 16)(state.train.params, jax.random.key(1))
    assert outcomes.reward.shape == (1, 6, 16)
    assert float(outcomes.reward[outcomes.done].mean()) > 0.9


def test_refusals_are_sentences():
    for told, must in (
        (dict(segment=3), "`segment` is 3; it must be a divisor of a lifetime's 8"),
        (dict(parts=3), "`parts` is 3; it must be a divisor of 4 lifetimes"),
        (dict(updates=0), "`updates` is 0; it must be an integer >= 1"),
        (dict(discount=1.5), r"`discount` is 1.5; it must be in \[0, 1\]"),
        (dict(clip=0.0), "`clip` is 0.0; it must be above 0"),
    ):
        with pytest.raises(ValueError, match=must):
            ppo.make(GRU, CHAIN, PLAN._replace(**told))
