# SPDX-License-Identifier: Apache-2.0
"""Nests: blocks equal ticks, and models of the papers equal loops written from their equations."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from nlx_experiments import bench_core

import nlx
from nlx import memories, objectives, writes

D = 2


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, expected, tolerance=1e-9):
    """Every entry within the tolerance of the larger of 1 and the array's largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(1, np.max(np.abs(b), initial=0))
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TracedClock(nlx.Clock):
    """A clock whose period may be traced, so that one compilation of `step` serves all clocks."""

    def __post_init__(self):
        """Takes what `Clock` refuses."""

    def fires(self, tick):
        return (tick + 1 - self.phase) % self.period == 0


def trio(clocks, read=None):
    """A gated memory, a delta memory whose keys the first makes, and a chain with a shared loss."""
    a, b, c = clocks
    matrix = memories.linear(D, D)
    init = lambda key: jax.random.normal(key, (D, D)) / 2
    recall = lambda p, x: objectives.l2(x.key @ p, x.value)
    levels = {
        "gated": nlx.Level(init, recall, writes.gated(), a),
        "delta": nlx.Level(init, recall, writes.gated(matrix.inputs, bound=2.0), b),
        "chain": nlx.Level(init, None, writes.summed(optax.sgd(0.3, momentum=0.5)), c),
    }

    def forward(p, x):
        k = memories.unit(x["k"] @ p["gated"])
        gates = {name: x[name] for name in ("rate", "retain", "momentum")}
        associations = {
            "gated": nlx.Association(x["k"], x["v"], **gates),
            "delta": nlx.Association(k, x["v"] @ p["delta"], **gates, erase=x["rate"]),
        }
        return jnp.tanh(k @ p["chain"]), associations

    return nlx.Nest(levels, forward, lambda p, x: objectives.l2(forward(p, x)[0], x["v"]), read)


def sequence(ticks, seed=0):
    random = np.random.default_rng(seed)
    k, v = random.normal(size=(2, ticks, D))
    rate, retain, momentum = random.uniform(size=(3, ticks)) * [[0.3], [1], [0.9]]
    retain[random.uniform(size=ticks) < 0.1] = 0
    contexts = {"k": k, "v": v, "rate": rate, "retain": retain, "momentum": momentum}
    return jax.tree.map(jnp.asarray, contexts)


def total(nest, scan, params, contexts, tick):
    """A scalar of all that a run leaves, and all of it."""
    states, outputs = scan(nest.start(params, tick), contexts)
    kept = {n: (s.params, s.carry) for n, s in states.items()}, outputs
    floats = [x for x in jax.tree.leaves(kept) if x.dtype == jnp.float64]
    return sum(jnp.vdot(jnp.cos(jnp.arange(x.size)).reshape(x.shape), x) for x in floats), kept


@functools.cache
def specification():
    """Compiles `step` repeated, with gradients, once per length."""

    @jax.jit
    def run(params, contexts, clocks, tick):
        nest = trio([TracedClock(*clock) for clock in clocks])
        stepped = lambda states, contexts: jax.lax.scan(nest.step, states, contexts)
        call = functools.partial(total, nest, stepped)
        return jax.grad(call, (0, 1), has_aux=True)(params, contexts, tick)

    return run


def blocks(params, contexts, clocks, tick, split, static):
    """`scan`, cut in two at `split`, with gradients."""
    nest = trio([nlx.Clock(*clock) for clock in clocks])

    def scan(states, contexts):
        if not 0 < split < contexts["k"].shape[0]:
            return nest.scan(states, contexts)
        states, first = nest.scan(states, jax.tree.map(lambda x: x[:split], contexts))
        states, second = nest.scan(states, jax.tree.map(lambda x: x[split:], contexts))
        return states, jnp.concatenate([first, second])

    call = functools.partial(total, nest, scan)
    if static:
        call = lambda params, contexts, _, call=call: call(params, contexts, tick)
    return jax.jit(jax.grad(call, (0, 1), has_aux=True))(params, contexts, jnp.int32(tick))


DIVIDING = ((2, 1), (8, 3), (4, -1))
COPRIME = ((3, 0), (5, 2), (7, 1))


@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 4)
@hypothesis.given(
    clocks=st.tuples(*[st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), st.integers(0, 7))] * 3),
    ticks=st.sampled_from([1, 19]),
    tick=st.integers(0, 30),
    split=st.integers(0, 18),
    static=st.booleans(),
)
@hypothesis.example(clocks=DIVIDING, ticks=19, tick=4, split=0, static=True)
@hypothesis.example(clocks=DIVIDING, ticks=19, tick=2, split=7, static=False)
@hypothesis.example(clocks=COPRIME, ticks=19, tick=10, split=0, static=False)
@hypothesis.example(clocks=COPRIME, ticks=19, tick=1, split=5, static=True)
def test_scan_equals_step_repeated_in_values_and_gradients(clocks, ticks, tick, split, static):
    with jax.enable_x64(True):
        contexts = sequence(ticks)
        params = trio([nlx.Clock(1)] * 3).init(jax.random.key(1))
        periods = tuple(tuple(map(jnp.int32, clock)) for clock in clocks)
        expected = specification()(params, contexts, periods, jnp.int32(tick))
        close(blocks(params, contexts, clocks, tick, split, static), expected)


@pytest.mark.parametrize("static", [True, False])
def test_scan_equals_step_repeated_when_working_weights_are_read(x64, static):
    def read(working, output, context):
        return output + context["k"] @ (working["gated"] + working["delta"]) @ working["chain"]

    nest = trio((nlx.Clock(2), nlx.Clock(6, 1), nlx.Clock(None)), read)
    nest = nlx.Nest(nest.levels, nest.forward, nest.loss, read)
    params, contexts = nest.init(jax.random.key(1)), sequence(9)
    stepped = lambda states, contexts: jax.lax.scan(nest.step, states, contexts)
    run = lambda scan, tick: jax.jit(
        jax.grad(lambda p, c: total(nest, scan, p, c, tick), (0, 1), has_aux=True)
    )(params, contexts)
    close(run(nest.scan, 3 if static else jnp.int32(3)), run(stepped, jnp.int32(3)))


def test_three_blocks_with_a_shared_loss_and_optax_rules_equal_a_plain_loop(x64):
    """CMS, sequential: each block learns the task's loss on its own clock (eqs. 70, 71)."""
    periods, rules = (2, 4, 8), (optax.adam(0.05), optax.sgd(0.1, momentum=0.9), optax.sgd(0.2))
    block = memories.mlp((3, 4, 3))
    levels = {
        f"block{i}": nlx.Level(block.init, None, writes.summed(rule, "sum"), nlx.Clock(period))
        for i, (period, rule) in enumerate(zip(periods, rules, strict=True))
    }

    def forward(p, x):
        return functools.reduce(lambda h, name: block.read(p[name], h), levels, x[0])

    loss = lambda p, x: objectives.l2(forward(p, x), x[1])
    nest = nlx.Nest(levels, lambda p, x: (forward(p, x), {}), loss)
    params, contexts = nest.init(jax.random.key(0)), (normal(1, 11, 3), normal(2, 11, 3))

    def token(state, now):
        (t, x), after = now, ([], [], [])
        chain, states, pending = state
        error = lambda chain: loss(dict(zip(levels, chain, strict=True)), x)
        pending = jax.tree.map(jnp.add, pending, jax.grad(error)(chain))
        for i, (rule, period) in enumerate(zip(rules, periods, strict=True)):
            updates, rule_state = rule.update(pending[i], states[i], chain[i])
            zeros = jax.tree.map(jnp.zeros_like, pending[i])
            fired = optax.apply_updates(chain[i], updates), rule_state, zeros
            pick = lambda a, b, fires=(t + 1) % period == 0: jnp.where(fires, a, b)
            chosen = jax.tree.map(pick, fired, (chain[i], states[i], pending[i]))
            for part, new in zip(after, chosen, strict=True):
                part.append(new)
        return after, forward(dict(zip(levels, chain, strict=True)), x)

    def plain(params, contexts):
        chain = [params[name] for name in levels]
        states = [rule.init(p) for rule, p in zip(rules, chain, strict=True)]
        state = chain, states, jax.tree.map(jnp.zeros_like, chain)
        return jax.lax.scan(token, state, (jnp.arange(11), contexts))[1]

    nested = lambda params, contexts: nest.scan(nest.start(params), contexts)[1]
    weigh = normal(3, 11, 3)
    run = lambda f: jax.jit(jax.value_and_grad(lambda p, c: jnp.vdot(weigh, f(p, c)), (0, 1)))
    close(run(nested)(params, contexts), run(plain)(params, contexts), 1e-10)


BOXES = ("key", "value", "rate", "retain", "memory")


def hope(chunk, projection_chunk, after_write):
    """Self-modifying Titans, spec 4.1: five boxes, self-generated values, two clocks."""
    memory = memories.mlp((3, 4, 3), memories.soft_unit("gelu"))
    write = writes.gated(memory.inputs, clip=1.0, bound=2.0)
    levels = {
        box: nlx.associative_memory(
            memory, objectives.l2, write, nlx.Clock(chunk if box == "memory" else projection_chunk)
        )
        for box in BOXES
    }

    def forward(p, token):
        k, v, rate, retain = (memory.read(p[box], token["x"]) for box in BOXES[:4])
        k, rate, retain = memories.unit(k), jax.nn.sigmoid(rate.sum()), jax.nn.sigmoid(retain.sum())
        gates = {"rate": rate, "retain": retain, "momentum": token["momentum"], "erase": rate}
        contexts = {box: nlx.Association(k, memory.read(p[box], v), **gates) for box in BOXES}
        return memory.read(p["memory"], token["q"]), contexts

    def read(working, output, token):
        return memory.read(working["memory"], token["q"])

    return nlx.Nest(levels, forward, read=read if after_write else None)


def hope_loop(params, tokens, chunk, projection_chunk, after_write):
    """The same, written from the equations: working, boundary and momentum of each box."""

    def gelu_soft(p):
        g = jax.nn.gelu(p, approximate=True)
        return g / jnp.sqrt(jnp.sum(g**2) + 0.25)

    def M(weights, z):
        return z + gelu_soft(z @ weights[0]) @ weights[1]

    def at_most(x, limit):
        norm = jnp.sqrt(jnp.sum(x**2))
        return jnp.where(norm > limit, x * limit / norm, x)

    def token(state, now):
        t, x = now
        working, boundary, momentum = state
        k, v, rate, retain = (M(boundary[box], x["x"]) for box in BOXES[:4])
        k = k / jnp.sqrt(jnp.sum(k**2))
        rate, retain = (1 / (1 + jnp.exp(-jnp.sum(gate))) for gate in (rate, retain))
        new = {}, {}, {}
        for box in BOXES:
            error = lambda w, target: 0.5 * jnp.sum((M(w, k) - target) ** 2)
            gradient = jax.grad(error)(boundary[box], M(boundary[box], v))
            h = gelu_soft(k @ boundary[box][0])
            directions = k / jnp.sqrt(jnp.sum(k**2)), h / jnp.sqrt(jnp.sum(h**2))
            P = [
                x["momentum"] * m - rate * at_most(g, 1.0)
                for m, g in zip(momentum[box], gradient, strict=True)
            ]
            W = [
                (retain * jnp.eye(len(z)) - rate * jnp.outer(z, z)) @ w + p
                for z, w, p in zip(directions, working[box], P, strict=True)
            ]
            fires = (t + 1) % (chunk if box == "memory" else projection_chunk) == 0
            bounded = [at_most(w, 2.0) for w in W]
            pick = lambda yes, no, fires=fires: tuple(
                jnp.where(fires, a, b) for a, b in zip(yes, no, strict=True)
            )
            new[0][box], new[1][box], new[2][box] = (
                pick(bounded, W),
                pick(bounded, boundary[box]),
                tuple(P),
            )
            if box == "memory":
                y = M(W if after_write else boundary[box], x["q"])
        return new, y

    momentum = jax.tree.map(jnp.zeros_like, params)
    ticks = jnp.arange(tokens["x"].shape[0])
    return jax.lax.scan(token, (params, params, momentum), (ticks, tokens))[1]


@pytest.mark.parametrize(
    ("chunk", "projection_chunk", "after_write"),
    [pytest.param(2, 4, False, marks=pytest.mark.slow), (3, 2, True)],
)
def test_hope_equals_a_plain_loop_and_its_gradients(x64, chunk, projection_chunk, after_write):
    nest = hope(chunk, projection_chunk, after_write)
    params = jax.tree.map(lambda w: 1.5 * w, nest.init(jax.random.key(0)))
    tokens = {"x": normal(1, 9, 3), "q": normal(2, 9, 3), "momentum": jnp.linspace(0.1, 0.8, 9)}
    weigh = normal(3, 9, 3)
    nested = lambda p, c: nest.scan(nest.start(p), c)[1]
    plain = lambda p, c: hope_loop(p, c, chunk, projection_chunk, after_write)
    run = lambda f: jax.jit(jax.value_and_grad(lambda p, c: jnp.vdot(weigh, f(p, c)), (0, 1)))
    value, slopes = run(nested)(params, tokens)
    close((value, slopes), run(plain)(params, tokens), 1e-10)
    for slope in jax.tree.leaves(slopes):
        assert np.abs(slope).max() > 1e-6


def regression(period=3):
    """A linear memory learning online; its output is the error before each write."""
    memory = memories.linear(D, D)
    init = lambda key: jax.random.normal(key, (D, D))
    level = nlx.associative_memory(memory, objectives.l2, writes.gated(), nlx.Clock(period))
    forward = lambda p, c: (
        objectives.l2(memory.read(p["inner"], c.key), c.value) + 0 * p["step"],
        {"inner": c},
    )
    levels = {"inner": level._replace(init=init), "step": nlx.Level(lambda key: jnp.zeros(()))}

    def wiring(p, c):
        gates = jnp.full(c["k"].shape[:-1], jnp.exp(p["step"]))
        return forward(p, nlx.Association(c["k"], c["v"], gates, retain=0.9 + 0 * gates))

    return nlx.Nest(levels, wiring)


def test_a_nest_three_deep_learns_through_everything_inside(x64):
    """A learned step size: inner steps, an episode's loss, and a meta-loss over episodes."""
    mean = lambda states, outputs, context: jnp.mean(outputs)
    middle = nlx.as_level(regression(), mean, writes.summed(optax.sgd(0.1)), nlx.Clock(2))
    episodes = nlx.Nest({"learner": middle}, lambda p, c: (p["learner"]["step"], {"learner": c}))

    def meta(states, outputs, context):
        last = jax.tree.map(lambda x: x[-1], context)
        return middle.loss(states["learner"].params, last) + jnp.sum(outputs)

    outer = nlx.as_level(episodes, meta, writes.summed(optax.adam(0.05)), nlx.Clock(1))
    contexts = {"k": normal(0, 3, 5, 7, D), "v": normal(1, 3, 5, 7, D)}
    params = outer.init(jax.random.key(2))
    run = jax.jit(lambda p: outer.loss(p, jax.tree.map(lambda x: x[0], contexts)))
    slopes, flat = jax.jit(jax.grad(run))(params), jax.tree.leaves(params)
    for i, slope in enumerate(jax.tree.leaves(slopes)):
        direction = normal(10 + i, *flat[i].shape)
        ends = [
            run(
                jax.tree.unflatten(
                    jax.tree.structure(params), flat[:i] + [flat[i] + h * direction] + flat[i + 1 :]
                )
            )
            for h in (1e-5, -1e-5)
        ]
        np.testing.assert_allclose(
            jnp.vdot(slope, direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6
        )
    before = outer.start(params, jnp.int32(0))
    after = jax.jit(outer.scan)(before, contexts)
    stepped = jax.lax.scan(lambda s, c: (outer.step(s, c), None), before, contexts)[0]
    close(after.params, stepped.params, 1e-10)
    assert after.params["learner"]["step"] != before.params["learner"]["step"]


def loops(jaxpr):
    """The length and the number of output entries of all loops in a jaxpr, however deep."""
    found = []
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "while"
        if equation.primitive.name == "scan":
            size = sum(variable.aval.size for variable in equation.outvars)
            found.append((equation.params["length"], size))
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(parameter := getattr(parameter, "jaxpr", parameter), "eqns"):
                found += loops(parameter)
    return found


@pytest.mark.parametrize("static", [True, False])
def test_loops_over_4096_ticks_are_short_and_save_only_the_starts_of_blocks(static):
    nest, contexts = bench_core.continuum(4), bench_core.contexts(4096, 4)
    tick, params = 0 if static else jnp.int32(0), nest.init(jax.random.key(0))
    gradient = bench_core.gradient(nest, nest.scan, tick)
    lengths, sizes = zip(*loops(jax.make_jaxpr(gradient)(params, contexts).jaxpr), strict=True)
    assert max(lengths) == (4 if static else 65)
    states = sum(x.size for x in jax.tree.leaves(nest.start(params, jnp.int32(0))))
    sequence = sum(x.size for x in jax.tree.leaves(contexts))
    assert max(sizes) < 65 * states + 2 * sequence


def test_jit_compiles_once_and_ticks_keep_their_type(x64):
    traces, nest = [], regression()
    contexts = {name: sequence(5)[name] for name in ("k", "v")}
    forward = lambda p, c, forward=nest.forward: traces.append(None) or forward(p, c)
    nest = nlx.Nest(nest.levels, forward)
    states = nest.start(nest.init(jax.random.key(0)))
    scan = jax.jit(nest.scan)
    once, _ = scan(states, contexts)
    seen = len(traces)
    twice, _ = scan(once, contexts)
    close(jax.jit(nest.scan)(once, contexts)[0], twice, 0)
    assert len(traces) == seen > 0
    eager, _ = nest.scan(nest.scan(states, contexts)[0], contexts)
    assert {type(state.tick) for state in eager.values()} == {int}
    assert {state.tick for state in eager.values()} == {10}
    close(jax.tree.map(jnp.asarray, eager), twice)


def test_padding_never_meets_an_objective_that_zero_would_break():
    """A context of zeros has no direction: its gradient is NaN, and 0 * NaN is NaN."""
    loss = lambda p, c: jnp.linalg.norm(p * c)
    level = nlx.Level(lambda key: jnp.ones(D), loss, writes.gated(), nlx.Clock(3))

    def total(scan, params, contexts):
        return jnp.sum(scan(level.start(params, jnp.int32(1)), contexts).carry.weights)

    stepped = lambda s, c: jax.lax.scan(lambda s, c: (level.step(s, c), None), s, c)[0]
    run = lambda scan: jax.grad(total, (1, 2))(scan, jnp.ones(D), normal(0, 5, D))
    close(run(level.scan), run(stepped), 1e-5)


@pytest.mark.parametrize("tick", [4, jnp.int32(4)])
def test_an_empty_sequence_changes_nothing(x64, tick):
    nest = trio((nlx.Clock(2),) * 3, lambda working, output, context: output + working["gated"][0])
    states = nest.start(nest.init(jax.random.key(0)), tick)
    after, outputs = nest.scan(states, sequence(0))
    close(after, states, 0)
    assert outputs.shape == (0, D)


def test_bad_nests_get_a_sentence():
    with pytest.raises(ValueError, match="`levels` must name at least one level"):
        nlx.Nest({}, lambda p, c: (c, {}))
    level = nlx.associative_memory(
        memories.linear(2, 2), objectives.l2, writes.gated(), nlx.Clock(2)
    )
    with pytest.raises(ValueError, match="`loss` of level 'b' is None, but its clock has period 2"):
        nlx.Nest({"a": level, "b": level._replace(loss=None)}, lambda p, c: (c, {}))
    with pytest.raises(ValueError, match="`write` of level 'a' is None"):
        nlx.Nest({"a": level._replace(write=None)}, lambda p, c: (c, {}))
    contexts = nlx.Association(jnp.ones((3, 2)), jnp.ones((3, 2)))
    for wiring, sentence in (
        (lambda p, c: (c, {}), "`forward` gave no context for level 'a', which has a `loss`"),
        (lambda p, c: (c, {"a": c, "z": c}), r"`forward` gave contexts for \['z'\], but `levels`"),
    ):
        nest = nlx.Nest({"a": level}, wiring)
        states = nest.start(nest.init(jax.random.key(0)))
        with pytest.raises(ValueError, match=sentence):
            nest.scan(states, contexts)
        with pytest.raises(ValueError, match=sentence):
            nest.step(states, jax.tree.map(lambda x: x[0], contexts))
    nest = nlx.Nest({"a": level, "b": level}, lambda p, c: (c, {"a": c, "b": c}))
    states = nest.start(nest.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"`states` are of \['a'\]; they must be of \['a', 'b'\]"):
        nest.scan({"a": states["a"]}, contexts)
    with pytest.raises(ValueError, match=r"`states` must all stand at one tick, got \[0, 1\]"):
        nest.scan({"a": states["a"], "b": states["b"]._replace(tick=1)}, contexts)
    with pytest.raises(ValueError, match=r"`params` are of \['a'\]; they must be of \['gated', "):
        trio([nlx.Clock(1)] * 3).start({"a": 1})


def test_what_comes_after_a_block_counts_nowhere_though_it_is_not_finite():
    memory = memories.linear(D, D)
    levels = {
        str(period): nlx.associative_memory(
            memory, objectives.l2, writes.gated(), nlx.Clock(period)
        )
        for period in (2, 3)  # blocks end after ticks 1, 2, 3, 5
    }

    def forward(params, x):
        read = sum(memory.read(weights, x["k"]) for weights in params.values())
        return read, dict.fromkeys(levels, nlx.Association(x["k"], x["v"]))

    nest = nlx.Nest(levels, forward)
    contexts, params = sequence(6), nest.init(jax.random.key(0))
    bad = contexts | {"v": contexts["v"].at[3:].set(jnp.nan)}
    for tick in (0, jnp.int32(0)):
        run = jax.jit(lambda contexts, tick=tick: nest.scan(nest.start(params, tick), contexts)[1])
        np.testing.assert_array_equal(run(bad)[:4], run(contexts)[:4])
        assert np.isnan(run(bad)[4:]).all()


def test_a_block_of_no_ticks_does_not_bring_back_what_a_rule_dropped():
    rule = optax.chain(optax.zero_nans(), optax.sgd(0.1))
    memory = memories.linear(D, D)
    level = nlx.associative_memory(memory, objectives.l2, writes.summed(rule), nlx.Clock(3))
    values = normal(1, 6, D).at[5].set(jnp.nan)
    contexts, start = (
        nlx.Association(normal(0, 6, D), values),
        level.start(jnp.eye(D), jnp.int32(0)),
    )
    after = jax.jit(level.scan)(start, contexts)  # the third of three blocks is empty
    stepped, _ = jax.lax.scan(lambda s, c: (level.step(s, c), None), start, contexts)
    close(after, stepped, 1e-6)
    for leaf in jax.tree.leaves(after):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    "tick",
    [10**15 + 7, np.int64(10**15 + 7), jnp.uint32(0)],
    ids=lambda tick: type(tick).__name__,
)
def test_ticks_may_be_of_any_integer_type_and_size(tick):
    nest = trio([nlx.Clock(*clock) for clock in COPRIME])
    params, contexts = nest.init(jax.random.key(1)), sequence(4)
    states, outputs = nest.scan(nest.start(params, tick), contexts)
    _, expected = nest.scan(nest.start(params, int(tick) % 105), contexts)
    np.testing.assert_array_equal(outputs, expected)
    assert type(states["chain"].tick) is type(tick)
    assert int(states["chain"].tick) == int(tick) + 4
