# SPDX-License-Identifier: Apache-2.0
"""Every public transformation inside everything optax and its neighbours wrap around them.

The quick tier runs three of them, the slow tier all.
"""

import functools
import inspect

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from nlx import Clock, optim
from nlx.testing import SUITE_LEARNING_RATES, check_transform

PARAMS = {
    "w": np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32),
    "b": np.ones(3, np.float32),
}
GRAM = {"w": jnp.eye(3) + 0.1, "b": jnp.ones(())}  # what `dgd` is given; the others ignore it

MAKERS = {name: getattr(optim, name) for name in SUITE_LEARNING_RATES} | {
    "feature_momentum": lambda rate: optim.feature_momentum(rate, lambda u: u / (1 + jnp.abs(u))),
    "m3": lambda rate: optim.m3(rate, clock=Clock(2)),
    "shampoo": lambda rate: optim.shampoo(rate, clock=Clock(2, phase=1)),
    "soap": lambda rate: optim.soap(rate, clock=Clock(2, phase=1)),
    "dmgd_coordinates": lambda rate: optim.dmgd(rate, memory="coordinates"),
    "dmgd_l2": lambda rate: optim.dmgd(rate, objective="l2"),
    "dmgd_orthogonal": lambda rate: optax.chain(
        optim.scale_by_deep_momentum(),
        optim.scale_by_newton_schulz(),
        optax.scale_by_learning_rate(rate),
    ),
    "dmgd_in_soap": lambda rate: optax.chain(
        optim.preconditioned(
            optim.scale_by_deep_momentum(), optim.scale_by_soap(0.0, clock=Clock(2, phase=1))
        ),
        optax.scale_by_learning_rate(rate),
    ),
    "dgd": lambda rate: optim.dgd(rate, gamma=0.1),
    "on_clock": lambda rate: optim.on_clock(optim.momentum(rate), Clock(2, phase=1)),
}
QUICK = ("dmgd", "m3", "on_clock")
by_tier = lambda names: [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names
]
everyone = pytest.mark.parametrize("name", by_tier(MAKERS))


def test_nothing_public_is_left_out():
    """Whoever takes a learning rate is in the table of rates, or is `dgd`."""
    takes = lambda x: inspect.isfunction(x) and "learning_rate" in inspect.signature(x).parameters
    aliases = {name for name, thing in vars(optim).items() if takes(thing)}
    aliases = {name for name in aliases if not name.startswith("scale_by_")}
    assert aliases == {*SUITE_LEARNING_RATES, "dgd"} <= set(MAKERS)
    scales = {name.removeprefix("scale_by_") for name in vars(optim) if name.startswith("scale_by")}
    assert aliases - {"dmgd"} <= scales
    assert scales - aliases == {"deep_momentum", "newton_schulz", "second_moment"}


ALIASES = {  # every option that is passed on, away from its default
    "momentum": {"decay": 0.7, "nesterov": True},
    "preconditioned_momentum": {"decay": 0.7, "nesterov": True},
    "delta_momentum": {"decay": 0.7, "erase": 0.5, "scale_decay": 0.8, "nesterov": False},
    "feature_momentum": {"features": jnp.tanh, "decay": 0.7, "nesterov": True},
    "orthogonal_momentum": {"decay": 0.7, "nesterov": False, "ns_steps": 2},
    "dmgd": {"decay": 0.7, "inner_lr": 0.3, "retention": 0.9, "nesterov": False, "hidden": (3,)},
    "adam_memory": {"b1": 0.7, "b2": 0.8, "ridge": 1e-2},
    "adagrad_memory": {"ridge": 1e-1, "clock": Clock(2)},
    "m3": {
        "b1": 0.7,
        "b2": 0.8,
        "b3": 0.6,
        "alpha": 0.5,
        "clock": Clock(2),
        "ns_steps": 2,
        "eps": 0.1,
    },
    "shampoo": {"b1": 0.7, "b2": 0.8, "ridge": 1e-2, "eps": 1e-2, "clock": Clock(2)},
    "soap": {"b1": 0.7, "b2": 0.8, "eps": 1e-2, "clock": Clock(2)},
    "dgd": {"gamma": 0.3},
}
FIRST = {  # what stands before or in place of `scale_by_<name>` in an alias
    "preconditioned_momentum": lambda **o: optim.scale_by_preconditioned_momentum(
        optim.scale_by_second_moment(), **o
    ),
    "delta_momentum": lambda **o: optax.chain(
        optim.scale_by_second_moment(), optim.scale_by_delta_momentum(**o)
    ),
    "dmgd": lambda **o: optax.chain(
        optim.scale_by_second_moment(), optim.scale_by_deep_momentum(**o)
    ),
}


def test_every_alias_is_below():
    assert set(ALIASES) == {*SUITE_LEARNING_RATES, "feature_momentum", "dgd"}


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_passes_its_options_on(name):
    """alias(rate, options, weight_decay, mask) == scale, decay, rate; and the options matter."""
    alias, options = getattr(optim, name), ALIASES[name]
    decays = "weight_decay" in inspect.signature(alias).parameters
    mask = {"w": True, "b": False}
    decayed = {"weight_decay": 0.5, "mask": mask} if decays else {}
    scale = FIRST.get(name) or getattr(optim, f"scale_by_{name}")
    given = {"learning_rate": 0.1} if name == "dgd" else {}
    chain = lambda **o: optax.chain(
        scale(**given, **o),
        optax.add_decayed_weights(0.5 * decays, mask),
        optax.scale_by_learning_rate(0.1),
    )
    ends = functools.partial(descend, steps=7)
    whole = ends(chain(**options))
    close(ends(alias(0.1, **options, **decayed)), whole)
    for option in set(options) - {"features", "hidden"}:
        fewer = {k: v for k, v in options.items() if k != option}
        other = ends(alias(0.1, **fewer, **decayed))
        assert not jax.tree.all(jax.tree.map(np.array_equal, other, whole)), option


def gradients(step, params):
    return jax.tree.map(lambda p: jnp.sin(7.0 * p + step) + 0.1, params)


@everyone
def test_obeys_the_laws_of_a_transformation(name):
    if name != "dgd":
        check_transform(MAKERS[name](0.1), jax.tree.map(jnp.asarray, PARAMS), tolerance=2e-3)


def descend(tx, steps=4, gradients=gradients):
    """Parameters after some steps; the state keeps its form, and nothing compiles twice."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def body(params, state, step):
        updates, state = tx.update(gradients(step, params), state, params, input_gram=GRAM)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for step in range(steps):
        params, after = body(params, state, step)
        same = lambda x, y: x.shape == y.shape and x.dtype == y.dtype
        assert jax.tree.all(jax.tree.map(same, state, after))
        state = after
    assert body._cache_size() == 1
    return params


@functools.lru_cache
def plain(name):
    """Parameters after four steps of descent, with no wrapper."""
    return descend(MAKERS[name](0.1))


def close(x, y, rtol=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), x, y)


WRAPPERS = {
    "chain": lambda make: optax.chain(optax.identity(), make(0.1)),
    "masked": lambda make: optax.masked(make(0.1), {"w": True, "b": True}),
    "partition": lambda make: optax.partition(
        {"one": make(0.1), "two": make(0.1)}, {"w": "one", "b": "two"}
    ),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(lambda learning_rate: make(
        learning_rate
    ))(learning_rate=0.1),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(0.1), 5),
}  # fmt: skip


@everyone
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_is_plain(name, wrapper):
    close(descend(WRAPPERS[wrapper](MAKERS[name])), plain(name))


@everyone
def test_multi_steps_is_plain_on_the_mean_of_two_gradients(name):
    tx = optax.MultiSteps(MAKERS[name](0.1), 2)
    if name == "dgd":  # it passes no extra arguments on
        with pytest.raises(ValueError, match="`input_gram`"):
            descend(tx)
        return
    mean = lambda step, p: jax.tree.map(
        lambda a, b: (a + b) / 2, gradients(2 * step, p), gradients(2 * step + 1, p)
    )
    close(descend(tx, 4), descend(MAKERS[name](0.1), 2, mean))


@everyone
def test_mask_leaves_the_rest_alone(name):
    tx = optax.masked(MAKERS[name](0.1), {"w": True, "b": False})
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, input_gram=GRAM)
    np.testing.assert_array_equal(updates["b"], params["b"])
    assert not np.array_equal(updates["w"], params["w"])


@everyone
def test_nan_is_skipped(name):
    tx = optax.apply_if_finite(MAKERS[name](0.1), 5)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    poisoned = params | {"b": jnp.array([1.0, jnp.nan, 1.0])}
    updates, after = jax.jit(tx.update)(poisoned, state, params, input_gram=GRAM)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


@everyone
def test_lookahead_that_follows_the_fast_ones_is_plain(name):
    tx = optax.lookahead(MAKERS[name](0.1), sync_period=2, slow_step_size=1.0)
    params = optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, PARAMS))

    @jax.jit
    def body(params, state, step):
        updates, state = tx.update(gradients(step, params.fast), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    if name == "dgd":  # it passes no extra arguments on
        with pytest.raises(ValueError, match="`input_gram`"):
            body(params, state, 0)
        return
    for step in range(4):
        params, state = body(params, state, step)
    close(params.fast, plain(name))
    close(params.slow, plain(name))


@everyone
def test_schedule_free_steps_along_it(name):
    """Its base sequence z moves by the transformation's own updates, three times in a row."""
    base = optax.with_extra_args_support(MAKERS[name](0.1))
    tx = optax.contrib.schedule_free(base, 0.1)
    params = jax.tree.map(jnp.asarray, PARAMS)

    @jax.jit
    def both(params, state, z, own, step):
        g = gradients(step, params)
        updates, state = tx.update(g, state, params, input_gram=GRAM)
        moved, own = base.update(g, own, params, input_gram=GRAM)
        return optax.apply_updates(params, updates), state, optax.apply_updates(z, moved), own

    state, z, own = tx.init(params), params, base.init(params)
    for step in range(3):
        params, state, z, own = both(params, state, z, own, step)
        close(state.z, z)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))


@everyone
def test_vmap_over_seeds_and_scan_over_steps_are_loops(name):
    tx = optax.with_extra_args_support(MAKERS[name](0.1))

    def run(params):
        def body(carry, step):
            params, state = carry
            updates, state = tx.update(gradients(step, params), state, params, input_gram=GRAM)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(4))[0][0]

    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    together = jax.jit(jax.vmap(run))(many)
    run = jax.jit(run)
    for i in range(2):
        close(jax.tree.map(lambda p: p[i], together), run(jax.tree.map(lambda p: p[i], many)))  # noqa: B023
    close(jax.tree.map(lambda p: p[0], together), plain(name))


@everyone
def test_abstract_parameters(name):
    tx = MAKERS[name](0.1)
    params = jax.tree.map(jnp.asarray, PARAMS)
    abstract = jax.eval_shape(lambda: params)
    shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes(tx.init(abstract)) == shapes(jax.eval_shape(tx.init, abstract))
    jax.tree.map(np.testing.assert_array_equal, tx.init(params), jax.jit(tx.init)(params))


@everyone
def test_nnx_optimizer(name):
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.asarray(PARAMS["w"]))
            self.b = nnx.Param(jnp.asarray(PARAMS["b"]))

    model = Layer()
    optimizer = nnx.Optimizer(model, MAKERS[name](0.1), wrt=nnx.Param)
    grams = nnx.map_state(
        lambda path, variable: variable.replace(GRAM[path[0]]), nnx.state(model, nnx.Param)
    )

    @nnx.jit
    def step_of(model, optimizer, step):
        found = gradients(step, nnx.state(model, nnx.Param))
        optimizer.update(model, found, input_gram=grams)

    for step in range(4):
        step_of(model, optimizer, step)
    close({"w": model.w[...], "b": model.b[...]}, plain(name))


@everyone
def test_orbax_round_trip(name, tmp_path):
    tx, params = MAKERS[name](0.1), jax.tree.map(jnp.asarray, PARAMS)
    _, state = jax.jit(tx.update)(params, tx.init(params), params, input_gram=GRAM)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


LEAVES = {
    "matrix": (4, 3), "kernel": (2, 2, 3, 4), "bias": (5,), "scalar": (), "row": (1, 6),
    "column": (6, 1), "none": (0,), "no_rows": (0, 3), "no_columns": (3, 0),
}  # fmt: skip


@everyone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_gradients_give_finite_updates(name, dtype):
    """Zeros, 1e-30, 1e30 and sudden changes between them, on leaves of every kind."""
    tx = optax.with_extra_args_support(MAKERS[name](0.1))
    params = {n: jnp.ones(shape, dtype) for n, shape in LEAVES.items()}
    grams = jax.tree.map(lambda p: jnp.zeros(()), params)
    pattern = {n: jnp.cos(jnp.arange(p.size)).reshape(p.shape) for n, p in params.items()}

    def body(state, size):
        u = jax.tree.map(lambda p: (size * p).astype(dtype), pattern)
        update, state = tx.update(u, state, params, input_gram=grams)
        return state, (update, state)

    sizes = jnp.array([0.0, 1e-30, 1.0, 1e30, -1e30, 0.0, 1e-3, -1e30, 1.0])
    _, seen = jax.jit(lambda s: jax.lax.scan(body, s, sizes))(tx.init(params))
    for leaf in jax.tree.leaves(seen):
        assert bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))), leaf
    updates, _ = seen
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    assert all(not np.any(u[0].astype(np.float32)) for u in jax.tree.leaves(updates))  # of zeros
    moved = np.max(np.abs(updates["matrix"][2].astype(np.float32)))
    assert 1e-4 < moved < 10  # by 1 times the pattern after tiny ones


def test_state_may_be_donated():
    tx, params = optim.dmgd(0.1), jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = jax.jit(tx.update, donate_argnums=1)(params, tx.init(params), params)
    assert bool(jnp.all(jnp.isfinite(updates["w"])))


def test_states_map_like_parameters():
    """The state is made of trees like the parameters, so that shardings, say, carry over."""
    tx, params = optim.dmgd(0.1), jax.tree.map(jnp.asarray, PARAMS)
    names = {"w": "w", "b": "b"}
    named = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(params), names, transform_non_params=lambda _: None
    )
    second_moment, deep = named[:2]
    assert second_moment.levels.carry.weights == names
    assert (deep.mu, deep.scale, deep.phi) == (names, names, (names, names))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["momentum", "delta_momentum", "preconditioned_momentum", "dmgd"])
def test_hyperparameters_of_low_precision_are_taken(name, dtype):
    """optax injects them in the dtype of the gradients; gates are at least float32 inside."""
    tx = optax.inject_hyperparams(getattr(optim, name))(learning_rate=0.1)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
