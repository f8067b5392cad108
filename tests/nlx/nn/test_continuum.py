# SPDX-License-Identifier: Apache-2.0
"""Continuum memory systems in context and in pre-training, against loops in plain NumPy.

A model without mixers keeps them small: an embedding, a system, a read-out. Each test that is named
after a fault fails on a system that has it.
"""

import functools
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
RATES = (0.5, 0.3, 0.2, 0.4, 0.1)
PERIODS = {"sequential": (1, 2, 2, 4, 8), "nested": (1, 2, 4), "independent": (2, 3)}
pytestmark = pytest.mark.usefixtures("x64")


class Toy(nnx.Module):
    """Tokens -> embedding -> continuum memory system -> scores; its state counts tokens."""

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
        return self.readout(y), None if state is None else state + tokens.shape[1]


def toy(variant):
    return Toy(variant, [nlx.Clock(period) for period in PERIODS.get(variant, (1,))])


def tokens(rows=ROWS, chunks=CHUNKS, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, VOCABULARY, (rows, chunks * CHUNK + 1)))


class Run(NamedTuple):
    """A system in context; all tests of one variant share one compilation."""

    model: Toy
    nest: nlx.Nest
    start: nn.StreamState
    stream: object  # (state, tokens [2, 17]) -> (scores, state)


@functools.cache
def run(variant, rows=ROWS):
    with jax.enable_x64(True):
        model = toy(variant)
        rules = [writes.summed(optax.sgd(rate)) for rate in RATES[: len(PERIODS[variant])]]
        nest = nn.in_context(model, rules)
        start = nn.begin(nest, nest.init(jax.random.key(0)), jnp.zeros(rows))
        stream = jax.jit(lambda state, tokens: nn.stream(nest, state, tokens, chunk_size=CHUNK))
        return Run(model, nest, start, stream)


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


def token_gradients(x, target, blocks, readout, aggregate):
    """Scores of one token, and the gradients of -log softmax(scores)[target] of every block."""
    saved, y = [], x
    for n, weights in enumerate(blocks):
        out, back = block_forward(x if aggregate is not None else y, weights)
        y = y + (out if aggregate is None else aggregate[n] * out)
        saved.append(back)
    scores = y @ readout
    chances = np.exp(scores - scores.max())
    error = readout @ (chances / chances.sum() - np.eye(VOCABULARY)[target])
    gradients = []
    for n in reversed(range(len(blocks))):
        own = error if aggregate is None else aggregate[n] * error
        back, slopes = block_backward(own, blocks[n], saved[n])
        gradients.insert(0, slopes)
        error = error if aggregate is not None else error + back
    return scores, gradients


def add(a, b, factor=1.0):
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def numpy_stream(variant, model, row):
    """One row: Eq. 70-74 with plain gradient descent, the mean over the tokens of each period.

    start[m][l] is where level m starts block l, for l < m learned by m itself (Eq. 72) and, like
    m's own block, reset when the next slower level's period is over.
    """
    periods = PERIODS[variant]
    k, embedding = len(periods), WIDTH**0.5 * np.asarray(model.embedding.table[...])
    readout = np.asarray(model.readout.kernel[...])
    aggregate = np.asarray(model.cms.aggregate[...]) if variant == "independent" else None
    levels = model.cms.levels if variant != "nested" else model.cms.levels[-1].blocks
    given = [
        [np.asarray(w) for w in (v.norm.scale[...], v.mlp.up.kernel[...], v.mlp.down.kernel[...])]
        for v in levels
    ]
    held = [given[: m + 1] for m in range(k)]  # what level m holds: its block, others' starts
    firings, all_scores = [0] * k, []
    pending = [[[0.0] * 3 for _ in range(k)] for _ in range(k)]
    for tick in range(CHUNKS):
        for t in range(tick * CHUNK, (tick + 1) * CHUNK):
            blocks = [held[m][m] for m in range(k)]
            x, target = embedding[row[t]], row[t + 1]
            scores, gradients = token_gradients(x, target, blocks, readout, aggregate)
            all_scores.append(scores)
            for m in range(k):
                pending[m] = [add(p, g) for p, g in zip(pending[m], gradients, strict=True)]
        for m in reversed(range(k)):  # the slowest first: others begin anew from what it learned
            if (tick + 1) % periods[m]:
                continue
            for l in range(m + 1) if variant == "nested" else [m]:
                held[m] = list(held[m])
                held[m][l] = add(held[m][l], pending[m][l], -RATES[m] / (CHUNK * periods[m]))
            pending[m], firings[m] = [[0.0] * 3 for _ in range(k)], firings[m] + 1
            if variant == "nested" and m < k - 1:
                if firings[m] % -(-periods[m + 1] // periods[m]) == 0:
                    held[m] = held[m + 1][: m + 1]
    return np.array(all_scores), [held[m][m] for m in range(k)]


def of_row(tree, row):
    """States or parameters of one row; "outer" is shared."""
    return {
        name: level if name == "outer" else jax.tree.map(lambda x: x[row], level)
        for name, level in tree.items()
    }


def parameters(state):
    return {name: level.params for name, level in state.levels.items()}


@pytest.mark.parametrize("variant", PERIODS)
def test_in_context_is_the_paper_token_by_token(variant):
    """Scores of every token and the blocks at the end, of every row by itself."""
    model, _, start, stream = run(variant)
    scores, after = stream(start, tokens())
    assert after.levels["cms_0"].tick == CHUNKS
    np.testing.assert_array_equal(after.mixers, [CHUNKS * CHUNK] * ROWS)
    _, _, join = nn.model.by_level(model)
    graph = nnx.graphdef(model)
    for row in range(ROWS):
        wanted, blocks = numpy_stream(variant, model, np.asarray(tokens()[row]))
        np.testing.assert_allclose(scores[row], wanted, rtol=1e-9, atol=1e-9)
        cms = nnx.merge(graph, join(of_row(parameters(after), row))).cms
        if variant == "nested":
            found = [tuple(block[:3]) for block in cms.weights()]
        else:
            found = [tuple(level.weights()[:3]) for level in cms.levels]
        for got, want in zip(found, blocks, strict=True):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# What other libraries got wrong


@pytest.mark.parametrize("variant", PERIODS)
def test_fast_state_is_not_shared_across_a_batch(variant):
    """A row is to the bit what it is beside any other row, also under a norm over all gradients."""
    _, _, start, stream = run(variant)
    scores, after = stream(start, tokens())
    other_scores, other = stream(start, tokens().at[1].set((tokens()[1] + 1) % VOCABULARY))
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(scores[0], other_scores[0])
    same(of_row(parameters(after), 0), of_row(parameters(other), 0))
    assert jnp.abs(scores[1] - other_scores[1]).max() > 1e-3
    slowest = parameters(after)[f"cms_{len(PERIODS[variant]) - 1}"]
    assert all(jnp.abs(leaf[0] - leaf[1]).max() > 1e-6 for leaf in slowest.values())


def test_a_rule_sees_one_row_at_a_time():
    """Clipping by the global norm would mix the rows of a batch."""
    model = toy("sequential")
    rule = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0, momentum=0.9))
    nest = nn.in_context(model, writes.summed(rule), [nlx.Clock(1)] * 5)
    params = nest.init(jax.random.key(0))

    def stream(rows):
        start = nn.begin(nest, params, jnp.zeros(len(rows)))
        return jax.jit(lambda rows: nn.stream(nest, start, rows, chunk_size=CHUNK))(rows)

    both, after = stream(tokens(chunks=2))
    for row in range(ROWS):
        alone, one = stream(tokens(chunks=2)[row : row + 1])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
        close(alone[0], both[row])
        jax.tree.map(close, of_row(parameters(one), 0), of_row(parameters(after), row))


@pytest.mark.parametrize("variant", PERIODS)
def test_update_frequency_is_gated(variant):
    """Between firings no level moves a bit; at its firings each of its arrays does, in each row."""
    _, nest, start, _ = run(variant)
    stream = one_chunk(variant)
    state, row = start, tokens()
    for tick in range(4):
        _, after = stream(state, row[:, tick * CHUNK : (tick + 1) * CHUNK + 1])
        for n, period in enumerate(PERIODS[variant]):
            params = (s.levels[f"cms_{n}"].params for s in (state, after))
            moved = jax.tree.map(lambda a, b: (a != b).reshape(ROWS, -1).any(1), *params)
            fires = (tick + 1) % period == 0
            assert all(jnp.all(rows == fires) for rows in moved.values()), (n, tick)
        np.testing.assert_equal(state.levels["outer"].params, after.levels["outer"].params)
        state = after


@functools.cache
def one_chunk(variant):
    """`stream` for a single chunk, compiled."""
    nest = run(variant).nest
    return jax.jit(lambda state, tokens: nn.stream(nest, state, tokens, chunk_size=CHUNK))


@pytest.mark.parametrize("variant", PERIODS)
def test_no_level_is_skipped_in_the_forward(variant):
    """At every tick the scores depend on every level, and one input gives one output."""
    _, nest, start, _ = run(variant)
    chunk = nn.Chunk(tokens()[0, :CHUNK], tokens()[0, 1 : CHUNK + 1], jnp.zeros(()))
    params = of_row(parameters(start), 0)
    slopes = jax.jit(jax.grad(lambda p: nest.forward(p, chunk)[0][0][0, 0]))(params)
    for name, part in slopes.items():
        if name != "outer":
            assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(part)), name
    stream, state = one_chunk(variant), start
    for tick in range(3):
        piece = tokens()[:, : CHUNK + 1]
        scores, after = stream(state, piece)
        again, _ = stream(state, piece)
        np.testing.assert_array_equal(scores, again)
        read, _ = nest.forward(of_row(parameters(state), 0), chunk)[0]
        np.testing.assert_allclose(scores[0], read, rtol=1e-12, atol=1e-12, err_msg=str(tick))
        state = after


def test_nested_is_not_sequential():
    """Equal at first; then blocks begin anew from an initial state that has itself moved."""
    _, nest, start, stream = run("nested")
    rules = [writes.summed(optax.sgd(rate)) for rate in RATES[:3]]
    plain = Toy("sequential", [nlx.Clock(period) for period in PERIODS["nested"]])
    nested = toy("nested")
    for level, own in zip(plain.cms.levels, nested.cms.levels[-1].blocks, strict=True):
        nnx.update(level, nnx.state(own))
    chain = nn.in_context(plain, rules)
    begin = nn.begin(chain, chain.init(jax.random.key(0)), jnp.zeros(ROWS))
    run_chain = jax.jit(lambda state, tokens: nn.stream(chain, state, tokens, chunk_size=CHUNK))
    scores, after = stream(start, tokens())
    other, _ = run_chain(begin, tokens())
    apart = jnp.abs(scores - other).max((0, 2))
    assert jnp.all(apart[: 2 * CHUNK] < 1e-12)  # until the first begins anew
    assert jnp.all(apart[2 * CHUNK :] > 1e-4)
    for name, shares in (("cms_0", 1), ("cms_1", 2)):  # both begin anew at the last tick
        params = after.levels[name].params
        assert len(params) == 3 * shares
        assert all(not jnp.any(leaf) for leaf in params.values())
        assert int(after.levels[name].carry.firings[0]) == 0
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(),
        after.levels["cms_2"].params,
        start.levels["cms_2"].params,
    )
    assert len(moved) == 9
    assert min(moved.values()) > 1e-4


def test_objective_is_the_tasks_loss_once():
    """A level collects the gradient of the loss of the next token: not twice, no surrogate."""
    model, nest, start, _ = run("sequential")
    _, after = one_chunk("sequential")(start, tokens()[:, : CHUNK + 1])
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
        assert checked == 12


# Causality, splits, outer gradients


def test_scores_depend_on_no_later_token():
    """The write of a chunk waits for the token after it, and is read from there on."""
    _, _, start, stream = run("sequential")
    scores, _ = stream(start, tokens())
    for at in (5, 6, 7, 16):  # 6: the first of a chunk, by which the chunk before is learned
        changed = tokens().at[:, at].set((tokens()[:, at] + 1) % VOCABULARY)
        other, _ = stream(start, changed)
        np.testing.assert_array_equal(scores[:, :at], other[:, :at])
        assert at == 16 or jnp.all(jnp.abs(scores[:, at:] - other[:, at:]).max(-1) > 0)


def test_any_split_into_chunks_is_the_whole():
    model, _, start, stream = run("nested")
    whole, last = stream(start, tokens())
    state, parts = start, []
    for tick in range(CHUNKS):
        piece = tokens()[:, tick * CHUNK : (tick + 1) * CHUNK + 1]
        scores, state = one_chunk("nested")(state, piece)
        parts.append(scores)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-12, atol=1e-12)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    jax.tree.map(close, state, last)


def test_a_level_is_as_level_of_the_nest_inside():
    """Nested, where no gradient flows through the faster writes: transfer by initialisation."""
    rule = optax.sgd(0.4, momentum=0.5)
    model = Toy("nested", [nlx.Clock(1), nlx.Clock(2)])
    nest = nn.in_context(model, writes.summed(rule))
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


@pytest.mark.parametrize("window", [1, 2, 3])
def test_outer_gradients_flow_through_the_writes_of_a_window(window):
    """Against an unrolled loop that cuts the flow where a window ends."""
    model = Toy("sequential", [nlx.Clock(1), nlx.Clock(2)])
    graph = nnx.graphdef(model)
    nest = nn.in_context(model, writes.summed(optax.sgd(0.5)))
    _, _, join = nn.model.by_level(model)
    row = tokens(1, 3)
    weights = jnp.cos(jnp.arange(3 * CHUNK * VOCABULARY)).reshape(1, -1, VOCABULARY)

    def streamed(params):
        start = nn.begin(nest, params, jnp.zeros(1))
        scores, _ = nn.stream(nest, start, row, chunk_size=CHUNK, window=window)
        return jnp.sum(weights * scores)

    def plain(params):
        learning = {name: params[name] for name in ("cms_0", "cms_1")}
        total, first = 0.0, learning
        pending = jax.tree.map(jnp.zeros_like, learning)
        for tick in range(3):
            piece = row[:, tick * CHUNK : (tick + 1) * CHUNK + 1]
            read = lambda learning: nnx.merge(graph, join({**learning, "outer": params["outer"]}))
            part = weights[:, tick * CHUNK : (tick + 1) * CHUNK]
            total += jnp.sum(part * read(learning)(piece[:, :-1])[0])
            loss = lambda w: train.next_token_loss(read(w)(piece[:, :-1])[0], piece)  # noqa: B023
            pending = jax.tree.map(jnp.add, pending, jax.grad(loss)(learning))
            for name, period in (("cms_0", 1), ("cms_1", 2)):
                if (tick + 1) % period == 0:
                    step = lambda w, g: w - 0.5 * g / period  # noqa: B023
                    learning = learning | {name: jax.tree.map(step, learning[name], pending[name])}
                    pending = pending | {name: jax.tree.map(jnp.zeros_like, pending[name])}
            if (tick + 1) % window == 0:
                learning = first = jax.tree.map(as_if, first, learning)
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
            lambda: toy("chained"),
            "`variant` is 'chained'; it must be one of sequential, nested, ind",
        ),
        (lambda: Toy("nested", [nlx.Clock(None)]), "`clocks` hold a period of None; in the nested"),
        (
            lambda: nn.in_context(Toy("sequential", [nlx.Clock(None)]), writes.fast(0.1)),
            "`model` has no block with a clock; see `nlx.nn.from_pretrained_mlps`",
        ),
        (
            lambda: nn.in_context(toy("nested"), [writes.fast(0.1)] * 2),
            "`write` has 2 entries; it must have 3, one for each level",
        ),
        (
            lambda: nn.in_context(toy("nested"), writes.fast(0.1), [nlx.Clock(1)]),
            "`clocks` has 1 entries; it must have 3, one for each level",
        ),
        (
            lambda: nn.stream(*run("nested")[1:3], tokens()[:, 1:], chunk_size=2),
            r"`tokens` has shape \(2, 16\); its length must be one more than a multiple of",
        ),
        (
            lambda: nn.stream(*run("nested")[1:3], tokens(), chunk_size=0),
            "`chunk_size` is 0; it must be an integer >= 1",
        ),
        (
            lambda: nn.stream(*run("nested")[1:3], tokens(), chunk_size=2, window=0),
            "`window` is 0; it must be an integer >= 1",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
