# SPDX-License-Identifier: Apache-2.0
"""Our transformations inside everything optax and its neighbours wrap around them."""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import nlx
from nlx import Clock
from nlx.optim import dmgd, gradient_memory, on_clock
from nlx.testing import check_transform

PARAMS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "b": np.ones(3, np.float32)}


def momentum(learning_rate):
    """Descent along a value-less gradient memory."""
    memory = gradient_memory(nlx.memories.constant, nlx.objectives.dot_product, retain=0.9)
    return optax.chain(memory, optax.scale_by_learning_rate(learning_rate))


def clocked(learning_rate):
    """The deep optimizer every second step."""
    return on_clock(dmgd(learning_rate), Clock(2))


MAKERS = [dmgd, momentum, clocked]


def gradients(step, params):
    return jax.tree.map(lambda p: jnp.sin(7.0 * p + step) + 0.1, params)


@pytest.mark.parametrize("make", MAKERS)
def test_obeys_the_laws_of_a_transformation(make):
    check_transform(make(0.1), jax.tree.map(jnp.asarray, PARAMS), tolerance=1e-5)


@functools.lru_cache
def plain(make):
    """Parameters after four steps of descent, with no wrapper."""
    return descend(make(0.1))


def descend(tx, steps=4, params=PARAMS, state=None):
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def body(params, state, step):
        updates, state = tx.update(gradients(step, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    for step in range(steps):
        params, after = body(params, state, step)
        same = lambda x, y: x.shape == y.shape and x.dtype == y.dtype
        assert jax.tree.all(jax.tree.map(same, state, after))
        state = after
    assert body._cache_size() == 1
    return params


def close(x, y, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), x, y)


WRAPPERS = {
    "chain": lambda make: optax.chain(optax.identity(), make(0.1)),
    "masked": lambda make: optax.masked(make(0.1), {"w": True, "b": True}),
    "partition": lambda make: optax.partition(
        {"one": make(0.1), "two": make(0.1)}, {"w": "one", "b": "two"}
    ),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(learning_rate=0.1),
    "MultiSteps": lambda make: optax.MultiSteps(make(0.1), 1),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(0.1), 5),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_is_plain(make, name):
    close(descend(WRAPPERS[name](make)), plain(make))


@pytest.mark.parametrize("make", MAKERS)
def test_mask_leaves_the_rest_alone(make):
    tx = optax.masked(make(0.1), {"w": True, "b": False})
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["b"], params["b"])


@pytest.mark.parametrize("make", MAKERS)
def test_nan_is_skipped(make):
    tx = optax.apply_if_finite(make(0.1), 5)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    poisoned = params | {"b": jnp.array([1.0, jnp.nan, 1.0])}
    updates, after = jax.jit(tx.update)(poisoned, state, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


def test_state_may_be_donated():
    tx, params = dmgd(0.1), jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = jax.jit(tx.update, donate_argnums=1)(params, tx.init(params), params)
    assert bool(jnp.all(jnp.isfinite(updates["w"])))


def test_states_map_like_parameters():
    """The state is made of trees like the parameters, so that shardings, say, carry over."""
    tx, params = dmgd(0.1), jax.tree.map(jnp.asarray, PARAMS)
    names = {"w": "w", "b": "b"}
    named = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(params), names, transform_non_params=lambda _: None
    )
    second_moment, deep = named[:2]
    assert second_moment.levels.carry.weights == names
    assert (deep.mu, deep.scale, deep.phi) == (names, names, (names, names))


@pytest.mark.parametrize("make", MAKERS)
def test_vmap_over_seeds_is_a_loop(make):
    tx = make(0.1)

    def run(params):
        state = tx.init(params)
        for step in range(3):
            updates, state = tx.update(gradients(step, params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    together = jax.jit(jax.vmap(run))(many)
    run = jax.jit(run)
    for i in range(3):
        close(jax.tree.map(lambda p: p[i], together), run(jax.tree.map(lambda p: p[i], many)))  # noqa: B023


@pytest.mark.parametrize("make", MAKERS)
def test_abstract_parameters(make):
    tx = make(0.1)
    params = jax.tree.map(jnp.asarray, PARAMS)
    abstract = jax.eval_shape(lambda: params)
    shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes(tx.init(abstract)) == shapes(jax.eval_shape(tx.init, abstract))
    assert shapes(tx.init(params)) == shapes(jax.jit(tx.init)(params))
    jax.tree.map(np.testing.assert_array_equal, tx.init(params), jax.jit(tx.init)(params))


@pytest.mark.parametrize("make", MAKERS)
def test_nnx_optimizer(make):
    class Layer(nnx.Module):
        def __init__(self):
            self.w, self.b = (
                nnx.Param(jnp.asarray(PARAMS["w"])),
                nnx.Param(jnp.asarray(PARAMS["b"])),
            )

    model = Layer()
    optimizer = nnx.Optimizer(model, make(0.1), wrt=nnx.Param)
    step_of = nnx.jit(lambda model, optimizer, step: optimizer.update(
        model, gradients(step, nnx.state(model, nnx.Param))
    ))  # fmt: skip
    for step in range(4):
        step_of(model, optimizer, step)
    close({"w": model.w[...], "b": model.b[...]}, plain(make))


@pytest.mark.parametrize("make", [dmgd, clocked])
def test_orbax_round_trip(make, tmp_path):
    tx, params = make(0.1), jax.tree.map(jnp.asarray, PARAMS)
    updates, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
