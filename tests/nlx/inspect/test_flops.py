"""Operations counted in a trace: against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nlx import inspect, nn, train

X, W = jnp.ones((3, 4)), jnp.ones((4, 5))


def branch(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.tanh(x @ w @ w.T @ w))


def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w @ w.T, None), x, length=7)[0]


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, None), lambda *_: (X, W))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x, w: jnp.tanh(x + 1), 0),
        (lambda x, w: x @ w, 2 * 3 * 4 * 5),
        (jax.jit(lambda x, w: x @ w), 2 * 3 * 4 * 5),
        (lambda x, w: jnp.einsum("bi,io->bo", x, w) @ w.T, 2 * 2 * 3 * 4 * 5),
        (loop, 7 * 2 * 2 * 3 * 4 * 5),
        (branch, 3 * 2 * 3 * 4 * 5),
        (custom, 2 * 3 * 4 * 5),
        (jax.checkpoint(lambda x, w: x @ w), 2 * 3 * 4 * 5),
        (jax.vmap(lambda x, w: x @ w, (0, None)), 2 * 3 * 4 * 5),
        (lambda x, w: jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w), 2 * 2 * 3 * 4 * 5),
    ],
)
def test_products_are_counted(function, count):
    assert inspect.flops(function, X, W) == count


def test_a_convolution_is_counted():
    x, w = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3))
    run = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")
    assert inspect.flops(run, x, w) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


def test_a_transformer_takes_six_operations_a_parameter_and_attention():
    """Forward and backward: 6 N + 12 layers width t, of all positions, seen or not."""
    config = nn.preset("transformer++-tiny")
    model = nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    loss, b, t = train.language_model_loss(graph), 2, 32
    batch = {"tokens": jax.ShapeDtypeStruct((b, t + 1), jnp.int32)}
    found = inspect.flops(jax.grad(loss), params, batch)
    matrices = sum(p.size for p in jax.tree.leaves(params) if p.ndim == 2)
    matrices -= config.vocabulary * config.width  # looked up, not multiplied
    assert found == b * t * (6 * matrices + 12 * config.layers * config.width * t)


def test_what_is_made_again_counts_again():
    config = dataclasses.replace(nn.preset("transformer++-tiny"), layers=1)
    found = []
    for remat in (False, True):
        made = dataclasses.replace(config, remat=remat)
        graph, params = nnx.split(
            nnx.eval_shape(lambda c=made: nn.LanguageModel(c, rngs=nnx.Rngs(0)))
        )
        loss = train.language_model_loss(graph)
        batch = {"tokens": jax.ShapeDtypeStruct((1, 9), jnp.int32)}
        found.append(inspect.flops(jax.grad(loss), params, batch))
    assert 1.1 * found[0] < found[1] < 1.4 * found[0]
