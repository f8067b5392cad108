# SPDX-License-Identifier: Apache-2.0
"""Keeps skills that an agent has, while it learns others: elastic weight consolidation.

Source: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, Eq. 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from nlx import nn
from nlx_experiments import continual_rules, environments, ppo
from nlx_experiments.agent import Recurrent
from nlx_experiments.environments import World

penalty = continual_rules.penalty


class Kept(NamedTuple):
    """What the skills learned so far need of the parameters p, each as they stood after it, p*."""

    fisher: PyTree[Array]  # sum over skills of F
    anchor: PyTree[Array]  # sum over skills of F p*


def nothing(params: PyTree[Array]) -> Kept:
    """Before the first skill."""
    none = jax.tree.map(jnp.zeros_like, params)
    return Kept(none, none)


def and_this(kept: Kept, params: PyTree[Array], fisher: PyTree[Array]) -> Kept:
    """One skill more. params, fisher: p* and F after it."""
    anchor = jax.tree.map(lambda a, f, p: a + f * p, kept.anchor, fisher, params)
    return Kept(jax.tree.map(jnp.add, kept.fisher, fisher), anchor)


def fisher(
    config: nn.ModelConfig | Recurrent, world: World, lifetimes: int
) -> Callable[[PyTree[Array], Array], PyTree[Array]]:
    """The function (weights [m], key) -> F [m], the diagonal of the policy's Fisher information.

    F_n = mean over lifetimes of (d sum_t log pi(a_t | what was told up to t) / dp_n)^2 / length,
    actions drawn from the policy; of the sum, as a step's action hangs on what was written before.
    """
    build = lambda: ppo.agent_of(config, world, nnx.Rngs(0))
    graph, length = nnx.graphdef(nnx.eval_shape(build)), world.length

    def squared(params: PyTree[Array], key: Array) -> PyTree[Array]:
        born, lived = jax.random.split(key)
        life = jax.tree.map(lambda leaf: leaf[None], environments.begin(world, born))
        agent = nnx.merge(graph, params)
        seen = ppo.act(agent, world, lived, life, agent.init_state(1, length), length)[2]

        def log_likelihood(params: PyTree[Array]) -> Float[Array, ""]:
            agent = nnx.merge(graph, params)
            scores, _, _ = agent(jnp.swapaxes(seen.percepts, 0, 1), agent.init_state(1, length))
            policy = jax.nn.log_softmax(scores[0])
            return jnp.take_along_axis(policy, seen.actions, -1).sum() / length**0.5

        return jax.tree.map(jnp.square, jax.grad(log_likelihood)(params))

    def mean(params: PyTree[Array], key: Array) -> PyTree[Array]:
        found = jax.vmap(squared, (None, 0))(params, jax.random.split(key, lifetimes))
        return jax.tree.map(lambda leaf: leaf.mean(0), found)

    return jax.jit(jax.vmap(mean, in_axes=(0, None)))
