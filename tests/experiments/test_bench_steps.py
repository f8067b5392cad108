# SPDX-License-Identifier: Apache-2.0
"""`bench_steps` at tiny sizes: the rival's attention is ours, and what fails is said."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import bench_steps

from nlx import nn
from nlx.nn import attention


def test_the_rivals_attention_is_ours(monkeypatch):
    model = nn.LanguageModel(nn.preset("transformer++-tiny"), rngs=nnx.Rngs(0))
    tokens, ours = jnp.arange(12)[None], attention.attend
    want, _ = model(tokens)
    with bench_steps.library_attention("xla"):
        assert attention.attend is not ours
        got, _ = model(tokens)
    assert attention.attend is ours
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_steps_are_timed_in_turn_and_what_fails_says_why():
    config = dataclasses.replace(nn.preset("transformer++-tiny"), width=16, heads=2, hidden=8)
    other = dataclasses.replace(config, mixer="deltanet", remat=True)
    configs = {"gated-deltanet-340m": other, "transformer++-340m": config}
    with ThreadPoolExecutor() as pool:
        steps = bench_steps.compiled(pool, configs, 8, "xla")
        none = bench_steps.compiled(pool, {"transformer++-340m": config}, 8, "cudnn")
    found = bench_steps.measure(configs, 8, steps, rounds=2)
    assert all(found[name] > 0 for name in configs)
    failed = bench_steps.measure({"transformer++-340m": config}, 8, none, rounds=1)
    assert failed["transformer++-340m"].startswith("failed: ")


def test_a_step_descends():
    config = dataclasses.replace(nn.preset("transformer++-tiny"), width=16, heads=2, hidden=8)
    descend, init = bench_steps.step(config)
    params = init()
    after = jax.jit(descend)(params, jnp.arange(9)[None])
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, after))
    assert max(moved) > 0
    assert bench_steps.config_of("hope-340m", 32768).remat
    assert not bench_steps.config_of("hope-340m", 4096).remat


def test_what_is_compiled_ahead_of_time(tmp_path, monkeypatch):
    """Presets and lengths that are named; what is neither gets a sentence."""
    asked = []
    answer = lambda name, tokens: asked.append((name, tokens)) or {}
    monkeypatch.setattr(bench_steps, "ahead_of_time", answer)
    bench_steps.main([str(tmp_path), "--ahead-of-time", "8", "deltanet-1.3b"])
    bench_steps.main([str(tmp_path), "--ahead-of-time", "16"])
    assert asked == [("deltanet-1.3b", 8), ("hope-340m", 16)]
    for words in (["--ahead-of-time", "hope"], ["hope-340m"]):
        with pytest.raises(SystemExit, match="must be a number of tokens, or with"):
            bench_steps.main([str(tmp_path), *words])
