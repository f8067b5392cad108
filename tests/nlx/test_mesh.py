# SPDX-License-Identifier: Apache-2.0
"""Whole models on meshes of eight simulated devices: loss and slopes are those of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import collectives

from nlx import nn, parallel, train

MESHES = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "tensor": dict(data=2, tensor=4),
    "sequence": dict(data=2, sequence=4),
    "all": dict(data=1, fsdp=2, tensor=2, sequence=2),
}
# Eight rows of 32 tokens, two segments in some; heads that every axis divides.
B, T = 8, 32
SIZES = dict(vocabulary=64, width=32, heads=4, layers=2, hidden=16, chunk_size=4)
FIELDS = dict(projection_chunk_size=8, memory_hidden=4, window=8)


def config(name):
    made = nn.preset(f"{name}-tiny")
    pattern = len(made.mixers)
    sizes = SIZES | FIELDS | {"layers": max(2, pattern)}
    return dataclasses.replace(made, **sizes)


def compare(name, mesh_names):
    """Raises unless loss and slopes on each mesh are those on one device, in float64."""
    made = config(name)
    model = nn.LanguageModel(made, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (B, T + 1))
    segments = np.cumsum(random.uniform(size=tokens.shape) < 0.05, 1)
    batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)}
    both = lambda params, batch: jax.value_and_grad(train.language_model_loss(graph))(params, batch)
    wanted = jax.jit(both)(params, batch)
    for mesh_name in mesh_names:
        mesh = parallel.make_mesh(**MESHES[mesh_name])
        placed = jax.device_put(params, parallel.parameter_shardings(model, mesh))
        rows = jax.device_put(batch, parallel.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            compiled = jax.jit(both).lower(placed, rows).compile()
        got = compiled(placed, rows)
        agree = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        jax.tree.map(agree, got, wanted)
        found = collectives.in_loops_of_loops(compiled.as_text())
        assert not found, (name, mesh_name, found)


def eight_devices(name, mesh_names):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    sizes = lambda **given: tuple(parallel.make_mesh(**given).shape.values())
    assert sizes(fsdp=2, tensor=2) == (2, 2, 2, 1)
    assert sizes(data=2, sequence=-1) == (2, 1, 1, 4)
    compare(name, mesh_names)


def in_bfloat16(name, mesh_name):
    """Loss and slopes in bfloat16, blocks made again, on a mesh and on one device.

    Sums in another order are of other bits: what is compared is how far both are from float32.
    """
    jax.config.update("jax_numpy_rank_promotion", "raise")
    narrow = dataclasses.replace(config(name), bfloat16=True, remat=True)
    random = np.random.default_rng(0)
    batch = {"tokens": jnp.asarray(random.integers(0, 64, (B, T + 1)))}
    found = {}
    for told, made in {"wide": config(name), "narrow": narrow, "on a mesh": narrow}.items():
        model = nn.LanguageModel(made, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)
        both = jax.jit(jax.value_and_grad(train.language_model_loss(graph)))
        if told == "on a mesh":
            mesh = parallel.make_mesh(**MESHES[mesh_name])
            params = jax.device_put(params, parallel.parameter_shardings(model, mesh))
            with jax.set_mesh(mesh):
                found[told] = both(params, jax.device_put(batch, parallel.batch_sharding(mesh)))
        else:
            found[told] = both(params, batch)
    flat = {k: np.concatenate([np.ravel(x) for x in jax.tree.leaves(f)]) for k, f in found.items()}
    apart = {k: np.linalg.norm(flat[k] - flat["wide"]) for k in ("narrow", "on a mesh")}
    size = np.linalg.norm(flat["wide"])
    assert 1e-4 * size < apart["narrow"] < 0.1 * size  # it is in bfloat16
    assert apart["on a mesh"] < 1.5 * apart["narrow"], apart


def token_by_token(name):
    """A prompt is read and continued on a mesh as on one device, states on their devices."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    model = nn.LanguageModel(config(name), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (B, 20)))

    def read(params, tokens, state):
        return nnx.merge(graph, params)(tokens, state)

    def all_of(params, tokens, state):
        whole, state = jax.jit(read)(params, tokens[:, :16], state)
        parts, step = [whole], jax.jit(read)
        for n in range(16, 20):
            one, state = step(params, tokens[:, n : n + 1], state)
            parts.append(one)
        return np.concatenate(parts, 1), state

    wanted, left = all_of(params, tokens, model.init_state(B))
    mesh = parallel.make_mesh(**MESHES["tensor"])
    placed = jax.device_put(params, parallel.parameter_shardings(model, mesh))
    state = model.init_state(B)
    state = jax.device_put(state, parallel.state_shardings(state, mesh))
    with jax.set_mesh(mesh):
        got, after = all_of(placed, jax.device_put(tokens, parallel.batch_sharding(mesh)), state)
    agree = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    agree(got, wanted)
    jax.tree.map(agree, after, left)
    rows = [x for x in jax.tree.leaves(after) if x.ndim and x.shape[0] == B]
    assert rows
    whole = [x.shape for x in rows if x.sharding.shard_shape(x.shape)[0] != B // 2]
    assert not whole, whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope", "titans-mac"])
def test_bfloat16_and_blocks_made_again(name, on_eight_devices):
    on_eight_devices(__file__, "in_bfloat16", name, "all")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope", "titans-mac", "transformer++"])
def test_reading_goes_on_with_a_state(name, on_eight_devices):
    on_eight_devices(__file__, "token_by_token", name)


@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("hope", ["all"]),
        *(
            pytest.param(name, list(MESHES), marks=pytest.mark.slow)
            for name in ("hope", "titans-mac", "transformer++")
        ),
        *(
            pytest.param(name, ["all"], marks=pytest.mark.slow)
            for name in ("gated-deltanet", "titans-lmm", "samba")
        ),
    ],
)
def test_a_mesh_changes_nothing(name, meshes, on_eight_devices):
    on_eight_devices(__file__, "eight_devices", name, meshes)
