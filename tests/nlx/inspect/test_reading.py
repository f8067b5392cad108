"""A model watched while it reads, against its own decoding, token by token, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import inspect, nn
from nlx.train import language_model_loss

pytestmark = pytest.mark.usefixtures("x64")
T = 8
PATH = "blocks.0.mixer.long_term.memory"
SIZES = dict(vocabulary=11, width=8, layers=1, heads=2, hidden=4, memory_hidden=3, window=4)
CHUNKS = dict(chunk_size=3, projection_chunk_size=6, persistent=2)


def made(mixer, **fields):
    config = nn.ModelConfig(mixer=mixer, feed_forward="swiglu", **SIZES | CHUNKS | fields)
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, 11)
    return nn.LanguageModel(config, rngs=nnx.Rngs(0)), tokens


def decoded(model, tokens):
    """Scores [b, t, s], and the mixer's states before and after every token, [t + 1, ...]."""
    graph, weights = nnx.split(model)
    start = model.init_state(len(tokens), capacity=T)

    @jax.jit
    def run(weights, start):
        def step(state, token):
            scores, state = nnx.merge(graph, weights)(token[:, None], state)
            return state, (scores[:, 0], state[0].mixer)

        _, (scores, states) = jax.lax.scan(step, start, tokens.T)
        first = jax.tree.map(lambda a, b: a[None].astype(b.dtype), start[0].mixer, states)
        return scores, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, states)

    scores, states = run(weights, start)
    return jnp.swapaxes(scores, 0, 1), states


MEMORIES = {
    "deltanet": lambda state: {"memory": state.memory},
    "ttt_mlp": lambda state: {"memory": state.memory.weights},
    "titans_lmm": lambda state: {"long_term.memory": state.memory.weights},
    "titans_mac": lambda state: {"memory": state.memory.weights},
    "self_modifying": lambda state: state.memory.weights,
}


@pytest.mark.parametrize("mixer", MEMORIES)
def test_updates_are_the_differences_of_decoded_states(mixer):
    model, tokens = made(mixer)
    watched = nnx.jit(inspect.watch)(model, tokens)
    scores, states = decoded(model, tokens)
    expected = MEMORIES[mixer](states)
    assert {name.removeprefix("blocks.0.mixer.") for name in watched.levels} == set(expected)
    for name, weights in expected.items():
        squares = [
            np.sum(np.diff(np.asarray(layer), axis=0) ** 2, (-2, -1))
            for layer in jax.tree.leaves(weights)
        ]
        found = watched.levels[f"blocks.0.mixer.{name}"].update  # [b, t, h]
        np.testing.assert_allclose(found, np.swapaxes(np.sqrt(sum(squares)), 0, 1), atol=1e-9)
        assert float(found.min()) > 0
    if mixer == "titans_lmm":  # its gates are of the token alone
        block = model.blocks[0]
        gates = block.mixer.long_term.memory.gates(block.norm(model.embed(tokens)))
        np.testing.assert_allclose(watched.levels[PATH].retain, gates["retain"], rtol=1e-9)
    np.testing.assert_allclose(
        watched.bits, inspect.surprise(scores[:, :-1], tokens[:, 1:]), atol=1e-9
    )


def test_surprise_sums_to_the_loss_and_attention_has_no_memory():
    model, tokens = made("attention", layers=2)
    watched = inspect.watch(model, tokens)
    graph, weights = nnx.split(model)
    loss = language_model_loss(graph)(weights, {"tokens": tokens})
    np.testing.assert_allclose(watched.bits.mean() * math.log(2), loss, rtol=1e-9)
    assert watched.levels == {}


def test_one_token_is_refused():
    model, tokens = made("attention")
    with pytest.raises(ValueError, match=r"`tokens` has shape \(2, 1\); it must be \[b, t\]"):
        inspect.watch(model, tokens[:, :1])
