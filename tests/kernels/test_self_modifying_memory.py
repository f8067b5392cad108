# SPDX-License-Identifier: Apache-2.0
"""self_modifying_memory: against NumPy and limits, then every form against the reference."""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import pytest
from jax.test_util import check_grads
from nlx_kernels.self_modifying_memory import shapes

BOXES = ("key", "value", "rate", "retain", "memory")
LIMITS = dict(clip=0.5, bound=1.5)  # low enough to be met
OPTIONS = ("chunk_size", "projection_chunk_size", "read", "erase", "activation", "clip", "bound")
self_modifying_memory = jax.jit(
    nlx_kernels.self_modifying_memory,
    static_argnames=(*OPTIONS, "implementation"),
)


def tokens(draw, shape, correlation=0.0, momentum=True):
    """Streams, queries and momentum, for rows of the same or of similar tokens."""
    b, t, h, d = shape[:4]
    scale = d**0.5
    streams = (scale * draw.keys(b, t, h, d, correlation) for _ in range(3))
    given = dict(x=nlx_kernels.Streams(*streams), q=draw.keys(b, t, h, d))
    return given | dict(momentum=draw.gate(b, t, h, high=0.9)) if momentum else given


def outer(draw, shape, retain_bias=2.0, query=False):
    """Parameters as large as what training makes of them."""
    h, d, f = shape[2:5]
    boxes = (*BOXES, "query") if query else BOXES
    return nlx_kernels.SelfModifyingParameters(
        memories={box: layers(draw, (h,), d, f) for box in boxes},
        rate_readout={box: draw.normal(h, d) / d**0.5 for box in boxes},
        rate_bias={box: draw.normal(h) - 1 for box in boxes},
        retain_readout=draw.normal(h, d) / d**0.5,
        retain_bias=draw.normal(h) + retain_bias,
    )


def layers(draw, lead, d, f):
    return draw.normal(*lead, d, f) / d**0.5, draw.normal(*lead, f, d) / f**0.5


def running(draw, shape, momentum=True, query=False):
    """A state in the middle of chunks, each row at its own position."""
    b, _, h, d, f = shape[:5]
    boxes = (*BOXES, "query") if query else BOXES
    weights, seen, buffer = ({x: layers(draw, (b, h), d, f) for x in boxes} for _ in range(3))
    position = 3 + 5 * jnp.arange(b, dtype=jnp.int32)
    return nlx_kernels.SelfModifyingState(weights, seen, buffer if momentum else None, position)


def sizes(shape):
    return dict(chunk_size=shape.chunk_size, projection_chunk_size=shape.projection_chunk_size)


# 1. the reference against hand computation and limits


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def l2(z):
    return z / np.sqrt(np.sum(z**2) + 1e-6)


def unit(z):
    return z / np.linalg.norm(z)


def shrink(matrix, limit):
    return matrix * min(1, limit / np.linalg.norm(matrix))


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu_slope(x, step=1e-6):
    return (gelu(x + step) - gelu(x - step)) / (2 * step)


def soft(p):
    return gelu(p) / np.sqrt(np.sum(gelu(p) ** 2) + 0.25)


def recall(w, z):
    return z + soft(z @ w[0]) @ w[1]


def by_hand(w, k, target):
    """Gradients of both layers and the directions they erase."""
    p = k @ w[0]
    h, n = soft(p), np.sqrt(np.sum(gelu(p) ** 2) + 0.25)
    error = recall(w, k) - target
    below = w[1] @ error
    below = (below - h * (h @ below)) / n * gelu_slope(p)
    return [np.outer(k, below), np.outer(h, error)], [unit(k), unit(h)]


def numpy_hope(x, q, momentum, parameters, chunks, clip, bound):
    """One head of spec 4.1, written box by box; returns both reads and the memories."""
    memories = {box: list(w) for box, w in parameters.memories.items()}
    seen, buffers = dict(memories), {box: [0, 0] for box in memories}
    after, before = [], []
    for t in range(len(q)):
        k, v = l2(recall(seen["key"], x.key[t])), recall(seen["value"], x.value[t])
        query = l2(recall(seen["query"], q[t]))
        scores = recall(seen["rate"], x.gate[t]), recall(seen["retain"], x.gate[t])
        alpha = sigmoid(scores[1] @ parameters.retain_readout + parameters.retain_bias)
        for box, w in memories.items():
            eta = sigmoid(scores[0] @ parameters.rate_readout[box] + parameters.rate_bias[box])
            eta *= (1 + alpha) / 2 if chunks[box] == 1 else 1 + alpha
            gradients, z = by_hand(seen[box], k, recall(seen[box], v))
            buffers[box] = [
                momentum[t] * p - eta * shrink(g, clip)
                for p, g in zip(buffers[box], gradients, strict=True)
            ]
            memories[box] = [
                alpha * w - eta * np.outer(z, z @ w) + p
                for w, z, p in zip(w, z, buffers[box], strict=True)
            ]
        after.append(recall(memories["memory"], query))
        before.append(recall(seen["memory"], query))
        for box, chunk in chunks.items():
            if (t + 1) % chunk == 0:
                seen[box] = memories[box] = [shrink(w, bound) for w in memories[box]]
    return np.array(after), np.array(before), memories, seen, buffers


@pytest.mark.parametrize("chunk", [1, 3])
def test_reference_is_hope_by_hand(chunk, draw, x64, agree):
    shape = shapes.Shape(1, 8, 1, 3, 4, chunk, 2)
    given, parameters = tokens(draw, shape), outer(draw, shape, query=True)
    run = functools.partial(
        self_modifying_memory, **given, parameters=parameters, implementation="reference"
    )
    y, state = run(**sizes(shape), **LIMITS)
    boundary, _ = run(**sizes(shape), **LIMITS, read="chunk_start")
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[0, :, 0], given)
    chunks = dict.fromkeys(parameters.memories, 2) | {"memory": chunk}
    head = jax.tree.map(lambda leaf: np.asarray(leaf)[0], parameters)
    want = numpy_hope(**one, parameters=head, chunks=chunks, **LIMITS)
    got = (y[0, :, 0], boundary[0, :, 0])
    got += tuple({box: [w[0, 0] for w in pair] for box, pair in s.items()} for s in state[:3])
    agree(got, want, 1e-8)
    assert state.position == 8
    loose, _ = run(**sizes(shape), clip=None, bound=None)
    assert np.abs(loose - y).max() > 1e-3  # both limits were met


def test_reference_limits(draw, x64, agree):
    shape = shapes.TESTS["mixed-63"]
    parameters = outer(draw, shape, retain_bias=1000.0)
    parameters = parameters._replace(rate_bias=dict.fromkeys(BOXES, jnp.full(shape.h, -1000.0)))
    given = tokens(draw, shape, momentum=False)
    y, state = self_modifying_memory(
        **given, parameters=parameters, **sizes(shape), bound=None, implementation="reference"
    )
    rows = jax.tree.map(lambda w: jnp.broadcast_to(w, (2, *w.shape)), parameters.memories)
    agree(state[:2], (rows, rows), 0)
    w1, w2 = parameters.memories["memory"]
    hidden = jax.nn.gelu(jnp.einsum("bthi,hio->btho", given["q"], w1))
    hidden = hidden / jnp.sqrt(jnp.sum(hidden**2, -1, keepdims=True) + 0.25)
    agree(y, given["q"] + jnp.einsum("bthi,hio->btho", hidden, w2), 1e-13)


def test_reference_gradients_are_finite_differences(draw, x64):
    shape = shapes.Shape(1, 5, 1, 3, 2, 2, 3)
    given = tokens(draw, shape) | dict(parameters=outer(draw, shape, query=True))

    @jax.jit
    def run(given):
        y, state = nlx_kernels.self_modifying_memory(
            **given, **sizes(shape), **LIMITS, implementation="reference"
        )
        return y, state[:3]

    check_grads(run, (given,), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize("start_from", ["parameters", "state"])
def test_reference_segments_are_as_alone(start_from, draw, x64, agree):
    shape = shapes.Shape(2, 40, 1, 3, 2, 7, 5)
    given, parameters = tokens(draw, shape), outer(draw, shape)
    run = functools.partial(
        self_modifying_memory, parameters=parameters, **sizes(shape), implementation="reference"
    )
    first = dict(state=running(draw, shape)) if start_from == "state" else {}
    cuts = (0, 3, 20, 37, 40)
    ids = jnp.repeat(jnp.array([[4, 9, 4, 2]] * 2), jnp.diff(jnp.array(cuts)), 1)
    y, state = run(**given, **first, segment_ids=ids)
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = jax.tree.map(lambda x, begin=begin, end=end: x[:, begin:end], given)
        y_alone, state_alone = run(**part, **{} if begin else first)
        agree(y[:, begin:end], y_alone, 1e-12)
    agree(state, state_alone, 1e-12)


# 2. every form against the reference


def form(gradients, implementation, shape, **options):
    """Reads and state, and all gradients."""
    options |= sizes(shape) | dict(implementation=implementation)
    return gradients(lambda given: nlx_kernels.self_modifying_memory(**given, **options))


@pytest.mark.parametrize(
    ("name", "momentum", "query", "options"),
    [
        ("online-24", False, False, {}),
        ("mixed-63", True, True, LIMITS),
        pytest.param(
            "mixed-64",
            False,
            False,
            dict(read="chunk_start", erase=False, clip=None, bound=None),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_xla_is_the_reference(name, momentum, query, options, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    reference = form(gradients, "reference", shape, **options)
    xla = form(gradients, "xla", shape, **options)
    for correlation, retain_bias in ((0.0, 2.0), (0.95, 1000.0), (1.0, -1000.0)):
        given = tokens(draw, shape, correlation, momentum)
        given["parameters"] = outer(draw, shape, retain_bias, query)
        agree(xla(given), reference(given), 1e-9)


@pytest.mark.parametrize("name", ["token", pytest.param("undivided-100", marks=pytest.mark.slow)])
def test_xla_goes_on_from_any_position_and_resets(name, draw, gradients, x64, agree):
    shape, options = shapes.TESTS[name], LIMITS | dict(activation="silu")
    reference = form(gradients, "reference", shape, **options)
    xla = form(gradients, "xla", shape, **options)
    for share in (0.1, 0.0):
        given = tokens(draw, shape)
        given |= dict(parameters=outer(draw, shape), state=running(draw, shape))
        given["segment_ids"] = draw.segments(shape.b, shape.t, share)
        agree(xla(given), reference(given), 1e-9)


@pytest.mark.slow
def test_low_precision(draw, gradients, x64, agree):
    shape = shapes.TESTS["mixed-63"]
    reference = form(gradients, "reference", shape)
    xla = form(gradients, "xla", shape)
    for dtype, correlation, values, grads in (
        (jnp.float32, 0.0, 2e-6, 5e-6),
        (jnp.float32, 0.9, 2e-6, 5e-6),
        (jnp.bfloat16, 0.0, 1e-2, 2e-2),
        (jnp.bfloat16, 0.9, 3e-2, 5e-2),
    ):
        given = tokens(draw, shape, correlation)
        given["parameters"] = jax.tree.map(lambda x: 0.5 * x, outer(draw, shape))
        low = jax.tree.map(lambda x: x.astype(jnp.float32), given)
        low |= jax.tree.map(lambda x, to=dtype: x.astype(to), {n: low[n] for n in ("x", "q")})
        outputs, slopes = xla(low)
        assert outputs[0].dtype == dtype
        assert {leaf.dtype for leaf in outputs[1:]} == {jnp.dtype("float32")}
        want = reference(jax.tree.map(lambda x: x.astype(jnp.float64), low))
        agree(outputs, want[0], values)
        agree(slopes, want[1], grads)


# 3. laws


def test_xla_carries_any_split(draw, x64, agree):
    shape = shapes.TESTS["mixed-63"]
    given, first = tokens(draw, shape), running(draw, shape)
    run = functools.partial(
        self_modifying_memory,
        parameters=outer(draw, shape),
        **sizes(shape),
        implementation="xla",
    )
    want = run(**given, state=first)
    for length in (7, 1):
        state, ys = first, []
        for begin in range(0, 63, length):
            part = jax.tree.map(lambda x, a=begin, n=length: x[:, a : a + n], given)
            y, state = run(**part, state=state)
            ys.append(y)
        agree((jnp.concatenate(ys, 1), state), want, 1e-11)


def test_xla_loops_over_chunks_only(loops, draw):
    shape = shapes.Shape(1, 1024, 2, 4, 3, 64, 128)

    def run(parameters, tokens):
        y, _ = nlx_kernels.self_modifying_memory(
            **tokens, parameters=parameters, **sizes(shape), implementation="xla"
        )
        return y.sum()

    arguments = outer(draw, shape), tokens(draw, shape)
    assert loops(jax.make_jaxpr(run)(*arguments).jaxpr) == [16]
    assert set(loops(jax.make_jaxpr(jax.grad(run, (0, 1)))(*arguments).jaxpr)) == {16}
