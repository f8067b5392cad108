# SPDX-License-Identifier: Apache-2.0
"""Continuum memory systems in context and in pre-training, against loops in plain NumPy.

One model serves them: an embedding, a system, a fading sum over tokens as its mixer, a read-out.
A test that is named after a fault fails on a system that has it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nlx
from nlx import nn, optim, train, writes
from nlx.nn.linear import Embedding, Linear

VOCABULARY, WIDTH, HIDDEN, ROWS, CHUNK, CHUNKS = 7, 4, 3, 2, 2, 8
RATES, KEPT = (0.5, 0.3, 0.2, 0.4, 0.1), 0.5
LIMITS = {"sequential": 0.4, "nested": np.inf, "independent": 0.4}
PERIODS = {"sequential": (1, 4), "nested": (1, 2), "independent": (2, 3)}
THREE = ("nested", (1, 2, 4))  # the fewest with a level in the middle
MORE = [
    ("sequential", (1, 2, 2, 4, 8)),
    ("nested", (1, 1, 2, 8)),
    ("independent", (1, 1, 2, 3)),
]
pytestmark = pytest.mark.usefixtures("x64")


class Toy(nnx.Module):
    """Tokens -> embedding -> continuum memory system -> s_t = 0.5 s_{t-1} + y_t -> scores."""

    def __init__(self, variant, clocks):
        rngs = nnx.Rngs(3)
        self.embedding = Embedding(VOCABULARY, WIDTH, rngs=rngs)
        self.cms = nn.CMS(WIDTH, HIDDEN, clocks, variant=variant, rngs=rngs)
        self.readout = Linear(WIDTH, VOCABULARY, ("embed", "vocabulary"), rngs=rngs)
        draw = np.random.default_rng(0)
        levels = self.cms.levels[-1].blocks if variant == "nested" else self.cms.levels
        for level in levels:
            level.norm.scale[...] += jnp.asarray(0.3 * draw.normal(size=WIDTH))
        if variant == "independent":
            self.cms.aggregate[...] = jnp.asarray(draw.uniform(0.5, 1.5, len(clocks)))

    def __call__(self, tokens, state=None, segment_ids=None):
        y, _ = self.cms(self.embedding(tokens))
        before = jnp.zeros((len(y), WIDTH)) if state is None else state
        t = np.arange(tokens.shape[1])
        fading = np.tril(KEPT ** np.abs(t[:, None] - t))
        s = jnp.einsum("ij,bjd->bid", fading, y) + KEPT ** (t + 1)[None, :, None] * before[:, None]
        return self.readout(s), s[:, -1]


def toy(variant, periods=None):
    return Toy(variant, [nlx.Clock(period) for period in periods or PERIODS[variant]])


def tokens(rows=ROWS, chunks=CHUNKS, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, VOCABULARY, (rows, chunks * CHUNK + 1)))


class Run(NamedTuple):
    """A system in context; all tests of one share one compilation."""

    model: Toy
    nest: nlx.Nest
    start: nn.StreamState
    chunk: Callable  # (state, tokens [2, 3]) -> (scores, state)

    def stream(self, tokens, state=None):
        """Scores of all chunks, and the state after them."""
        state, parts = state or self.start, []
        for n in range(0, tokens.shape[1] - 1, CHUNK):
            scores, state = self.chunk(state, tokens[:, n : n + CHUNK + 1])
            parts.append(scores)
        return jnp.concatenate(parts, 1), state


@functools.cache
def run(variant, periods=None):
    """Clips the gradients of each row: if it saw the others', they would show."""
    with jax.enable_x64(True):
        model, clip = toy(variant, periods), optax.clip_by_global_norm(LIMITS[variant])
        rules = [optax.chain(clip, optax.sgd(rate)) for rate in RATES[: len(model.cms.levels)]]
        nest = nn.in_context(model, [writes.summed(rule) for rule in rules])
        start = nn.begin(nest, nest.init(jax.random.key(0)), jnp.zeros((ROWS, WIDTH)))
        chunk = jax.jit(lambda state, tokens: nn.stream(nest, state, tokens, chunk_size=CHUNK))
        return Run(model, nest, start, chunk)


def of_row(tree, row):
    """States or parameters of one row; "outer" is shared."""
    return {
        name: level if name == "outer" else jax.tree.map(lambda x: x[row], level)
        for name, level in tree.items()
    }


def parameters(state):
    return {name: level.params for name, level in state.levels.items()}


# The paper's equations, token by token


def gelu(p):
    t = np.tanh((2 / np.pi) ** 0.5 * (p + 0.044715 * p**3))
    slope = (2 / np.pi) ** 0.5 * (1 + 3 * 0.044715 * p**2)
    return 0.5 * p * (1 + t), 0.5 * (1 + t) + 0.5 * p * (1 - t**2) * slope


def block_forward(x, weights):
    """RMSNorm and MLP of one token, and what going back needs."""
    scale, up, down = weights
    length = np.sqrt(np.mean(x**2) + 1e-6)
    z = scale * x / length
    hidden, slope = gelu(z @ up)
    return hidden @ down, (x, length, z, hidden, slope)


def block_backward(error, weights, saved):
    """The error at the block's input, and the gradients of its weights."""
    (scale, up, down), (x, length, z, hidden, slope) = weights, saved
    first = (down @ error) * slope
    inner = (up @ first) * scale
    at_input = inner / length - x * (inner @ x) / (len(x) * length**3)
    return at_input, [(up @ first) * x / length, np.outer(z, first), np.outer(hidden, error)]


def chunk_gradients(inputs, targets, before, blocks, readout, aggregate):
    """Of one chunk: scores, the mixer's state, the gradients of its tokens' losses, summed.

    before: the mixer's state before the chunk, a constant.
    """
    trace, scores, s = [], [], before
    for x in inputs:
        saved, y = [], x
        for n, weights in enumerate(blocks):
            out, back = block_forward(x if aggregate is not None else y, weights)
            y = y + (out if aggregate is None else aggregate[n] * out)
            saved.append(back)
        s = KEPT * s + y
        trace.append(saved)
        scores.append(s @ readout)
    at_s, total = np.zeros(WIDTH), [[0.0] * 3 for _ in blocks]
    for score, target, saved in zip(scores[::-1], targets[::-1], trace[::-1], strict=True):
        chances = np.exp(score - score.max())
        at_s = KEPT * at_s + readout @ (chances / chances.sum() - np.eye(VOCABULARY)[target])
        error = at_s
        for n in reversed(range(len(blocks))):
            own = error if aggregate is None else aggregate[n] * error
            back, slopes = block_backward(own, blocks[n], saved[n])
            total[n] = add(total[n], slopes)
            error = error if aggregate is not None else error + back
    return scores, s, total


def add(a, b, factor=1.0):
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def numpy_stream(variant, periods, model, row):
    """One row: Eq. 70-74 with clipped gradient descent on the mean over the tokens of each period.

    held[m][l] is what level m holds of block l: its own, l = m, and in the nested variant where
    faster ones start, l < m, learned by m itself (Eq. 72). All that m holds begins anew, from what
    the next slower level holds of it, when that one's period is over.
    """
    k, embedding = len(periods), WIDTH**0.5 * np.asarray(model.embedding.table[...])
    readout, cms = np.asarray(model.readout.kernel[...]), model.cms
    aggregate = np.asarray(cms.aggregate[...]) if variant == "independent" else None
    given = [
        [np.asarray(w) for w in (v.norm.scale[...], v.mlp.up.kernel[...], v.mlp.down.kernel[...])]
        for v in (cms.levels[-1].blocks if cms.variant == "nested" else cms.levels)
    ]
    held, firings = [given[: m + 1] for m in range(k)], [0] * k
    pending = [[[0.0] * 3 for _ in range(k)] for _ in range(k)]
    s, all_scores = np.zeros(WIDTH), []
    for tick in range(CHUNKS):
        now = np.arange(tick * CHUNK, (tick + 1) * CHUNK)
        blocks = [held[m][m] for m in range(k)]
        scores, s, gradients = chunk_gradients(
            embedding[row[now]], row[now + 1], s, blocks, readout, aggregate
        )
        all_scores += scores
        for m in range(k):
            pending[m] = [add(p, g) for p, g in zip(pending[m], gradients, strict=True)]
        for m in reversed(range(k)):  # the slowest first: others begin anew from what it learned
            if (tick + 1) % periods[m]:
                continue
            mine, share = range(m + 1) if variant == "nested" else [m], 1 / (CHUNK * periods[m])
            norm = np.sqrt(sum(np.sum((share * g) ** 2) for l in mine for g in pending[m][l]))
            held[m], rate = list(held[m]), RATES[m] * min(1, LIMITS[cms.variant] / norm)
            for l in mine:
                held[m][l] = add(held[m][l], pending[m][l], -rate * share)
            pending[m], firings[m] = [[0.0] * 3 for _ in range(k)], firings[m] + 1
            if variant == "nested" and m < k - 1:
                if firings[m] % -(-periods[m + 1] // periods[m]) == 0:
                    held[m] = held[m + 1][: m + 1]
    return np.array(all_scores), s, [held[m][m] for m in range(k)]


@pytest.mark.parametrize(
    ("variant", "periods"),
    [
        *PERIODS.items(),
        THREE,
        *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE),
    ],
)
def test_in_context_is_the_paper_token_by_token(variant, periods):
    """Scores of every token, states and blocks at the end, of every row by itself."""
    system = run(variant, periods)
    scores, after = system.stream(tokens())
    assert after.levels["cms_0"].tick == CHUNKS
    graph, _, join = nn.model.by_level(system.model)
    for row in range(ROWS):
        row_tokens = np.asarray(tokens()[row])
        wanted, mixer, blocks = numpy_stream(variant, periods, system.model, row_tokens)
        np.testing.assert_allclose(scores[row], wanted, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(after.mixers[row], mixer, rtol=1e-9, atol=1e-9)
        cms = nnx.merge(graph, join(of_row(parameters(after), row))).cms
        nested = variant == "nested"
        found = cms.weights() if nested else [level.weights() for level in cms.levels]
        for got, want in zip(found, blocks, strict=True):
            for a, b in zip(got[:3], want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# What other libraries got wrong


SYSTEMS = pytest.mark.parametrize("variant", PERIODS)


@SYSTEMS
def test_fast_state_is_not_shared_across_a_batch(variant):
    """A row is to the bit what it is beside any other row, also under a norm of its gradients."""
    system = run(variant, PERIODS[variant])
    scores, after = system.stream(tokens())
    other = tokens().at[1].set((tokens()[1] + 1) % VOCABULARY)
    other_scores, other_after = system.stream(other)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(scores[0], other_scores[0])
    same(of_row(parameters(after), 0), of_row(parameters(other_after), 0))
    assert jnp.abs(scores[1] - other_scores[1]).max() > 1e-3
    slowest = parameters(after)[f"cms_{len(PERIODS[variant]) - 1}"]
    assert all(jnp.abs(leaf[0] - leaf[1]).max() > 1e-6 for leaf in slowest.values())


@SYSTEMS
def test_a_row_that_begins_anew_is_as_alone(variant):
    """At a tick at which all levels have fired; the other row notices nothing."""
    system = run(variant, PERIODS[variant])
    now = CHUNK * (6 if variant == "independent" else 4)
    _, state = system.stream(tokens()[:, : now + 1])
    going, _ = system.stream(tokens()[:, now:], state)
    fresh, _ = system.stream(tokens()[:, now:])
    mixed = nn.anew(state, system.start, jnp.array([False, True]))
    scores, _ = system.stream(tokens()[:, now:], mixed)
    np.testing.assert_array_equal(scores[0], going[0])
    np.testing.assert_allclose(scores[1], fresh[1], rtol=1e-9, atol=1e-9)
    assert jnp.abs(going[1] - fresh[1]).max() > 1e-3
    with pytest.raises(ValueError, match=r"`rows` has shape \(3,\); it must be 2 booleans"):
        nn.anew(state, system.start, jnp.zeros(3, bool))


@SYSTEMS
def test_update_frequency_is_gated(variant):
    """Between firings no level moves a bit; at a firing all its arrays do, in every row."""
    system = run(variant, PERIODS[variant])
    state, same = system.start, lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    for tick in range(4):
        piece = tokens()[:, tick * CHUNK : (tick + 1) * CHUNK + 1]
        _, after = system.chunk(state, piece)
        for n, period in enumerate(PERIODS[variant]):
            params = (s.levels[f"cms_{n}"].params for s in (state, after))
            moved = jax.tree.map(lambda a, b: (a != b).reshape(ROWS, -1).any(1), *params)
            fires = (tick + 1) % period == 0
            assert all(jnp.all(rows == fires) for rows in moved.values()), (n, tick)
        same(state.levels["outer"].params, after.levels["outer"].params)
        state = after


@SYSTEMS
def test_no_level_is_skipped_in_the_forward(variant):
    """At every tick the scores depend on every level, and one input gives one output."""
    system = run(variant, PERIODS[variant])
    chunk = nn.Chunk(tokens()[0, :CHUNK], tokens()[0, 1 : CHUNK + 1], jnp.zeros(WIDTH))
    first = jax.jit(jax.value_and_grad(lambda p: system.nest.forward(p, chunk)[0][0][0, 0]))
    state, piece = system.start, tokens()[:, : CHUNK + 1]
    for tick in range(3):
        score, slopes = first(of_row(parameters(state), 0))
        for name, part in slopes.items():
            if name != "outer":
                assert all(jnp.abs(leaf).max() > 0 for leaf in part.values()), (name, tick)
        scores, after = system.chunk(state, piece)
        again, _ = system.chunk(state, piece)
        np.testing.assert_array_equal(scores, again)
        np.testing.assert_allclose(scores[0, 0, 0], score, rtol=1e-12)
        state = after._replace(mixers=state.mixers)


def test_nested_is_not_sequential():
    """Equal until a block begins anew, from an initial state that has itself moved."""
    system = run("nested", PERIODS["nested"])
    scores, after = system.stream(tokens())
    other, _, _ = numpy_stream("sequential", PERIODS["nested"], system.model, tokens()[0])
    apart = np.abs(scores[0] - other).max(1)
    assert np.all(apart[: 2 * CHUNK] < 1e-9)
    assert np.all(apart[2 * CHUNK :] > 1e-6)
    assert len(after.levels["cms_0"].params) == 3
    assert still(after.levels["cms_0"])  # it has begun anew at the last tick
    assert int(after.levels["cms_0"].carry.firings[0]) == 0
    first = parameters(system.start)["cms_1"]
    assert len(first) == 6
    for path, leaf in after.levels["cms_1"].params.items():
        assert jnp.abs(leaf - first[path]).max() > 1e-4


def test_objective_is_the_tasks_loss_once():
    """A level collects the gradient of the loss of the next token: not twice, no surrogate."""
    model, _, start, chunk = run("sequential", PERIODS["sequential"])
    _, after = chunk(start, tokens()[:, : CHUNK + 1])
    graph, params = nnx.split(model)
    loss = train.language_model_loss(graph)
    _, _, join = nn.model.by_level(model)
    collected = parameters(start) | {
        name: level.carry.total for name, level in after.levels.items() if name != "outer"
    }
    for row in range(ROWS):
        batch = {"tokens": tokens()[row : row + 1, : CHUNK + 1]}
        wanted = jax.jit(jax.grad(loss))(params, batch)
        found = join(of_row(collected, row))
        labels = jax.tree.leaves(nn.labels_by_level(model))
        leaves = (jax.tree.leaves(tree) for tree in (found, wanted))
        checked = 0
        for label, a, b in zip(labels, *leaves, strict=True):
            if label not in ("outer", "cms_0"):  # cms_0 has fired and collects anew
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
                checked += 1
        assert checked == 3


# Causality, splits, outer gradients


def test_scores_depend_on_no_later_token():
    """The write of a chunk waits for the token after it, and is read from there on."""
    system = run("sequential", PERIODS["sequential"])
    scores, _ = system.stream(tokens())
    for at in (5, 6, 7, 16):  # 6: the first of a chunk, by which the chunk before is learned
        changed = tokens().at[:, at].set((tokens()[:, at] + 1) % VOCABULARY)
        other, _ = system.stream(changed)
        np.testing.assert_array_equal(scores[:, :at], other[:, :at])
        assert at == 16 or jnp.all(jnp.abs(scores[:, at:] - other[:, at:]).max(-1) > 0)


def test_any_split_into_chunks_is_the_whole():
    system = run("independent", PERIODS["independent"])
    whole = jax.jit(lambda s, x: nn.stream(system.nest, s, x, chunk_size=CHUNK))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    jax.tree.map(close, system.stream(tokens()), whole(system.start, tokens()))


def test_a_level_is_as_level_of_the_nest_inside():
    """Nested, where no gradient flows through the faster writes: transfer by initialisation."""
    rule = optax.sgd(0.4, momentum=0.5)
    nest = nn.in_context(toy("nested"), writes.summed(rule))
    row, ticks = tokens(chunks=6)[0], 6
    chunks = nn.Chunk(row[:-1].reshape(ticks, CHUNK), row[1:].reshape(ticks, CHUNK), None)
    params = nest.init(jax.random.key(0))
    fast = {path: path.replace("['levels'][0]", "['levels'][1]") for path in params["cms_0"]}

    def whole(params):
        """The parameters of the flat nest: block 0 as its initial state, with nothing added."""
        slow = params["slow"] | {fast[path]: leaf for path, leaf in params["fast"].items()}
        return {"cms_0": zeros, "cms_1": slow, "outer": outer}

    zeros, outer = params["cms_0"], params["outer"]
    loss = lambda params, chunk: nest.loss(whole(params), chunk)
    inside = nlx.Nest(
        {
            "fast": nlx.Level(
                lambda key: {path: params["cms_1"][start] for path, start in fast.items()},
                None,
                detached(writes.summed(rule)),
                nlx.Clock(1),
            ),
            "slow": nlx.Level(
                lambda key: {p: v for p, v in params["cms_1"].items() if p not in fast.values()}
            ),
        },
        lambda params, chunk: (loss(params, chunk), {}),
        loss,
    )
    mean = lambda states, losses, chunks: losses.mean()
    level = nlx.as_level(inside, mean, writes.summed(rule), nlx.Clock(1))
    state = level.start(level.init(jax.random.key(0)), jnp.int32(0))
    episodes = jax.tree.map(lambda x: x.reshape(3, 2, CHUNK), chunks)
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, c: (level.step(s, c), None), s, episodes))(
        state
    )
    flat, _ = jax.jit(lambda s: jax.lax.scan(nest.step, s, chunks))(
        nest.start(params, jnp.int32(0))
    )
    assert all(not jnp.any(leaf) for leaf in flat["cms_0"].params.values())
    for path, leaf in whole(state.params)["cms_1"].items():
        np.testing.assert_allclose(leaf, flat["cms_1"].params[path], rtol=1e-9, atol=1e-12)
        assert jnp.abs(leaf - params["cms_1"][path]).max() > 1e-3


def detached(write):
    """A write through which nothing flows back but the parameters themselves."""

    def fire(params, carry):
        after, carry = write.fire(*jax.lax.stop_gradient((params, carry)))
        return jax.tree.map(as_if, params, after), carry

    def block(params, carry, pull, contexts, mask):
        return write.block(params, carry, lambda w: jax.lax.stop_gradient(pull(w)), contexts, mask)

    return write._replace(fire=fire, block=block)


def as_if(then, now):
    """What is now, differentiated as if it were what was then."""
    return jax.lax.stop_gradient(now) + then - jax.lax.stop_gradient(then)


SLOW_WINDOWS = [pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)]


@pytest.mark.parametrize("window", [2, *SLOW_WINDOWS])
def test_outer_gradients_flow_through_the_writes_of_a_window(window):
    """Against an unrolled loop that cuts the flow where a window ends."""
    model = toy("sequential", (1, 2) if window == 3 else (1,))
    graph = nnx.graphdef(model)
    nest = nn.in_context(model, writes.summed(optax.sgd(0.5)))
    _, _, join = nn.model.by_level(model)
    row = tokens(1, 3)
    weights = jnp.cos(jnp.arange(3 * CHUNK * VOCABULARY)).reshape(1, -1, VOCABULARY)

    def streamed(params):
        start = nn.begin(nest, params, jnp.zeros((1, WIDTH)))
        scores, _ = nn.stream(nest, start, row, chunk_size=CHUNK, window=window)
        return jnp.sum(weights * scores)

    def plain(params):
        learning = {name: part for name, part in params.items() if name != "outer"}
        pending, first = jax.tree.map(jnp.zeros_like, learning), dict(learning)
        total, state = 0.0, jnp.zeros((1, WIDTH))
        for tick in range(3):
            now = slice(tick * CHUNK, (tick + 1) * CHUNK)
            piece = row[:, tick * CHUNK : (tick + 1) * CHUNK + 1]

            def read(learning, state, piece=piece):
                return nnx.merge(graph, join({**params, **learning}))(piece[:, :-1], state)

            def loss(learning, state=state, piece=piece):
                return train.next_token_loss(read(learning, state)[0], piece)

            pending = jax.tree.map(jnp.add, pending, jax.grad(loss)(learning))
            scores, state = read(learning, state)
            total += jnp.sum(weights[:, now] * scores)
            for n, name in enumerate(learning):
                if (tick + 1) % (n + 1) == 0:  # the periods are 1 and 2
                    step = lambda w, g, period=n + 1: w - 0.5 * g / period
                    learning[name] = jax.tree.map(step, learning[name], pending[name])
                    pending[name] = jax.tree.map(jnp.zeros_like, pending[name])
            if (tick + 1) % window == 0:
                learning = jax.tree.map(as_if, first, learning)
                first = dict(learning)
                pending = jax.lax.stop_gradient(pending)
        return total

    params = nest.init(jax.random.key(0))
    (value, got), (wanted, slopes) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (streamed, plain)
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
    jax.tree.map(close, got, slopes)


# In the outer loop


def still(level):
    """Whether all that it holds is 0."""
    return all(not jnp.any(leaf) for leaf in level.params.values())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["nested", "independent"])
def test_pretraining_as_a_nest_is_the_train_step_on_clocks(variant):
    """The levels ticked by batches, and optax rules on clocks that begin anew: one function."""
    model = Toy(variant, [nlx.Clock(1), nlx.Clock(2), nlx.Clock(4)])
    graph, params = nnx.split(model)
    rule = optax.sgd(0.3, momentum=0.9)
    nest, restarts = nn.pretraining(model, rule), nn.restarts_by_level(model)
    assert restarts == ({"cms_0": 2, "cms_1": 2} if variant == "nested" else {})
    tx = optax.partition(
        {
            label: optim.on_clock(rule, clock, restart=restarts.get(label))
            for label, clock in nn.clocks_by_level(model).items()
        },
        nn.labels_by_level(model),
    )
    step = jax.jit(train.make_train_step(train.language_model_loss(graph), tx))
    state, tick = train.init_train_state(params, tx), jax.jit(nest.step)
    states = nest.start(nest.init(jax.random.key(0)), jnp.int32(0))
    for t in range(7):
        batch = {"tokens": tokens(seed=t)}
        state, metrics = step(state, batch)
        states, loss = tick(states, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
        if variant == "nested":
            assert still(states["cms_0"]) == (t % 2 == 1)
            assert still(states["cms_1"]) == (t % 4 in (0, 3))
    found = {path: leaf for level in states.values() for path, leaf in level.params.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        expected = found[jax.tree_util.keystr(path)]
        np.testing.assert_allclose(leaf, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_labels_and_clocks_of_two_to_five_levels(variant, levels):
    periods = [3**n for n in range(levels)]
    model = nnx.eval_shape(lambda: Toy(variant, [nlx.Clock(period) for period in periods]))
    labels, clocks = nn.labels_by_level(model), nn.clocks_by_level(model)
    assert jax.tree.structure(labels) == jax.tree.structure(nnx.state(model, nnx.Param))
    names = [f"cms_{n}" for n in range(levels)]
    assert list(clocks) == ["outer", *names]
    assert [clocks[name].period for name in names] == periods
    count = lambda name: jax.tree.leaves(labels).count(name)
    shares = range(1, levels + 1) if variant == "nested" else [1] * levels
    assert [count(name) for name in names] == [3 * n for n in shares]
    assert count("outer") == 2 + (variant == "independent")
    restarts = dict.fromkeys(names[:-1], 3) if variant == "nested" else {}
    assert nn.restarts_by_level(model) == restarts


def test_periods_that_do_not_divide_restart_after_the_ceiling():
    model = nnx.eval_shape(lambda: Toy("nested", [nlx.Clock(2), nlx.Clock(3), nlx.Clock(3)]))
    assert nn.restarts_by_level(model) == {"cms_0": 2, "cms_1": 1}
    clocks = {"cms_0": nlx.Clock(4), "cms_1": nlx.Clock(9), "cms_2": nlx.Clock(30)}
    assert nn.restarts_by_level(model, clocks) == {"cms_0": 3, "cms_1": 4}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: toy("chained", (1,)),
            "`variant` is 'chained'; it must be one of sequential, nested, ind",
        ),
        (lambda: Toy("nested", [nlx.Clock(None)]), "`clocks` hold a period of None; in the nested"),
        (
            lambda: nn.in_context(Toy("sequential", [nlx.Clock(None)]), writes.fast(0.1)),
            "`model` has no block with a clock; see `nlx.nn.from_pretrained_mlps`",
        ),
        (
            lambda: nn.in_context(toy("nested"), [writes.fast(0.1)] * 3),
            "`write` has 3 entries; it must have 2, one for each level",
        ),
        (
            lambda: nn.in_context(toy("nested"), writes.fast(0.1), [nlx.Clock(1)]),
            "`clocks` has 1 entries; it must have 2, one for each level",
        ),
        (
            lambda: nn.stream(
                *run("nested", PERIODS["nested"])[1:3], tokens()[:, 1:], chunk_size=2
            ),
            r"`tokens` has shape \(2, 16\); its length must be one more than a multiple of",
        ),
        (
            lambda: nn.stream(*run("nested", PERIODS["nested"])[1:3], tokens(), chunk_size=0),
            "`chunk_size` is 0; it must be an integer >= 1",
        ),
        (
            lambda: nn.stream(
                *run("nested", PERIODS["nested"])[1:3], tokens(), chunk_size=2, window=0
            ),
            "`window` is 0; it must be an integer >= 1",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.slow
def test_gradients_flow_through_writes_of_hope_token_by_token(x64):
    """One token a chunk, so windows of one: a gradient of gradients, mapped over rows."""
    sizes = dict(layers=1, width=8, heads=2, hidden=4, memory_hidden=4, cms_periods=(1, 3))
    config = dataclasses.replace(
        nn.preset("hope-tiny"), vocabulary=7, chunk_size=2, projection_chunk_size=2, **sizes
    )
    model = nn.LanguageModel(config, rngs=nnx.Rngs(0))
    nest, text = nn.in_context(model, writes.fast(0.3)), jnp.arange(10).reshape(2, 5) % 7

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        state = nn.begin(nest, params, model.init_state(2))
        return jnp.sum(jnp.sin(nn.stream(nest, state, text, chunk_size=1, window=4)[0]))

    params = nest.init(jax.random.key(0))
    moved = lambda step: jax.tree.map(lambda p, d: p + step * d, params, direction)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    direction = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, loss(params)[1], direction)))
    measured = (loss(moved(1e-5))[0] - loss(moved(-1e-5))[0]) / 2e-5
    np.testing.assert_allclose(slope, measured, rtol=1e-6)
