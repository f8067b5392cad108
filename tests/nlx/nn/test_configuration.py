# SPDX-License-Identifier: Apache-2.0
"""Every field of a configuration reaches the module it belongs to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import nn

UNUSUAL = dict(
    vocabulary=10,
    width=8,
    heads=2,
    kv_heads=1,
    window=5,
    rotary=False,
    negative_eigenvalues=True,
    hidden=12,
    cms_periods=(2, 3),
    cms_variant="independent",
    memory_hidden=6,
    memory_depth=3,
    persistent=3,
    chunk_size=7,
    projection_chunk_size=9,
    read="chunk_start",
    momentum=False,
    erase=False,
    retain=False,
    adaptive_key=False,
    adaptive_value=False,
    adaptive_query=True,
    tied=True,
    context=11,
    remat=True,
    bfloat16=True,
)


def memory(mixer):
    """Where a mixer's writes are configured: its `DeepMemory`, or itself."""
    deep = [m for _, m in nnx.iter_modules(mixer) if type(m).__name__ == "DeepMemory"]
    return deep[0] if deep else mixer


def persistent(mixer):
    owner = [m for _, m in nnx.iter_modules(mixer) if getattr(m, "persistent", None) is not None]
    return owner[0].persistent.shape[0]


def window(mixer):
    return getattr(mixer, "attention", mixer).window


of_memory = lambda name: lambda mixer: getattr(memory(mixer), name)
heads = dict(heads=lambda mixer: mixer.heads)
ttt = heads | dict(chunk_size=of_memory("chunk_size"))
titans = dict(
    heads=of_memory("heads"),
    memory_hidden=lambda mixer: memory(mixer).sizes[1],
    memory_depth=lambda mixer: len(memory(mixer).layers),
    chunk_size=of_memory("chunk_size"),
    persistent=persistent,
    momentum=lambda mixer: memory(mixer).momentum is not None,
    read=of_memory("read"),
)
MIXERS = {
    "attention": heads
    | dict(
        kv_heads=lambda mixer: mixer.kv_heads,
        window=window,
        rotary=lambda mixer: mixer.theta is not None,
    ),
    "retnet": heads,
    "deltanet": heads | dict(negative_eigenvalues=lambda mixer: mixer.top == 2),
    "gated_deltanet": heads,
    "mamba2": heads,
    "ttt_linear": ttt,
    "ttt_mlp": ttt,
    "titans_lmm": titans,
    "titans_mac": titans,
    "titans_mag": titans | dict(window=window),
    "titans_mal": titans | dict(window=window),
    "self_modifying": heads
    | dict(
        memory_hidden=lambda mixer: mixer.hidden,
        chunk_size=lambda mixer: mixer.chunk_size,
        projection_chunk_size=lambda mixer: mixer.projection_chunk_size,
        read=lambda mixer: mixer.read,
        momentum=lambda mixer: mixer.momentum is not None,
        erase=lambda mixer: mixer.erase,
        retain=lambda mixer: mixer.retain,
        adaptive_key=lambda mixer: "key" in mixer.boxes,
        adaptive_value=lambda mixer: "value" in mixer.boxes,
        adaptive_query=lambda mixer: "query" in mixer.boxes,
    ),
}
levels = lambda model: model.blocks[0].feed_forward.levels
MODEL = dict(
    vocabulary=lambda model: model.embedding.table.shape[0],
    width=lambda model: model.embedding.table.shape[1],
    hidden=lambda model: levels(model)[0].mlp.up.kernel.shape[1],
    cms_periods=lambda model: tuple(level.clock.period for level in levels(model)),
    cms_variant=lambda model: model.blocks[0].feed_forward.variant,
    tied=lambda model: model.readout is None,
)


def built(**fields):
    """A model of shapes alone."""
    config = nn.ModelConfig(**UNUSUAL | dict(feed_forward="cms", layers=1) | fields)
    return nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))


def test_the_values_are_unusual_and_all_fields_are_looked_at():
    fields = {field.name: field.default for field in dataclasses.fields(nn.ModelConfig)}
    assert not [name for name, value in UNUSUAL.items() if value == fields[name]]
    looked_at = {name for each in (MODEL, *MIXERS.values()) for name in each}
    named_below = {"mixer", "then", "layers", "feed_forward", "context", "bfloat16", "remat"}
    assert looked_at | named_below == set(fields)


@pytest.mark.parametrize("mixer", MIXERS)
def test_fields_reach_the_mixer(mixer):
    model = built(mixer=mixer)
    for field, found in MIXERS[mixer].items():
        assert found(model.blocks[0].mixer) == UNUSUAL[field], field


def test_fields_reach_the_model():
    model = built(mixer="attention", then=("retnet", "mamba2"), layers=6)
    for field, found in MODEL.items():
        assert found(model) == UNUSUAL[field], field
    pattern = [nn.Attention, nn.RetNet, nn.Mamba2]
    assert [type(block.mixer) for block in model.blocks] == pattern * 2
    swiglu = built(mixer="attention", feed_forward="swiglu")
    assert [type(level.mlp) for level in levels(swiglu)] == [nn.SwiGLU]


def test_context_is_what_attention_keeps_without_a_window():
    for mixer in ("titans_mag", "titans_mal"):
        assert window(built(mixer=mixer, window=None).blocks[0].mixer) == UNUSUAL["context"]
    model = built(mixer="attention", window=None)
    cache = jax.eval_shape(lambda: model.init_state(2))[0].mixer
    assert cache.key.shape[1] == UNUSUAL["context"]
    assert cache.key.dtype == jnp.bfloat16


@pytest.mark.parametrize("mixer", ["titans_lmm", "titans_mac", "titans_mag", "titans_mal"])
def test_titans_do_without_persistent_tokens(mixer):
    """One of the ablations of the paper: whole, then in two calls, are the same."""
    fields = dict(persistent=0, momentum=True, bfloat16=False, feed_forward="swiglu")
    config = nn.ModelConfig(**UNUSUAL | fields | dict(mixer=mixer, layers=1))
    graph, params = nnx.split(nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    assert "persistent" not in str(jax.tree_util.tree_structure(params))
    read = jax.jit(lambda tokens, state: nnx.merge(graph, params)(tokens, state))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 10)
    state, halves = nnx.merge(graph, params).init_state(2), []
    for half in jnp.split(tokens, 2, axis=1):
        scores, state = read(half, state)
        halves.append(scores)
    whole, _ = read(tokens, None)
    np.testing.assert_allclose(jnp.concatenate(halves, axis=1), whole, rtol=1e-4, atol=1e-4)
