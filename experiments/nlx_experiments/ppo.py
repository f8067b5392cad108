# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimization of agents whose memory goes on through episodes and segments.

A lifetime is lived in segments of equal length. Of every segment whole sequences are replayed, from
the state that the agent was in at its start, so that gradients flow through the writes of its
memory; where that is a lifetime's start it is made of the parameters, and they learn it too. What
comes after an episode counts as what comes within it, as in a lifetime of many; after a lifetime's
last step the value stands for what would have come.

Source: Schulman et al. (2017), Proximal Policy Optimization Algorithms; Schulman et al. (2016),
High-Dimensional Continuous Control, Eq. 16 (advantages); Duan et al. (2016), RL^2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from nlx import nn, train
from nlx_experiments import environments, sequence_learner
from nlx_experiments.agent import Agent, Recurrent
from nlx_experiments.environments import Life, Outcome, World


class Plan(NamedTuple):
    """How an agent learns."""

    updates: int  # segments lived and learned from
    lifetimes: int  # lived side by side
    segment: int  # steps, a divisor of every world's length
    epochs: int = 4  # times that a segment is replayed
    parts: int = 4  # of the lifetimes, each a step of the optimizer; a divisor of them
    discount: float = 0.9
    trace: float = 0.9  # lambda of the advantages
    clip: float = 0.2  # of the ratio of probabilities
    value: float = 0.5  # weight of the error of the values
    entropy: float = 0.01  # weight of the policy's entropy


class Segment(NamedTuple):
    """What was lived, by lifetime and step."""

    percepts: Float[Array, "b t p"]
    actions: Int[Array, "b t"]
    chances: Float[Array, "b t"]  # log-probability of the action when it was chosen
    advantages: Float[Array, "b t"]
    returns: Float[Array, "b t"]  # what values should have been


class Learning(NamedTuple):
    """All that is carried from update to update."""

    train: train.TrainState
    lives: Life  # [b]
    memory: PyTree[Array]  # the agent's, [b]
    done: Int[Array, ""]  # updates


class Learners(NamedTuple):
    """The functions of a training, over models m = rates x seeds.

    init(seeds) -> states: weights drawn from seeds [m].
    start(seeds, weights) -> states: the same with weights [m] that are given, learning anew.
    learn(states, rates, keys, count, kept=None) -> (states, rewards [m, count]): so many updates,
        and the mean reward of a step in each; count is static. kept [m]: what earlier skills need,
        see `skills`.
    """

    init: Callable[[Any], Learning]
    start: Callable[[Any, PyTree[Array]], Learning]
    learn: Callable[..., tuple[Learning, Float[Array, "m n"]]]


def advantages(
    rewards: Float[Array, "t b"], values: Float[Array, "t1 b"], discount: float, trace: float
) -> Float[Array, "t b"]:
    """A_t = sum_k (discount trace)^k d_{t+k},  d_t = r_t + discount V_{t+1} - V_t.

    rewards: r. values: V, one more than rewards: that after the last step too. discount, trace: in
    [0, 1].

    Source: Schulman et al. (2016), Eq. 16.
    """
    if values.shape != (len(rewards) + 1, *rewards.shape[1:]):
        raise ValueError(
            f"`values` has shape {values.shape}; it must be that of rewards {rewards.shape} and "
            "one step more."
        )

    def back(after, told):
        reward, value, coming = told
        now = reward + discount * coming - value + discount * trace * after
        return now, now

    told = (rewards, values[:-1], values[1:])
    return jax.lax.scan(back, jnp.zeros_like(rewards[0]), told, reverse=True)[1]


def clipped_loss(
    chances: Float[Array, "..."],
    before: Float[Array, "..."],
    advantages: Float[Array, "..."],
    clip: float,
) -> Float[Array, ""]:
    """-mean min(r A, clip(r, 1 - e, 1 + e) A),  r = exp(chances - before).

    chances, before: log-probabilities of the actions, now and when they were chosen. clip: e, > 0.

    Source: Schulman et al. (2017), Eq. 7.
    """
    ratio = jnp.exp(chances - before)
    bound = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.mean(jnp.minimum(ratio * advantages, bound * advantages))


def loss(agent: Agent, start: PyTree[Array], segment: Segment, plan: Plan) -> Float[Array, ""]:
    """clipped_loss + value mean 1/2 (V - returns)^2 - entropy mean H(policy).

    start: the agent's state before the segment. Advantages are taken with mean 0 and deviation 1
    over the segment. Source: Schulman et al. (2017), Eq. 9.
    """
    scores, values, _ = agent(segment.percepts, start)
    policy = jax.nn.log_softmax(scores)
    chances = jnp.take_along_axis(policy, segment.actions[..., None], -1)[..., 0]
    gained = segment.advantages
    gained = (gained - gained.mean()) / (gained.std() + 1e-6)
    missed = 0.5 * jnp.mean(jnp.square(values - segment.returns))
    entropy = -jnp.mean(jnp.sum(jnp.exp(policy) * policy, -1))
    acting = clipped_loss(chances, segment.chances, gained, plan.clip)
    return acting + plan.value * missed - plan.entropy * entropy


def make(
    config: nn.ModelConfig | Recurrent,
    world: World,
    plan: Plan,
    penalty: Callable[[PyTree[Array], Any], Float[Array, ""]] | None = None,
) -> Learners:
    """The functions that train agents of `config` in a world.

    The optimizer is that of `sequence_learner`, its rate falling to a tenth. penalty: (params,
    kept) -> what is added to the loss; None: nothing.

    Raises ValueError for a segment that does not divide a lifetime, parts that do not divide the
    lifetimes, or a world that is none.
    """
    _check(world, plan)
    build = lambda rngs: agent_of(config, world, rngs)
    shapes = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, labels = nnx.graphdef(shapes), nn.labels_by_level(shapes)
    steps = plan.updates * plan.epochs * plan.parts
    rule = sequence_learner.optimizer(shapes, steps=steps, decay=True)
    segments, count = world.length // plan.segment, plan.lifetimes
    begin = jax.vmap(lambda key: environments.begin(world, key))
    born = lambda params: nnx.merge(graph, params).init_state(count, world.length + 1)

    def started(params, first: Array, memory: PyTree[Array]) -> PyTree[Array]:
        choose = lambda new, old: jnp.where(first, new, old)
        return jax.tree.map(choose, born(params), memory)

    def start(seed: Array, params: PyTree[Array]) -> Learning:
        lives = begin(jax.random.split(jax.random.key(seed), count))
        state = train.init_train_state(params, rule(jnp.float32(0)))
        return Learning(state, lives, born(params), jnp.int32(0))

    def init(seed: Array) -> Learning:
        return start(seed, nnx.split(build(nnx.Rngs(jax.random.key(seed))))[1])

    def update(
        rate: Array, key: Array, kept: Any, now: Learning
    ) -> tuple[Learning, Float[Array, ""]]:
        drawn, lived, shuffled = jax.random.split(jax.random.fold_in(key, now.done), 3)
        first = now.done % segments == 0
        fresh = begin(jax.random.split(drawn, count))
        lives = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, now.lives)
        params = now.train.params
        memory = started(params, first, now.memory)
        agent = nnx.merge(graph, params)
        lives, memory_after, seen, outcomes = act(agent, world, lived, lives, memory, plan.segment)
        # The value of what comes next; its percept is told again when the next segment begins.
        _, last, _ = agent(lives.percept[:, None], memory_after)
        values = jnp.concatenate([seen.values, last.T])
        gained = advantages(outcomes.reward, values, plan.discount, plan.trace)
        whole = Segment(seen.percepts, seen.actions, seen.chances, gained, gained + values[:-1])
        whole = jax.tree.map(lambda z: jnp.swapaxes(z, 0, 1), whole)

        def lost(params, rows):
            take = lambda tree: jax.tree.map(lambda z: z[rows], tree)
            start = take(started(params, first, memory))
            lost = loss(nnx.merge(graph, params), start, take(whole), plan)
            return lost if penalty is None else lost + penalty(params, kept)

        step = train.make_train_step(lost, rule(rate), labels)
        order = jax.vmap(lambda key: jax.random.permutation(key, count))(
            jax.random.split(shuffled, plan.epochs)
        ).reshape(plan.epochs * plan.parts, -1)
        body = lambda state, rows: (step(state, rows)[0], None)
        state, _ = jax.lax.scan(body, now.train, order)
        return Learning(state, lives, memory_after, now.done + 1), outcomes.reward.mean()

    def learn(now: Learning, rate: Array, key: Array, kept: Any, number: int):
        body = lambda now, _: update(rate, key, kept, now)
        return jax.lax.scan(body, now, None, number)

    def learn_all(states: Learning, rates: Array, keys: Array, number: int, kept: Any = None):
        one = lambda now, rate, key, kept: learn(now, rate, key, kept, number)
        return jax.vmap(one)(states, rates, keys, kept)

    compiled: Any = jax.jit(learn_all, static_argnums=3, donate_argnums=0)
    return Learners(jax.jit(jax.vmap(init)), jax.jit(jax.vmap(start)), compiled)


class Seen(NamedTuple):
    """What an agent was told, did and thought; by step and lifetime."""

    percepts: Float[Array, "t b p"]
    actions: Int[Array, "t b"]
    chances: Float[Array, "t b"]
    values: Float[Array, "t b"]


def act(
    agent: Agent, world: World, key: Array, lives: Life, memory: PyTree[Array], steps: int
) -> tuple[Life, PyTree[Array], Seen, Outcome]:
    """Lives so many steps, actions drawn from the policy.

    lives: [b]. memory: the agent's, as it returned it for the percepts before.

    Returns both as they are then, and what was seen and what came of it: [steps, b].
    """
    rows = len(lives.tick)

    def step(carry, key):
        lives, memory = carry
        choosing, living = jax.random.split(key)
        scores, values, memory = agent(lives.percept[:, None], memory)
        policy = jax.nn.log_softmax(scores[:, 0])
        actions = jax.random.categorical(choosing, policy)
        chances = jnp.take_along_axis(policy, actions[:, None], -1)[:, 0]
        one = lambda key, life, action: environments.live(world, key, life, action)
        after, outcome = jax.vmap(one)(jax.random.split(living, rows), lives, actions)
        return (after, memory), (Seen(lives.percept, actions, chances, values[:, 0]), outcome)

    keys = jax.random.split(key, steps)
    (lives, memory), (seen, outcomes) = jax.lax.scan(step, (lives, memory), keys)
    return lives, memory, seen, outcomes


def agent_of(config: nn.ModelConfig | Recurrent, world: World, rngs: nnx.Rngs) -> Agent:
    """An agent of the world's sizes."""
    percept = environments.percept_size(world.environment)
    return Agent(config, percept, world.environment.actions, rngs=rngs)


def examine(config: nn.ModelConfig | Recurrent, world: World, lifetimes: int) -> Callable:
    """The function (weights [m], key) -> outcomes [m, length, lifetimes] of whole lifetimes.

    All models live the same ones, as far as what they do lets them be the same.
    """
    environments.check(world)
    graph = nnx.graphdef(nnx.eval_shape(lambda: agent_of(config, world, nnx.Rngs(0))))

    def exam(params: PyTree[Array], key: Array) -> Outcome:
        agent = nnx.merge(graph, params)
        born, lived = jax.random.split(key)
        begin = lambda key: environments.begin(world, key)
        lives = jax.vmap(begin)(jax.random.split(born, lifetimes))
        memory = agent.init_state(lifetimes, world.length)
        return act(agent, world, lived, lives, memory, world.length)[3]

    return jax.jit(jax.vmap(exam, in_axes=(0, None)))


def _check(world: World, plan: Plan) -> None:
    environments.check(world)
    for name in ("updates", "lifetimes", "segment", "epochs", "parts"):
        value = getattr(plan, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 1.")
    for name in ("discount", "trace"):
        if not 0 <= getattr(plan, name) <= 1:
            raise ValueError(f"`{name}` is {getattr(plan, name)}; it must be in [0, 1].")
    if not plan.clip > 0:
        raise ValueError(f"`clip` is {plan.clip}; it must be above 0.")
    if world.length % plan.segment:
        raise ValueError(
            f"`segment` is {plan.segment}; it must be a divisor of a lifetime's {world.length}."
        )
    if plan.lifetimes % plan.parts:
        raise ValueError(
            f"`parts` is {plan.parts}; it must be a divisor of {plan.lifetimes} lifetimes."
        )
