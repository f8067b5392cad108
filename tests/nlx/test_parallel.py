"""Which mesh axis shards which axis of a parameter."""

import jax
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
    found = specs(hope, AbstractMesh((2, 4), ("data", "model")))
    mixer = "blocks.0.mixer."
    assert found["embedding.table.value"] == P("model", "data")
    assert found["readout.kernel.value"] == P("data", "model")
    assert found[mixer + "streams.key.map.kernel.value"] == P("data", "model")
    assert found[mixer + "streams.key.convolution.kernel.value"] == P(None, "model")
    assert found[mixer + "boxes.memory.w1.value"] == P("model", None, None)
    assert found[mixer + "boxes.memory.rate_bias.value"] == P("model")
    assert found[mixer + "output.kernel.value"] == P("model", "data")
    assert found["blocks.1.feed_forward.levels.1.mlp.up.kernel.value"] == P("data", "model")
    assert found["norm.scale.value"] == P("data")


def test_structure_is_that_of_the_parameters(hope):
    shardings = parallel.parameter_shardings(hope, AbstractMesh((2,), ("data",)))
    assert jax.tree.structure(shardings) == jax.tree.structure(nnx.state(hope, nnx.Param))


def test_an_axis_the_mesh_lacks_shards_nothing(hope):
    assert specs(hope, AbstractMesh((2,), ("data",)))["embedding.table.value"] == P(None, "data")


def test_a_mesh_axis_shards_one_axis_of_a_parameter(hope):
    rules = dict.fromkeys(parallel.RULES, "data")
    found = specs(hope, AbstractMesh((2,), ("data",)), rules=rules)
    assert found["embedding.table.value"] == P("data", None)


def test_bad_input_gets_a_sentence(hope):
    with pytest.raises(ValueError, match="`mesh` has 3 devices along 'data'; it must divide the"):
        parallel.parameter_shardings(hope, AbstractMesh((3,), ("data",)))
    with pytest.raises(ValueError, match="`rules` has no entry 'mlp', the axis of blocks.0"):
        parallel.parameter_shardings(hope, AbstractMesh((2,), ("data",)), {"embed": None})
