# SPDX-License-Identifier: Apache-2.0
"""mlp_memory's Pallas TPU kernels, interpreted on memory that is NaN until it is written."""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels.mlp_memory import shapes

LIMITS = dict(clip=0.5, bound=1.5)  # low enough to be met


def tokens(draw, shape, correlation=0.0, momentum=True, erase=True, norm=False):
    """All array arguments; a few tokens forget everything, a few nothing, but not under a norm."""
    b, t, h, k, _, v, _ = shape
    retain = draw.gate(b, t, h, low=0.8)
    if t > 40:
        retain = retain.at[:, 9:20].set(1)
        retain = retain if norm else retain.at[:, 5].set(0).at[:, 31:33].set(0)
    given = dict(
        q=draw.normal(b, t, h, k),
        k=draw.keys(b, t, h, k, correlation),
        v=draw.normal(b, t, h, v),
        rate=draw.gate(b, t, h, high=0.2),
        retain=retain,
    )
    if momentum:
        given["momentum"] = draw.gate(b, t, h, high=0.9)
    if erase:
        given["erase"] = draw.gate(b, t, h)
    weights = tuple(draw.normal(*size) / size[1] ** 0.5 for size in shape.weights)
    return given | dict(weights=weights)


def call(given, implementation, shape, **options):
    interpret = implementation == "pallas_tpu"
    options = dict(chunk_size=shape.chunk_size, residual=shape.k == shape.v) | options
    return nlx_kernels.mlp_memory(
        **given, **options, implementation=implementation, interpret=interpret
    )


def form(gradients, implementation, shape, **options):
    """Reads and state, and all gradients."""
    return gradients(lambda given: call(given, implementation, shape, **options))


@pytest.mark.parametrize(
    ("name", "momentum", "erase", "options"),
    [
        ("ragged-63", True, True, LIMITS),
        ("whole-64", True, True, dict(norm=True, activation="silu")),
        ("online-24", False, True, {}),
        ("deep-100", True, False, dict(read="chunk_start", residual=False)),
    ],
)
def test_kernels_are_the_reference(name, momentum, erase, options, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    reference = form(gradients, "reference", shape, **options)
    kernels = form(gradients, "pallas_tpu", shape, **options)
    for correlation in (0.0, 0.9, 1.0):
        given = tokens(draw, shape, correlation, momentum, erase, "norm" in options)
        agree(kernels(given), reference(given), 1e-9)


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (jnp.float32, [(0.0, 2e-6, 5e-6), (0.9, 2e-6, 5e-6)]),
        pytest.param(jnp.bfloat16, [(0.0, 1e-2, 2e-2), (0.9, 3e-2, 5e-2)], marks=pytest.mark.slow),
    ],
)
def test_low_precision(dtype, rows, draw, gradients, x64, agree):
    shape = shapes.TESTS["ragged-63"]
    reference = form(gradients, "reference", shape)
    kernels = form(gradients, "pallas_tpu", shape)
    for correlation, values, grads in rows:
        given = tokens(draw, shape, correlation)
        low = jax.tree.map(lambda x: x.astype(jnp.float32), given)
        low |= {name: low[name].astype(dtype) for name in ("q", "k", "v")}
        outputs, slopes = kernels(low)
        assert outputs[0].dtype == dtype
        want = reference(jax.tree.map(lambda x: x.astype(jnp.float64), low))
        agree(outputs, want[0], values)
        agree(slopes, want[1], grads)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(segment_ids=jnp.zeros((2, 63), jnp.int32)), "begins at the start of a sequence"),
        (dict(chunk_size=64), "needs a whole chunk"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(change, sentence, draw):
    shape = shapes.TESTS["ragged-63"]
    with pytest.raises(ValueError, match=f"implementation='pallas_tpu' .*{sentence}"):
        call(tokens(draw, shape), "pallas_tpu", shape, **change)


def test_what_does_not_fit_is_refused(draw):
    shape = shapes.Shape(1, 512, 1, 512, (2048,), 512, 512)
    given = jax.eval_shape(functools.partial(tokens, draw, shape))
    with pytest.raises(ValueError, match="fast memory"):
        jax.eval_shape(lambda given: call(given, "pallas_tpu", shape), given)
