"""The benchmark of memories and the comparison with peers, at tiny sizes and without the peers."""

import sys

import jax
import numpy as np
import pytest
from nlx_experiments import bench_memories, compare_peers, peers, resident
from nlx_experiments.errors import Refused


@pytest.mark.parametrize(
    "runs",
    [bench_memories.linear(1, 8, 4), bench_memories.mlp(1, 8, 4, 4, 4)],
    ids=["linear", "mlp"],
)
def test_both_forms_compute_one_gradient(runs):
    slow, fast = runs["token loop"](), runs["chunks"]()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), slow, fast)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slow))


def test_medians_are_of_calls_in_turn(monkeypatch):
    called, times = [], iter([0, 1, 0, 10, 0, 3, 0, 30, 0, 2, 0, 20])
    monkeypatch.setattr(bench_memories.time, "perf_counter", lambda: next(times))
    runs = {name: lambda name=name: called.append(name) for name in "ab"}
    assert bench_memories.medians(runs, 3) == {"a": 2, "b": 20}
    assert "".join(called) == "ab" * 4


def test_hopes_block_runs_at_any_width():
    runs = bench_memories.hope(tokens=8, width=8)
    assert runs["forward"]().shape == (1, 8, 8)
    assert set(runs) == {"forward", "forward and backward"}


@pytest.mark.parametrize("name", ["deltanet", "samba"])
def test_decoding_takes_a_state_of_one_size(name):
    found = bench_memories.decode(name, short=8, long=32, decoded=4, budget=0.0)
    assert found.state[0] == found.state[1] > 0


@pytest.mark.skipif(resident._trim is None, reason="this C library cannot give memory back")
def test_what_grows_within_what_was_freed_is_seen():
    """Blocks are of the heap, too small to be given back one by one, and one that stays at its end
    keeps the others there."""
    fill = lambda count: [np.ones(12_000, np.float32) for _ in range(count)]
    before, held = resident.now(), fill(2_000)
    stays = fill(1)
    most = resident.now()
    assert most > before + 80
    del held
    assert resident.now() < before + 20
    held = fill(1_000)
    assert before + 40 < resident.now() < most - 20
    del held, stays


def test_resident_memory_is_below_its_peak():
    assert 10 < resident.now() <= resident.peak() + 1


def test_names_of_parts_are_checked():
    for command in (bench_memories.main, compare_peers.main):
        with pytest.raises(SystemExit, match="not nonsense"):
            command(["nonsense"])


def test_a_missing_peer_gets_a_sentence(monkeypatch, capsys):
    for package in ("torch", "nested_learning", "nested_learning.titan.self_modifying"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Refused, match="the package `torch`.* pip install torch==2.13.0"):
        peers.torch()
    with pytest.raises(Refused, match="`nested_learning`.* pip install --no-deps nested-learning"):
        peers.load("nested_learning.titan.self_modifying")
    assert compare_peers.main(["hope"]) == 1
    assert "skipped: the package `torch`" in capsys.readouterr().out
