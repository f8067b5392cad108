# SPDX-License-Identifier: Apache-2.0
"""mlp_memory's Pallas TPU kernels, interpreted on memory that is NaN until it is written."""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels.mlp_memory import shapes

SLOW = pytest.mark.slow
LIMITS = dict(clip=0.5, bound=1.5)  # low enough to be met


def floats(dtype, tree):
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(dtype), tree)


def tokens(draw, shape, *arguments, **options):
    """All array arguments."""
    weights = tuple(draw.normal(*size) / size[1] ** 0.5 for size in shape.weights)
    return draw.mlp_memory(shape, *arguments, **options) | dict(weights=weights)


def running(draw, shape, momentum=True, position=None):
    """A state inside a chunk, each row elsewhere, as far from the chunk's start as can be."""
    leaves = lambda: tuple(draw.normal(shape.b, *w) / w[1] ** 0.5 for w in shape.weights)
    position = 3 + 5 * jnp.arange(shape.b) if position is None else jnp.asarray(position)
    buffer = leaves() if momentum else None
    return nlx_kernels.MLPMemoryState(leaves(), leaves(), buffer, position.astype(jnp.int32))


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
    ("name", "position", "momentum", "erase", "options"),
    [
        ("ragged-63", (5, 48), True, True, LIMITS),
        pytest.param(
            "whole-64", (31, 30), False, True, dict(norm=True, activation="silu"), marks=SLOW
        ),
        pytest.param("online-24", (3, 0), True, False, {}, marks=SLOW),
        pytest.param(
            "deep-100", (2,), True, False, dict(read="chunk_start", residual=False), marks=SLOW
        ),
    ],
)
def test_kernels_go_on_from_any_position(
    name, position, momentum, erase, options, draw, gradients, x64, agree
):
    """States included, and the weights of a chunk's start apart from those of its last token."""
    shape = shapes.TESTS[name]
    given = tokens(draw, shape, 0.9, momentum, erase, "norm" in options)
    given |= dict(weights=None, state=running(draw, shape, momentum, position))
    want = form(gradients, "reference", shape, **options)(given)
    agree(form(gradients, "pallas_tpu", shape, **options)(given), want, 1e-9)


def test_positions_too_large_for_float32_are_exact(draw, agree):
    shape = shapes.TESTS["ragged-63"]
    state = running(draw, shape, position=(2**24 + 5, 2**30 + 3))
    given = floats(jnp.float32, tokens(draw, shape) | dict(weights=None, state=state))
    got, want = (call(given, form, shape) for form in ("pallas_tpu", "xla"))
    agree(got, want, 5e-6)


@pytest.mark.parametrize("cuts", [pytest.param((32, 16, 16), marks=SLOW), (17, 30, 17)])
def test_whole_is_its_parts(cuts, draw, x64, agree):
    """Parts that are whole chunks, and others; then single tokens, which the XLA form takes."""
    shape = shapes.TESTS["whole-64"]
    given = tokens(draw, shape)
    run = jax.jit(functools.partial(call, implementation="pallas_tpu", shape=shape))
    one = jax.jit(functools.partial(call, implementation="xla", shape=shape))
    whole = run(given)
    take = lambda start, n: {
        name: x if name == "weights" else x[:, start : start + n] for name, x in given.items()
    }
    for parts, form in ((cuts, run), ((1,) * 64, one)):
        reads, state, begin = [], {}, 0
        for n in parts:
            part = take(begin, n) | (dict(weights=None, state=state) if begin else {})
            y, state = (run if n >= shape.chunk_size else form)(part)
            reads, begin = [*reads, y], begin + n
        agree((jnp.concatenate(reads, 1), state), whole, 1e-11)


@SLOW
@pytest.mark.parametrize("state", [False, True])
def test_gradients_of_gradients_are_those_of_the_xla_form(
    state, draw, x64, agree, slopes_of_slopes
):
    shape = shapes.Shape(1, 4, 1, 2, (), 2, 2)
    given = tokens(draw, shape, momentum=state)
    given |= dict(weights=None, state=running(draw, shape)) if state else {}

    read = lambda form: lambda given: call(given, form, shape)[0]
    found = [slopes_of_slopes(read(form), given) for form in ("pallas_tpu", "xla")]
    agree(*found, 1e-9)


@pytest.mark.parametrize(
    ("dtype", "goes_on", "rows"),
    [
        pytest.param(jnp.float32, False, [(0.0, 2e-6, 5e-6), (0.9, 2e-6, 5e-6)], marks=SLOW),
        (jnp.float32, True, [(0.0, 2e-6, 5e-6)]),
        pytest.param(jnp.bfloat16, False, [(0.0, 1e-2, 2e-2), (0.9, 3e-2, 5e-2)], marks=SLOW),
    ],
)
def test_low_precision(dtype, goes_on, rows, draw, gradients, x64, agree):
    shape = shapes.Shape(2, 20, 1, 4, (5,), 4, 8) if goes_on else shapes.TESTS["ragged-63"]
    reference = form(gradients, "reference", shape)
    kernels = form(gradients, "pallas_tpu", shape)
    for correlation, values, grads in rows:
        given = tokens(draw, shape, correlation)
        given |= dict(weights=None, state=running(draw, shape)) if goes_on else {}
        low = floats(jnp.float32, given)
        low |= {name: low[name].astype(dtype) for name in ("q", "k", "v")}
        outputs, slopes = kernels(low)
        assert outputs[0].dtype == dtype
        want = reference(floats(jnp.float64, low))
        agree(outputs, want[0], values)
        agree(slopes, want[1], grads)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(segment_ids=jnp.zeros((2, 63), jnp.int32)), "is without segment_ids"),
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
