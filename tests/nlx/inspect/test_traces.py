"""What memories do tick by tick, against closed forms and brute force, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlx import inspect, memories, objectives, writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.nest import Nest

pytestmark = pytest.mark.usefixtures("x64")
T, K, V = 7, 4, 3


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def gates(seed, *shape):
    return np.random.default_rng(seed).uniform(0.1, 0.9, size=shape)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_range_is_that_of_the_explicit_matrix(n):
    key, retain, erase = numbers(0, T, n), gates(1, T), 2 * gates(2, T)
    found = inspect.transition_range(jnp.asarray(key), jnp.asarray(retain), jnp.asarray(erase))
    for t in range(T):
        matrix = retain[t] * np.eye(n) - erase[t] * np.outer(key[t], key[t])
        values = np.linalg.eigvals(matrix).real
        close((found.low[t], found.high[t]), (values.min(), values.max()))
    assert float(found.low.min()) < 0


@pytest.mark.parametrize("momentum", [False, True])
def test_age_is_the_mean_over_the_stored_history(momentum):
    written, retain = gates(0, T, 2), gates(1, T, 2)
    share = gates(2, T, 2) if momentum else np.zeros((T, 2))
    moving, held = np.zeros((T, 2)), np.zeros((T, 2))  # of each tick's step, by tick
    for t in range(T):
        moving, held = share[t] * moving, retain[t] * held
        moving[t] = written[t]
        held = held + moving
        ages = (t - np.arange(T))[:, None]
        expected = (held * ages).sum(0) / held.sum(0)
        given = [jnp.asarray(a[: t + 1]) for a in (written, retain, share)]
        close(inspect.memory_age(*given[: 3 if momentum else 2])[-1], expected)


def test_what_holds_nothing_has_no_age():
    age = inspect.memory_age(jnp.array([1.0, 0, 0]), jnp.array([1.0, 1, 0]))
    assert age.tolist() == [0, 1, 0]


def test_surprise_of_a_known_distribution():
    scores = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
    close(inspect.surprise(scores + 3, jnp.array([1, 0])), [2, 3])


def alone(level):
    return Nest({"memory": level}, lambda params, context: (None, {"memory": context}))


def stored(key_size, value_size, *names):
    made = {name: jnp.asarray(gates(10 + n, T)) for n, name in enumerate(names)}
    keys, values = numbers(3, T, key_size), numbers(4, T, *np.ravel(value_size))
    return Association(jnp.asarray(keys), jnp.asarray(values), **made)


def test_delta_rule_against_a_plain_loop():
    memory = memories.linear(K, V)
    level = associative_memory(memory, objectives.l2, writes.gated(momentum=False), Clock(1))
    contexts, start = stored(K, V, "rate", "retain"), numbers(5, K, V)
    trace = inspect.follow(alone(level), {"memory": jnp.asarray(start)}, contexts)["memory"]
    weights, mass, first = start, 0.0, 0.0
    for t in range(T):
        key, value, rate, retain = (np.asarray(part)[t] for part in contexts[:4])
        gradient = np.outer(key, key @ weights - value)
        after = retain * weights - rate * gradient
        size = np.linalg.norm(rate * gradient)
        mass, first = retain * mass + size, retain * (first + mass)
        values = np.linalg.eigvals(retain * np.eye(K) - rate * np.outer(key, key)).real
        close(trace.surprise[t], np.linalg.norm(gradient))
        close(trace.update[t], np.linalg.norm(after - weights))
        close(trace.retain[t], retain)
        close(trace.age[t], first / mass)
        close((trace.eigenvalues.low[t], trace.eigenvalues.high[t]), (values.min(), values.max()))
        weights = after


def linear(objective, momentum, period, *, erase):
    memory = memories.linear(K, V)
    write = writes.gated(memory.inputs if erase else None, momentum)
    return memory, associative_memory(memory, objective, write, Clock(period)), V


def constant(objective, momentum, period, *, erase):
    memory = memories.constant(jnp.zeros((K, V)))
    assert not erase
    write = writes.gated(None, momentum)
    return memory, associative_memory(memory, objective, write, Clock(period)), (K, V)


def deep(objective, momentum, period, *, erase, clip=0.5, norm=False):
    memory = memories.mlp((K, 5, K), norm=norm)
    write = writes.gated(memory.inputs if erase else None, momentum, clip, 1.5)
    return memory, associative_memory(memory, objective, write, Clock(period)), K


unlimited = functools.partial(deep, clip=None)
normed = functools.partial(deep, clip=None, norm=True)

CASES = {
    "delta rule": (linear, objectives.l2, False, 1, False),
    "delta rule that erases besides": (linear, objectives.l2, False, 1, True),
    "delta rule in chunks": (linear, objectives.l2, False, 3, False),
    "gated delta rule": (linear, objectives.dot_product, False, 1, True),
    "linear attention": (linear, objectives.dot_product, False, 1, False),
    "Titans": (deep, objectives.l2, True, 3, False),
    "delta gradient descent": (deep, objectives.l2, True, 3, True),
    "an average": (constant, objectives.l2, False, 1, False),
    "a sum": (constant, objectives.dot_product, False, 1, False),
    "Titans, token by token": (unlimited, objectives.l2, True, 1, False),
    "Titans, token by token, limited": (deep, objectives.l2, True, 1, False),
    "Hope, token by token": (unlimited, objectives.l2, True, 1, True),
    "Hope, token by token, limited": (deep, objectives.l2, False, 1, True),
    "dot products in a deep memory": (unlimited, objectives.dot_product, False, 1, True),
    "TTT, token by token": (normed, objectives.l2, False, 1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_eigenvalues_are_those_of_the_derivative_of_a_tick(case):
    """W_{t-1} -> W_t, differentiated: visible weights move along only where the clock is 1."""
    make, objective, momentum, period, erase = CASES[case]
    _, level, value_size = make(objective, momentum, period, erase=erase)
    names = ("rate", "retain", *["momentum"] * momentum, *["erase"] * erase)
    contexts = stored(K, value_size, *names)
    params = level.init(jax.random.key(0))
    trace = inspect.follow(alone(level), {"memory": params}, contexts)["memory"]
    state = level.start(params)
    for t in range(T):
        context = jax.tree.map(lambda a, t=t: a[t], contexts)

        def tick(weights, state=state, context=context):
            visible = weights if period == 1 else state.params
            gradient = jax.grad(level.loss)(visible, context)
            carry = state.carry._replace(weights=weights)
            return level.write.tick(visible, carry, gradient, context).weights

        matrices = jax.tree.leaves(jax.jacobian(tick)(state.carry.weights))
        depth = round(len(matrices) ** 0.5)
        values = []
        for n in range(depth):  # of each layer with respect to itself
            block = np.asarray(matrices[n * depth + n])
            i, o = block.shape[:2]
            found = np.linalg.eigvals(block.reshape(i * o, i * o))
            close(found.imag, 0 * found.imag)
            values += list(found.real)
        found = trace.eigenvalues
        close((found.low[t], found.high[t]), (min(values), max(values)))
        after = level.step(state, context)
        difference = jax.tree.map(jnp.subtract, after.carry.weights, state.carry.weights)
        close(trace.update[t], np.sqrt(sum(np.sum(d**2) for d in jax.tree.leaves(difference))))
        state = after


def test_age_counts_what_the_clip_lets_through_and_the_momentum_delays():
    _, level, size = deep(objectives.l2, True, 3, erase=True)
    contexts = stored(K, size, "rate", "retain", "momentum", "erase")
    contexts = contexts._replace(value=contexts.value.at[2].multiply(1e3))
    params = level.init(jax.random.key(0))
    trace = inspect.follow(alone(level), {"memory": params}, contexts)["memory"]
    state, written = level.start(params), []
    for t in range(T):
        context = jax.tree.map(lambda a, t=t: a[t], contexts)
        layers = jax.grad(level.loss)(state.params, context)
        sizes = [min(0.5, float(np.linalg.norm(layer))) for layer in layers]
        written.append(float(context.rate) * np.linalg.norm(sizes))
        state = level.step(state, context)
    given = jnp.array(written), contexts.retain, contexts.momentum
    close(trace.age, inspect.memory_age(*given))
    assert float(trace.surprise[2]) > 10 * float(trace.surprise[1])
