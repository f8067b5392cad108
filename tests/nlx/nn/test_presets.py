"""Presets, configurations, and what a model says to bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import inspect, nn

TINY = nn.ModelConfig(
    mixer="attention", feed_forward="swiglu", vocabulary=16, width=8, layers=1, heads=2, hidden=8
)


@pytest.fixture(scope="module")
def tiny():
    return nn.LanguageModel(TINY, rngs=nnx.Rngs(0))


def abstract(config):
    return nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def sizes():
    return {name: inspect.size(config, 4096) for name, config in nn.PRESETS.items()}


def test_architectures_of_a_size_have_as_many_parameters(sizes):
    for name, size in sizes.items():
        rival = sizes[f"transformer++-{name.rpartition('-')[2]}"]
        assert size.parameters == pytest.approx(rival.parameters, rel=0.02), name


def test_presets_are_of_the_size_they_say(sizes):
    said = {
        "tiny": 0.6e6,
        "small": 17.7e6,
        "340m": 340e6,
        "400m": 400e6,
        "760m": 760e6,
        "1.3b": 1.3e9,
    }
    for size, parameters in said.items():
        assert sizes[f"transformer++-{size}"].parameters == pytest.approx(parameters, rel=0.03)


def test_state_grows_with_the_context_only_where_attention_sees_all_of_it(sizes):
    for name in (name for name in sizes if name.endswith("-tiny")):
        grows = inspect.size(nn.preset(name), 8192).state > sizes[name].state
        assert grows == name.startswith(("transformer++", "hope-attention"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.endswith("-small") else pytest.mark.slow)
        for name in nn.PRESETS
    ],
)
def test_sizes_are_those_of_the_whole_model(sizes, name):
    """Inspected is the pattern of mixers once; the model repeats it."""

    def whole():
        model = nn.LanguageModel(nn.preset(name), rngs=nnx.Rngs(0))
        return model, model.init_state(1, 4096)

    model, state = nnx.eval_shape(whole)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert sizes[name] == (nn.parameter_count(model), kept)


def test_what_results_depend_on_stays():
    """These have been trained, and what came out is written down."""
    tiny, small = dict(layers=2, width=128, heads=4), dict(layers=6, width=384, heads=6)
    attention, swiglu = dict(mixer="attention"), dict(feed_forward="swiglu")
    cms, hope = dict(feed_forward="cms"), dict(mixer="self_modifying", feed_forward="cms")
    two, three = dict(cms_periods=(1, 4)), dict(cms_periods=(1, 4, 16))
    for name, fields in {
        "hope-tiny": hope | tiny | two | dict(hidden=256, projection_chunk_size=32),
        "hope-attention-tiny": attention | cms | tiny | two | dict(hidden=400),
        "transformer++-tiny": attention | swiglu | tiny | dict(hidden=536),
        "hope-small": hope | small | three | dict(hidden=768, memory_hidden=64),
        "hope-attention-small": attention | cms | small | three | dict(hidden=1008),
        "transformer++-small": attention | swiglu | small | dict(hidden=2016),
    }.items():
        assert nn.preset(name) == nn.ModelConfig(**fields)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="`preset` is 'hope-tny'; did you mean 'hope-tiny'?"):
        nn.preset("hope-tny")


def test_a_model_is_not_made_of_a_name():
    with pytest.raises(
        TypeError, match="`config` is 'hope-tiny'; it must be an nlx.nn.ModelConfig"
    ):
        nn.LanguageModel("hope-tiny", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": 0}, "`width` is 0; it must be an integer >= 1"),
        ({"layers": 1.5}, "`layers` is 1.5; it must be an integer >= 1"),
        ({"heads": 3}, "`heads` is 3; it must be a divisor of width = 8"),
        ({"mixer": "mamba"}, "`mixer` is 'mamba'; it must be one of attention, retnet, deltanet"),
        ({"then": ("mamba",)}, "`then` is ('mamba',); it must be any of attention, retnet"),
        ({"then": ("retnet",)}, "`layers` is 1; it must be a multiple of the 2 mixers attention"),
        ({"window": 0}, "`window` is 0; it must be an integer >= 1"),
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


@pytest.mark.parametrize("name", [name for name in nn.PRESETS if name.endswith("-tiny")])
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
    for block in after:
        if hasattr(block.mixer, "memory"):
            kept = [leaf.dtype for leaf in jax.tree.leaves(block.mixer.memory)]
            assert set(kept) <= {jnp.dtype("float32"), jnp.dtype("int32")}


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
