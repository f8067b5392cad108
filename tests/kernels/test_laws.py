# SPDX-License-Identifier: Apache-2.0
"""The laws of `nlx.testing.check_op` over every op, and what each saves for its backward pass."""

import functools

import jax
import nlx_kernels
import pytest

from nlx import testing


def linear(draw, t):
    names = ("retain", "erase", "rate")
    given = {n: draw.normal(2, t, 2, 3) for n in "qkv"} | {n: draw.gate(2, t, 2) for n in names}
    given["state"] = draw.normal(2, 2, 3, 3)
    op = functools.partial(nlx_kernels.linear_memory, block_size=4)
    return op, given, dict(sequence=("q", "k", "v", *names))


def mlp(draw, t, f=4):
    names = ("retain", "erase", "rate", "momentum")
    given = {n: draw.normal(2, t, 1, 3) for n in "qkv"}
    given |= {n: draw.gate(2, t, 1, high=0.6) for n in names}
    given["weights"] = (draw.normal(1, 3, f), draw.normal(1, f, 3))
    op = functools.partial(nlx_kernels.mlp_memory, chunk_size=4)
    return op, given, dict(sequence=("q", "k", "v", *names), initial="weights")


def hope(draw, t, f=4):
    boxes = ("key", "value", "rate", "retain", "memory")
    given = {n: draw.normal(2, t, 1, 3) for n in "xq"} | {"momentum": draw.gate(2, t, 1)}
    given["parameters"] = nlx_kernels.SelfModifyingParameters(
        memories={box: (draw.normal(1, 3, f), draw.normal(1, f, 3)) for box in boxes},
        rate_readout={box: draw.normal(1, 3) for box in boxes},
        rate_bias={box: draw.normal(1) for box in boxes},
        retain_readout=draw.normal(1, 3),
        retain_bias=draw.normal(1),
    )
    op = functools.partial(nlx_kernels.self_modifying_memory, chunk_size=4, projection_chunk_size=4)
    return op, given, dict(sequence=("x", "q", "momentum"))


@pytest.mark.parametrize(
    "make", [linear, *(pytest.param(f, marks=pytest.mark.slow) for f in (mlp, hope))]
)
def test_op_obeys_the_laws(make, draw, x64):
    op, given, options = make(draw, 6)
    reference = functools.partial(op, implementation="reference")
    testing.check_op(op, reference, given, splits=[3], **options)


@pytest.mark.parametrize(
    ("make", "states", "copies"), [(linear, 2 * 2 * 9, 5), (mlp, 2 * 384, 4), (hope, 2 * 1920, 7)]
)
def test_op_saves_its_inputs_and_the_states_at_chunk_starts(make, states, copies, draw):
    """`copies` of the inputs, as given, in windows, and what a block makes of them (linear)."""

    def saved(t):
        """Numbers that the backward pass is handed, and numbers in the inputs."""
        op, given, _ = make(draw, t, **({} if make is linear else {"f": 64}))
        pull = jax.eval_shape(lambda given: jax.vjp(lambda given: op(**given), given)[1], given)
        return [sum(x.size for x in jax.tree.leaves(tree)) for tree in (pull, given)]

    (short, few), (long, many) = saved(64), saved(128)
    chunks = 16
    assert long - short <= copies * (many - few) + 2 * chunks * states
