"""The table of levels is read off the objects."""

import dataclasses

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nlx.inspect
from nlx import nn, optim
from nlx.clock import Clock

CONFIG = nn.ModelConfig(
    mixer="self_modifying",
    feed_forward="cms",
    vocabulary=16,
    width=8,
    layers=2,
    heads=2,
    hidden=8,
    cms_periods=(1, 3),
    memory_hidden=4,
    chunk_size=2,
    projection_chunk_size=6,
)


def rows(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    model = nn.LanguageModel(config, rngs=nnx.Rngs(0))
    return model, {row.name: row for row in nlx.inspect.levels(model)}


def test_pretraining_holds_every_parameter_once():
    model, found = rows()
    outer = [row for row in found.values() if "mixer" not in row.name]
    assert {row.order for row in outer} == {0}
    assert [row.name for row in outer] == ["cms_1", "outer", "cms_0"]
    assert [row.clock for row in outer] == ["3 steps", "every step", "every step"]
    assert {row.objective for row in outer} == {"next_token_loss"}
    assert {row.write for row in outer} == {"summed(reduce=mean)"}
    assert {row.context for row in outer} == {"batch per step"}
    assert sum(row.parameters for row in outer) == nn.parameter_count(model)


def test_a_transformer_learns_in_context_by_attention_alone():
    _, found = rows(mixer="attention", feed_forward="swiglu")
    assert list(found) == ["outer", "blocks.*.mixer"]
    attention = found["blocks.*.mixer"]
    assert attention.copies == 2 * 2
    assert (attention.objective, attention.clock, attention.order) == (
        "softmax_l2",
        "every token",
        1,
    )


@pytest.mark.parametrize(
    ("mixer", "objective", "write", "clock"),
    [
        ("retnet", "dot_product", "gated", "every token"),
        ("deltanet", "l2", "gated", "every token"),
        ("gated_deltanet", "dot_product", "gated(erase)", "every token"),
        ("mamba2", "dot_product", "gated", "every token"),
        ("ttt_linear", "l2", "gated", "2 tokens"),
        ("ttt_mlp", "l2", "gated", "2 tokens"),
    ],
)
def test_rivals_are_one_memory_a_head(mixer, objective, write, clock):
    config = dataclasses.replace(CONFIG, mixer=mixer, feed_forward="swiglu")
    model = nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    found = {row.name: row for row in nlx.inspect.levels(model)}
    memory = found["blocks.*.mixer.memory"]
    assert memory.copies == 2 * 2
    assert (memory.objective, memory.write, memory.clock) == (objective, write, clock)


def test_a_pattern_shows_both_of_its_mixers():
    config = dataclasses.replace(CONFIG, mixer="mamba2", then=("attention",))
    model = nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    copies = {row.name: row.copies for row in nlx.inspect.levels(model)}
    assert copies["blocks.*.mixer.memory"] == copies["blocks.*.mixer"] == 2


def test_hope_shows_its_memories_on_their_clocks():
    _, found = rows()
    of = {name.rpartition(".")[2]: row for name, row in found.items() if ".mixer." in name}
    assert [of[box].clock for box in ("key", "value", "rate", "retain")] == ["6 tokens"] * 4
    assert [of[box].order for box in ("key", "memory", "readouts")] == [1, 2, 0]
    memory = of["memory"]
    assert memory.name == "blocks.*.mixer.memory"
    assert memory.clock == "2 tokens"
    assert (memory.copies, memory.parameters) == (2 * 2, 2 * 2 * 2 * 4 * 4)
    assert memory.objective == "l2"
    assert memory.write == "gated(bound=4.0, clip=1.0, erase, momentum)"
    assert of["readouts"].clock == "never"
    assert of["convolution"].objective == "dot_product"
    assert "query" not in of


def test_flags_of_hope_show():
    _, found = rows(momentum=False, erase=False, adaptive_query=True, chunk_size=6)
    assert found["blocks.*.mixer.query"].write == "gated(bound=4.0, clip=1.0)"
    assert found["blocks.*.mixer.memory"].clock == "6 tokens"
    assert found["blocks.*.mixer.memory"].order == 1


def test_a_level_that_begins_anew_shows_its_write_and_when():
    _, found = rows(mixer="attention", cms_variant="nested")
    assert found["cms_0"].write == "restarted(summed(reduce=mean), firings=3)"
    assert found["cms_1"].write == "summed(reduce=mean)"


def test_an_optimizer_shows_its_levels():
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    tx = optax.chain(
        optax.clip(1.0),
        optax.partition(
            {"a": optim.dmgd(1e-3), "b": optim.on_clock(optax.adam(1e-3), Clock(4))},
            {"kernel": "a", "bias": "b"},
        ),
    )
    found = {row.name: row for row in nlx.inspect.levels(tx, params)}
    assert found["on_clock"].clock == "4 steps"
    assert found["on_clock"].write == "summed(reduce=mean)"
    assert found["scale_by_deep_momentum.average"].objective == "l2"
    assert found["scale_by_deep_momentum.deep"].clock == "every step"
    assert found["scale_by_deep_momentum.deep"].copies == 1  # a bias has no rows to learn from


def test_table_lines_up():
    _, found = rows(mixer="attention")
    lines = nlx.inspect.table(found.values()).splitlines()
    assert lines[0].startswith("level ")
    assert set(lines[1]) == {"-", " "}
    assert len(lines) == 2 + len(found)
    for line, row in zip(lines[2:], found.values(), strict=True):
        assert line.startswith(row.name)
        assert line.endswith(str(row.order))
        assert line.index(row.clock) == lines[0].index("clock")


def test_bad_input_gets_a_sentence():
    with pytest.raises(TypeError, match="`thing` is of type int; it must be a Module or an optax"):
        nlx.inspect.levels(3)
    with pytest.raises(TypeError, match="`params` is None; it must be the parameters"):
        nlx.inspect.levels(optax.sgd(0.1))


def test_matrices_and_other_leaves_show_their_own_levels():
    found = {r.name: r for r in nlx.inspect.levels(optim.m3(0.1), {"w": jnp.zeros((4, 3))})}
    assert set(found) == {"scale_by_m3.fast", "scale_by_m3.slow", "scale_by_m3.second"}
    assert found["scale_by_m3.slow"].clock == "10 steps"
    assert found["scale_by_m3.fast"].order == 2
    found = {r.name: r for r in nlx.inspect.levels(optim.m3(0.1), {"b": jnp.zeros(3)})}
    assert set(found) == {"scale_by_adam_memory.first", "scale_by_adam_memory.second"}
