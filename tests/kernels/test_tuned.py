# SPDX-License-Identifier: Apache-2.0
"""Block sizes from measurements: used, harmless, and missing or damaged."""

import functools
import json

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels import _tuned


def tokens(draw, t, width):
    key, gate = draw.keys(1, t, 1, width), draw.gate(1, t, 1)
    given = dict(q=key, k=key, v=draw.normal(1, t, 1, width), retain=gate, erase=gate, rate=gate)
    return jax.tree.map(lambda x: x.astype(jnp.float32), given)


def call(given, **options):
    return nlx_kernels.linear_memory(**given, **options)


def blocks(loops, given, **options):
    """How many blocks the tokens are cut into."""
    run = functools.partial(call, **options, implementation="xla")
    return max(loops(jax.make_jaxpr(run)(given).jaxpr))


@pytest.fixture(name="tuned")
def _tuned_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    return tmp_path


def test_none_takes_what_was_measured_for_this_kind_of_device(tuned, draw, loops):
    (tuned / "cpu.json").write_text('{"linear_memory float32 4": {"block_size": 16}}')
    (tuned / "nvidia-h200.json").write_text('{"linear_memory float32 4": {"block_size": 32}}')
    given = tokens(draw, 128, 4)
    assert blocks(loops, given) == 8
    assert blocks(loops, given, block_size=32) == 4
    assert blocks(loops, tokens(draw, 128, 5)) == 2  # no entry: 64
    kind = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        assert blocks(loops, given) == 4


def test_what_is_shipped_changes_nothing_but_speed(draw, gradients, agree):
    files = list(_tuned.FOLDER.glob("*.json"))
    assert files
    for name, entry in (pair for file in files for pair in json.loads(file.read_text()).items()):
        op, dtype, width = name.split()
        assert op == "linear_memory"
        given = tokens(draw, 100, int(width))
        given |= {name: given[name].astype(dtype) for name in "qkv"}
        form = lambda **how: gradients(functools.partial(call, **how))
        got = form(implementation="xla", block_size=entry["block_size"])(given)
        rounding = 1e-2 if dtype == "bfloat16" else 5e-6
        agree(got, form(implementation="reference")(given), rounding)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 16}', '{"a": {}}', '{"a": {"block_size": 0}}'])
def test_a_damaged_file_gets_a_sentence(text, tuned, draw):
    (tuned / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match="cpu.json is damaged; it must hold a positive whole"):
        nlx_kernels.linear_memory(**tokens(draw, 3, 4), implementation="xla")


def test_a_kind_without_a_file_has_the_default(tuned):
    del tuned
    assert _tuned.block_size("linear_memory", jnp.zeros((1, 4)), jnp.zeros((1, 4))) == 64
