# SPDX-License-Identifier: Apache-2.0
"""linear_memory's Pallas TPU kernels, interpreted on memory that is NaN until it is written."""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels.linear_memory import shapes

READS = ("after_write", "chunk_start")


def call(arguments, implementation, block_size=None, read="after_write"):
    interpret = implementation == "pallas_tpu"
    return nlx_kernels.linear_memory(
        **arguments,
        read=read,
        block_size=block_size,
        implementation=implementation,
        interpret=interpret,
    )


@functools.cache
def form(gradients, implementation, block_size=None, reads=READS):
    """Reads and states of both kinds, and all gradients."""
    return gradients(lambda given: [call(given, implementation, block_size, r) for r in reads])


@pytest.mark.parametrize("name", shapes.TESTS)
def test_kernels_are_the_reference(name, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    for correlation in (0.0, 0.9, 1.0):
        given = draw.linear_memory(shape, correlation)
        given["segment_ids"] = draw.segments(shape.b, shape.t, share=0.1 * (correlation < 1))
        want = form(gradients, "reference")(given)
        agree(form(gradients, "pallas_tpu", shape.block_size)(given), want, 1e-9)


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (jnp.float32, [(0.0, 2e-6, 5e-6), (0.9, 2e-6, 5e-6), (1.0, 2e-6, 5e-6)]),
        (jnp.bfloat16, [(0.0, 1e-2, 2e-2), (0.9, 3e-2, 5e-2)]),
    ],
)
def test_low_precision(dtype, rows, draw, gradients, x64, agree):
    for correlation, values, grads in rows:
        given = draw.linear_memory(shapes.Shape(2, 100, 2, 16, 8), correlation)
        low = {
            name: x.astype(dtype if name in ("q", "k", "v") else jnp.float32)
            for name, x in given.items()
        }
        wide = {name: x.astype(jnp.float64) for name, x in low.items()}
        outputs, slopes = form(gradients, "pallas_tpu", None, READS[:1])(low)
        assert [x.dtype for x in outputs] == [dtype, jnp.float32]
        want = form(gradients, "reference", None, READS[:1])(wide)
        agree(outputs, want[0], values)
        agree(slopes, want[1], grads)


def test_gradients_of_gradients_are_those_of_the_xla_form(draw, x64, agree):
    given = draw.linear_memory(shapes.Shape(1, 9, 1, 3, 2))

    def slope(implementation, given):
        loss = lambda given: sum(jnp.sum(jnp.sin(x)) for x in call(given, implementation, 4))
        size = lambda given: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(given)))
        return jax.grad(size)(given)

    agree(slope("pallas_tpu", given), slope("xla", given), 1e-9)


def test_segments_may_belong_to_a_trace_that_is_differentiated_from_outside(draw, x64, agree):
    """As where the layers of a model are a loop or a `jit`, and the gradient is taken outside."""
    given = draw.linear_memory(shapes.Shape(2, 9, 1, 3, 2))
    ids = draw.segments(2, 9, share=0.3)

    def loss(implementation, given, ids):
        return jnp.sum(jnp.sin(call(given | dict(segment_ids=ids), implementation, 4)[0]))

    slope = lambda form: jax.grad(jax.jit(functools.partial(loss, form)))(given, ids)
    agree(slope("pallas_tpu"), slope("reference"), 1e-9)


def test_what_does_not_fit_is_refused(draw):
    given = draw.linear_memory(shapes.Shape(1, 4096, 1, 256, 256))
    lower = lambda given, block_size: jax.jit(
        lambda given: nlx_kernels.linear_memory(
            **given, block_size=block_size, implementation="pallas_tpu"
        )
    ).trace(given)
    lower(given, 64)
    with pytest.raises(ValueError, match="fast memory"):
        lower(given, 4096)


def test_float64_is_for_interpretation(draw, x64):
    with pytest.raises(ValueError, match="float64"):
        nlx_kernels.linear_memory(
            **draw.linear_memory(shapes.TESTS["token"]), implementation="pallas_tpu"
        )
