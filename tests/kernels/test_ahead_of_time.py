# SPDX-License-Identifier: Apache-2.0
"""Every TPU kernel compiled to machine code for TPUs that are not there, and what it takes of them.

The figures of VMEM are compared with those recorded in ahead_of_time_tpu.json, which
`NLX_RECORD=1 python -m pytest -m "" tests/kernels/test_ahead_of_time.py` writes anew.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels import ahead_of_time

RECORD = pathlib.Path(__file__).with_name("ahead_of_time_tpu.json")
BOXES = ("key", "value", "rate", "retain", "memory")
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
pytestmark = pytest.mark.skipif(
    not ahead_of_time.available(), reason='libtpu is not installed: pip install "nlx[aot]"'
)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def linear_memory(dtype, d, block_size):
    token, gate = array(1, 2 * block_size, 4, d, dtype=dtype), array(1, 2 * block_size, 4)
    given = dict(q=token, k=token, v=token, retain=gate, erase=gate, rate=gate)
    return given, lambda given: nlx_kernels.linear_memory(**given, block_size=block_size)


def mlp_memory(dtype, d, f, chunk_size):
    token, gate = array(1, 2 * chunk_size, 1, d, dtype=dtype), array(1, 2 * chunk_size, 1)
    given = dict(q=token, k=token, v=token, rate=gate, retain=gate, momentum=gate, erase=gate)
    given["weights"] = array(1, d, f), array(1, f, d)
    return given, lambda given: nlx_kernels.mlp_memory(**given, chunk_size=chunk_size)


def self_modifying_memory(dtype, d, f, chunk_size):
    token = array(1, 4 * chunk_size, 1, d, dtype=dtype)
    given = dict(x=token, q=token, momentum=array(1, 4 * chunk_size, 1))
    given["parameters"] = nlx_kernels.SelfModifyingParameters(
        memories=dict.fromkeys(BOXES, (array(1, d, f), array(1, f, d))),
        rate_readout=dict.fromkeys(BOXES, array(1, d)),
        rate_bias=dict.fromkeys(BOXES, array(1)),
        retain_readout=array(1, d),
        retain_bias=array(1),
    )
    sizes = dict(chunk_size=chunk_size, projection_chunk_size=4 * chunk_size)
    return given, lambda given: nlx_kernels.self_modifying_memory(**given, **sizes)


def from_a_state(dtype, make, *sizes):
    """The call that goes on from what such a call leaves."""
    given, op = make(dtype, *sizes)
    state = jax.eval_shape(lambda given: op(given)[1], given)
    if make is mlp_memory:
        given["weights"] = None
    return given | dict(state=state), op


def cms_chain(dtype, d, f):
    row = nlx_kernels.ChainBlock(array(2, d), array(2, d, f), array(2, f, d), array(2, d, f))
    shared = nlx_kernels.ChainBlock(array(d), array(d, f), array(f, d))
    given = dict(x=array(2, 512, d, dtype=dtype), weights=(row, shared))
    return given, lambda given: nlx_kernels.cms_chain(**given)


def fast_update(dtype, d, f):
    weights = (array(2, d, f, dtype=dtype), array(2, f, d, dtype=dtype), array(2, d, dtype=dtype))
    wide = tuple(array(*w.shape) for w in weights)
    carry = nlx_kernels.FastCarry(wide, array(2, dtype=jnp.int32), wide)
    given = dict(weights=weights, carry=carry, gradient=weights)
    return given, lambda given: nlx_kernels.fast_update(
        **given, fires=True, rate=0.1, momentum=0.9, decay=0.1
    )


CASES = {
    "update d=1024 f=2048": (fast_update, 1024, 2048),
    "cms d=256 f=320": (cms_chain, 256, 320),
    "cms d=1024 f=2048": (cms_chain, 1024, 2048),
    "linear d=64 block=16": (linear_memory, 64, 16),
    "linear d=128 block=64": (linear_memory, 128, 64),
    "linear d=96 block=24": (linear_memory, 96, 24),
    "mlp d=64 f=256 chunk=16": (mlp_memory, 64, 256, 16),
    "mlp d=128 f=512 chunk=64": (mlp_memory, 128, 512, 64),
    "mlp d=256 f=1024 chunk=64": (mlp_memory, 256, 1024, 64),
    "mlp d=64 f=256 chunk=16 state": (from_a_state, mlp_memory, 64, 256, 16),
    "mlp d=128 f=512 chunk=64 state": (from_a_state, mlp_memory, 128, 512, 64),
    "hope d=64 f=64 chunk=16 state": (from_a_state, self_modifying_memory, 64, 64, 16),
    "hope d=64 f=64 chunk=16": (self_modifying_memory, 64, 64, 16),
    "hope d=64 f=256 chunk=64": (self_modifying_memory, 64, 256, 64),
    "hope d=128 f=128 chunk=64": (self_modifying_memory, 128, 128, 64),
}
QUICK = (
    "update d=1024 f=2048",
    "cms d=256 f=320",
    "linear d=64 block=16",
    "mlp d=64 f=256 chunk=16",
    "hope d=64 f=64 chunk=16",
    "mlp d=64 f=256 chunk=16 state",
)


def table():
    for case in CASES:
        for dtype in ("bfloat16", "float32") if case in QUICK else ("bfloat16",):
            for topology in TOPOLOGIES:
                quick = case in QUICK and dtype == "bfloat16" and topology == "v5e:2x2"
                marks = () if quick else pytest.mark.slow
                yield pytest.param(f"{case} {dtype}", topology, marks=marks)


@pytest.mark.parametrize(("name", "topology"), list(table()))
def test_compiles(name, topology):
    case, dtype = name.rsplit(" ", 1)
    make, *sizes = CASES[case]
    given, op = make(jnp.dtype(dtype), *sizes)

    def both(given):
        if make is fast_update:
            return op(given)
        floats = lambda out: [x for x in jax.tree.leaves(out) if x.dtype != jnp.int32]
        loss = lambda given: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in floats(op(given)))
        return jax.value_and_grad(loss, allow_int=True)(given)

    report = ahead_of_time.compile_for_tpu(both, given, topology=topology)
    op_name = (sizes[0] if make is from_a_state else make).__name__
    own = set() if make in (cms_chain, fast_update) else {f"{op_name}_backward"}
    assert set(report.kernels) == {op_name} | own
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("NLX_RECORD"):
        recorded.setdefault(name, {})[topology] = report.kernels
        RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
        return
    for kernel, held in recorded[name][topology].items():
        assert report.kernels[kernel] <= 1.05 * held, kernel


def test_the_estimate_is_not_below_what_the_compiler_takes():
    """What is refused is refused for what a kernel needs; what is not refused fits."""
    from nlx_kernels import _tpu

    recorded = json.loads(RECORD.read_text())
    held = [n for case in recorded.values() for row in case.values() for n in row.values()]
    assert max(held) <= _tpu.VMEM_LIMIT


def test_a_kernel_that_takes_too_much_is_refused_by_the_compiler(monkeypatch):
    """The compiler, not only our estimate, knows how much fast memory there is."""
    from nlx_kernels import _tpu

    monkeypatch.setattr(_tpu, "needs", lambda *_: 0)
    monkeypatch.setattr(_tpu, "VMEM_LIMIT", 2**16)
    given, op = linear_memory(jnp.dtype("bfloat16"), 64, 16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        ahead_of_time.compile_for_tpu(op, given, topology="v5e:2x2")


def test_another_topology_and_mesh():
    mesh = ahead_of_time.tpu_mesh("v5p:2x2x1", (2, 2), ("data", "model"))
    assert mesh.shape == {"data": 2, "model": 2}
    with pytest.raises(ValueError, match="has 8 devices; v5e:2x2 has 4"):
        ahead_of_time.tpu_mesh("v5e:2x2", (8,))
