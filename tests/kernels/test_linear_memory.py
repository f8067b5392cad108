# SPDX-License-Identifier: Apache-2.0
"""linear_memory: against NumPy loops and limits, then every form against the reference."""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import pytest
from jax.test_util import check_grads
from nlx_kernels.linear_memory import shapes

READS = ("after_write", "chunk_start")
OPTIONS = ("read", "block_size", "implementation")
linear_memory = jax.jit(
    nlx_kernels.linear_memory,
    static_argnames=OPTIONS,
)


@functools.cache
def form(gradients, implementation, block_size=None):
    """Both reads and the state, and all gradients."""
    return gradients(
        lambda arguments: [
            nlx_kernels.linear_memory(
                **arguments, read=read, implementation=implementation, block_size=block_size
            )
            for read in READS
        ]
    )


# 1. the reference against hand computation and limits


def numpy_memory(q, k, v, transition, write):
    """One head: S <- transition(S, t) + write(t), read after the write."""
    s, ys = np.zeros((k.shape[-1], v.shape[-1])), []
    for t in range(len(q)):
        s = transition(s, t) + write(t)
        ys.append(q[t] @ s)
    return np.array(ys), s


def test_reference_is_retnet_deltanet_and_gated_deltanet(draw, x64, agree):
    q, k, v, a, beta = (
        draw.normal(1, 9, 1, 4),
        draw.keys(1, 9, 1, 4),
        draw.normal(1, 9, 1, 3),
        draw.gate(1, 9, 1),
        draw.gate(1, 9, 1),
    )
    ones, zeros = jnp.ones_like(a), jnp.zeros_like(a)
    qn, kn, vn, an, bn = (np.asarray(x)[0, :, 0] for x in (q, k, v, a, beta))
    eye = np.eye(4)
    rows = [
        (dict(retain=a, erase=zeros, rate=ones), lambda s, t: an[t] * s, lambda t: 1.0),
        (
            dict(retain=ones, erase=beta, rate=beta),
            lambda s, t: (eye - bn[t] * np.outer(kn[t], kn[t])) @ s,
            lambda t: bn[t],
        ),
        (
            dict(retain=a, erase=a * beta, rate=beta),
            lambda s, t: an[t] * (eye - bn[t] * np.outer(kn[t], kn[t])) @ s,
            lambda t: bn[t],
        ),
    ]
    for gates, transition, strength in rows:
        want = numpy_memory(
            qn, kn, vn, transition, lambda t, s=strength: s(t) * np.outer(kn[t], vn[t])
        )
        y, state = linear_memory(q, k, v, **gates, implementation="reference")
        agree((y[0, :, 0], state[0, 0]), want, 1e-13)


def test_reference_limits(draw, x64, agree):
    given = draw.linear_memory(shapes.TESTS["whole-64"])
    still = jnp.zeros_like(given["rate"])
    _, state = linear_memory(
        **given | dict(rate=still, erase=still, retain=still + 1), implementation="reference"
    )
    agree(state, given["state"], 0)
    k = jnp.eye(5)[None, :, None]
    v, ones = draw.normal(1, 5, 1, 3), jnp.ones((1, 5, 1))
    run = functools.partial(linear_memory, k, k, v, retain=ones, implementation="reference")
    _, state = run(erase=ones, rate=ones)
    y, _ = run(erase=0 * ones, rate=0 * ones, state=state)
    agree(y, v, 1e-15)


def test_reference_reads_before_its_write_at_chunk_start(draw, x64, agree):
    given = draw.linear_memory(shapes.Shape(1, 6, 1, 3, 2))
    after, _ = linear_memory(**given, implementation="reference")
    before, _ = linear_memory(**given, read="chunk_start", implementation="reference")
    agree(before[:, 0], jnp.einsum("bhk,bhkv->bhv", given["q"][:, 0], given["state"]), 1e-14)
    shifted = given | dict(q=jnp.roll(given["q"], -1, 1))
    agree(before[:, 1:], linear_memory(**shifted, implementation="reference")[0][:, :-1], 1e-13)
    assert float(jnp.abs(after - before).max()) > 0.1


def test_reference_gradients_are_finite_differences(draw, x64):
    given = draw.linear_memory(shapes.Shape(1, 4, 1, 3, 2))
    run = functools.partial(nlx_kernels.linear_memory, implementation="reference")
    check_grads(lambda a: run(**a), (given,), order=1, modes=["rev"], eps=1e-6)


# 2. every form against the reference


@pytest.mark.parametrize("name", shapes.TESTS)
def test_xla_is_the_reference(name, draw, gradients, x64, agree):
    shape = shapes.TESTS[name]
    for correlation in (0.0, 0.95, 1.0):
        given = draw.linear_memory(shape, correlation)
        given["segment_ids"] = draw.segments(shape.b, shape.t, share=0.1 * (correlation < 1))
        want = form(gradients, "reference")(given)
        agree(form(gradients, "xla", shape.block_size)(given), want, 1e-9)


def test_block_size_and_missing_segments_change_nothing(draw, gradients, x64, agree):
    given = draw.linear_memory(shapes.TESTS["ragged-100"])
    want = form(gradients, "reference")(given)
    for block_size in (1, 33, 200):
        agree(form(gradients, "xla", block_size)(given), want, 1e-9)


@pytest.mark.parametrize(
    ("dtype", "correlation", "values", "grads"),
    [
        (jnp.float32, 0.0, 2e-6, 5e-6),
        (jnp.float32, 0.9, 2e-6, 5e-6),
        (jnp.bfloat16, 0.0, 1e-2, 2e-2),
        (jnp.bfloat16, 0.9, 3e-2, 5e-2),
    ],
)
def test_low_precision(dtype, correlation, values, grads, draw, gradients, x64, agree):
    given = draw.linear_memory(shapes.Shape(2, 100, 2, 16, 8), correlation)
    low = {
        name: x.astype(dtype if name in ("q", "k", "v") else jnp.float32)
        for name, x in given.items()
    }
    wide = {name: x.astype(jnp.float64) for name, x in low.items()}
    outputs, slopes = form(gradients, "xla")(low)
    assert [x.dtype for x in outputs] == [dtype, jnp.float32] * 2
    want = form(gradients, "reference")(wide)
    agree(outputs, want[0], values)
    agree(slopes, want[1], grads)


# 3. laws


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_state_carries_any_split(implementation, draw, x64, agree):
    given = draw.linear_memory(shapes.TESTS["ragged-63"])
    given["segment_ids"] = draw.segments(2, 63)
    run = functools.partial(linear_memory, implementation=implementation, block_size=16)
    want = run(**given)
    for cuts in ([0, 7, 63], range(64)):
        state, ys = given["state"], []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            part = {n: x[:, start:end] for n, x in given.items() if n != "state"}
            begins = given["segment_ids"][:, start] != given["segment_ids"][:, start - 1]
            if start:  # a call's first token goes on from the state: the caller resets it
                state = jnp.where(begins[:, None, None, None], 0, state)
            y, state = run(**part, state=state)
            ys.append(y)
        agree((jnp.concatenate(ys, 1), state), want, 1e-12)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_segments_are_as_alone(implementation, draw, x64, agree):
    given = draw.linear_memory(shapes.Shape(1, 40, 2, 4, 3, 16)) | dict(state=None)
    run = functools.partial(linear_memory, implementation=implementation, block_size=16)
    cuts = (0, 3, 20, 37, 40)
    ids = jnp.repeat(jnp.array([4, 9, 4, 2]), jnp.diff(jnp.array(cuts)))[None]
    y, state = run(**given, segment_ids=ids)
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        alone = {n: x if x is None else x[:, start:end] for n, x in given.items()}
        y_alone, state_alone = run(**alone)
        agree(y[:, start:end], y_alone, 1e-12)
    agree(state, state_alone, 1e-12)


def test_xla_loops_over_blocks_only(loops):
    given = jax.eval_shape(lambda: tokens_of_length(1024))
    run = functools.partial(nlx_kernels.linear_memory, implementation="xla")
    slope = jax.grad(lambda given: jnp.sum(run(**given)[0]))
    assert loops(jax.make_jaxpr(lambda given: run(**given))(given).jaxpr) == [16]
    assert set(loops(jax.make_jaxpr(slope)(given).jaxpr)) == {16}


def tokens_of_length(t):
    """Zeros of the right shapes."""
    token = dict.fromkeys(("q", "k", "v"), jnp.zeros((1, t, 2, 8)))
    return token | dict.fromkeys(("retain", "erase", "rate"), jnp.zeros((1, t, 2)))
