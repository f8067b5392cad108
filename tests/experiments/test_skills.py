"""What keeps skills: F by single steps, the penalty by hand, and that it holds an agent still."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import agents_contest, agents_tasks, environments, mazes, ppo, skills
from nlx_experiments.agent import Recurrent
from nlx_experiments.agents_tasks import Size

GRU = Recurrent(width=8, layers=1, hidden=4)
CHAIN = mazes.walks("chain", mazes.memory_chain, (1, 3), 8)
PLAN = ppo.Plan(updates=4, lifetimes=4, segment=4, epochs=2, parts=2)


def test_fisher_is_the_squared_sum_of_the_steps_slopes():
    graph, params = nnx.split(ppo.agent_of(GRU, CHAIN, nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # a policy that is not even
    expected = jax.tree.map(jnp.zeros_like, params)
    for key in jax.random.split(jax.random.key(7), 3):
        born, lived = jax.random.split(key)
        lives = jax.tree.map(lambda leaf: leaf[None], environments.begin(CHAIN, born))
        agent = nnx.merge(graph, params)
        seen = ppo.act(agent, CHAIN, lived, lives, agent.init_state(1, 8), 8)[2]

        def chances(params, seen=seen):
            agent = nnx.merge(graph, params)
            scores, _, _ = agent(seen.percepts.swapaxes(0, 1), agent.init_state(1, 8))
            return jax.nn.log_softmax(scores[0])[jnp.arange(8), seen.actions[:, 0]]

        of_steps = jax.jacrev(chances)(params)
        squared = jax.tree.map(lambda slopes: jnp.square(slopes.sum(0)) / 8, of_steps)
        expected = jax.tree.map(lambda e, s: e + s / 3, expected, squared)
    alone = jax.tree.map(lambda leaf: leaf[None], params)
    found = skills.fisher(GRU, CHAIN, 3)(alone, jax.random.key(7))
    compare = lambda f, e: np.testing.assert_allclose(f[0], e, rtol=1e-3, atol=1e-7)
    jax.tree.map(compare, found, expected)
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(found)) > 1e-3


def test_the_penalty_by_hand():
    first, second, now = jnp.array([1.0, -2.0]), jnp.array([3.0, 0.0]), jnp.array([0.5, 4.0])
    weights = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.0])
    kept = skills.nothing(now)
    for params, fisher in zip((first, second), weights, strict=True):
        kept = skills.and_this(kept, params, fisher)
    expected = lambda p: (
        0.5 * ((weights[0] * (p - first) ** 2).sum() + (weights[1] * (p - second) ** 2).sum())
    )
    slope = jax.grad(skills.penalty)(now, kept)
    np.testing.assert_allclose(slope, jax.grad(expected)(now), rtol=1e-6)
    apart = skills.penalty(now, kept) - skills.penalty(first, kept)
    np.testing.assert_allclose(apart, expected(now) - expected(first), rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 1e4])
def test_a_penalty_holds_an_agent_where_it_was(strength):
    penalty = lambda params, kept: strength * skills.penalty(params, kept)
    made = ppo.make(GRU, CHAIN, PLAN, penalty)
    state = made.init(jnp.zeros(1, jnp.uint32))
    start = jax.tree.map(jnp.copy, state.train.params)
    ones = jax.tree.map(jnp.ones_like, start)
    kept = skills.and_this(skills.nothing(start), start, ones)
    keys = jax.random.split(jax.random.key(0), 1)
    state, _ = made.learn(state, jnp.full(1, 1e-3), keys, 3, kept)
    far = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.train.params, start)
    assert (max(jax.tree.leaves(far)) < 2.5e-3) == (strength > 0)


@pytest.mark.slow
def test_skills_are_kept_from_the_second_on():
    task = agents_tasks.tiny()["skills"]
    size = Size(8, 1_700, (0.1,), 1, 1, 16)
    config = agents_tasks.models(task, size)["gru"]
    task = task._replace(plan=task.plan._replace(updates=4, epochs=4))
    measured = lambda keep: agents_contest.measure(config, task._replace(keep=keep), size)
    plain, kept = (np.array(measured(keep)["rates"]["0.1"]["matrix"][0]) for keep in (0.0, 1e4))
    np.testing.assert_array_equal(plain[0], kept[0])
    assert np.abs(plain[1] - kept[1]).max() > 1e-3
