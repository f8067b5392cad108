"""Faults that other implementations have: the law each breaks, and the test that ours keeps it.

What is not tested elsewhere is tested here.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import nn, ops, optim

ROOT = pathlib.Path(__file__).parent
# fault -> file::test of the law it breaks
FAULTS = {
    # nested-learning 0.2.0
    "no outer gradient reaches the memories that make keys, values, rates and retention": (
        "nlx/nn/test_model.py::test_every_parameter_has_a_gradient_equal_to_finite_differences"
    ),
    "an unfinished chunk is written at the end of every call": (
        "nlx/nn/test_model.py::test_whole_is_chunked_is_token_by_token"
    ),
    "a Python loop over tokens": (
        "kernels/test_self_modifying_memory.py::test_xla_loops_over_chunks_only"
    ),
    "erases one layer of two": (
        "kernels/test_self_modifying_memory.py::test_reference_is_hope_by_hand"
    ),
    "DMGD's memory has no parameters, or never learns": (
        "nlx/optim/test_deep_momentum.py::test_memory_learns_on_a_stationary_stream"
    ),
    "muon without orthogonalisation": (
        "nlx/optim/test_momentum.py::test_orthogonal_momentum_is_muons_step"
    ),
    "three cubic steps leave singular values near 0": (
        "kernels/test_newton_schulz.py::test_the_quintic_brings_singular_values_near_1"
    ),
    "an L2 objective that is not one": (
        "nlx/optim/test_gradient_memory.py::test_constant_l2_is_an_average"
    ),
    "M3's steps die away": "test_peers.py::test_steps_of_m3_do_not_die_away",
    "vectors fall through M3 without a rule": ("nlx/optim/test_m3.py::test_other_leaves_have_adam"),
    "CMS's local objective yields twice the gradient": (
        "nlx/nn/test_continuum.py::test_objective_is_the_tasks_loss_once"
    ),
    "a fast state shared across the batch": (
        "nlx/nn/test_continuum.py::test_fast_state_is_not_shared_across_a_batch"
    ),
    "NaN in training": (
        "nlx/optim/test_deep_momentum.py::test_extreme_gradients_give_finite_updates"
    ),
    # titans-pytorch
    "every chunk's surprise is taken at the initial weights": (
        "test_peers.py::test_surprise_is_taken_at_the_start_of_its_own_chunk"
    ),
    "gates averaged over a chunk, the sequence or the batch": (
        "test_peers.py::test_gates_are_of_their_own_token_and_row"
    ),
    "MAC stores before it attends": "nlx/nn/test_titans.py::test_variants_are_the_paper",
    "gradients kept for every token": (
        "kernels/test_laws.py::test_op_saves_its_inputs_and_the_states_at_chunk_starts"
    ),
    "NaN at depth 4": "kernels/test_mlp_memory.py::test_limits_keep_a_deep_memory_finite",
    # others
    "nested CMS is sequential CMS": "nlx/nn/test_continuum.py::test_nested_is_not_sequential",
    "levels are skipped in the forward by a step counter": (
        "nlx/nn/test_continuum.py::test_no_level_is_skipped_in_the_forward"
    ),
    "update frequency gates nothing": ("nlx/nn/test_continuum.py::test_update_frequency_is_gated"),
    "delta momentum ascends": (
        "nlx/optim/test_momentum.py::test_delta_momentum_descends_on_the_l2_objective"
    ),
    "delta momentum with a scalar for its matrix": (
        "nlx/optim/test_gradient_memory.py::test_delta_momentum_row"
    ),
    "Muon's inner problem without its diagonal": (
        "kernels/test_newton_schulz.py::test_it_is_a_level_that_descends"
    ),
    "a write by the mean input of the batch": (
        "nlx/nn/test_laws.py::test_causal_and_no_leak_across_the_batch"
    ),
    "attention that is not causal": (
        "nlx/nn/test_model.py::test_causal_and_no_leak_across_the_batch"
    ),
    "DGD that is not the delta rule": (
        "nlx/optim/test_dgd.py::test_is_eq_57_for_one_input_of_any_norm"
    ),
    "decoding reads the prompt again": (
        "nlx/nn/test_model.py::test_decoding_compiles_once_for_every_position"
    ),
    # flash-linear-attention
    "TTT reads another function than it trains": (
        "test_peers.py::test_a_memory_reads_the_function_that_it_trains"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_known_fault_has_a_test_of_its_law(fault):
    path, test = FAULTS[fault].split("::")
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def gates(*shape, seed, low=0.2, high=0.8):
    return low + (high - low) * jax.random.uniform(jax.random.key(seed), shape)


def deep(tokens=8, rows=1, seed=0):
    """Arguments of `mlp_memory` with two layers, and where it starts."""
    shape = rows, tokens, 1
    given = {name: normal(*shape, 4, seed=seed + n) for n, name in enumerate("qkv")}
    given |= {name: gates(*shape, seed=seed + 5 + n) for n, name in enumerate(("rate", "retain"))}
    return given, (0.5 * normal(1, 4, 6, seed=8), 0.5 * normal(1, 6, 4, seed=9))


@pytest.mark.parametrize("chunk_size", [4, 3])
def test_surprise_is_taken_at_the_start_of_its_own_chunk(x64, chunk_size):
    """Chunk by chunk, each a sequence of its own that starts where the last one ended."""
    given, weights = deep()
    whole, _ = ops.mlp_memory(**given, weights=weights, chunk_size=chunk_size)
    parts, start = [], weights
    for at in range(0, 8, chunk_size):
        part = {name: x[:, at : at + chunk_size] for name, x in given.items()}
        y, state = ops.mlp_memory(**part, weights=start, chunk_size=chunk_size)
        parts.append(y)
        start = tuple(w[0] for w in state.weights)
    np.testing.assert_allclose(whole, jnp.concatenate(parts, 1), rtol=1e-12, atol=1e-12)
    at_first_weights, _ = ops.mlp_memory(**given, weights=weights, chunk_size=8)
    assert jnp.abs(whole - at_first_weights)[:, 4:].max() > 1e-3


@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_gates_are_of_their_own_token_and_row(x64, op):
    """Inside a chunk: each earlier token's gate counts, no later one's and no other row's."""
    given, weights = deep(rows=2)
    names = ("erase" if op == "linear" else "momentum", "rate", "retain")
    given[names[0]] = gates(2, 8, 1, seed=7)

    def output(values):
        arguments = given | dict(zip(names, values, strict=True))
        if op == "linear":
            y, _ = ops.linear_memory(**arguments)
        else:
            y, _ = ops.mlp_memory(**arguments, weights=weights, chunk_size=8)
        return y[0, 5] @ jnp.arange(1.0, 5)

    slopes = jax.grad(lambda values: output(values)[0])([given[name] for name in names])
    for name, slope in zip(names, slopes, strict=True):
        first = 0 if name == "rate" or (name == "retain" and op == "mlp") else 1  # nothing before
        own = jnp.abs(slope[0, first:6, 0])
        assert own.min() > 1e-9, name
        assert jnp.unique(own).size == own.size, name
        assert jnp.all(slope[0, 6:] == 0), name
        assert jnp.all(slope[1] == 0), name


def test_a_memory_reads_the_function_that_it_trains(x64):
    """One pair stored over and over is what its key recalls, also through the inner norm of TTT."""
    key, kick = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    value = key + (kick - kick.mean()) / kick.std()
    q, v = (jnp.tile(z, (1, 400, 1, 1)) for z in (key, value))
    rate = jnp.full((1, 400, 1), 0.1)
    y, _ = ops.mlp_memory(
        q, q, v, weights=(normal(1, 8, 8, seed=2),), rate=rate, retain=jnp.ones_like(rate),
        chunk_size=1, norm=True,
    )  # fmt: skip
    assert jnp.abs(y - v)[0, 0].max() > 0.1
    assert jnp.abs(y - v)[0, -1].max() < 1e-3


def test_steps_of_m3_do_not_die_away(x64):
    """On gradients of one distribution; as printed, where sums never decay, they do."""
    gradients = normal(300, 8, 6)

    def lengths(tx):
        def step(state, gradient):
            update, state = tx.update(gradient, state)
            return state, jnp.linalg.norm(update)

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]

    early, late = slice(30, 60), slice(270, 300)
    kept = lengths(optim.scale_by_m3())
    assert 0.8 < kept[late].mean() / kept[early].mean() < 1.25
    printed = lengths(optim.scale_by_m3(literal=True))
    assert printed[late].mean() / printed[early].mean() < 0.5


def test_every_recurrent_model_keeps_a_state_of_one_size():
    """Decoding costs the same after any number of tokens: what it carries does not grow."""

    def start(name, capacity):
        make = lambda: nn.LanguageModel(nn.preset(name), rngs=nnx.Rngs(0)).init_state(1, capacity)
        return jax.eval_shape(make)

    all_before = "transformer++-tiny", "hope-attention-tiny"
    for name in nn.PRESETS:
        if name.endswith("-tiny"):
            assert (start(name, 1_000) == start(name, 100_000)) == (name not in all_before), name
