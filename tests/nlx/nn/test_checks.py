# SPDX-License-Identifier: Apache-2.0
"""What layers say to what they can't take: one sentence, before anything is compiled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nlx
from nlx import inspect, nn, writes
from nlx.nn.mixer import make_mixer

SMALL = dict(
    vocabulary=16,
    width=8,
    layers=1,
    heads=2,
    hidden=8,
    window=5,
    chunk_size=4,
    projection_chunk_size=4,
    memory_hidden=4,
)
MIXERS = (
    "attention",
    "retnet",
    "deltanet",
    "gated_deltanet",
    "mamba2",
    "ttt_linear",
    "ttt_mlp",
    "titans_lmm",
    "titans_mac",
    "titans_mag",
    "titans_mal",
    "self_modifying",
)


def config(mixer="attention", **fields):
    return nn.ModelConfig(**SMALL | dict(mixer=mixer, feed_forward="swiglu") | fields)


def model(mixer="attention", **fields):
    return nn.LanguageModel(config(mixer, **fields), rngs=nnx.Rngs(0))


def refused(call, sentence, kind=ValueError):
    """Shapes alone are enough to be told, so nothing was compiled."""
    with pytest.raises(kind, match=re.escape(sentence)):
        nnx.eval_shape(call)


@pytest.mark.parametrize("mixer", ["titans_mag", "titans_mal"])
def test_a_state_without_its_attention_is_refused(mixer):
    """A call from no state leaves attention nothing to go on from; the memory would go on."""
    x = jnp.ones((2, 3, 8))

    def twice():
        layer = make_mixer(config(mixer), mixer, rngs=nnx.Rngs(0))
        return layer(x, layer(x)[1])

    refused(twice, "`state.attention.key` is missing; it must be float32[2, 5, 2, 4], as in what")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        (dict(mixer="attention"), "[0].mixer"),
        (dict(mixer="attention", window=None), "[0].mixer"),
        (dict(mixer="attention", feed_forward="cms"), "[0].mixer"),
        (dict(mixer="titans_mag"), "[0].mixer.attention"),
        (dict(mixer="titans_mal"), "[0].mixer.attention"),
        (dict(mixer="mamba2", then=("attention",), layers=2), "[1].mixer"),
    ],
    ids=["transformer", "no window", "hope-attention", "mag", "mal", "samba"],
)
def test_a_model_refuses_it_too(fields, where):
    tokens = jnp.ones((2, 3), int)

    def twice():
        made = model(**fields)
        return made(tokens, made(tokens)[1])

    refused(twice, f"`state{where}.key` is missing; it must be float32[2,")


def test_a_block_refuses_it_too():
    def twice():
        block, x = model().blocks[0], jnp.ones((2, 3, 8))
        return block(x, block(x)[1])

    refused(twice, "`state.mixer.key` is missing; it must be float32[2, 5, 2, 4]")


def test_a_state_from_no_state_goes_on_where_nothing_is_missing():
    made, tokens = model("self_modifying", feed_forward="cms"), jnp.ones((2, 3), int)
    jax.eval_shape(lambda: made(tokens, made(tokens)[1]))


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_says_what_it_must_be_given(name):
    x, ids = jnp.ones((2, 3, 8)), jnp.ones((2, 4), int)
    called = lambda *inputs: lambda: make_mixer(config(name), name, rngs=nnx.Rngs(0))(*inputs)
    refused(called(x[..., 1:]), "`x` has shape (2, 3, 7); it must be [b, t, 8], none empty.")
    refused(called(x[0]), "`x` has shape (3, 8); it must be [b, t, 8], none empty.")
    integers = called(jnp.ones((2, 3, 8), int))
    refused(integers, "`x` is of type int32; it must be an array of floats.", TypeError)
    refused(called(x, None, ids), "`segment_ids` has shape (2, 4); it must be (2, 3), as tokens.")

    def other_rows():
        layer = make_mixer(config(name), name, rngs=nnx.Rngs(0))
        return layer(x, layer.init_state(3, 5))

    with pytest.raises(ValueError, match=r"^`state\.\S+ is \w+\[3.*; it must be \w+\[2.*, as in"):
        nnx.eval_shape(other_rows)


def test_a_model_is_told_another_models_state():
    def other():
        made = model("self_modifying", feed_forward="cms")
        return made(jnp.ones((2, 3), int), model("gated_deltanet").init_state(2))

    refused(other, "`state[0].mixer.windows['gate']` is missing; it must be float32[2, 3, 8], as")

    def wider():
        made = model("gated_deltanet", bfloat16=True)
        return made(jnp.ones((2, 3), int), model("gated_deltanet").init_state(2))

    refused(wider, "`state[0].mixer.before['key']` is float32[2, 3, 8]; it must be bfloat16[2, 3,")
    unlike = lambda: model()(jnp.ones((2, 3), int), (jnp.ones((2, 3)),))
    refused(unlike, "`state[0].mixer.key` is missing; it must be float32[2, 5, 2, 4], as in what")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.SelfModifying(8, **UNTIL_READ, projection_chunk_size=4, rngs=nnx.Rngs(0)),
        lambda: nn.TitansLMM(8, **UNTIL_READ, rngs=nnx.Rngs(0)),
        lambda: nn.TitansMAC(8, **UNTIL_READ, rngs=nnx.Rngs(0)),
    ],
)
def test_read_is_looked_at_when_a_mixer_is_made(make):
    with pytest.raises(ValueError, match="`read` is 'x'; it must be one of after_write, chunk_sta"):
        make()


UNTIL_READ = dict(heads=2, hidden=4, chunk_size=4, read="x")
RULE = writes.summed(optax.sgd(0.1))
Clock = nlx.Clock


def learner(variant="nested"):
    return model(feed_forward="cms", cms_periods=(1, 2), cms_variant=variant)


@pytest.mark.parametrize(
    ("clocks", "kind", "sentence"),
    [
        ([Clock(4), Clock(1)], ValueError, "`clocks` have the periods [4, 1]; there must be"),
        ([Clock(1), Clock(None)], ValueError, "`clocks` hold a period of None; in the nested"),
        ([1, 2], TypeError, "`clocks` is [1, 2]; it must be a sequence of `nlx.Clock`s."),
        (Clock(1), TypeError, "`clocks` is Clock(period=1, phase=0); it must be a sequence of"),
    ],
    ids=["falling", "never", "integers", "one"],
)
def test_clocks_in_context(clocks, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        nn.in_context(learner(), RULE, clocks)


def test_clocks_of_levels():
    sentence = re.escape("`clocks` is [1, 2]; it must be a sequence of `nlx.Clock`s.")
    with pytest.raises(TypeError, match=sentence):
        nn.CMS(8, 8, [1, 2], rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=sentence):
        nn.from_pretrained_mlps(model(), [1, 2])


@pytest.mark.parametrize("write", [optax.sgd(0.1), [RULE, optax.sgd(0.1)], 0.1])
def test_an_optax_rule_alone_is_no_write(write):
    """It is a tuple of two functions, as long as two levels."""
    kind = type(write).__name__
    with pytest.raises(TypeError, match=f"`write` is a {kind}; it must be an `nlx.Write`, such as"):
        nn.in_context(learner(), write)


@pytest.fixture(scope="module")
def begun():
    made = learner()
    nest = nn.in_context(made, RULE)
    return nest, nn.begin(nest, nest.init(jax.random.key(0)), made.init_state(2))


@pytest.mark.parametrize(
    ("tokens", "kind", "sentence"),
    [
        (jnp.ones(5, int), ValueError, "`tokens` has shape (5,); it must be [b, t], neither"),
        ([[1, 2, 3, 4, 5]] * 2, TypeError, "`tokens` is of type list; it must be an array of"),
        (jnp.ones((2, 5)), TypeError, "`tokens` is of type float32; it must be an array of"),
        (jnp.ones((3, 5), int), ValueError, "`tokens` are of 3 rows; they must be of 2, as the"),
    ],
)
def test_a_stream_of_other_tokens(begun, tokens, kind, sentence):
    nest, state = begun
    with pytest.raises(kind, match=re.escape(sentence)):
        nn.stream(nest, state, tokens, chunk_size=2)


@pytest.mark.parametrize(
    ("tokens", "kind", "sentence"),
    [
        ([[1, 2]], TypeError, "`tokens` is of type list; it must be an array of integers."),
        (jnp.ones((1, 4)), TypeError, "`tokens` is of type float32; it must be an array of"),
        (jnp.ones(4, int), ValueError, "`tokens` has shape (4,); it must be [b, t], neither"),
        (jnp.ones((1, 1), int), ValueError, "`tokens` has shape (1, 1); it must be [b, t], t at"),
    ],
)
def test_what_can_not_be_watched(tokens, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        inspect.watch(model("retnet"), tokens)


def test_zero_is_for_persistent_tokens_alone():
    assert dataclasses.replace(config("titans_lmm"), persistent=0).persistent == 0
    with pytest.raises(ValueError, match="`persistent` is -1; it must be an integer >= 0"):
        config(persistent=-1)
    with pytest.raises(ValueError, match="`memory_depth` is 0; it must be an integer >= 1"):
        config(memory_depth=0)
