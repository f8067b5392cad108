# SPDX-License-Identifier: Apache-2.0
"""Ops on eight simulated devices, rows over "data" and heads over "tensor": as on one device.

In float64, so that another order of sums can't pass for a mistake, or a mistake for it.
"""

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

B, T, H, D, F = 8, 10, 8, 4, 3
ROW, HEAD, BOTH = (PartitionSpec("data"), PartitionSpec("tensor"), PartitionSpec("data", "tensor"))
TOKEN = PartitionSpec("data", None, "tensor")
MESHES = ((4, 2), (8, 1), (2, 4))


class Numbers:
    """Random arrays, each with how a mesh splits it."""

    def __init__(self, rows):
        self.random, self.rows = np.random.default_rng(0), rows

    def token(self, *d, low=None, high=1.0):
        shape = (self.rows, T, H, *d)
        if low is None:
            return self.random.normal(size=shape) / max(1, sum(d)) ** 0.5, TOKEN
        return self.random.uniform(low, high, size=shape), TOKEN

    def of(self, spec, *shape):
        return self.random.normal(size=shape) / shape[-1] ** 0.5, spec


def linear_memory(n):
    gates = dict(retain=n.token(low=0.7), erase=n.token(low=0.0), rate=n.token(low=0.0))
    ids = (np.cumsum(n.random.uniform(size=(n.rows, T)) < 0.2, 1).astype(np.int32), ROW)
    state = n.of(BOTH, n.rows, H, D, F)
    given = dict(q=n.token(D), k=n.token(D), v=n.token(F), state=state, **gates)
    return given | dict(segment_ids=ids), dict(block_size=4)


def mlp_memory(n):
    gates = dict(rate=n.token(low=0.0, high=0.2), retain=n.token(low=0.7))
    more = dict(momentum=n.token(low=0.0, high=0.9), erase=n.token(low=0.0))
    given = dict(q=n.token(D), k=n.token(D), v=n.token(D), **gates, **more)
    return given | dict(weights=(n.of(HEAD, H, D, F), n.of(HEAD, H, F, D))), dict(chunk_size=4)


def self_modifying_memory(n):
    boxes = ("key", "value", "rate", "retain", "memory")
    parameters = nlx_kernels.SelfModifyingParameters(
        memories={box: (n.of(HEAD, H, D, F), n.of(HEAD, H, F, D)) for box in boxes},
        rate_readout={box: n.of(HEAD, H, D) for box in boxes},
        rate_bias={box: n.of(HEAD, H) for box in boxes},
        retain_readout=n.of(HEAD, H, D),
        retain_bias=n.of(HEAD, H),
    )
    given = dict(x=n.token(D), q=n.token(D), momentum=n.token(low=0.0), parameters=parameters)
    return given, dict(chunk_size=2, projection_chunk_size=4)


def cms_chain(n):
    up, down = PartitionSpec(None, "tensor"), PartitionSpec("tensor")
    shared = (n.of(PartitionSpec(), D), n.of(up, D, 8), n.of(down, 8, D), n.of(up, D, 8))
    x = (n.random.normal(size=(n.rows, T, D)), ROW)
    return dict(x=x, weights=(nlx_kernels.ChainBlock(*shared),) * 2), {}


OPS = {f.__name__: f for f in (linear_memory, mlp_memory, self_modifying_memory, cms_chain)}


def both_ways(op, options):
    """given -> outputs, and the slopes of all that is no integer."""

    def floats(tree):
        return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)

    def weighed(some, given):
        given = jax.tree.map(
            lambda x, y: y if x is None else x, some, given, is_leaf=lambda x: x is None
        )
        outputs = floats(op(**given, **options))
        waves = [x * jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in jax.tree.leaves(outputs)]
        return sum(map(jnp.sum, waves)), outputs

    def run(given):
        slopes, outputs = jax.grad(weighed, has_aux=True)(floats(given), given)
        return outputs, slopes

    return run


def compare(name, implementation, shape, rows):
    """Raises unless values and slopes on a mesh are those on one device, each with its own part."""
    pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], PartitionSpec)
    described, options = OPS[name](Numbers(rows))
    given = jax.tree.map(lambda x: jnp.asarray(x[0]), described, is_leaf=pair)
    specs = jax.tree.map(lambda x: x[1], described, is_leaf=pair)
    op = getattr(nlx_kernels, name)
    wanted = jax.jit(both_ways(op, options | dict(implementation="xla")))(given)
    options |= dict(implementation=implementation, interpret=implementation == "pallas_tpu")
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=auto)

    def place(x, spec):
        sizes = [mesh.shape.get(axis, 1) for axis in spec]
        fits = all(n % size == 0 for n, size in zip(x.shape, sizes, strict=False))
        return jax.device_put(x, NamedSharding(mesh, spec if fits else PartitionSpec()))

    given = jax.tree.map(place, given, specs)
    with jax.set_mesh(mesh):
        compiled = jax.jit(both_ways(op, options)).lower(given).compile()
        got = compiled(given)
    agree = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jax.tree.map(agree, got, wanted)
    y = jax.tree.leaves(got)[0]
    parts = (1 if rows % shape[0] else shape[0]) * (1 if name == "cms_chain" else shape[1])
    assert y.size == parts * y.addressable_shards[0].data.size, (name, implementation, shape)
    assert "all-gather" not in compiled.as_text(), (name, implementation, shape)


def eight_devices(cases):
    """Runs the cases, where there are eight devices."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for case in cases:
        compare(*case)


@pytest.mark.parametrize(
    "cases",
    [
        [("linear_memory", "pallas_tpu", (2, 4), 8), ("linear_memory", "pallas_tpu", (4, 2), 6)],
        *(
            pytest.param([(op, "xla", mesh, 8) for mesh in meshes], marks=pytest.mark.slow)
            for op, meshes in zip(OPS, (MESHES, MESHES, MESHES[:2], MESHES), strict=True)
        ),
        *(
            pytest.param([(op, "pallas_tpu", mesh, 8)], marks=pytest.mark.slow)
            for op, mesh in (
                ("mlp_memory", (4, 2)),
                ("self_modifying_memory", (2, 4)),
                ("cms_chain", (8, 1)),
            )
        ),
    ],
    ids=lambda cases: "-".join(cases[0][:2]),
)
def test_a_mesh_changes_nothing(cases, on_eight_devices):
    on_eight_devices(__file__, "eight_devices", cases)
