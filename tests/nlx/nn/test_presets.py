"""Presets, configurations, and what a model says to bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import nn

TINY = nn.ModelConfig(
    mixer="attention", feed_forward="swiglu", vocabulary=16, width=8, layers=1, heads=2, hidden=8
)


@pytest.fixture(scope="module")
def tiny():
    return nn.LanguageModel(TINY, rngs=nnx.Rngs(0))


def abstract(config):
    return nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def counts():
    return {name: nn.parameter_count(abstract(nn.preset(name))) for name in nn.PRESETS}


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_rivals_have_as_many_parameters_as_hope(counts, size):
    for rival in ("transformer++", "hope-attention"):
        assert counts[f"{rival}-{size}"] == pytest.approx(counts[f"hope-{size}"], rel=0.02)


def test_presets_are_of_the_size_they_say(counts):
    assert 0.5e6 < counts["hope-tiny"] < 0.7e6
    assert 10e6 < counts["hope-small"] < 20e6


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="`preset` is 'hope-tny'; did you mean 'hope-tiny'?"):
        nn.preset("hope-tny")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": 0}, "`width` is 0; it must be an integer >= 1"),
        ({"layers": 1.5}, "`layers` is 1.5; it must be an integer >= 1"),
        ({"heads": 3}, "`heads` is 3; it must be a divisor of width = 8"),
        ({"mixer": "mamba"}, "`mixer` is 'mamba'; it must be one of attention, self_modifying"),
        ({"cms_periods": (4, 1)}, "`cms_periods` is (4, 1); it must be one or more integers >= 1"),
        ({"cms_periods": (0,)}, "`cms_periods` is (0,); it must be one or more integers >= 1"),
        ({"cms_periods": ()}, "`cms_periods` is (); it must be one or more integers >= 1"),
        (
            {"cms_variant": "chain"},
            "`cms_variant` is 'chain'; it must be one of sequential, nested,",
        ),
        ({"chunk_size": True}, "`chunk_size` is True; it must be an integer >= 1"),
        ({"tied": 1}, "`tied` is 1; it must be True or False"),
    ],
)
def test_bad_field_gets_a_sentence(fields, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dataclasses.replace(TINY, **fields)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda m: m([[1, 2]]), TypeError, "`tokens` is of type list; it must be an array of"),
        (lambda m: m(jnp.ones((1, 2))), TypeError, "`tokens` is of type float32; it must be an"),
        (lambda m: m(jnp.ones(2, int)), ValueError, r"`tokens` has shape \(2,\); it must be \[b,"),
        (lambda m: m(jnp.ones((1, 0), int)), ValueError, r"`tokens` has shape \(1, 0\)"),
        (
            lambda m: m(jnp.ones((1, 2), int), segment_ids=jnp.ones((1, 3), int)),
            ValueError,
            r"`segment_ids` has shape \(1, 3\); it must be \(1, 2\), as tokens",
        ),
        (
            lambda m: m(jnp.ones((2, 2), int), m.init_state(3)),
            ValueError,
            r"`state` is of 1 blocks and \[3\] rows; it must be of 1 blocks and 2 rows",
        ),
        (lambda m: m.init_state(0), ValueError, "`batch` is 0; it must be an integer >= 1"),
        (lambda m: m.init_state(1, -1), ValueError, "`capacity` is -1; it must be an integer >= 1"),
    ],
)
def test_bad_call_gets_a_sentence(tiny, call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call(tiny)


def test_capacity_is_what_attention_keeps_and_nothing_to_hope(tiny):
    sizes = lambda state: [leaf.shape for leaf in jax.tree.leaves(state)]
    assert sizes(tiny.init_state(2, 5)) == [(2, 5, 2, 4), (2, 5, 2, 4), (2,)]
    assert sizes(tiny.init_state(2))[0] == (2, TINY.context, 2, 4)
    hope = nn.LanguageModel(
        dataclasses.replace(TINY, mixer="self_modifying", feed_forward="cms"), rngs=nnx.Rngs(0)
    )
    assert sizes(hope.init_state(2, 5)) == sizes(hope.init_state(2, 500))


@pytest.mark.parametrize("name", ["hope-tiny", "hope-attention-tiny", "transformer++-tiny"])
def test_bfloat16_stays_where_it_is_safe(name):
    """Scores, parameters and the memories' states are float32; activations are bfloat16."""
    config = dataclasses.replace(nn.preset(name), bfloat16=True)
    model = abstract(config)
    graphdef, params = nnx.split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        start = model.init_state(2, 8)
        return start, *model(tokens, start)

    start, logits, after = jax.eval_shape(run, params, jnp.zeros((2, 4), jnp.int32))
    assert logits.dtype == jnp.float32
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert like(after) == like(start)
    if config.mixer == "self_modifying":
        for block in after:
            assert block.mixer.windows["key"].dtype == jnp.bfloat16
            assert block.mixer.memory.weights["key"][0].dtype == jnp.float32


def test_bfloat16_computes_about_the_same():
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 16)
    run = jax.jit(
        lambda config: nn.LanguageModel(config, rngs=nnx.Rngs(0))(tokens)[0], static_argnums=0
    )
    wide, narrow = run(TINY), run(dataclasses.replace(TINY, bfloat16=True))
    assert 0 < jnp.abs(wide - narrow).max() < 0.1


def test_tied_model_reads_out_with_its_embedding():
    config = dataclasses.replace(TINY, tied=True)
    model = nn.LanguageModel(config, rngs=nnx.Rngs(0))
    untied = nn.parameter_count(abstract(TINY))
    assert nn.parameter_count(model) == untied - config.vocabulary * config.width
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.arange(4)[None])[0])
    before = run(params)
    params.embedding.table[...] = params.embedding.table[...].at[9].add(1.0)
    after = run(params)
    moved = jnp.abs(after - before).max(axis=(0, 1))
    assert moved[9] > 0.1
    np.testing.assert_array_equal(jnp.delete(moved, 9), 0)


@pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
def test_float32_whole_is_token_by_token(mixer):
    config = dataclasses.replace(TINY, mixer=mixer, chunk_size=3, projection_chunk_size=6)
    model = nn.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 16)
    run = jax.jit(lambda tokens, state: model(tokens, state))
    whole, _ = run(tokens, None)
    state, pieces = model.init_state(2, 12), []
    for t in range(12):
        logits, state = run(tokens[:, t : t + 1], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-5, atol=1e-5)
