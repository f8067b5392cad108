"""Who reads whom, and what optimizers store."""

import dataclasses

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from nlx import inspect, memories, nn, objectives, optim, writes
from nlx.clock import Clock
from nlx.inspect import Link, Stored
from nlx.level import Association, associative_memory
from nlx.nest import Nest

CONFIG = nn.ModelConfig(
    mixer="self_modifying",
    feed_forward="cms",
    vocabulary=16,
    width=8,
    layers=2,
    heads=2,
    hidden=8,
    cms_periods=(1, 3, 9),
    memory_hidden=4,
    chunk_size=2,
    projection_chunk_size=6,
)


def wired(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    links = inspect.wiring(nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0))))
    short = lambda name: name.removeprefix("blocks.*.mixer.")
    return {(short(a), short(b), what) for a, b, what in links}


def parts(links, source, target):
    return {what for a, b, what in links if (a, b) == (source, target)}


def test_a_nest_wired_by_hand():
    memory = memories.linear(2, 2)
    level = associative_memory(memory, objectives.l2, writes.gated(momentum=False), Clock(1))

    def forward(params, x):
        key = memory.read(params["maker"], x)
        return None, {
            "maker": Association(x, x),
            "user": Association(key, x, retain=jnp.tanh(params["user"][0, 0])),
        }

    nest = Nest({"maker": level, "user": level}, forward)
    params = {"maker": jnp.zeros((2, 2)), "user": jnp.zeros((2, 2))}
    found = inspect.links(nest, params, jnp.zeros(2))
    assert found == [Link("maker", "user", "key"), Link("user", "user", "retain")]


def test_hope_makes_its_own_keys_values_and_gates():
    links = wired()
    boxes = ("key", "value", "rate", "retain", "memory")
    for target in boxes:
        assert "key" in parts(links, "key", target)
        assert "value" in parts(links, "value", target)
        assert {"rate", "erase"} <= parts(links, "rate", target)
        assert "retain" in parts(links, "retain", target)
        assert "initial state" in parts(links, "outer", target)
        assert "value" in parts(links, target, target)  # M_B(v), its own answer
        if target != "memory":
            assert not parts(links, "memory", target)
    assert "momentum" not in {what for a, _, what in links if a in boxes}
    assert not [link for link in links if "readouts" in link]


def test_levels_under_one_loss_hand_each_other_gradients():
    links = wired(mixer="attention")
    trained = ("outer", "cms_0", "cms_1", "cms_2")
    for a in trained:
        for b in trained:
            assert parts(links, a, b) == (set() if a == b else {"gradient"})


def test_nested_levels_start_where_the_slower_one_says():
    links = wired(mixer="attention", cms_variant="nested")
    starts = {(a, b) for a, b, what in links if what == "initial state"}
    assert starts == {("cms_1", "cms_0"), ("cms_2", "cms_1")}


ASSOCIATION = {"key", "value", "query"}
TITANS = ASSOCIATION | {"initial state", "rate", "retain", "momentum"}


@pytest.mark.parametrize(
    ("mixer", "target", "told"),
    [
        ("retnet", "memory", ASSOCIATION),
        ("gated_deltanet", "memory", ASSOCIATION | {"rate", "retain", "erase"}),
        ("ttt_linear", "memory", ASSOCIATION | {"initial state", "rate"}),
        ("titans_mal", "memory.long_term.memory", TITANS),
        ("titans_mac", "memory.*", TITANS),
        ("titans_mac", "attention", ASSOCIATION),
    ],
)  # fmt: skip
def test_memories_are_told_by_the_slow_maps(mixer, target, told):
    assert parts(wired(mixer=mixer, feed_forward="swiglu"), "outer", target) == told


@pytest.mark.parametrize(
    ("mixer", "memory", "read", "told"),
    [
        ("titans_mac", "memory.*", {"key", "value"}, TITANS - {"initial state"}),
        ("titans_mal", "memory.long_term.memory", ASSOCIATION, set()),
        ("titans_mag", "long_term.memory", set(), set()),
    ],
)
def test_attention_and_memory_read_each_other(mixer, memory, read, told):
    links = wired(mixer=mixer, feed_forward="swiglu", persistent=2)
    assert parts(links, memory, "attention") == read
    assert parts(links, "attention", memory) == told
    assert not parts(links, memory, memory)


@pytest.mark.parametrize(
    ("mixer", "target", "told"),
    [
        ("self_modifying", "rate", {"key": {"key"}, "value": {"value"}, "query": set(),
                                    "gate": {"rate", "retain", "erase"}}),
        ("self_modifying", "memory", {"query": {"query"}}),
        ("mamba2", "memory", {"key": {"key"}, "value": {"value"}, "query": {"query"}}),
    ],
)  # fmt: skip
def test_convolutions_make_what_memories_are_told(mixer, target, told):
    links = wired(mixer=mixer)
    for stream, expected in told.items():
        assert parts(links, f"streams.{stream}.convolution", target) == expected


def test_an_adaptive_query_comes_from_its_memory():
    links = wired(adaptive_query=True)
    assert parts(links, "query", "memory") == {"query"}


@pytest.mark.parametrize("name", [name for name in nn.PRESETS if name.endswith("-tiny")])
def test_every_level_of_every_architecture_is_wired(name):
    model = nnx.eval_shape(lambda: nn.LanguageModel(nn.preset(name), rngs=nnx.Rngs(0)))
    links = inspect.wiring(model)
    rows = inspect.levels(model)
    names = {row.name for row in rows}
    told = {row.name for row in rows if ".mixer" in row.name and row.clock != "never"}
    assert told <= {link.target for link in links if link.source == "outer"}
    assert {end for link in links for end in link[:2]} <= names


SCALED = "f(gradient, gradient_memory)"
KERNEL = {"kernel": jnp.zeros((6, 4))}


def test_deep_momentum_reads_its_average_as_a_key():
    links = set(inspect.wiring(optim.dmgd(0.1), KERNEL))
    average, deep = (f"scale_by_deep_momentum.{name}" for name in ("average", "deep"))
    assert parts(links, average, deep) == {"key", "rate"}
    assert parts(links, "gradient", deep) == {"value"}
    for target in (average, deep):  # they learn u / sqrt(v), v the second moment's memory
        assert parts(links, "gradient_memory", target) == {"value"}
    assert parts(links, deep, average) == set()
    stored = set(inspect.stored(optim.dmgd(0.1), KERNEL))
    assert Stored("gradient_memory", "none", "gradient^2") in stored
    assert Stored(average, "none", SCALED) in stored
    assert Stored(deep, "f(average)", SCALED) in stored
    alone = optim.dmgd(0.1, precondition=False)
    assert Stored(average, "none", "gradient") in set(inspect.stored(alone, KERNEL))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (optim.momentum(0.1), {("gradient_memory", "none", "gradient")}),
        (
            optim.adam_memory(0.1),
            {
                ("scale_by_adam_memory.first", "none", "gradient"),
                ("scale_by_adam_memory.second", "none", "gradient^2"),
            },
        ),
        (
            optim.delta_momentum(0.1),
            {
                ("gradient_memory", "none", "gradient^2"),
                ("gradient_memory 2", SCALED, SCALED),
            },
        ),
        (
            optim.preconditioned_momentum(0.1),
            {
                ("gradient_memory", "none", "gradient^2"),
                ("gradient_memory 2", "none", SCALED),
            },
        ),
        (optim.dgd(0.1), set()),
    ],
)
def test_what_optimizers_store(rule, expected):
    assert set(map(tuple, inspect.stored(rule, KERNEL))) == expected
    names = {row.name for row in inspect.levels(rule, KERNEL)}
    assert {link.target for link in inspect.wiring(rule, KERNEL)} == names


def test_soap_turns_its_gradients_into_the_slow_basis():
    links = set(inspect.wiring(optim.soap(0.1), KERNEL))
    for side in ("left", "right"):
        assert Link(f"scale_by_soap.{side}", "scale_by_soap.second", "value") in links


def test_dgd_shows_its_level():
    (row,) = inspect.levels(optim.dgd(0.1), KERNEL)
    assert (row.objective, row.write) == ("dot_product_and_norm", "implicit")


def test_bad_input_gets_a_sentence():
    with pytest.raises(TypeError, match="`thing` must be a LanguageModel, or an optax"):
        inspect.wiring(3)
    with pytest.raises(TypeError, match="transformation with its `params`"):
        inspect.stored(optax.sgd(0.1), None)
