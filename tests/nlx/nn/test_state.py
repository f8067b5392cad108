# SPDX-License-Identifier: Apache-2.0
"""The state of every mixer: donated, handed over, cut to a row, kept on disk, differentiated."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from nlx import nn

SMALL = dict(
    vocabulary=32,
    layers=1,
    width=16,
    heads=2,
    kv_heads=2,
    hidden=8,
    window=5,
    chunk_size=4,
    projection_chunk_size=4,
    memory_hidden=4,
)
FIRST, NEXT = 6, 5  # tokens before and after the state changes hands; no multiples of a chunk
NAMES = sorted({name.rsplit("-", 1)[0] for name in nn.PRESETS})
QUICK = ("transformer++", "titans-mac", "hope")
everyone = pytest.mark.parametrize(
    "system",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES],
    indirect=True,
)
pytestmark = pytest.mark.usefixtures("x64")


class System(NamedTuple):
    """An architecture, two rows of tokens, and one compiled step for all tests."""

    model: nn.LanguageModel
    tokens: jax.Array
    read: Any  # (tokens, state) -> (logits, state)


@pytest.fixture(scope="module")
def system(request):
    with jax.enable_x64(True):
        preset = nn.preset(f"{request.param}-tiny")
        layers = 1 + len(preset.then)
        periods = {"cms_periods": (1, 3)} if preset.feed_forward == "cms" else {}
        config = dataclasses.replace(preset, **SMALL | {"layers": layers} | periods)
        model = nn.LanguageModel(config, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)
        tokens = jax.random.randint(jax.random.key(1), (2, FIRST + NEXT), 0, 32)
        read = jax.jit(lambda tokens, state: nnx.merge(graph, params)(tokens, state))
        yield System(model, tokens, read)


def begin(system):
    return system.read(system.tokens[:, :FIRST], system.model.init_state(2, capacity=FIRST + NEXT))[
        1
    ]


@everyone
def test_a_fresh_state_owns_its_buffers_and_may_be_donated(system):
    start = system.model.init_state(2, capacity=FIRST + NEXT)
    leaves = jax.tree.leaves(start)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    kept = begin(system)
    given = jax.jit(system.read, donate_argnums=1)(system.tokens[:, :FIRST], start)[1]
    jax.tree.map(np.testing.assert_array_equal, given, kept)


@everyone
def test_a_row_goes_on_alone(system):
    """Row 1 of the state is the state of row 1: it has no other place in it."""
    state = begin(system)
    both, after = system.read(system.tokens[:, FIRST:], state)
    row = jax.tree.map(lambda leaf: leaf[1:], state)
    alone, ended = system.read(system.tokens[1:, FIRST:], row)
    close(alone, both[1:])
    close(ended, jax.tree.map(lambda leaf: leaf[1:], after))


@everyone
def test_is_kept_on_disk_without_the_weights(system, tmp_path):
    """Into a template of shapes alone; what goes on is the same to the bit."""
    state = begin(system)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        template = jax.eval_shape(lambda: system.model.init_state(2, capacity=FIRST + NEXT))
        read = checkpointer.restore(tmp_path / "state", template)
    assert jax.tree.structure(read) == jax.tree.structure(state)
    found = (system.read(system.tokens[:, FIRST:], s) for s in (state, read))
    jax.tree.map(np.testing.assert_array_equal, *found)


@everyone
def test_is_differentiated_through(system):
    """d loss(later tokens) / d (state at the hand-over), against a finite difference."""
    state = begin(system)
    floats = lambda tree: [
        x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)
    ]

    def loss(moved):
        it = iter(moved)
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        at = jax.tree.map(lambda x: next(it) if is_float(x) else x, state)
        return jnp.sum(jnp.sin(system.read(system.tokens[:, FIRST:], at)[0]))

    at = floats(state)
    gradient = jax.grad(loss)(at)
    keys = jax.random.split(jax.random.key(3), len(at))
    direction = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, at, strict=True)]
    slope = sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
    moved = lambda step: loss([x + step * d for x, d in zip(at, direction, strict=True)])
    measured = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert jnp.abs(slope) > 1e-6
    np.testing.assert_allclose(slope, measured, rtol=1e-5)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), a, b)
