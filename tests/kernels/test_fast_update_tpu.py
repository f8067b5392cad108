# SPDX-License-Identifier: Apache-2.0
"""fast_update's Pallas TPU kernel, interpreted, from the middle of a period."""

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels.fast_update import pallas_tpu, shapes

NUMBERS = ("rate", "decay", "momentum")


def arguments(draw, shape, momentum, dtype=None):
    tree = lambda: tuple(draw.normal(shape.b, *size) for size in shape.weights)
    weights, gradient = (jax.tree.map(lambda x: x.astype(dtype or x.dtype), tree()) for _ in "ab")
    wide = jnp.promote_types(weights[0].dtype, jnp.float32)
    total, buffer = (jax.tree.map(lambda x: x.astype(wide), tree()) for _ in "ab")
    ticks = jnp.arange(shape.b, dtype=jnp.int32)
    carry = nlx_kernels.FastCarry(total, ticks, buffer if momentum else None)
    gates = {name: draw.gate(shape.b).astype(wide) for name in NUMBERS[: 3 if momentum else 2]}
    return dict(weights=weights, carry=carry, gradient=gradient) | gates


def form(gradients, implementation, shape):
    options = dict(fires=jnp.arange(shape.b) % 2 == 0, ticks=2, implementation=implementation)
    interpret = implementation == "pallas_tpu"
    return gradients(lambda given: nlx_kernels.fast_update(**given, **options, interpret=interpret))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("name", shapes.TESTS)
def test_kernel_is_the_reference(name, momentum, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    given = arguments(draw, shape, momentum)
    want = form(gradients, "reference", shape)(given)
    agree(form(gradients, "pallas_tpu", shape)(given), want, 1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles(dtype, draw, agree, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILE", 16 * 8)
    shape = shapes.Shape(2, ((48, 8), (2, 16, 8), (3,)))
    given = arguments(draw, shape, True, dtype)
    run = lambda implementation: nlx_kernels.fast_update(
        **given, fires=True, implementation=implementation, interpret=implementation != "xla"
    )
    (weights, carry), (want, after) = run("pallas_tpu"), run("xla")
    assert jax.tree.map(lambda x: x.dtype, weights) == jax.tree.map(lambda x: x.dtype, want)
    agree((weights, carry), (want, after), 2e-6 if dtype == jnp.float32 else 1e-2)


def test_rows_that_no_tile_divides_are_refused(draw):
    given = jax.eval_shape(lambda: arguments(draw, shapes.Shape(1, ((520, 1024),)), True))
    run = lambda given: nlx_kernels.fast_update(
        **given, fires=True, implementation="pallas_tpu", interpret=True
    )
    with pytest.raises(ValueError, match="tiles of 16 rows"):
        jax.eval_shape(run, given)
