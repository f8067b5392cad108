# SPDX-License-Identifier: Apache-2.0
"""Memories and objectives against the equations written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlx import memories, objectives


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def soft(x):
    return gelu(x) / np.sqrt(np.sum(gelu(x) ** 2) + 0.25)


ACTIVATIONS = {"gelu": ("gelu", gelu), "silu": ("silu", silu), "soft": (memories.soft_unit(), soft)}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_mlp_reads_what_the_equation_says(x64, key, name, residual):
    activation, written_out = ACTIVATIONS[name]
    memory = memories.mlp((3, 5, 4, 3), activation, residual)
    params = memory.init(key)
    assert [w.shape for w in params] == [(3, 5), (5, 4), (4, 3)]
    z = np.asarray(jax.random.normal(jax.random.key(1), (3,)))
    w1, w2, w3 = map(np.asarray, params)
    h1 = written_out(z @ w1)
    h2 = written_out(h1 @ w2)
    expected = h2 @ w3 + (z if residual else 0)
    np.testing.assert_allclose(memory.read(params, z), expected, rtol=1e-12)
    for direction, x in zip(memory.inputs(params, z), (z, h1, h2), strict=True):
        np.testing.assert_allclose(direction, x / np.linalg.norm(x), rtol=1e-12)


def test_mlp_of_depth_one_is_a_matrix(key):
    memory = memories.mlp((4, 4))
    z, (w,) = jnp.arange(4.0), memory.init(key)
    np.testing.assert_allclose(memory.read((w,), z), z + z @ w, rtol=1e-6)


def test_mlp_init_keeps_the_size_of_its_input(key):
    for weight in memories.mlp((256, 512, 256)).init(key):
        np.testing.assert_allclose(jnp.std(weight) * weight.shape[0] ** 0.5, 1, rtol=0.02)


def test_linear_starts_empty_and_erases_along_the_key_as_given(key):
    memory = memories.linear(3, 2)
    np.testing.assert_array_equal(memory.init(key), np.zeros((3, 2)))
    params, k = jnp.arange(6.0).reshape(3, 2), jnp.array([1.0, 2.0, 0.5])
    np.testing.assert_allclose(memory.read(params, k), [6, 9.5], rtol=1e-6)
    np.testing.assert_array_equal(memory.inputs(params, k), k)


def test_constant_ignores_its_key_and_keeps_types(key):
    like = {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    memory = memories.constant(like)
    params = memory.init(key)
    assert params["w"].dtype == jnp.bfloat16
    assert not params["b"].any()
    assert memory.read(params, None) is params
    assert memory.inputs is None


def test_unit_is_zero_with_zero_gradient_at_zero():
    value, pull = jax.vjp(memories.unit, jnp.zeros(3))
    np.testing.assert_array_equal(value, np.zeros(3))
    np.testing.assert_array_equal(pull(jnp.ones(3))[0], np.zeros(3))
    np.testing.assert_array_equal(memories.unit(jnp.full(3, 1e-25)), np.zeros(3))
    np.testing.assert_allclose(jnp.linalg.norm(memories.unit(jnp.full(3, 1e-15))), 1, rtol=1e-6)


def test_mlp_directions_have_finite_gradients_at_a_zero_key(key):
    memory = memories.mlp((3, 4, 3))
    params = memory.init(key)
    total = lambda p, k: sum(jnp.sum(z) for z in memory.inputs(p, k))
    for slope in jax.tree.leaves(jax.grad(total, (0, 1))(params, jnp.zeros(3))):
        assert jnp.isfinite(slope).all()


def test_soft_unit_is_shorter_than_one_for_any_input():
    soft_gelu = memories.soft_unit("gelu")
    for size in (1e-3, 1.0, 1e4):
        assert jnp.linalg.norm(soft_gelu(size * jnp.arange(1.0, 5.0))) <= 1


@pytest.mark.parametrize(
    ("sizes", "options", "sentence"),
    [
        ((3, 4, 2), {}, r"`residual` needs equal first and last `sizes`, got \(3, 4, 2\)"),
        ((3,), {}, "`sizes` must name at least a key and a value size"),
        ((3, 0, 3), {}, r"`sizes` must be integers >= 1, got \(3, 0, 3\)"),
        (
            (3, 3),
            {"activation": "relu"},
            "`activation` must be gelu, silu or a function, got 'relu'",
        ),
    ],
)
def test_bad_shapes_get_a_sentence(sizes, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        memories.mlp(sizes, **options)
    with pytest.raises(ValueError, match="`dk, dv` must be integers >= 1"):
        memories.linear(0, 2)


def test_objectives_sum_over_all_leaves(x64):
    output, value = (
        {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])},
        {"a": jnp.array([4.0, -1.0]), "b": jnp.array([[2.0]])},
    )
    np.testing.assert_allclose(objectives.dot_product(output, value), -(4 - 2 + 6))
    np.testing.assert_allclose(objectives.l2(output, value), (9 + 9 + 1) / 2)
    gradient = jax.grad(objectives.dot_product)(output, value)
    np.testing.assert_array_equal(gradient["a"], -value["a"])
    gradient = jax.grad(objectives.l2)(output, value)
    np.testing.assert_allclose(gradient["a"], output["a"] - value["a"])


@pytest.mark.parametrize("objective", [objectives.l2, objectives.dot_product])
def test_objectives_broadcast_nothing(objective):
    with pytest.raises(ValueError, match=r"`value` has shape \(1, 3\); it must be \(2, 3\)"):
        objective(jnp.ones((2, 3)), jnp.ones((1, 3)))
