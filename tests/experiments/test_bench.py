# SPDX-License-Identifier: Apache-2.0
"""`nlx bench`: what it counts, what it times and writes, at tiny sizes."""

import json

import jax
import pytest
from nlx_experiments import bench, bench_fla, bench_ops, bench_tune
from nlx_experiments.errors import Refused
from nlx_kernels import _tuned, ahead_of_time
from nlx_kernels.linear_memory.shapes import Shape

TINY = {"linear_memory": {"cpu": bench_ops.linear(Shape(1, 8, 2, 4, 4))}}


def test_every_workload_is_a_call_that_fits_its_op():
    for shapes in bench_ops.workloads().values():
        for workload in shapes.values():
            y = jax.eval_shape(lambda w=workload: w.call(w.make(), "xla"))
            assert y.shape[1] * y.shape[0] in (workload.tokens, workload.tokens // y.shape[2])


def test_counts_of_a_token_and_head():
    """128 channels, 64 tokens a block: what reference papers' formulas give."""
    cost = bench_ops.workloads()["linear_memory"]["batch"].cost
    assert cost.flops == (6 * 128**2 + 8 * 64 * 128, 22 * 128**2 + 32 * 64 * 128)
    assert cost.bytes == (8 * 128, 22 * 128)
    workload = bench_ops.Workload(dict, None, 10**6, bench_ops.Cost((1000, 0), (10, 0)))
    rates = bench_ops.rates(workload, "forward", 2.0, {"TFLOP/s": 5.0, "GB/s": 10.0})
    assert list(rates.values()) == pytest.approx([2.0, 0.5, 5.0, 10.0, 50.0])


def test_bench_times_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_ops, "workloads", lambda: TINY)
    monkeypatch.setattr(bench_ops, "ceilings", lambda *_: {"TFLOP/s": 1.0, "GB/s": 1.0})
    bench.main(bench.Bench(out=tmp_path, implementations=("xla", "reference")))
    lines = json.loads((tmp_path / "bench.json").read_text())["lines"]
    assert [line["implementation"] for line in lines] == ["xla"] * 2 + ["reference"] * 2
    assert all(line["ms"] > 0 for line in lines)
    assert (tmp_path / "bench.md").exists()
    assert (tmp_path / "bench.png").exists()
    assert "ns/token/head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(ops=("nonsense",)), "there is no op 'nonsense' to time"),
        (dict(shapes=("nonsense",)), "no op has a shape called 'nonsense'"),
        (dict(ahead_of_time="h900"), "`ahead_of_time` is 'h900'; it must be h100, h200, or TPUs"),
    ],
)
def test_what_is_refused(options, sentence, tmp_path):
    with pytest.raises(Refused, match=sentence):
        bench.main(bench.Bench(out=tmp_path, **options))


def test_the_check_against_the_reference_finds_a_difference():
    given, ids = bench_fla.case(0.5, b=1, t=5, h=1, d=4)
    given = {n: x.astype("float32") for n, x in given.items()}
    got, want = (bench_fla.check(f, "chunk_start", True)(given, ids) for f in ("xla", "reference"))
    one, other = got(given, ids), want(given, ids)
    assert max(bench_fla._distance(one[n], other[n]) for n in other) < 1e-5
    changed = other | {"dk": other["dk"] * 1.01}
    assert bench_fla._distance(one["dk"], changed["dk"]) > 5e-3


@pytest.mark.slow
@pytest.mark.skipif(not ahead_of_time.available(), reason='needs libtpu: pip install "nlx[aot]"')
def test_ahead_of_time_for_tpus(tmp_path):
    options = bench.Bench(
        ops=("linear_memory",), shapes=("cpu",), ahead_of_time="tpu:v5e:2x2", out=tmp_path
    )
    bench.main(options)
    found = json.loads((tmp_path / "ahead_of_time.json").read_text())
    assert set(found["kernels"]) == {"linear_memory", "linear_memory_backward"}
    assert all(takes["VMEM"] > 0 for takes in found["kernels"].values())


def test_a_block_size_is_kept_where_it_is_the_quickest_twice_and_by_enough():
    slow, best = {16: 9.0, 32: 8.0, 64: 10.0}, {16: 9.0, 32: 8.5, 64: 10.0}
    assert bench_tune.quicker(slow, best) == 32
    assert bench_tune.quicker(slow, {16: 8.0, 32: 8.5, 64: 10.0}) is None  # not the same
    assert bench_tune.quicker(slow, {16: 9.0, 32: 8.5, 64: 8.9}) is None  # by too little
    assert bench_tune.quicker({16: 9.0, 64: 8.0}, {16: 9.0, 64: 8.0}) is None


def test_tune_times_every_size_and_writes_what_the_op_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_tune, "BENCH", {"tiny": Shape(1, 8, 1, 4, 4)})
    monkeypatch.setattr(bench_tune, "ROUNDS", 1)
    monkeypatch.setattr(bench_tune, "SIZES", (4, 64))
    monkeypatch.setattr(bench_tune, "quicker", lambda first, _: 4 if set(first) == {4, 64} else 0)
    bench_tune.tune(["tiny"], tmp_path)
    entries = _tuned.table(tmp_path, "cpu")
    assert {name: entry["block_size"] for name, entry in entries.items()} == {
        "linear_memory float32 4": 4,
        "linear_memory bfloat16 4": 4,
    }
    monkeypatch.setattr(bench_tune, "quicker", lambda *_: None)
    bench_tune.tune(["tiny"], tmp_path)
    assert json.loads((tmp_path / "cpu.json").read_text()) == {}


def test_tune_is_for_the_op_that_has_a_block_size():
    with pytest.raises(Refused, match="`tune` is for `--ops linear_memory`"):
        bench.main(bench.Bench(ops=("mlp_memory",), tune=True))


def test_tuning_a_damaged_file_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_tune, "medians", lambda given: pytest.fail("timed"))
    for text in ("{", "[]"):
        (tmp_path / "cpu.json").write_text(text)
        with pytest.raises(Refused, match="cpu.json is damaged; mend it, or take it away"):
            bench_tune.tune(["cpu-narrow"], tmp_path)
