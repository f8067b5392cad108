"""Which mesh axis shards which axis of a parameter."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from nlx import nn, parallel


@pytest.fixture(scope="module")
def hope():
    return nnx.eval_shape(lambda: nn.LanguageModel(nn.preset("hope-tiny"), rngs=nnx.Rngs(0)))


def specs(model, mesh, **kwargs):
    shardings = parallel.parameter_shardings(model, mesh, **kwargs)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }


def test_axes_go_where_the_table_says(hope):
    found = specs(hope, AbstractMesh((2, 4), ("fsdp", "tensor")))
    mixer = "blocks.0.mixer."
    assert found["embedding.table.value"] == P("tensor", "fsdp")
    assert found["readout.kernel.value"] == P("fsdp", "tensor")
    assert found[mixer + "streams.key.map.kernel.value"] == P("fsdp", "tensor")
    assert found[mixer + "streams.key.convolution.kernel.value"] == P(None, "tensor")
    assert found[mixer + "boxes.memory.w1.value"] == P("tensor", None, None)
    assert found[mixer + "boxes.memory.rate_bias.value"] == P("tensor")
    assert found[mixer + "output.kernel.value"] == P("tensor", "fsdp")
    assert found["blocks.1.feed_forward.levels.1.mlp.up.kernel.value"] == P("fsdp", "tensor")
    assert found["norm.scale.value"] == P("fsdp")


def test_structure_is_that_of_the_parameters(hope):
    shardings = parallel.parameter_shardings(hope, AbstractMesh((2,), ("fsdp",)))
    assert jax.tree.structure(shardings) == jax.tree.structure(nnx.state(hope, nnx.Param))


def test_an_axis_the_mesh_lacks_shards_nothing(hope):
    assert specs(hope, AbstractMesh((2,), ("fsdp",)))["embedding.table.value"] == P(None, "fsdp")


def test_a_mesh_axis_shards_one_axis_of_a_parameter(hope):
    rules = dict.fromkeys(parallel.RULES, "fsdp")
    found = specs(hope, AbstractMesh((2,), ("fsdp",)), rules=rules)
    assert found["embedding.table.value"] == P("fsdp", None)


def test_bad_input_gets_a_sentence(hope):
    with pytest.raises(ValueError, match="`mesh` has 3 devices along 'fsdp'; it must divide the"):
        parallel.parameter_shardings(hope, AbstractMesh((3,), ("fsdp",)))
    with pytest.raises(ValueError, match="`rules` has no entry 'mlp', the axis of blocks.0"):
        parallel.parameter_shardings(hope, AbstractMesh((2,), ("fsdp",)), {"embed": None})


def test_a_mesh_has_four_axes_and_takes_all_devices():
    mesh = parallel.make_mesh()
    assert dict(mesh.shape) == dict.fromkeys(parallel.AXES, 1) | {"data": len(jax.devices())}


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (dict(data=3), "the mesh is data 3, fsdp 1, .*; there are 8 devices, and it must have as"),
        (dict(tensor=3), "the mesh is data 2, .* tensor 3, .*; there are 8 devices"),
        (dict(tensor=16), "the mesh is data 0, .* tensor 16, .*; there are 8 devices"),
        (dict(fsdp=0), "`fsdp` is 0; it must be an integer >= 1, or -1"),
        (dict(fsdp=True), "`fsdp` is True; it must be an integer >= 1, or -1"),
        (dict(fsdp=-1), "`fsdp` is -1, and so is `data`; only one axis can take all"),
    ],
)
def test_a_mesh_that_cannot_be_made_gets_a_sentence(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallel.make_mesh(**sizes, devices=[None] * 8)


def test_what_a_mesh_must_divide_is_checked():
    mesh = AbstractMesh((2, 2, 2, 2), parallel.AXES)
    parallel.check_sizes(mesh, batch=8, length=6, heads=4)
    with pytest.raises(ValueError, match="`batch` is 6; it must be a multiple of 4.*data 2 x"):
        parallel.check_sizes(mesh, batch=6, length=6, heads=4)
    with pytest.raises(ValueError, match="`length` is 7; it must be a multiple of 2"):
        parallel.check_sizes(mesh, batch=8, length=7, heads=4)
    with pytest.raises(ValueError, match="`heads` is 2; it must be a multiple of 4"):
        parallel.check_sizes(mesh, batch=8, length=6, heads=2)


def test_batches_and_states_are_split_by_rows(hope):
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    assert parallel.batch_sharding(mesh).spec == P(("data", "fsdp"))
    for rows, spec in ((8, P(("data", "fsdp"))), (6, P(None))):
        made = lambda rows=rows: nn.LanguageModel(hope.config, rngs=nnx.Rngs(0)).init_state(rows)
        state = jax.eval_shape(made)
        assert {s.spec for s in jax.tree.leaves(parallel.state_shardings(state, mesh))} == {spec}


def test_without_a_mesh_nothing_is_split():
    x = jnp.ones((2, 4, 4))
    assert parallel.by_tokens(x) is x
    assert parallel.by_heads(x) is x
