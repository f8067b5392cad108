# SPDX-License-Identifier: Apache-2.0
"""What is not finite stays in its row, head and segment, and never reaches what stands before."""

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import pytest

B, T, H, D, F = 2, 12, 2, 4, 3
SEGMENTS = jnp.asarray([[0] * 8 + [1] * 4, [0] * 12], jnp.int32)
HERE, FROM, UNTIL = (0, slice(3, 8), 1), 3, 8  # row 0, head 1; what token 3 of row 0 reaches


def linear(draw):
    state = draw.normal(B, H, D, D)
    given = {n: draw.normal(B, T, H, D) for n in ("q", "k", "v")} | {"state": state}
    given |= {n: draw.gate(B, T, H) for n in ("retain", "erase", "rate")}
    return given, lambda given: nlx_kernels.linear_memory(
        **given, segment_ids=SEGMENTS, block_size=8
    )


def mlp(draw):
    weights = (draw.normal(H, D, F), draw.normal(H, F, D))
    given = {n: draw.normal(B, T, H, D) for n in ("q", "k", "v")}
    names = ("retain", "erase", "rate", "momentum")
    given |= {n: draw.gate(B, T, H, high=0.5) for n in names} | {"weights": weights}
    return given, lambda given: nlx_kernels.mlp_memory(**given, segment_ids=SEGMENTS, chunk_size=4)


def hope(draw):
    boxes = ("key", "value", "rate", "retain", "memory")
    parameters = nlx_kernels.SelfModifyingParameters(
        memories={box: (draw.normal(H, D, F), draw.normal(H, F, D)) for box in boxes},
        rate_readout={box: draw.normal(H, D) for box in boxes},
        rate_bias={box: draw.normal(H) for box in boxes},
        retain_readout=draw.normal(H, D),
        retain_bias=draw.normal(H),
    )
    given = {"x": draw.normal(B, T, H, D), "q": draw.normal(B, T, H, D)}
    given |= {"momentum": draw.gate(B, T, H), "parameters": parameters}
    return given, lambda given: nlx_kernels.self_modifying_memory(
        **given, segment_ids=SEGMENTS, chunk_size=4, projection_chunk_size=4
    )


CASES = [(linear, "k"), (linear, "rate"), (linear, "q"), (mlp, "v"), (mlp, "momentum"), (hope, "x")]


@pytest.fixture(scope="module")
def compiled():
    """One compilation for each op: reads, state, and the gradient of what no bad token reaches."""
    made = {}

    def get(case, draw):
        if case not in made:
            given, op = case(draw)

            def run(given, reached):
                def total(given):
                    y, state = op(given)
                    return jnp.sum(jnp.where(reached[..., None], 0, y)), (y, state)

                slopes, outputs = jax.grad(total, has_aux=True)(given)
                return outputs, slopes

            made[case] = given, jax.jit(run)
        return made[case]

    return get


@pytest.mark.parametrize(("case", "name"), CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_token_reaches_what_follows_it_in_its_segment(case, name, bad, draw, compiled):
    given, run = compiled(case, draw)
    reached = np.zeros((B, T, H), bool)
    reached[HERE] = True
    if name == "q":  # a query is its own read's only
        reached[0, FROM + 1 : UNTIL, 1] = False
    at = (0, FROM, 1) + (2,) * (given[name].ndim - 3)
    (y, state), slopes = run(given | {name: given[name].at[at].set(bad)}, reached)
    (clean, clean_state), clean_slopes = run(given, reached)
    assert np.array_equal(np.isnan(y).all(-1), reached)
    np.testing.assert_array_equal(np.asarray(y)[~reached], np.asarray(clean)[~reached])
    jax.tree.map(np.testing.assert_array_equal, state, clean_state)  # a new segment began
    for slope, other in zip(jax.tree.leaves(slopes), jax.tree.leaves(clean_slopes), strict=True):
        assert np.all(np.isfinite(slope))
        assert slope.shape != y.shape or np.allclose(slope[1], other[1], atol=1e-6)


def test_a_bad_state_reaches_its_own_segment(draw, compiled):
    given, run = compiled(linear, draw)
    given = given | {"state": given["state"].at[:, 1, 0, 0].set(np.inf)}
    (y, state), _ = run(given, np.zeros((B, T, H), bool))
    reached = np.isnan(y).all(-1)
    assert reached[0, :8, 1].all()
    assert reached[1, :, 1].all()
    assert not reached[0, 8:].any()
    assert not reached[:, :, 0].any()
    assert np.isnan(state[1, 1]).all()
    assert np.isfinite(state[0]).all()
