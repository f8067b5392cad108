# SPDX-License-Identifier: Apache-2.0
"""Hope's Pallas TPU kernels, interpreted on memory that is NaN until it is written."""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels.self_modifying_memory import shapes

BOXES = ("key", "value", "rate", "retain", "memory")
SLOW = pytest.mark.slow
LIMITS = dict(clip=0.5, bound=1.5)  # low enough to be met


def tokens(draw, shape, correlation=0.0, momentum=True, query=False, retain_bias=2.0):
    """Streams, queries, momentum and parameters, as large as what training makes of them."""
    b, t, h, d, f = shape[:5]
    streams = [d**0.5 * draw.keys(b, t, h, d, correlation) for _ in range(3)]
    given = dict(x=nlx_kernels.Streams(*streams), q=draw.keys(b, t, h, d))
    given |= dict(momentum=draw.gate(b, t, h, high=0.9)) if momentum else {}
    boxes = (*BOXES, "query") if query else BOXES
    layers = lambda: (draw.normal(h, d, f) / d**0.5, draw.normal(h, f, d) / f**0.5)
    parameters = nlx_kernels.SelfModifyingParameters(
        memories={box: layers() for box in boxes},
        rate_readout={box: draw.normal(h, d) / d**0.5 for box in boxes},
        rate_bias={box: draw.normal(h) - 1 for box in boxes},
        retain_readout=draw.normal(h, d) / d**0.5,
        retain_bias=draw.normal(h) + retain_bias,
    )
    return given | dict(parameters=parameters)


def floats(dtype, tree):
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(dtype), tree)


def halved(tree):
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else 0.5 * x, tree)


def running(draw, shape, boxes=BOXES, momentum=True, position=(5, 48)):
    """A state inside chunks, each row elsewhere, as far from the chunks' starts as can be."""
    b, _, h, d, f = shape[:5]
    layers = lambda: (draw.normal(b, h, d, f) / d**0.5, draw.normal(b, h, f, d) / f**0.5)
    weights, start, buffer = ({box: layers() for box in boxes} for _ in range(3))
    position = jnp.asarray(position[:b], jnp.int32)
    return nlx_kernels.SelfModifyingState(weights, start, buffer if momentum else None, position)


def call(given, implementation, shape, **options):
    options = (
        dict(chunk_size=shape.chunk_size, projection_chunk_size=shape.projection_chunk_size)
        | options
    )
    interpret = implementation == "pallas_tpu"
    return nlx_kernels.self_modifying_memory(
        **given, **options, implementation=implementation, interpret=interpret
    )


def form(gradients, implementation, shape, **options):
    """Reads and state, and all gradients."""
    run = functools.partial(call, implementation=implementation, shape=shape, **options)
    return gradients(lambda given: run(given))


@pytest.mark.parametrize(
    ("name", "momentum", "query", "options"),
    [
        ("token", True, False, {}),
        ("online-24", False, False, {}),
        ("mixed-63", True, True, LIMITS),
        ("mixed-64", False, False, dict(read="chunk_start", erase=False, clip=None, bound=None)),
    ],
)
def test_kernels_are_the_reference(name, momentum, query, options, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    reference = form(gradients, "reference", shape, **options)
    kernels = form(gradients, "pallas_tpu", shape, **options)
    for correlation, retain_bias in ((0.0, 2.0), (0.95, 1000.0), (1.0, -1000.0)):
        given = tokens(draw, shape, correlation, momentum, query, retain_bias)
        agree(kernels(given), reference(given), 1e-9)


@pytest.mark.parametrize(
    ("name", "position", "momentum", "query", "options"),
    [
        pytest.param("online-24", (3, 0), False, False, {}, marks=SLOW),
        ("mixed-63", (5, 48), True, True, LIMITS),
        pytest.param(
            "mixed-64", (31,), False, False, dict(read="chunk_start", erase=False), marks=SLOW
        ),
    ],
)
def test_kernels_go_on_from_any_position(
    name, position, momentum, query, options, draw, gradients, x64, agree
):
    """States included, and the weights of a chunk's start apart from those of its last token."""
    shape = shapes.TESTS[name]
    given = tokens(draw, shape, 0.9, momentum, query)
    boxes = (*BOXES, "query") if query else BOXES
    given |= dict(state=running(draw, shape, boxes, momentum, position))
    want = form(gradients, "reference", shape, **options)(given)
    agree(form(gradients, "pallas_tpu", shape, **options)(given), want, 1e-9)


def test_positions_too_large_for_float32_are_exact(draw, agree):
    shape = shapes.TESTS["mixed-63"]
    state = running(draw, shape, position=(2**24 + 5, 2**30 + 3))
    given = floats(jnp.float32, tokens(draw, shape) | dict(state=state))
    got, want = (call(given, form, shape) for form in ("pallas_tpu", "xla"))
    agree(got, want, 5e-6)


@pytest.mark.parametrize("cuts", [pytest.param((16, 32, 16), marks=SLOW), (17, 30, 17)])
def test_whole_is_its_parts(cuts, draw, x64, agree):
    """Parts that are whole windows, and others; then single tokens, which the XLA form takes."""
    shape = shapes.TESTS["mixed-64"]
    given = tokens(draw, shape)
    run = jax.jit(functools.partial(call, implementation="pallas_tpu", shape=shape))
    one = jax.jit(functools.partial(call, implementation="xla", shape=shape))
    whole = run(given)
    take = lambda start, n: {
        name: x if name == "parameters" else jax.tree.map(lambda x: x[:, start : start + n], x)
        for name, x in given.items()
    }
    for parts, form in ((cuts, run), ((1,) * 64, one)):
        reads, state, begin = [], {}, 0
        for n in parts:
            y, state = form(take(begin, n) | (dict(state=state) if begin else {}))
            reads, begin = [*reads, y], begin + n
        agree((jnp.concatenate(reads, 1), state), whole, 1e-11)


@SLOW
@pytest.mark.parametrize("state", [False, True])
def test_gradients_of_gradients_are_those_of_the_xla_form(
    state, draw, x64, agree, slopes_of_slopes
):
    shape = shapes.Shape(1, 2, 1, 2, 1, 1, 1)
    given = tokens(draw, shape, momentum=state)
    given |= dict(state=running(draw, shape, momentum=True)) if state else {}

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
    shape = shapes.Shape(2, 20, 1, 4, 3, 8, 16) if goes_on else shapes.TESTS["mixed-63"]
    reference = form(gradients, "reference", shape)
    kernels = form(gradients, "pallas_tpu", shape)
    for correlation, values, grads in rows:
        given = tokens(draw, shape, correlation)
        given |= dict(state=running(draw, shape)) if goes_on else {}
        given |= {name: halved(given[name]) for name in ("parameters", "state") if name in given}
        low = floats(jnp.float32, given)
        low |= jax.tree.map(lambda x, to=dtype: x.astype(to), {n: low[n] for n in ("x", "q")})
        outputs, slopes = kernels(low)
        assert outputs[0].dtype == dtype
        assert {leaf.dtype for leaf in outputs[1:]} == {jnp.dtype("float32")}
        want = reference(floats(jnp.float64, low))
        agree(outputs, want[0], values)
        agree(slopes, want[1], grads)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(segment_ids=jnp.zeros((2, 63), jnp.int32)), "is without segment_ids"),
        (dict(chunk_size=12, projection_chunk_size=18), "of which one divides the other"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(change, sentence, draw):
    shape = shapes.TESTS["mixed-63"]
    with pytest.raises(ValueError, match=f"implementation='pallas_tpu' .*{sentence}"):
        call(tokens(draw, shape), "pallas_tpu", shape, **change)


def test_what_does_not_fit_is_refused():
    shape = shapes.Shape(1, 64, 1, 256, 1024, 64, 64)
    given = jax.eval_shape(lambda: tokens(Zeros(), shape))
    with pytest.raises(ValueError, match="fast memory"):
        jax.eval_shape(lambda given: call(given, "pallas_tpu", shape), given)


class Zeros:
    """Draws nothing but zeros."""

    def normal(self, *shape):
        return jnp.zeros(shape)

    def gate(self, *shape, high=1.0):
        return jnp.zeros(shape)

    def keys(self, b, t, h, k, correlation=0.0):
        return jnp.zeros((b, t, h, k))
