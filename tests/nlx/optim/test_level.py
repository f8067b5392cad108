# SPDX-License-Identifier: Apache-2.0
"""Levels as optax transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx import Association, Clock, associative_memory
from nlx.optim import as_transformation


def heavy_ball(period=1, momentum=False):
    """A level of gradients, and how to read and feed it."""
    write = nlx.writes.gated(momentum=momentum)
    level = lambda param: associative_memory(
        nlx.memories.constant(param), nlx.objectives.dot_product, write, Clock(period)
    )
    context = lambda gradient, param: Association((), gradient, retain=jnp.float32(0.9))
    return as_transformation(level, lambda params, gradient: params, context)


def steps(tx, gradients, params=None):
    def body(state, gradient):
        update, state = tx.update(gradient, state, params)
        return state, update

    start = tx.init(jax.tree.map(lambda g: g[0], gradients))
    return jax.jit(lambda s, g: jax.lax.scan(body, s, g))(start, gradients)


def test_heavy_ball_costs_what_trace_costs():
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(3)}
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    tick = 4
    assert size(heavy_ball().init(params)) == size(optax.trace(0.9).init(params)) + tick
    assert size(heavy_ball(momentum=True).init(params)) == 2 * size(params) + tick
    assert size(heavy_ball(3).init(params)) == 2 * size(params) + tick


@pytest.mark.parametrize("clock", [Clock(1), Clock(3), Clock(3, phase=1), Clock(None)])
def test_is_the_level_stepped_once_per_gradient(x64, clock):
    gradients = jax.random.normal(jax.random.key(0), (8, 4, 3))
    memory = nlx.memories.constant(gradients[0])
    write = nlx.writes.gated()
    level = associative_memory(memory, nlx.objectives.l2, write, clock)
    contexts = lambda g: Association((), g, jnp.float64(0.3), momentum=jnp.float64(0.5))
    tx = as_transformation(
        lambda param: level, lambda params, g: params + g, lambda g, param: contexts(g)
    )
    _, updates = steps(tx, gradients)

    def body(state, gradient):
        state = level.step(state, contexts(gradient))
        return state, state.params + gradient

    _, wanted = jax.lax.scan(body, level.start(jnp.zeros((4, 3)), jnp.int32(0)), gradients)
    np.testing.assert_allclose(updates, wanted, rtol=1e-9)


def test_a_summed_write_is_a_rule_of_optax(x64):
    """The level's parameter starts at the leaf's value and follows it by its own optimizer."""
    write = nlx.writes.summed(optax.adam(0.1))
    level = lambda param: nlx.Level(lambda key: param, lambda w, g: jnp.sum(w * g), write, Clock(2))
    tx = as_transformation(level, lambda params, g: params, lambda g, param: g)
    gradients = jax.random.normal(jax.random.key(1), (6, 5))
    _, updates = steps(tx, gradients)
    w, rule = gradients[0], optax.adam(0.1)
    state = rule.init(w)
    for t in (1, 3, 5):
        np.testing.assert_allclose(updates[t - 1], w, rtol=1e-9)
        step, state = rule.update(gradients[t - 1 : t + 1].mean(0), state)
        w = w + step
        np.testing.assert_allclose(updates[t], w, rtol=1e-9)


def test_random_initial_memories_differ_by_leaf_and_key():
    level = lambda param: associative_memory(
        nlx.memories.mlp((3, 4, 3)), nlx.objectives.l2, nlx.writes.gated(momentum=False), Clock(1)
    )
    make = lambda key: as_transformation(
        level, lambda params, g: g, lambda g, param: Association(g, g), key
    )
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    first, again, other = (make(k).init(params).levels for k in (0, 0, 1))
    weights = lambda state, name: np.asarray(state.carry.weights[0][name])
    assert np.array_equal(weights(first, "a"), weights(again, "a"))
    assert not np.allclose(weights(first, "a"), weights(first, "b"))
    assert not np.allclose(weights(first, "a"), weights(other, "a"))


def test_parameters_reach_the_context():
    level = lambda param: associative_memory(
        nlx.memories.constant(param), nlx.objectives.dot_product, nlx.writes.gated(momentum=False),
        Clock(1),
    )  # fmt: skip
    tx = as_transformation(
        level, lambda state, g: state, lambda g, param: Association((), g * param)
    )
    params = jnp.array([2.0, 3.0])
    _, updates = steps(tx, jnp.ones((2, 2)), params)
    np.testing.assert_array_equal(updates, [[2, 3], [4, 6]])


def test_missing_leaves_pass_untouched():
    tx = heavy_ball()
    params = {"w": jnp.ones(2), "none": None, "masked": optax.MaskedNode(), "empty": {}}
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    assert updates["none"] is None
    assert updates["masked"] == optax.MaskedNode()
    assert jax.tree.structure(after) == jax.tree.structure(state)
    skipped, after = tx.update({**params, "w": None}, after, params)
    assert skipped["w"] is None
    np.testing.assert_array_equal(after.levels.carry.weights["w"], jnp.ones(2))
    assert tx.init({}).levels.carry.weights == {}
    assert tx.update({}, tx.init({}))[0] == {}


def test_levels_of_different_structure_are_refused():
    memory = lambda p: nlx.memories.mlp((2,) * (p.ndim + 1))
    level = lambda p: associative_memory(memory(p), nlx.objectives.l2, nlx.writes.gated(), Clock(1))
    tx = as_transformation(level, lambda w, g: g, lambda g, p: Association(g, g))
    with pytest.raises(ValueError, match="`level` must give every leaf a state of one structure"):
        tx.init([jnp.ones(2), jnp.ones((2, 2))])
