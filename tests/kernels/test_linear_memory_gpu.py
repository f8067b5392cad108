# SPDX-License-Identifier: Apache-2.0
"""linear_memory as Mosaic GPU kernels: interpreted, compiled for absent GPUs, refused."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels import ahead_of_time_gpu
from nlx_kernels.linear_memory import shapes

RECORDED = pathlib.Path(ahead_of_time_gpu.__file__).with_name("targets") / "compiled.json"
interpreted = functools.partial(
    nlx_kernels.linear_memory, implementation="mosaic_gpu", interpret=True
)
reference = functools.partial(nlx_kernels.linear_memory, implementation="reference")


def tokens(draw, shape, correlation):
    """All array arguments, tokens in bfloat16; a few tokens forget everything, a few nothing."""
    b, t, h, k, v, _ = shape
    retain = draw.gate(b, t, h, low=0.8)
    if t > 40:
        retain = retain.at[:, 5].set(0).at[:, 9:20].set(1).at[:, 31:33].set(0)
    low, wide = (lambda x: x.astype(jnp.bfloat16)), (lambda x: x.astype(jnp.float32))
    return dict(
        q=low(draw.normal(b, t, h, k)),
        k=low(draw.keys(b, t, h, k, correlation)),
        v=low(draw.normal(b, t, h, v)),
        retain=wide(retain),
        erase=wide(draw.gate(b, t, h, high=1.9)),
        rate=wide(draw.gate(b, t, h)),
        state=wide(draw.normal(b, h, k, v)),
    )


def exact(gradients, given, read):
    """Reads, state and slopes of the reference in float64."""
    with jax.enable_x64(True):
        wide = {n: x if n == "segment_ids" else x.astype(jnp.float64) for n, x in given.items()}
        return gradients(lambda given: reference(**given, read=read))(wide)


@pytest.mark.parametrize(
    ("shape", "correlation", "read", "values", "grads"),
    [
        (shapes.Shape(2, 1, 2, 64, 64), 0.0, "after_write", 1e-2, 2e-2),
        (shapes.Shape(1, 130, 1, 128, 64), 0.0, "after_write", 1e-2, 2e-2),
        (shapes.Shape(1, 100, 2, 64, 128), 0.9, "chunk_start", 3e-2, 5e-2),
        (shapes.Shape(1, 64, 1, 64, 64), 1.0, "after_write", 3e-2, 5e-2),
        (shapes.Shape(1, 3, 1, 64, 256), 0.0, "after_write", 1e-2, 2e-2),
    ],
)
def test_kernels_are_the_reference(shape, correlation, read, values, grads, draw, gradients, agree):
    given = tokens(draw, shape, correlation)
    if correlation < 1:
        given["segment_ids"] = draw.segments(shape.b, shape.t, share=0.05)
    outputs, slopes = gradients(lambda given: interpreted(**given, read=read))(given)
    assert [x.dtype for x in outputs] == [jnp.bfloat16, jnp.float32]
    want = exact(gradients, given, read)
    agree(outputs, want[0], values)
    agree(slopes, want[1], grads)


def test_what_is_not_finite_stays_in_its_segment(draw, agree):
    given = tokens(draw, shapes.Shape(1, 80, 1, 64, 64), 0.0)
    given["segment_ids"] = (jnp.arange(80)[None] >= 30).astype(jnp.int32)
    want = interpreted(**given)
    y, state = interpreted(**given | dict(k=given["k"].at[0, 20, 0, 3].set(jnp.inf)))
    assert jnp.all(jnp.isnan(y[:, 20:30]))
    agree(y[:, :20], want[0][:, :20], 0)
    agree((y[:, 30:], state), (want[0][:, 30:], want[1]), 1e-2)  # token 20 is a reset more


def test_what_is_not_finite_spoils_all_parts_of_wide_values(draw):
    """256 channels are two parts; a value of the first reaches all later reads of its head."""
    given = tokens(draw, shapes.Shape(1, 3, 1, 64, 256), 0.0)
    given["v"] = given["v"].at[0, 1, 0, 5].set(jnp.nan)
    y, state = interpreted(**given)
    want = nlx_kernels.linear_memory(**given, implementation="xla")
    assert jnp.array_equal(jnp.isnan(y), jnp.isnan(want[0]))
    assert jnp.isnan(y[:, 1:]).all()
    assert jnp.isfinite(y[:, 0]).all()
    assert jnp.isnan(state).all()


def test_gradients_of_gradients_are_those_of_the_reference(draw, agree):
    """The first derivative is the kernels', the second XLA's; of a `jit`, with segments inside.

    Both are rounded to bfloat16: the XLA form alone is as far away (0.9 to 9 hundredths).
    """
    given = tokens(draw, shapes.Shape(1, 3, 1, 64, 64), 0.0)
    ids = jnp.array([[0, 0, 1]])
    sine = lambda out: sum(jnp.sum(jnp.sin(x.astype(wide(x)))) for x in out)

    def slope(form, given):
        loss = jax.jit(lambda given, ids: sine(form(**given, segment_ids=ids)))
        grads = lambda given: jax.tree.leaves(jax.grad(loss)(given, ids))
        size = lambda given: sum(jnp.sum(g.astype(wide(g)) ** 2) for g in grads(given))
        return jax.jit(jax.grad(size))(given)

    got = slope(interpreted, given)
    with jax.enable_x64(True):
        want = slope(reference, {n: x.astype(jnp.float64) for n, x in given.items()})
    agree(got, want, 5e-2)


def wide(x):
    """At least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


# What is refused


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(interpret=False), "is for Hopper GPUs"),
        (dict(dtype=jnp.float32), "q, k and v must be bfloat16, not float32"),
        (dict(k=32), "those of k must be 64 or 128, not 32"),
        (dict(v=96), "those of v must be 64 or a multiple of 128, not 96"),
        (dict(block_size=32), "block_size must be 64 or None, not 32"),
    ],
)
def test_what_is_refused(change, sentence):
    call = dict(dtype=jnp.bfloat16, k=64, v=64, block_size=None, interpret=True) | change
    key, value = (jnp.zeros((1, 2, 1, call[x]), call["dtype"]) for x in "kv")
    gates = dict.fromkeys(("retain", "erase", "rate"), jnp.zeros((1, 2, 1)))
    with pytest.raises(
        ValueError, match=f"linear_memory: implementation='mosaic_gpu' .*{sentence}"
    ):
        nlx_kernels.linear_memory(
            key, key, value, **gates, block_size=call["block_size"],
            implementation="mosaic_gpu", interpret=call["interpret"],
        )  # fmt: skip


# Compiled for a Hopper GPU


@pytest.fixture(name="compiled")
def _compiled():
    if (package := ahead_of_time_gpu.missing()) is not None:
        pytest.skip(f'{package} is not installed (pip install "nlx[aot]")')
    return ahead_of_time_gpu.compile_for_gpu


def arguments(t=256):
    token = jax.ShapeDtypeStruct((1, t, 2, 128), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((1, t, 2), jnp.float32)
    names = ("retain", "erase", "rate")
    return dict.fromkeys("qkv", token) | dict.fromkeys(names, gate)


@pytest.mark.slow
def test_kernels_compile_as_last_recorded(compiled):
    """Both passes, as chosen by None; `nlx bench --record` writes what is compared with."""

    def slopes(given):
        return jax.vjp(lambda given: nlx_kernels.linear_memory(**given), given)[1](
            (jnp.ones((1, 256, 2, 128), jnp.bfloat16), jnp.ones((1, 2, 128, 128)))
        )

    forward = compiled(lambda given: nlx_kernels.linear_memory(**given), arguments()).kernels
    backward = compiled(slopes, arguments()).kernels
    assert set(forward) == {"linear_memory_prepare", "linear_memory_scan"}
    assert set(backward) == {f"linear_memory_{n}" for n in ("prepare", "scan", "reverse", "slopes")}
    recorded = json.loads(RECORDED.read_text())
    for name, kernel in {**forward, **backward}.items():
        assert kernel.registers <= 255
        assert kernel.spilled <= recorded[name]["spilled"], name


def test_none_takes_the_kernel_where_it_can(compiled):
    given = arguments() | dict.fromkeys("qkv", jax.ShapeDtypeStruct((1, 256, 2, 96), jnp.bfloat16))
    assert compiled(lambda given: nlx_kernels.linear_memory(**given)[0], given).kernels == {}
