# SPDX-License-Identifier: Apache-2.0
"""linear_memory over pieces of a sequence: equal to the op on the whole.

`jax.vmap` with an axis name stands for the devices, but for the last tests.
"""

import functools

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from nlx_kernels import ahead_of_time
from nlx_kernels.linear_memory import shapes

AUTO = (jax.sharding.AxisType.Auto,) * 2
READS = ("after_write", "chunk_start")


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def split(given, pieces, **options):
    """The op on equal pieces, each as if it were on a device of its own."""
    state = given.get("state")
    cut = lambda x: x.reshape(len(x), pieces, -1, *x.shape[2:])
    parts = {n: cut(x) for n, x in given.items() if n != "state" and x is not None}
    run = lambda part: nlx_kernels.linear_memory_split(
        **part, state=state, axis_name="piece", **options
    )
    y, after = jax.vmap(run, in_axes=1, out_axes=(1, None), axis_name="piece")(parts)
    return y.reshape(given["v"].shape), after


@functools.cache
def form(gradients, pieces, reads=READS, **options):
    """Reads and states, and all gradients; pieces None: the op on the whole."""
    run = nlx_kernels.linear_memory if pieces is None else functools.partial(split, pieces=pieces)
    return gradients(
        lambda given: [
            run(given, read=r, **options) if pieces else run(**given, read=r, **options)
            for r in reads
        ]
    )


@pytest.mark.parametrize(
    ("pieces", "length", "block_size"),
    [(8, 9, 4), slow(5, 1, 4), slow(3, 20, 20)],
)
def test_pieces_are_the_whole(pieces, length, block_size, draw, gradients, x64, agree):
    shape = shapes.Shape(2, pieces * length, 2, 5, 3)
    edges = jnp.arange(shape.t) // length >= 2  # and one segment begins with the third piece
    for correlation, share in ((0.0, 0.05), (0.95, 0.02), (1.0, 0)):
        given = draw.linear_memory(shape, correlation)
        given["segment_ids"] = draw.segments(shape.b, shape.t, share) + 1000 * edges[None]
        want = form(gradients, None)(given)
        agree(form(gradients, pieces, block_size=block_size)(given), want, 1e-9)


@pytest.mark.slow
def test_no_segments_and_no_state(draw, gradients, x64, agree):
    given = draw.linear_memory(shapes.Shape(1, 48, 1, 3, 4), 0.9)
    del given["state"]
    agree(form(gradients, 4)(given), form(gradients, None)(given), 1e-9)


@pytest.mark.parametrize(
    ("dtype", "correlation", "values", "grads"),
    [
        slow(jnp.float32, 0.0, 2e-6, 5e-6),
        slow(jnp.float32, 0.9, 2e-6, 5e-6),
        (jnp.bfloat16, 0.0, 1e-2, 2e-2),
        (jnp.bfloat16, 0.9, 3e-2, 5e-2),
    ],
)
def test_low_precision(dtype, correlation, values, grads, draw, gradients, x64, agree):
    given = draw.linear_memory(shapes.Shape(2, 96, 2, 16, 8), correlation)
    low = {
        name: x.astype(dtype if name in ("q", "k", "v") else jnp.float32)
        for name, x in given.items()
    }
    wide = {name: x.astype(jnp.float64) for name, x in low.items()}
    outputs, slopes = form(gradients, 8, READS[:1])(low)
    assert [x.dtype for x in outputs] == [dtype, jnp.float32]
    want = form(gradients, None, READS[:1])(wide)
    agree(outputs, want[0], values)
    agree(slopes, want[1], grads)


@pytest.mark.slow
def test_kernels_serve_the_pieces(draw, gradients, x64, agree):
    given = draw.linear_memory(shapes.Shape(1, 12, 1, 3, 2))
    options = dict(implementation="pallas_tpu", interpret=True, block_size=4)
    got = form(gradients, 2, READS[:1], **options)(given)
    agree(got, form(gradients, None, READS[:1])(given), 1e-9)


@pytest.mark.parametrize("segments", [slow(False), True])
def test_what_is_not_finite_is_as_in_the_whole(segments, draw):
    """It spoils what follows, pieces later too, up to the next segment; never a slope beyond it."""
    given = draw.linear_memory(shapes.Shape(2, 12, 2, 4, 3))
    if segments:
        given["segment_ids"] = (jnp.arange(12)[None] >= 7) * jnp.ones((2, 1), jnp.int32)
    given["k"] = given["k"].at[0, 3, 1, 2].set(jnp.inf).at[1, 11, 0, 0].set(jnp.inf)
    loss = lambda v, run: jnp.sum(run(given | dict(v=v))[0][0, 8:] ** 2)
    pieces, whole = (
        functools.partial(split, pieces=4),
        lambda given: nlx_kernels.linear_memory(**given),
    )
    finite = lambda tree: jax.tree.map(np.isfinite, jax.device_get(tree))
    both = lambda run: jax.jit(lambda: (run(given), jax.grad(loss)(given["v"], run)))()
    (got, slope), (want, wanted) = finite(both(pieces)), finite(both(whole))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert slope.all() == wanted.all() == segments


@pytest.mark.parametrize("segments", [False, True])
def test_a_state_that_is_not_finite_is_as_in_the_whole(segments, draw):
    """Without segments it stays in its column; what a segment begins in the last piece is clean."""
    given = draw.linear_memory(shapes.Shape(2, 12, 2, 4, 3))
    if segments:
        given["segment_ids"] = (jnp.arange(12)[None] >= 10) * jnp.ones((2, 1), jnp.int32)
        given["k"] = given["k"].at[1, 3, 1, 2].set(jnp.inf)
    given["state"] = given["state"].at[0, 0, 0, 1].set(jnp.nan)
    finite = lambda run: jax.tree.map(np.isfinite, jax.device_get(jax.jit(run)(given)))
    got = finite(functools.partial(split, pieces=4))
    want = finite(lambda given: nlx_kernels.linear_memory(**given))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got[1].all() == segments
    assert got[0][0, 0, 0].any() != segments


def test_an_axis_that_is_none_is_refused(draw):
    sentence = (
        "linear_memory_split: axis_name is 'rows'; it must be an axis over which jax.shard_map "
        "splits \\(here none\\)"
    )
    with pytest.raises(ValueError, match=sentence):
        nlx_kernels.linear_memory_split(
            **draw.linear_memory(shapes.TESTS["token"]), axis_name="rows"
        )
    given = draw.linear_memory(shapes.TESTS["token"]) | dict(q=jnp.zeros((2, 3, 2, 5)))
    with pytest.raises(ValueError, match=r"linear_memory_split: k has shape .* with b=2, t=3"):
        jax.vmap(lambda _: nlx_kernels.linear_memory_split(**given, axis_name="a"), axis_name="a")(
            jnp.zeros(2)
        )


# On devices: with a mesh


def on_mesh(mesh, check_vma, **options):
    """given -> y and the state, tokens split over "sequence", rows over "data"."""
    token, row = PartitionSpec("data", "sequence"), PartitionSpec("data")

    def run(given):
        spec = {name: row if name == "state" else token for name in given}
        return jax.shard_map(
            lambda given: nlx_kernels.linear_memory_split(**given, axis_name="sequence", **options),
            mesh=mesh, in_specs=(spec,), out_specs=(token, row), check_vma=check_vma,
        )(given)  # fmt: skip

    return run


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_device_is_the_op(check_vma, draw):
    given = jax.tree.map(
        lambda x: x.astype(jnp.float32), draw.linear_memory(shapes.TESTS["ragged-63"])
    )
    mesh = jax.make_mesh((1, 1), ("data", "sequence"), axis_types=AUTO, devices=jax.devices()[:1])
    got = jax.jit(on_mesh(mesh, check_vma))(given)
    want = jax.jit(lambda given: nlx_kernels.linear_memory(**given))(given)
    assert all(jnp.array_equal(x, y) for x, y in zip(got, want, strict=True))


def eight_devices():
    """Values and slopes, and what is exchanged."""
    from conftest import Draw, agree, gradients

    jax.config.update("jax_enable_x64", True)
    draw = Draw()
    given = draw.linear_memory(shapes.Shape(2, 48, 2, 5, 3), 0.9)
    given["segment_ids"] = draw.segments(2, 48, 0.05)
    want = gradients(lambda given: nlx_kernels.linear_memory(**given))(given)
    for shape, check_vma in (((1, 8), True), ((2, 4), False)):
        mesh = jax.make_mesh(shape, ("data", "sequence"), axis_types=AUTO)
        agree(gradients(on_mesh(mesh, check_vma, block_size=4))(given), want, 1e-9)
        text = jax.jit(on_mesh(mesh, check_vma)).lower(given).compile().as_text()
        assert "all-gather" not in text


@pytest.mark.slow
def test_eight_devices(on_eight_devices):
    on_eight_devices(__file__, "eight_devices")


@pytest.mark.skipif(not ahead_of_time.available(), reason="libtpu is not installed")
def test_pieces_on_tpus_hold_the_kernels():
    mesh = ahead_of_time.tpu_mesh("v5p:2x2x1", (1, 4), ("data", "sequence"))
    at = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    token = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16, sharding=at)
    gate = jax.ShapeDtypeStruct((1, 256, 2), jnp.float32, sharding=at)
    given = dict.fromkeys("qkv", token) | dict.fromkeys(("retain", "erase", "rate"), gate)
    run = on_mesh(mesh, False)
    slopes = jax.grad(lambda given: sum(jnp.sum(x.astype(jnp.float32)) for x in run(given)))
    kernels = ahead_of_time.kernels_for_tpu(slopes, given, mesh=mesh)
    assert kernels == {"linear_memory", "linear_memory_backward"}
    # Where `shard_map` checks what varies no kernel can be: None takes XLA, a name is refused.
    assert not ahead_of_time.kernels_for_tpu(on_mesh(mesh, True), given, mesh=mesh)
    named = on_mesh(mesh, True, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"'pallas_tpu' needs jax.shard_map\(..., check_vma=False"):
        ahead_of_time.kernels_for_tpu(named, given, mesh=mesh)
