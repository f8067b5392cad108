# SPDX-License-Identifier: Apache-2.0
"""Training steps lowered and compiled for TPUs that are not there: the kernels are in them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from nlx_kernels import ahead_of_time

from nlx import nn, parallel, train

pytestmark = pytest.mark.skipif(
    not ahead_of_time.available(), reason='libtpu is not installed: pip install "nlx[aot]"'
)
HOPE = {"self_modifying_memory", "self_modifying_memory_backward"}


def step(name, mesh, batch, tokens, layers):
    """A step of gradient descent in bfloat16, and its arguments, as they are split."""
    config = dataclasses.replace(nn.preset(name), bfloat16=True, layers=layers)
    model = nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    split = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(split, params, parallel.parameter_shardings(model, mesh))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    loss = train.language_model_loss(graph)

    def descend(params, tokens):
        slopes = jax.grad(lambda params: loss(params, {"tokens": tokens}))(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, slopes)

    return descend, params, jax.ShapeDtypeStruct((batch, tokens + 1), jnp.int32, sharding=rows)


@pytest.mark.parametrize(("shape", "kernels"), [((4, 1), HOPE | {"cms_chain"}), ((2, 2), HOPE)])
def test_hopes_training_step_holds_its_kernels(shape, kernels):
    mesh = ahead_of_time.tpu_mesh("v5p:2x2x1", shape, ("data", "model"))
    run, *given = step("hope-340m", mesh, 4, 128, layers=1)
    assert ahead_of_time.kernels_for_tpu(run, *given, mesh=mesh) == kernels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope-340m", "hope-1.3b"])
def test_hopes_training_step_compiles_for_64_tpus(name):
    mesh = ahead_of_time.tpu_mesh("v5p:4x4x4", (16, 4), ("data", "model"))
    run, *given = step(name, mesh, 64, 4096, layers=2)
    report = ahead_of_time.compile_for_tpu(run, *given, topology="v5p:4x4x4", mesh=mesh)
    assert set(report.kernels) == HOPE
    assert report.arguments + report.temporaries < 95 * 2**30
