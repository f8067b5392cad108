# SPDX-License-Identifier: Apache-2.0
"""Writes: ticks, firings and blocks against the equations and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nlx
from nlx import memories, objectives, writes


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tick_by_tick(write, params, carry, gradients, contexts, mask):
    for t in np.flatnonzero(mask):
        at = jax.tree.map(lambda x, t=t: x[t], (gradients, contexts))
        carry = write.tick(params, carry, *at)
    return carry


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_summed_gives_the_rule_what_the_ticks_collected(x64, reduce):
    rule = optax.chain(optax.clip(0.5), optax.adam(0.1))
    write = writes.summed(rule, reduce)
    params, gradients = normal(0, 3, 2), normal(1, 8, 3, 2)
    carry, state, expected = write.init(params), rule.init(params), params
    for t in range(8):
        carry = write.tick(params, carry, gradients[t], None)
        if t % 4 == 3:
            params, carry = write.fire(params, carry)
            block = gradients[t - 3 : t + 1]
            total = block.mean(0) if reduce == "mean" else block.sum(0)
            updates, state = rule.update(total, state, expected)
            expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(params, expected, rtol=1e-12)
    assert not carry.total.any()
    assert carry.ticks == 0


def test_summed_mean_is_multi_steps(x64):
    rule = optax.sgd(0.1, momentum=0.9)
    write = writes.summed(rule)
    many = optax.MultiSteps(rule, 3, accumulator_dtype=jnp.float64)
    params = expected = normal(0, 3, 2)
    carry, state = write.init(params), many.init(params)
    for t in range(9):
        gradient = normal(t + 1, 3, 2)
        carry = write.tick(params, carry, gradient, None)
        updates, state = many.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
        if t % 3 == 2:
            params, carry = write.fire(params, carry)
        np.testing.assert_allclose(params, expected, rtol=1e-9)


@pytest.mark.parametrize("momentum", [0.7, None])
def test_fast_is_heavy_ball_and_decay_summed(x64, momentum):
    """Ticks, blocks and firings, the carry too."""
    trace = optax.identity() if momentum is None else optax.trace(momentum)
    rule = optax.chain(trace, optax.add_decayed_weights(0.2), optax.scale_by_learning_rate(0.3))
    fast, plain = writes.fast(0.3, momentum, decay=0.2), writes.summed(rule)
    params = expected = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    carry, pending = fast.init(params), plain.init(params)
    for t in range(6):
        gradients = {"w": normal(2 + t, 3, 3, 2), "b": normal(9 + t, 3, 2)}
        if t % 2:
            pull = lambda weights, g=gradients: jax.tree.map(
                lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), g
            )
            mask = jnp.arange(3) < t - 1
            carry = fast.block(params, carry, pull, None, mask)
            pending = plain.block(expected, pending, pull, None, mask)
        else:
            first = jax.tree.map(lambda x: x[0], gradients)
            carry = fast.tick(params, carry, first, None)
            pending = plain.tick(expected, pending, first, None)
        assert carry.ticks == pending.ticks
        if t % 3 == 2:
            params, carry = fast.fire(params, carry)
            expected, pending = plain.fire(expected, pending)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        jax.tree.map(close, (params, carry.total), (expected, pending.total))
    if momentum is not None:
        jax.tree.map(close, carry.momentum, pending.rule[0].trace)


@pytest.mark.parametrize("inside", [writes.summed(optax.adam(0.1)), writes.gated()])
def test_restarted_begins_anew_after_so_many_firings(x64, inside):
    """Two episodes of three firings are one episode, twice."""
    write = writes.restarted(inside, 3)
    assert (write.view is None) == (inside.view is None)
    seen = []
    params, carry = (start := jnp.zeros((3, 2))), write.init(jnp.zeros((3, 2)))
    for t in range(12):
        carry = write.tick(params, carry, normal(t % 6, 3, 2), None)
        if t % 2:
            params, carry = write.fire(params, carry)
            seen.append((params, carry))
    jax.tree.map(np.testing.assert_array_equal, seen[:3], seen[3:])
    assert [bool(jnp.any(params)) for params, _ in seen[:3]] == [True, True, False]
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(seen[2][1], write.init(start))
    params, expected = start, inside.init(start)
    for t in range(2):
        expected = inside.tick(params, expected, normal(t, 3, 2), None)
    params, expected = inside.fire(params, expected)
    same(seen[0], (params, writes.Restarted(expected, jnp.int32(1))))


def test_gated_follows_its_equation(x64):
    memory = memories.mlp((3, 4, 3))
    params = memory.init(jax.random.key(0))
    write = writes.gated(memory.inputs, clip=0.7, bound=1.5)
    carry = write.init(params)
    working, momentum = [np.asarray(w) for w in params], [0 * np.asarray(w) for w in params]
    for t in range(4):
        key, gradient = (
            normal(t, 3),
            tuple(normal(9 * t + i, *w.shape) for i, w in enumerate(params)),
        )
        rate, retain, decay, erase = 0.3 + t, 0.9 - 0.1 * t, 0.2 * t, 0.5 + 0.1 * t
        gates = nlx.Association(key, key, rate, retain, decay, erase)
        carry = write.tick(params, carry, gradient, gates)
        for i, z in enumerate(map(np.asarray, memory.inputs(params, key))):
            g = np.asarray(gradient[i])
            g = g * min(1, 0.7 / np.linalg.norm(g))
            momentum[i] = decay * momentum[i] - rate * g
            transition = retain * np.eye(len(z)) - erase * np.outer(z, z)
            working[i] = transition @ working[i] + momentum[i]
    for got, expected in zip(carry.weights + carry.momentum, working + momentum, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert write.view(params, carry) is carry.weights
    published, carry = write.fire(params, carry)
    for got, kept, expected in zip(published, carry.weights, working, strict=True):
        assert np.linalg.norm(expected) > 1.5
        np.testing.assert_allclose(got, expected * 1.5 / np.linalg.norm(expected), rtol=1e-12)
        np.testing.assert_array_equal(kept, got)


def test_absent_gates_are_neutral():
    write, params = writes.gated(lambda p, k: k), normal(0, 3, 2)
    absent = nlx.Association(normal(1, 3), None)
    neutral = absent._replace(rate=1.0, retain=1.0, momentum=0.0, erase=0.0)
    for context in (absent, neutral, None):
        carry = write.tick(params, write.init(params), normal(2, 3, 2), context)
        np.testing.assert_allclose(carry.weights, params - normal(2, 3, 2), rtol=1e-6)


BLOCK = 5


@jax.jit
def block_and_ticks(operands, mask):
    """Both forms' carries and gradients of a random scalar of them, without and with momentum."""

    def run(kind, momentum):
        write = writes.gated(momentum=momentum, bound=1.0)

        def total(params, old, gradients, gates):
            rate, retain, decay = gates
            contexts = nlx.Association(rate, rate, rate, retain, decay if momentum else None)
            carry = writes.Working(old[0], old[1] if momentum else None)
            if kind == "block":
                pull = lambda weights: jnp.tensordot(weights, gradients, 1)
                carry = write.block(params, carry, pull, contexts, mask)
            else:
                for t in range(BLOCK):
                    at = jax.tree.map(lambda x, t=t: x[t], (gradients, contexts))
                    new = write.tick(params, carry, *at)
                    carry = jax.tree.map(lambda a, b, t=t: jnp.where(mask[t], a, b), new, carry)
            kept = jax.tree.leaves(carry)
            return sum(jnp.vdot(normal(50 + i, 3, 2), x) for i, x in enumerate(kept)), kept

        return jax.grad(total, (0, 1, 2, 3), has_aux=True)(*operands)

    return [(run("block", m), run("ticks", m)) for m in (False, True)]


@given(
    mask=st.lists(st.booleans(), min_size=BLOCK, max_size=BLOCK),
    resets=st.lists(st.booleans(), min_size=BLOCK, max_size=BLOCK),
    decay=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_gated_block_equals_its_ticks_in_values_and_gradients(mask, resets, decay):
    with jax.enable_x64(True):
        retain = jnp.where(jnp.array(resets), 0.0, jax.random.uniform(jax.random.key(1), (BLOCK,)))
        gates = normal(2, BLOCK), retain, jnp.full(BLOCK, decay)
        operands = normal(3, 3, 2), normal(4, 2, 3, 2), normal(5, BLOCK, 3, 2), gates
        for got, expected in block_and_ticks(operands, jnp.array(mask)):
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_blocks_where_gates_are_absent(x64):
    gradients, params, mask = normal(0, 4, 3, 2), normal(1, 3, 2), np.array([1, 0, 1, 1], bool)
    pull = lambda weights: jnp.tensordot(weights.astype(float), gradients, 1)
    contexts = nlx.Association(normal(2, 4, 3), normal(3, 4, 2))
    for write in (writes.gated(), writes.gated(momentum=False), writes.summed(optax.sgd(1.0))):
        carry = write.tick(params, write.init(params), normal(4, 3, 2), contexts)
        got = write.block(params, carry, pull, contexts, jnp.asarray(mask))
        expected = tick_by_tick(write, params, carry, gradients, contexts, mask)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_heavy_ball_as_a_level_is_optax_trace_to_the_bit(jit, decay):
    params = {"w": normal(0, 4, 3), "b": normal(1, 3)}
    level = nlx.associative_memory(
        memories.constant(params),
        objectives.dot_product,
        writes.gated(momentum=False),
        nlx.Clock(1),
    )
    trace = optax.trace(decay)
    step = lambda s, g: level.step(s, nlx.Association(None, g, retain=decay))
    update = lambda g, s: trace.update(g, s)
    step, update = (jax.jit(step), jax.jit(update)) if jit else (step, update)
    state, expected = level.start(level.init(jax.random.key(0))), trace.init(params)
    for t in range(20):
        gradient = {"w": normal(2 * t, 4, 3), "b": 1e3 * normal(2 * t + 1, 3)}
        state = step(state, gradient)
        momentum, expected = update(gradient, expected)
        for name, leaf in momentum.items():
            np.testing.assert_array_equal(state.params[name], leaf)


def test_low_precision_parameters_are_written_in_float32():
    params = jnp.ones((2, 2), jnp.bfloat16)
    write = writes.gated()
    carry = write.init(params)
    for _ in range(1000):
        carry = write.tick(
            params, carry, jnp.zeros_like(params), nlx.Association(None, None, retain=0.9985)
        )
    assert carry.weights.dtype == carry.momentum.dtype == jnp.float32
    np.testing.assert_allclose(carry.weights, np.full((2, 2), 0.9985**1000), rtol=1e-3)
    assert write.fire(params, carry)[0].dtype == jnp.bfloat16
    summed = writes.summed(optax.sgd(1.0))
    assert summed.init(params).total.dtype == jnp.float32
    assert summed.fire(params, summed.init(params))[0].dtype == jnp.bfloat16


def test_clip_and_bound_are_smooth_at_zero():
    write = writes.gated(clip=1.0, bound=1.0)

    def published(params, gradient):
        carry = write.tick(params, write.init(params), gradient, None)
        return jnp.sum(write.fire(params, carry)[0])

    slopes = jax.grad(published, (0, 1))(jnp.zeros((2, 2)), jnp.zeros((2, 2)))
    np.testing.assert_array_equal(slopes[0], np.ones((2, 2)))
    np.testing.assert_array_equal(slopes[1], -np.ones((2, 2)))


def test_bad_arguments_get_a_sentence():
    with pytest.raises(ValueError, match="`firings` must be an integer >= 1, got 1.5"):
        writes.restarted(writes.gated(), 1.5)
    with pytest.raises(ValueError, match='`reduce` must be "mean" or "sum", got \'max\'.'):
        writes.summed(optax.sgd(1.0), "max")
    for name in ("clip", "bound"):
        with pytest.raises(ValueError, match=f"`{name}` must be None or > 0, got 0"):
            writes.gated(**{name: 0})
    params = jnp.ones((2, 2))
    for write, gate in ((writes.gated(momentum=False), "momentum"), (writes.gated(), "erase")):
        context = nlx.Association(params[0], None, **{gate: 0.5})
        with pytest.raises(ValueError, match=f"`{gate}` is gated by an association whose write"):
            write.tick(params, write.init(params), params, context)
    write = writes.gated()
    start = write.init(jnp.zeros((2, 2)))
    for gate, sentence in (
        (
            jnp.bfloat16(0.9985),
            "`retain` of an association has dtype bfloat16; it must be at least",
        ),
        (jnp.full(2, 0.5), r"`retain` of an association has shape \(2,\); it must be \(\)"),
    ):
        context = nlx.Association(None, None, retain=gate)
        with pytest.raises(ValueError, match=sentence):
            write.tick(jnp.zeros((2, 2)), start, jnp.zeros((2, 2)), context)
