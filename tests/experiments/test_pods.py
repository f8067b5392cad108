# SPDX-License-Identifier: Apache-2.0
"""The table of compiled steps: its lines, its arithmetic, and one line for real."""

import json

import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from nlx_experiments import pods
from nlx_experiments.errors import Refused
from nlx_kernels import ahead_of_time

from nlx import nn, parallel

CHIPS = {"v5p:4x4x4": 64, "v5e:16x16": 256, "v5p:8x8x8": 512, "v5p:2x2x1": 4, "v5p:2x2x4": 16}


@pytest.mark.parametrize("name", pods.LINES)
def test_a_line_fills_its_chips_and_has_its_parameters(name):
    line = pods.LINES[name]
    made = pods.chosen(line)
    assert made.model.bfloat16
    assert made.model.remat is True
    count = CHIPS[line.topology]
    split = made.mesh.fsdp * (count // made.mesh.fsdp if made.mesh.data == -1 else 1)
    assert split == count
    assert made.batch % count == 0
    model = nnx.eval_shape(lambda: nn.LanguageModel(made.model, rngs=nnx.Rngs(0)))
    billions = float(name.split(",")[0].rpartition("-")[2].replace("340m", "0.34").strip("b"))
    assert nn.parameter_count(model) == pytest.approx(1e9 * billions, rel=0.05)
    sizes = dict(zip(parallel.AXES, (count // made.mesh.fsdp, made.mesh.fsdp, 1, 1), strict=True))
    parallel.parameter_shardings(model, AbstractMesh(tuple(sizes.values()), tuple(sizes)))


def test_bytes_on_paper_by_hand():
    assert pods.on_paper(1000, 1, 10) == 0
    assert pods.on_paper(1000, 4, 10) == pytest.approx(8 * 1000 * 3 / 4 / 10)
    gathered, summed = 4 * 1000 * 3 / 4, 4 * 1000 * 63 / 64
    assert pods.on_paper(1000, 64, 10) == pytest.approx((gathered + summed) / 10)


def record(devices, sent):
    return {
        "parameters": 1000, "devices": devices, "batch": 4 * devices, "length": 8,
        "bytes_per_device": {"all": 2**30, "of": 2**31}, "fits": True,
        "sent": {"all-gather": {"times": 2, "bytes": sent}},
        "exchanged_at_every_chunk": {}, "seconds_at_least": {"step": 0.25}, "mfu_at_most": 0.5,
        "compiled_in": 60.0,
    }  # fmt: skip


def test_the_tables():
    found = {"hope-340m, a": record(4, 3200), "hope-340m, b": record(16, 6400)}
    text = pods.shown(found)
    assert "| hope-340m, a | 0.00 | 1.0 of 2.0 | fits | 0 | nothing | 250 | 50 | 60 |" in text
    paper = lambda devices: f"{pods.on_paper(1000, devices, 32):,.0f}"
    assert f"| 4 | 100 | {paper(4)} |" in text
    assert f"| 16 | 200 | {paper(16)} |" in text
    assert f"| 6,144 |  | {paper(6144)} |" in text


def test_an_unknown_line_is_refused(tmp_path):
    with pytest.raises(Refused, match="`only` holds 'hope-9b'; it must be one of hope-1.3b, v5p"):
        pods.main(pods.Pods(only=("hope-9b",), runs=tmp_path, place=tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not ahead_of_time.available(), reason='no compiler: pip install "nlx[aot]"')
def test_a_line_is_compiled_once_and_kept(tmp_path, monkeypatch):
    options = pods.Tiny(runs=tmp_path / "runs", place=tmp_path)
    found = pods.main(options)
    assert found["hope-tiny, v5e:2x2"]["fits"]
    monkeypatch.setattr(pods.pod, "measure", lambda *_: pytest.fail("compiled again"))
    assert pods.main(options) == found
    cells = json.loads((tmp_path / "results" / "pods.json").read_text())["tasks"]
    assert "hope-tiny, v5e:2x2" in cells["pods"]["models"]
    assert "hope-tiny, v5e:2x2" in (tmp_path / "results" / "pods.md").read_text()
