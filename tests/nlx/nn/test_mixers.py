"""Each mixer and feed-forward alone: its equation, its state, its bad input."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import nn, ops
from nlx.clock import Clock
from nlx.level import Association
from nlx.self_modifying import Readouts, Token


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def rotated(z, position):
    """Two channel pairs (i, i + 2) turned by position / 10000^(i / 2), as complex numbers."""
    turned = (z[:2] + 1j * z[2:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(2) / 2))
    return np.concatenate([turned.real, turned.imag])


ATTENTIONS = {
    "whole": (None, 0),
    "window": (3, 0),
    "prefix": (None, 2),
    "window-prefix": (3, 2),
}


@pytest.fixture(params=ATTENTIONS.values(), ids=ATTENTIONS, scope="module")
def attended(request):
    """Four heads of four channels, two of them on each key and value head; 7 tokens."""
    with jax.enable_x64(True):
        window, n = request.param
        attention = nn.Attention(16, heads=4, kv_heads=2, window=window, rngs=nnx.Rngs(0))
        x, prefix = random(1, 7, 16), random(n, 16, seed=1) if n else None
        y, state = jax.jit(lambda x: attention(x, prefix=prefix))(x)
        assert state is None
        kernel = lambda part: np.asarray(getattr(attention, part).kernel[...])
        q, k, v = (np.asarray(x[0]) @ kernel(part) for part in ("query", "key", "value"))
        pk, pv = (np.asarray(random(n, 16, seed=1)) @ kernel(part) for part in ("key", "value"))
        yield attention, y[0], (q, k, v, pk, pv), kernel("output")


def visible(attention, made, h, t):
    """What head h sees at token t: its query, keys and values, a prefix's keys turned with it."""
    q, k, v, pk, pv = made
    mine, shared = slice(4 * h, 4 * h + 4), slice(4 * (h // 2), 4 * (h // 2) + 4)
    seen = range(max(0, t + 1 - (attention.window or 100)), t + 1)
    keys = [rotated(key, t) for key in pk[:, shared]] + [rotated(k[s, shared], s) for s in seen]
    return rotated(q[t, mine], t), np.array(keys), np.concatenate([pv[:, shared], v[seen, shared]])


def test_attention_is_its_equation(attended, x64):
    attention, y, made, output = attended
    heads = np.zeros((7, 16))
    for h in range(4):
        for t in range(7):
            query, keys, values = visible(attention, made, h, t)
            weights = np.exp(keys @ query / 2)
            heads[t, 4 * h : 4 * h + 4] = weights / weights.sum() @ values
    close(y, heads @ output)


def test_attention_is_its_level(attended, x64):
    """One token's write, from any parameters, is what the head reads: Eq. 62 solved exactly."""
    attention, y, made, output = attended
    level = attention.level()
    solved = [
        level.step(level.start(random(4, seed=9)), nn.Lookup(*visible(attention, made, h, 6)))
        for h in range(4)
    ]
    close(y[6], np.concatenate([state.params for state in solved]) @ output)


def test_a_window_streams_without_end(x64):
    """A ring of constant size, at any length of a call; and how late it is does not matter."""
    attention = nn.Attention(8, heads=2, window=3, rngs=nnx.Rngs(0))
    x, prefix = random(2, 12, 8), random(2, 8, seed=1)
    run = jax.jit(lambda x, state: attention(x, state, prefix=prefix))
    whole, _ = run(x, None)
    for length in (1, 2, 5):
        state = start = attention.init_state(2, capacity=1)
        pieces = []
        for n in range(0, 12, length):
            y, state = run(x[:, n : n + length], state)
            pieces.append(y)
        close(jnp.concatenate(pieces, axis=1), whole)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)
    assert state.key.shape == (2, 3, 2, 4)
    late = state._replace(position=state.position + 3 * 10**8)
    np.testing.assert_array_equal(run(x[:, :2], late)[0], run(x[:, :2], state)[0])


def test_convolution_is_its_level(x64):
    convolution = nn.Convolution(3, rngs=nnx.Rngs(0))
    x = random(1, 6, 3)
    level = convolution.level()
    state = level.start(level.init(jax.random.key(0)))
    for t in range(6):
        window = jnp.concatenate([state.params[1:], x[0, t : t + 1]])
        one, none = jnp.ones(()), jnp.zeros(())
        state = level.step(state, Association((), window, rate=one, retain=none))
    _, window = convolution(x)
    close(state.params, window[0])


@pytest.mark.parametrize("window", [None, 4])
def test_attention_keeps_only_the_running_segment(window, x64):
    attention = nn.Attention(8, heads=2, window=window, rngs=nnx.Rngs(0))
    x = random(2, 9, 8)
    segment_ids = jnp.array([[1] * 3 + [2] * 6, [1] * 7 + [2] * 2])
    run = jax.jit(lambda x, state, segment_ids: attention(x, state, segment_ids))
    whole, _ = run(x, None, segment_ids)
    state = attention.init_state(2, 6)
    pieces = []
    for start, stop in ((0, 2), (2, 5), (5, 8), (8, 9)):
        y, state = run(x[:, start:stop], state, segment_ids[:, start:stop])
        pieces.append(y)
        if stop == 8:
            np.testing.assert_array_equal(state.position, [5, 1])
    close(jnp.concatenate(pieces, axis=1), whole)
    alone, _ = run(x[:1, 3:], None, None)
    close(whole[0, 3:], alone[0])


def test_attention_without_positions_does_not_see_their_order(x64):
    """`rotary=False`: the last token reads a set; whole == through a cache; with positions not."""
    x, mixed = random(1, 5, 8), [2, 0, 3, 1, 4]
    for rotary in (False, True):
        config = dataclasses.replace(nn.preset("transformer++-tiny"), width=8, heads=2, hidden=4)
        config = dataclasses.replace(config, rotary=rotary)
        attention = nn.LanguageModel(config, rngs=nnx.Rngs(0)).blocks[0].mixer
        y, _ = attention(x)
        again, state = attention(x[:, :3], attention.init_state(1, 5))
        rest, _ = attention(x[:, 3:], state)
        close(jnp.concatenate([again, rest], 1), y)
        shuffled, _ = attention(x[:, jnp.asarray(mixed)])
        apart = np.abs(shuffled[0, -1] - y[0, -1]).max()
        assert apart > 1e-3 if rotary else apart < 1e-12


def test_attention_says_when_its_cache_is_full():
    attention = nn.Attention(8, heads=2, rngs=nnx.Rngs(0))
    state = attention.init_state(1, 4)
    _, state = jax.jit(lambda x, state: attention(x, state))(random(1, 3, 8), state)
    with pytest.raises(ValueError, match="`capacity` is 4; it must be at least 5"):
        attention(random(1, 2, 8), state)
    with pytest.raises(ValueError, match="`capacity` is 4; it must be at least 5"):
        jax.eval_shape(attention, random(1, 5, 8), state)


def test_attention_keeps_its_cache_in_the_dtype_of_its_input():
    attention = nn.Attention(8, heads=2, rngs=nnx.Rngs(0))
    state = attention.init_state(1, 4, jnp.bfloat16)
    y, after = jax.eval_shape(attention, jnp.zeros((1, 2, 8), jnp.bfloat16), state)
    assert y.dtype == after.key.dtype == after.value.dtype == jnp.bfloat16


def test_convolution_is_its_equation(x64):
    convolution = nn.Convolution(3, rngs=nnx.Rngs(0))
    x = random(2, 7, 3)
    y, window = convolution(x)
    kernel = np.asarray(convolution.kernel[...])
    padded = np.concatenate([np.zeros((2, 3, 3)), x], axis=1)
    for t in range(7):
        close(y[:, t], sum(kernel[3 - j] * padded[:, t + 3 - j] for j in range(4)))
    close(window, x[:, 4:])


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_convolution_splits_anywhere_and_forgets_other_segments(cut, x64):
    convolution = nn.Convolution(3, rngs=nnx.Rngs(0))
    x = random(2, 7, 3)
    segment_ids = jnp.array([[1, 1, 1, 4, 4, 4, 4], [1, 1, 1, 1, 1, 1, 2]])
    run = jax.jit(lambda x, state, segment_ids: convolution(x, state, segment_ids))
    whole, last = run(x, None, segment_ids)
    first, state = run(x[:, :cut], None, segment_ids[:, :cut])
    second, state = run(x[:, cut:], state, segment_ids[:, cut:])
    close(jnp.concatenate([first, second], axis=1), whole)
    close(state, last)
    alone, _ = run(x[:1, 3:], None, None)
    close(whole[0, 3:], alone[0])


def test_cms_is_a_chain_of_residual_blocks(x64):
    cms = nn.CMS(4, 6, [Clock(1), Clock(2)], rngs=nnx.Rngs(0))
    x = random(1, 3, 4)
    y, state = jax.jit(lambda x: cms(x, ()))(x)
    assert state == ()
    expected = x
    for level in cms.levels:
        normed = expected / jnp.sqrt(jnp.mean(expected**2, -1, keepdims=True) + 1e-6)
        hidden = jax.nn.gelu(normed @ level.mlp.up.kernel[...], approximate=True)
        expected = expected + hidden @ level.mlp.down.kernel[...]
    close(y, expected)


def test_swiglu_is_its_equation(x64):
    mlp = nn.SwiGLU(4, 6, rngs=nnx.Rngs(0))
    x = random(1, 3, 4)
    gate, up = x @ mlp.gate.kernel[...], x @ mlp.up.kernel[...]
    close(mlp(x), (gate * jax.nn.sigmoid(gate) * up) @ mlp.down.kernel[...])


@pytest.fixture(scope="module")
def hope():
    return nn.SelfModifying(
        8, heads=2, hidden=4, chunk_size=1, projection_chunk_size=4, rngs=nnx.Rngs(0)
    )


def test_hope_starts_with_the_rates_and_retention_it_says(hope):
    parameters = hope.parameters()
    assert jnp.all(parameters.retain_bias == 4.0)
    rate = {box: jax.nn.sigmoid(bias) for box, bias in parameters.rate_bias.items()}
    close(rate["memory"], 0.2 * jnp.ones(2), 1e-6)  # times (1 + alpha) / 2: chunks of one token
    close(2 * rate["key"], 0.2 * jnp.ones(2), 1e-6)  # times 1 + alpha
    scales = {box: [float(w.std()) for w in pair] for box, pair in parameters.memories.items()}
    for inner, outer in scales.values():
        assert 0.5 < inner / 4**-0.5 < 1.5
        assert 0.5 < outer / (0.5 * 4**-0.5) < 1.5
    assert len({str(pair) for pair in scales.values()}) == 5


def test_hope_starts_where_its_op_starts(hope):
    """The state before the first token is the one the op makes by itself."""
    x = random(2, 1, 2, 4)
    start = hope.init_state(2).memory
    call = dict(parameters=hope.parameters(), chunk_size=1, projection_chunk_size=4)
    momentum = jnp.full((2, 1, 2), 0.5)
    made, _ = ops.self_modifying_memory(x, x, **call, momentum=momentum, implementation="reference")
    given, _ = ops.self_modifying_memory(
        x, x, **call, momentum=momentum, state=start, implementation="reference"
    )
    np.testing.assert_array_equal(made, given)


def check_around_the_op(hope, inputs, calls, outputs):
    """Streams, unit queries, momentum, norm, gate and output map, straight from their equations."""
    silu = lambda z: z * jax.nn.sigmoid(z)
    streams = {}
    for name, stream in hope.streams.items():
        mapped = jnp.pad(inputs[0] @ stream.map.kernel[...], ((3, 0), (0, 0)))
        kernel = stream.convolution.kernel[...]
        made = sum(kernel[j][None] * mapped[j : j + 7] for j in range(4))
        streams[name] = silu(made).reshape(7, 2, 4)
    if "query" not in hope.boxes:
        norm = jnp.sqrt(jnp.sum(streams["query"] ** 2, axis=-1, keepdims=True) + 1e-6)
        streams["query"] = streams["query"] / norm
    given = {"query": calls["q"], **calls["x"]._asdict()}
    for name, stream in streams.items():
        close(given[name][0], stream)
    if calls["momentum"] is not None:
        close(calls["momentum"][0], jax.nn.sigmoid(inputs[0] @ hope.momentum.kernel[...] - 2.0))
    y = calls["y"][0]
    y = y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    gated = y.reshape(7, 8) * silu(inputs[0] @ hope.gate.kernel[...])
    close(outputs[0], gated @ hope.output.kernel[...])


FLAGS = dict(read="chunk_start", momentum=False, erase=False, adaptive_query=True)


@pytest.mark.parametrize(
    "flags",
    [pytest.param({}, id="defaults"), pytest.param(FLAGS, id="flags", marks=pytest.mark.slow)],
)
def test_hope_is_its_nest(flags, x64, monkeypatch):
    """What the op gave the mixer for one head is what the mixer's nest says, tick by tick."""
    hope = nn.SelfModifying(
        8, heads=2, hidden=4, chunk_size=2, projection_chunk_size=3, **flags, rngs=nnx.Rngs(0)
    )
    calls = {}

    def op(x, q, *, momentum, **rest):
        y, state = ops.self_modifying_memory(
            x, q, momentum=momentum, **rest, implementation="reference"
        )
        calls.update(x=x, q=q, momentum=momentum, y=y)
        return y, state

    seam = types.SimpleNamespace(**{**vars(ops), "self_modifying_memory": op})
    monkeypatch.setattr("nlx.nn.hope.ops", seam)
    inputs = random(1, 7, 8)
    outputs, _ = hope(inputs)
    check_around_the_op(hope, inputs, calls, outputs)
    head = lambda a: None if a is None else a[0, :, 1]
    tokens = Token(*map(head, calls["x"]), head(calls["q"]), head(calls["momentum"]))
    parameters = jax.tree.map(lambda w: w[1], hope.parameters())
    nest = hope.nest()
    start = nest.start(parameters.memories | {"readouts": Readouts(*parameters[1:])})
    _, y = jax.jit(nest.scan)(start, tokens)
    close(y, head(calls["y"]), 1e-9)


def test_hope_without_momentum_and_with_adaptive_queries():
    hope = nn.SelfModifying(
        8,
        heads=2,
        hidden=4,
        chunk_size=2,
        projection_chunk_size=4,
        momentum=False,
        adaptive_query=True,
        rngs=nnx.Rngs(0),
    )
    assert "query" in hope.parameters().memories
    state = hope.init_state(2)
    assert state.memory.momentum is None
    y, after = jax.eval_shape(hope, jnp.zeros((2, 3, 8)), state)
    assert y.shape == (2, 3, 8)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda r: nn.Attention(6, heads=2, rngs=r), "`width` is 6; it must be a multiple of 2"),
        (lambda r: nn.Attention(8, heads=2, kv_heads=3, rngs=r), "`kv_heads` is 3; it must be a"),
        (lambda r: nn.Attention(8, heads=0, rngs=r), "`heads` is 0; it must be an integer >= 1"),
        (lambda r: nn.Attention(8, heads=2, window=0, rngs=r), "`window` is 0; it must be an"),
        (
            lambda r: nn.Attention(8, heads=2, rngs=r)(random(1, 2, 8), prefix=random(2, 4)),
            r"`prefix` has shape \(2, 4\); it must be \[n, 8\]",
        ),
        (lambda r: nn.CMS(4, 0, [Clock(1)], rngs=r), "`size_out` is 0; it must be an integer"),
        (lambda r: nn.CMS(4, 4, [], rngs=r), "`clocks` have the periods"),
        (lambda r: nn.CMS(4, 4, [Clock(4), Clock(1)], rngs=r), "from the shortest to the longest"),
        (lambda r: nn.Convolution(0, rngs=r), "`channels` is 0; it must be an integer >= 1"),
        (
            lambda r: nn.SelfModifying(
                8, heads=3, hidden=4, chunk_size=1, projection_chunk_size=4, rngs=r
            ),
            "`heads` is 3; it must be a divisor of width = 8",
        ),
        (
            lambda r: nn.SelfModifying(
                8, heads=2, hidden=4, chunk_size=0, projection_chunk_size=4, rngs=r
            ),
            "`chunk_size` is 0; it must be an integer >= 1",
        ),
        (
            lambda r: nn.Attention(8, heads=2, rngs=r).init_state(1, 0),
            "`capacity` is 0; it must be an integer >= 1",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(nnx.Rngs(0))
