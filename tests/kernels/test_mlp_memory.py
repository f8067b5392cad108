# SPDX-License-Identifier: Apache-2.0
"""mlp_memory: against NumPy and limits, then every form against the reference."""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import pytest
from jax.test_util import check_grads
from nlx_kernels.mlp_memory import shapes

READS = ("after_write", "chunk_start")
OPTIONS = ("chunk_size", "read", "activation", "residual", "norm", "clip", "bound")
mlp_memory = jax.jit(
    nlx_kernels.mlp_memory,
    static_argnames=(*OPTIONS, "implementation"),
)
LIMITS = dict(clip=0.5, bound=1.5)  # low enough to be met


def start(draw, shape):
    return tuple(draw.normal(*size) / size[1] ** 0.5 for size in shape.weights)


def running(draw, shape, momentum=True):
    """A state in the middle of a chunk, each row at its own position."""

    def leaves():
        return tuple(draw.normal(shape.b, *w) / w[1] ** 0.5 for w in shape.weights)

    position = 3 + 5 * jnp.arange(shape.b, dtype=jnp.int32)
    buffer = leaves() if momentum else None
    return nlx_kernels.MLPMemoryState(leaves(), leaves(), buffer, position)


# 1. the reference against hand computation and limits


def unit(z):
    return z / np.linalg.norm(z) if np.any(z) else z


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu_slope(x, step=1e-6):
    return (gelu(x + step) - gelu(x - step)) / (2 * step)


def numpy_titans(q, k, v, w1, w2, rate, retain, momentum, erase, chunk):
    """z + gelu(z W_1) W_2 of one head, its gradient by hand, both reads."""
    w, p, ys, start_ys = [w1, w2], [0 * w1, 0 * w2], [], []
    for t in range(len(q)):
        if t % chunk == 0:
            b1, b2 = w
        hidden = gelu(k[t] @ b1)
        error = k[t] + hidden @ b2 - v[t]
        below = (error @ b2.T) * gelu_slope(k[t] @ b1)
        gradients = [np.outer(k[t], below), np.outer(hidden, error)]
        p = [momentum[t] * p - rate[t] * g for p, g in zip(p, gradients, strict=True)]
        z = [unit(k[t]), unit(hidden)]
        w = [
            retain[t] * w - erase[t] * np.outer(z, z @ w) + p
            for w, z, p in zip(w, z, p, strict=True)
        ]
        ys.append(q[t] + gelu(q[t] @ w[0]) @ w[1])
        start_ys.append(q[t] + gelu(q[t] @ b1) @ b2)
    return np.array(ys), np.array(start_ys), w, [b1, b2], p


def test_reference_is_titans_by_hand(draw, x64, agree):
    shape = shapes.Shape(1, 8, 1, 3, (4,), 3, 3)
    given, weights = draw.mlp_memory(shape), start(draw, shape)
    run = functools.partial(
        mlp_memory, **given, weights=weights, chunk_size=3, implementation="reference"
    )
    y, state = run()
    boundary, _ = run(read="chunk_start")
    one = {n: np.asarray(x)[0, :, 0] for n, x in given.items()}
    w1, w2 = (np.asarray(w)[0] for w in weights)
    want = numpy_titans(**one, w1=w1, w2=w2, chunk=3)
    got = (y[0, :, 0], boundary[0, :, 0])
    got += tuple([w[0, 0] for w in leaves] for leaves in state[:3])
    agree(got, want, 1e-8)
    assert state.position == 8


def test_reference_is_the_delta_rule_without_layers(draw, x64, agree):
    shape = shapes.Shape(2, 9, 2, 4, (), 3, 1)
    given, weights = draw.mlp_memory(shape, momentum=False, erase=False), start(draw, shape)
    y, state = mlp_memory(
        **given, weights=weights, chunk_size=1, residual=False, implementation="reference"
    )
    rows = jnp.broadcast_to(weights[0], (2, *weights[0].shape))
    want = nlx_kernels.linear_memory(**given, erase=given["rate"], state=rows)
    agree((y, state.weights[0]), want, 1e-12)


def test_reference_limits(draw, x64, agree):
    shape = shapes.TESTS["ragged-63"]
    given, weights = draw.mlp_memory(shape), start(draw, shape)
    still = jnp.zeros_like(given["rate"])
    given |= dict(rate=still, retain=still + 1, momentum=still, erase=still)
    y, state = mlp_memory(**given, weights=weights, chunk_size=16, implementation="reference")
    rows = tuple(jnp.broadcast_to(w, (2, *w.shape)) for w in weights)
    agree(state[:3], (rows, rows, tuple(jnp.zeros_like(w) for w in rows)), 0)
    agree(state.position, jnp.array([63, 63]), 0)
    hidden = jax.nn.gelu(jnp.einsum("bthi,hio->btho", given["q"], weights[0]))
    agree(y, given["q"] + jnp.einsum("bthi,hio->btho", hidden, weights[1]), 1e-13)


def test_reference_gradients_are_finite_differences(draw, x64):
    shape = shapes.Shape(1, 4, 1, 3, (2,), 3, 2)
    given = draw.mlp_memory(shape) | dict(weights=start(draw, shape))

    def run(given):
        options = dict(chunk_size=2, norm=True, implementation="reference")
        y, state = nlx_kernels.mlp_memory(**given, **options)
        return y, state[:3]

    check_grads(run, (given,), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize("start_from", ["weights", "state"])
def test_reference_segments_are_as_alone(start_from, draw, x64, agree):
    shape = shapes.Shape(2, 40, 2, 4, (5,), 4, 7)
    given, weights = draw.mlp_memory(shape), start(draw, shape)
    run = functools.partial(mlp_memory, chunk_size=7, implementation="reference")
    first = dict(state=running(draw, shape)) if start_from == "state" else dict(weights=weights)
    cuts = (0, 3, 20, 37, 40)
    ids = jnp.repeat(jnp.array([[4, 9, 4, 2]] * 2), jnp.diff(jnp.array(cuts)), 1)
    y, state = run(**given, **first | dict(weights=weights), segment_ids=ids)
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = {n: x[:, begin:end] for n, x in given.items()}
        y_alone, state_alone = run(**part, **dict(weights=weights) if begin else first)
        agree(y[:, begin:end], y_alone, 1e-12)
    agree(state, state_alone, 1e-12)


# 2. every form against the reference


def form(gradients, implementation, shape, **options):
    """Reads and state, and all gradients."""
    options |= dict(chunk_size=shape.chunk_size, implementation=implementation)
    return gradients(lambda given: nlx_kernels.mlp_memory(**given, **options))


@pytest.mark.parametrize(
    ("name", "momentum", "erase", "options"),
    [
        ("ragged-63", True, True, {}),
        ("whole-64", True, True, {}),
        ("whole-64", False, False, dict(norm=True, activation="silu", read="chunk_start")),
        ("long-chunk-63", False, True, dict(residual=False)),
        ("online-24", True, True, LIMITS),
        ("deep-100", True, False, LIMITS),
    ],
)
def test_xla_is_the_reference(name, momentum, erase, options, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    reference = form(gradients, "reference", shape, **options)
    xla = form(gradients, "xla", shape, **options)
    for correlation in (0.0, 0.95, 1.0):
        given = draw.mlp_memory(shape, correlation, momentum, erase, options.get("norm", False))
        given["weights"] = start(draw, shape)
        agree(xla(given), reference(given), 1e-9)


@pytest.mark.parametrize("name", [pytest.param("token", marks=pytest.mark.slow), "ragged-63"])
def test_xla_goes_on_from_any_position_and_resets(name, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    given = draw.mlp_memory(shape) | dict(state=running(draw, shape), weights=start(draw, shape))
    ids = draw.segments(shape.b, shape.t)
    filling = jnp.arange(shape.t) // shape.chunk_size  # segments that fill a window
    given["segment_ids"] = ids.at[0].set(filling.astype(ids.dtype))
    want = form(gradients, "reference", shape)(given)
    agree(form(gradients, "xla", shape)(given), want, 1e-9)


def test_tiny_inputs_of_a_layer_keep_gradients_finite(draw, gradients, agree):
    shape = shapes.TESTS["ragged-63"]
    xla = form(gradients, "xla", shape)
    for length in (0.0, 1e-3, 1e-12, 1e-15, 1e-20, 1e-25):
        given = draw.mlp_memory(shape) | dict(weights=start(draw, shape))
        given["k"] = given["k"] * length
        given = jax.tree.map(lambda x: x.astype(jnp.float32), given)
        for leaf in jax.tree.leaves(xla(given)):
            assert jnp.all(jnp.isfinite(leaf)), length


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "bound"), [(2.0, 16.0), (None, None)])
def test_limits_keep_a_deep_memory_finite(clip, bound, draw):
    """Four layers, 16k tokens, bfloat16, equal keys, nothing forgotten, rates at the limit.

    2 / chunk_size is where a linear memory is on the edge; without limits this one blows up.
    """
    shape = shapes.Shape(1, 16 * 1024, 1, 4, (8, 8, 8), 4, 16)
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), start(draw, shape))
    key, value = (jnp.broadcast_to(draw.keys(1, 1, 1, 4) * n, (1, shape.t, 1, 4)) for n in (1, 4))
    one = jnp.ones((1, shape.t, 1), jnp.float32)
    y, state = mlp_memory(
        *(x.astype(jnp.bfloat16) for x in (draw.normal(1, shape.t, 1, 4), key, value)),
        weights=weights,
        rate=one * 2 / shape.chunk_size,
        retain=one,
        momentum=0 * one,
        chunk_size=shape.chunk_size,
        clip=clip,
        bound=bound,
    )
    finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((y, state)))
    assert finite == (clip is not None)


def test_low_precision(draw, gradients, x64, agree):
    shape = shapes.TESTS["ragged-63"]
    reference = form(gradients, "reference", shape)
    xla = form(gradients, "xla", shape)
    for dtype, correlation, values, grads in (
        (jnp.float32, 0.0, 2e-6, 5e-6),
        (jnp.float32, 0.9, 2e-6, 5e-6),
        (jnp.bfloat16, 0.0, 1e-2, 2e-2),
        (jnp.bfloat16, 0.9, 3e-2, 5e-2),
    ):
        given = draw.mlp_memory(shape, correlation) | dict(weights=start(draw, shape))
        low = jax.tree.map(lambda x: x.astype(jnp.float32), given)
        low |= {name: low[name].astype(dtype) for name in ("q", "k", "v")}
        outputs, slopes = xla(low)
        assert [x.dtype for x in outputs] == [dtype, *[jnp.float32] * 6]
        want = reference(jax.tree.map(lambda x: x.astype(jnp.float64), low))
        agree(outputs, want[0], values)
        agree(slopes, want[1], grads)


# 3. laws


def test_xla_carries_any_split(draw, x64, agree):
    shape = shapes.TESTS["ragged-63"]
    given, first = draw.mlp_memory(shape), running(draw, shape)
    run = functools.partial(mlp_memory, chunk_size=16, implementation="xla")
    want = run(**given, state=first)
    for length in (7, 1):
        state, ys = first, []
        for begin in range(0, 63, length):
            part = {n: x[:, begin : begin + length] for n, x in given.items()}
            y, state = run(**part, state=state)
            ys.append(y)
        agree((jnp.concatenate(ys, 1), state), want, 1e-11)


def test_xla_loops_over_chunks_only(loops):
    def run(weights, rate):
        token = jnp.zeros((1, 1024, 2, 8))
        gates = dict(rate=rate, retain=rate, momentum=rate, erase=rate)
        y, _ = nlx_kernels.mlp_memory(
            *[token] * 3, weights=weights, chunk_size=64, implementation="xla", **gates
        )
        return y.sum()

    arguments = ((jnp.zeros((2, 8, 8)),) * 2, jnp.zeros((1, 1024, 2)))
    assert loops(jax.make_jaxpr(run)(*arguments).jaxpr) == [16]
    assert set(loops(jax.make_jaxpr(jax.grad(run, (0, 1)))(*arguments).jaxpr)) == {16}
