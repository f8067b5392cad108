# SPDX-License-Identifier: Apache-2.0
"""Whole language models in context, and trained ones whose MLPs become levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nlx
from nlx import nn, train, writes

CONFIG = dict(vocabulary=11, width=8, heads=2, hidden=7)
CHUNK, CHUNKS = 3, 4
pytestmark = pytest.mark.usefixtures("x64")


def made(layers, **fields):
    return nn.LanguageModel(nn.ModelConfig(**CONFIG | fields, layers=layers), rngs=nnx.Rngs(0))


def tokens(rows, chunks=CHUNKS):
    return jax.random.randint(jax.random.key(1), (rows, chunks * CHUNK + 1), 0, 11)


def close(a, b, tolerance=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


def streamed(model, write, clocks=None, rows=2):
    """Scores [b, 12, s] of four chunks, and the state after them."""
    nest = nn.in_context(model, write, clocks)
    start = nn.begin(nest, nest.init(jax.random.key(0)), model.init_state(rows, CHUNK * CHUNKS))
    run = jax.jit(lambda state, tokens: nn.stream(nest, state, tokens, chunk_size=CHUNK))
    return run(start, tokens(rows))


@functools.cache
def transformer():
    with jax.enable_x64(True):
        return made(3, mixer="attention", feed_forward="swiglu")


def chunked(model):
    """Scores of the model as it is, chunk by chunk."""
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, tokens, state: nnx.merge(graph, params)(tokens, state))
    state, parts = model.init_state(2, CHUNK * CHUNKS), []
    for n in range(CHUNKS):
        scores, state = run(params, tokens(2)[:, n * CHUNK : (n + 1) * CHUNK], state)
        parts.append(scores)
    return jnp.concatenate(parts, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "variant"),
    [("attention", "independent"), ("self_modifying", "nested"), ("attention", "sequential")],
)
def test_a_language_model_in_context_is_a_plain_loop(mixer, variant):
    """Rows one after the other, chunk after chunk, each level with a rule of its own."""
    model = made(
        2, mixer=mixer, feed_forward="cms", cms_periods=(1, 2), cms_variant=variant,
        memory_hidden=3, chunk_size=2, projection_chunk_size=4,
    )  # fmt: skip
    adam = optax.adam(0.05)
    write = [writes.fast(0.3, momentum=0.5, decay=0.1), writes.summed(adam)]
    scores, after = streamed(model, write)
    graph, parts, join = nn.model.by_level(model)

    @jax.jit
    def look(params, piece, state):
        def loss(learning):
            read = nnx.merge(graph, join(learning | {"outer": parts["outer"]}))
            scores, state_after = read(piece[:, :-1], state)
            return train.next_token_loss(scores, piece), (scores, state_after)

        return jax.value_and_grad(loss, has_aux=True)(params)

    for row in range(2):
        params = {name: parts[name] for name in ("cms_0", "cms_1")}
        momentum = {path: 0.0 for path in params["cms_0"]}
        pending, rule = dict.fromkeys(params["cms_1"], 0.0), adam.init(params["cms_1"])
        state = model.init_state(1, CHUNK * CHUNKS)
        for n in range(CHUNKS):
            piece = tokens(2)[row : row + 1, n * CHUNK : (n + 1) * CHUNK + 1]
            (_, (seen, state)), slopes = look(params, piece, state)
            close(scores[row : row + 1, n * CHUNK : (n + 1) * CHUNK], seen)
            momentum = {k: 0.5 * p + slopes["cms_0"][k] for k, p in momentum.items()}
            params["cms_0"] = {
                k: w - 0.3 * (momentum[k] + 0.1 * w) for k, w in params["cms_0"].items()
            }
            pending = {k: p + slopes["cms_1"][k] / 2 for k, p in pending.items()}
            if n % 2:
                updates, rule = adam.update(pending, rule)
                params["cms_1"] = optax.apply_updates(params["cms_1"], updates)
                pending = dict.fromkeys(pending, 0.0)
                if variant == "nested":  # after ceil(2 / 1) firings
                    params["cms_0"] = jax.tree.map(jnp.zeros_like, params["cms_0"])
                    momentum = dict.fromkeys(momentum, 0.0)
        of = lambda tree, row: jax.tree.map(lambda x: x[row], tree)
        for name, wanted in params.items():
            close(of(after.levels[name].params, row), wanted)
        close(of(after.mixers, row), of(state, 0))


def scores_of(model):
    """Scores of a whole sequence."""
    graph, params = nnx.split(model)
    return jax.jit(lambda params: nnx.merge(graph, params)(tokens(2)[:, :-1])[0])(params)


def test_layers_as_levels_are_the_given_model_to_the_bit():
    model, clocks = transformer(), [nlx.Clock(1), nlx.Clock(2)]
    stacked = nn.from_pretrained_mlps(model, clocks)
    assert [block.feed_forward.levels[0].rank for block in stacked.blocks] == [0, 0, 1]
    assert nn.clocks_by_level(stacked) == dict(outer=nlx.Clock(1), cms_0=clocks[0], cms_1=clocks[1])
    assert list(nn.clocks_by_level(model)) == ["outer"]
    np.testing.assert_array_equal(scores_of(stacked), scores_of(model))


@pytest.mark.slow
def test_layers_as_levels_with_rate_0_stay_the_given_model_to_the_bit():
    model, clocks = transformer(), [nlx.Clock(1), nlx.Clock(2)]
    stacked, given = nn.from_pretrained_mlps(model, clocks), chunked(model)
    for write in (writes.fast(0.0, momentum=0.9), writes.summed(optax.adam(0.0))):
        scores, after = streamed(stacked, write)
        np.testing.assert_array_equal(scores, given)
        found = after.levels["cms_0"].params | after.levels["cms_1"].params
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
            if (own := found.pop(jax.tree_util.keystr(path), None)) is not None:
                np.testing.assert_array_equal(own, jnp.stack([leaf, leaf]))
        assert not found


@pytest.mark.slow
def test_with_rate_0_weights_stay_to_the_bit_at_a_real_size():
    """float32, width 128: rows of their own may be summed in another order."""
    with jax.enable_x64(False):
        model = nn.LanguageModel(nn.preset("transformer++-tiny"), rngs=nnx.Rngs(0))
        text = jax.random.randint(jax.random.key(1), (2, 65), 0, 256)
        nest = nn.in_context(nn.from_pretrained_mlps(model, [nlx.Clock(1)]), writes.fast(0.0))
        params = nest.init(jax.random.key(0))
        state = nn.begin(nest, params, model.init_state(2, capacity=64))
        scores, after = nn.stream(nest, state, text, chunk_size=32)
        for row in range(2):
            same = lambda held, given, row=row: np.testing.assert_array_equal(held[row], given)
            jax.tree.map(same, after.levels["cms_0"].params, params["cms_0"])
        close(scores, model(text[:, :-1])[0], 1e-4)


def test_hidden_units_as_levels_are_the_given_model_up_to_rounding():
    model = transformer()
    for block in model.blocks:
        scale = block.feed_forward.levels[0].norm.scale
        scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(4), scale.shape)
    split = nn.from_pretrained_mlps(model, [nlx.Clock(1), nlx.Clock(2)], split=True)
    cms = split.blocks[0].feed_forward
    assert cms.variant == "independent"
    assert [level.mlp.up.kernel.shape[1] for level in cms.levels] == [3, 4]
    close(scores_of(split), scores_of(model), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_levels_of_a_trained_model_learn_at_their_rate(split):
    clocks = [nlx.Clock(1), nlx.Clock(4), nlx.Clock(None)]
    stacked = nn.from_pretrained_mlps(transformer(), clocks, split=split)
    assert list(nn.clocks_by_level(stacked)) == ["outer", "cms_0", "cms_1"]
    still, _ = streamed(stacked, writes.fast(0.0))
    scores, _ = streamed(stacked, writes.summed(optax.sgd(0.5)))
    close(still, chunked(transformer()), 1e-12)
    apart = jnp.abs(scores - still).max((0, 2))
    assert jnp.all(apart[:CHUNK] < 1e-12)
    assert jnp.all(apart[CHUNK:] > 1e-4)


@pytest.mark.parametrize(
    ("clocks", "split", "sentence"),
    [
        ([], False, r"`clocks` have the periods \[\]; there must be 1 to 3, no more than the mod"),
        ([1] * 4, False, r"`clocks` have the periods \[1, 1, 1, 1\]; there must be 1 to 3, no mor"),
        ([1] * 8, True, "there must be 1 to 7, no more than the model has hidden units, from the"),
        ([2, 1], True, r"`clocks` have the periods \[2, 1\]; there must be 1 to 7"),
    ],
)
def test_bad_input_gets_a_sentence(clocks, split, sentence):
    with pytest.raises(ValueError, match=sentence):
        nn.from_pretrained_mlps(transformer(), [nlx.Clock(c) for c in clocks], split=split)


def test_a_model_of_several_blocks_a_layer_is_refused():
    model = made(1, mixer="attention", feed_forward="cms", cms_periods=(1, 2))
    with pytest.raises(
        ValueError, match="`model` has layers of several blocks; each must hold one"
    ):
        nn.from_pretrained_mlps(model, [nlx.Clock(1)])
