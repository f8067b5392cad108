# SPDX-License-Identifier: Apache-2.0
"""Training steps lowered and compiled for devices that are not there: the kernels are in them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from nlx_kernels import ahead_of_time, ahead_of_time_gpu
from nlx_kernels.cms_chain.api import OFFERED as OF_CHAIN
from nlx_kernels.linear_memory.api import OFFERED as OF_LINEAR
from nlx_kernels.mlp_memory.api import OFFERED as OF_MLP
from nlx_kernels.self_modifying_memory.api import OFFERED as OF_HOPE

from nlx import nn, parallel, train

for_tpu = pytest.mark.skipif(
    not ahead_of_time.available(), reason='libtpu is not installed: pip install "nlx[aot]"'
)
for_gpu = pytest.mark.skipif(
    ahead_of_time_gpu.missing() is not None, reason='no CUDA compiler: pip install "nlx[aot]"'
)
OFFERED = {
    "cms_chain": OF_CHAIN,
    "linear_memory": OF_LINEAR,
    "mlp_memory": OF_MLP,
    "self_modifying_memory": OF_HOPE,
}
HOPE = {"self_modifying_memory", "self_modifying_memory_backward"}
MLP = {"mlp_memory", "mlp_memory_backward"}
LINEAR = {"linear_memory", "linear_memory_backward"}
MOSAIC = {f"linear_memory_{part}" for part in ("prepare", "scan", "reverse", "slopes")}
CMS, WHOLE = {"cms_chain"}, None


def step(name, batch, tokens, layers, mesh=None):
    """A step of gradient descent in bfloat16, and its arguments, split as the mesh says."""
    config = nn.preset(name)
    config = dataclasses.replace(config, bfloat16=True, layers=layers or config.layers)
    model = nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    rows = None
    if mesh is not None:
        split = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        params = jax.tree.map(split, params, parallel.parameter_shardings(model, mesh))
        rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    loss = train.language_model_loss(graph)

    def descend(params, tokens):
        slopes = jax.grad(lambda params: loss(params, {"tokens": tokens}))(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, slopes)

    return descend, params, jax.ShapeDtypeStruct((batch, tokens + 1), jnp.int32, sharding=rows)


@pytest.fixture(name="plain")
def _plain(monkeypatch):
    """The ops of which the XLA form was traced, by name."""
    found = set()

    def spied(name, form):
        def call(*arguments, **options):
            found.add(name)
            return form(*arguments, **options)

        return call

    for name, offered in OFFERED.items():
        monkeypatch.setitem(offered, "xla", spied(name, offered["xla"]))
    return found


slow = pytest.mark.slow


# Lowered: all kernels are in a step, and what has none for the device is known by name


@for_tpu
@pytest.mark.parametrize(
    ("name", "layers", "shape", "kernels", "as_xla"),
    [
        ("hope-340m", 1, (4, 1), HOPE | CMS, set()),
        ("hope-340m", 1, (2, 2), HOPE, CMS),  # no kernel for weights split over "tensor"
        pytest.param("hope-340m", WHOLE, (4, 1), HOPE | CMS, set(), marks=slow),
        pytest.param("hope-1.3b", WHOLE, (2, 2), HOPE, CMS, marks=slow),
        ("hope-attention-340m", WHOLE, (4, 1), CMS, set()),
        pytest.param("hope-attention-1.3b", WHOLE, (4, 1), CMS, set(), marks=slow),
        ("gated-deltanet-340m", WHOLE, (4, 1), LINEAR | CMS, set()),
        pytest.param("gated-deltanet-1.3b", WHOLE, (2, 2), LINEAR, CMS, marks=slow),
        # its four persistent tokens are less than a chunk: those are the XLA form's
        pytest.param("titans-lmm-340m", WHOLE, (4, 1), MLP | CMS, {"mlp_memory"}, marks=slow),
    ],
)
def test_a_step_for_tpus_holds_its_kernels(name, layers, shape, kernels, as_xla, plain):
    mesh = ahead_of_time.tpu_mesh("v5p:2x2x1", shape, ("fsdp", "tensor"))
    run, *given = step(name, 4, 128, layers, mesh)
    assert ahead_of_time.kernels_for_tpu(run, *given, mesh=mesh) == kernels
    assert plain == as_xla


@for_gpu
@pytest.mark.parametrize(
    ("name", "kernels", "as_xla"),
    [
        ("gated-deltanet-340m", MOSAIC, CMS),
        pytest.param("deltanet-1.3b", MOSAIC, CMS, marks=slow),
        pytest.param("gated-deltanet-1.3b", MOSAIC, CMS, marks=slow),  # values of 256 channels
        pytest.param("hope-340m", set(), CMS | {"self_modifying_memory"}, marks=slow),
        pytest.param("hope-1.3b", set(), CMS | {"self_modifying_memory"}, marks=slow),
        pytest.param("hope-attention-1.3b", set(), CMS, marks=slow),
        pytest.param("titans-lmm-340m", set(), CMS | {"mlp_memory"}, marks=slow),
    ],
)
def test_a_step_for_a_gpu_holds_its_kernels(name, kernels, as_xla, plain):
    run, *given = step(name, 1, 128, WHOLE)
    assert ahead_of_time_gpu.kernels_for_gpu(run, *given, target="h200") == kernels
    assert plain == as_xla


# Compiled


@for_tpu
@slow
@pytest.mark.parametrize("name", ["hope-340m", "hope-1.3b"])
def test_hopes_training_step_compiles_for_64_tpus(name):
    mesh = ahead_of_time.tpu_mesh("v5p:4x4x4", (16, 4), ("fsdp", "tensor"))
    run, *given = step(name, 64, 4096, 2, mesh)
    report = ahead_of_time.compile_for_tpu(run, *given, topology="v5p:4x4x4", mesh=mesh)
    assert set(report.kernels) == HOPE
    assert report.arguments + report.temporaries < 95 * 2**30


@for_gpu
@slow
@pytest.mark.parametrize(
    ("name", "kernels"), [("gated-deltanet-340m", MOSAIC), ("hope-340m", set())]
)
def test_a_training_step_compiles_for_one_h200(name, kernels):
    run, *given = step(name, 1, 4096, layers=2)
    report = ahead_of_time_gpu.compile_for_gpu(run, *given, target="h200")
    assert set(report.kernels) == kernels
    assert report.arguments + report.temporaries < 141 * 10**9
