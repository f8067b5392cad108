# SPDX-License-Identifier: Apache-2.0
"""Everything shipped obeys the laws, and every law fails on something that breaks it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlx
from nlx import memories, objectives, testing, writes
from nlx.self_modifying import Token, self_modifying_nest

T, D = 6, 3


PLAIN = writes.gated(momentum=False)


def sequence(*names):
    """Associations of T ticks with the named gates."""
    random = np.random.default_rng(0)
    key, value = (jnp.asarray(random.normal(size=(T, D)), jnp.float32) for _ in range(2))
    gates = {name: jnp.asarray(random.uniform(0.05, 0.9, T), jnp.float32) for name in names}
    return nlx.Association(key, value, **gates)


deep = memories.mlp((D, 4, D))
matrix = memories.linear(D, D)
LEVELS = {
    "heavy ball": (
        memories.constant(jnp.zeros(D)),
        objectives.dot_product,
        PLAIN,
        nlx.Clock(1),
        ("retain",),
    ),
    "gated delta rule": (
        matrix,
        objectives.l2,
        writes.gated(matrix.inputs, momentum=False),
        nlx.Clock(1),
        ("rate", "retain", "erase"),
    ),
    "Titans": (deep, objectives.l2, writes.gated(), nlx.Clock(3), ("rate", "retain", "momentum")),
    "Hope's memory": (
        deep,
        objectives.l2,
        writes.gated(deep.inputs, clip=0.5, bound=1.5),
        nlx.Clock(4, 2),
        ("rate", "retain", "momentum", "erase"),
    ),
    "optax rule": (
        deep,
        objectives.l2,
        writes.summed(optax.sgd(0.1, momentum=0.9)),
        nlx.Clock(2, 1),
        (),
    ),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_obey_the_laws(name):
    *parts, gates = LEVELS[name]
    testing.check_level(nlx.associative_memory(*parts), sequence(*gates))


def chain(write, clocks):
    """A memory, and a block with a shared loss that reads it."""
    levels = {
        "memory": nlx.associative_memory(matrix, objectives.l2, writes.gated(), clocks[0]),
        "block": nlx.Level(matrix.init, None, write, clocks[1]),
        "query": nlx.Level(lambda key: jax.random.normal(key, (D, D))),
    }

    def forward(p, c):
        return (c.key @ p["query"] @ p["memory"] + c.key) @ p["block"], {"memory": c}

    return nlx.Nest(levels, forward, lambda p, c: objectives.l2(forward(p, c)[0], c.value))


def test_a_nest_obeys_the_laws():
    nest = chain(writes.summed(optax.sgd(0.2)), (nlx.Clock(2), nlx.Clock(3)))
    testing.check_nest(nest, sequence("rate", "retain", "momentum"), splits=[3, 1])


@pytest.mark.slow
def test_hope_obeys_the_laws():
    nest = self_modifying_nest(2, 3, chunk_size=3, projection_chunk_size=2, momentum=True)
    random = np.random.default_rng(0)
    streams = (jnp.asarray(random.normal(size=(4, 2)), jnp.float32) for _ in range(4))
    momentum = jnp.asarray(random.uniform(size=4), jnp.float32)
    testing.check_nest(nest, Token(*streams, momentum=momentum))


def test_a_nest_as_a_level_obeys_the_laws():
    memory = nlx.associative_memory(matrix, objectives.l2, PLAIN, nlx.Clock(2))
    nest = nlx.Nest({"memory": memory}, lambda p, c: (c.key @ p["memory"], {"memory": c}))
    loss = lambda states, outputs, context: objectives.l2(outputs, context.value)
    level = nlx.as_level(nest, loss, writes.summed(optax.sgd(0.01)), nlx.Clock(2))
    contexts = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), sequence("rate"))
    testing.check_level(level, contexts)


SIMPLE = nlx.associative_memory(matrix, objectives.l2, PLAIN, nlx.Clock(2))
counter = itertools.count()


class TooEager(nlx.Level):
    def step(self, state, context):
        return super().step(state._replace(tick=1), context)._replace(tick=state.tick + 1)


class Strict(nlx.Level):
    """Does something else with an integer tick than with a traced one."""

    def step(self, state, context):
        after = super().step(state, context)
        return after._replace(params=after.params + isinstance(state.tick, int))


BROKEN = {
    "pure": SIMPLE._replace(loss=lambda p, c: SIMPLE.loss(p, c) * next(counter)),
    "state in == state out": SIMPLE._replace(
        write=PLAIN._replace(tick=lambda *args: PLAIN.tick(*args)._replace(momentum=jnp.zeros(())))
    ),
    "clock law of level 'level' after tick 2": TooEager(*SIMPLE),
    "scan == repeated step, gradients": SIMPLE._replace(
        write=PLAIN._replace(
            block=lambda p, carry, *rest: PLAIN.block(p, jax.lax.stop_gradient(carry), *rest)
        )
    ),
    "scan == repeated step, values": SIMPLE._replace(
        write=PLAIN._replace(block=lambda p, c, pull, x, mask: PLAIN.block(p, c, pull, x, ~mask))
    ),
    "jit == no jit": Strict(*SIMPLE),
    "gradient == finite difference": SIMPLE._replace(
        loss=lambda p, c: SIMPLE.loss(p, c._replace(value=jax.lax.stop_gradient(c.value)))
    ),
}


@pytest.mark.parametrize("law", BROKEN)
def test_check_level_names_the_law_that_a_level_breaks(law):
    with pytest.raises(AssertionError, match=law):
        testing.check_level(BROKEN[law], sequence())


def running_sum(states, contexts):
    """A fake `scan`: outputs are running sums, carried on in the state."""
    state, ticks = states["level"], contexts.shape[0]
    outputs = state.params + jnp.cumsum(contexts)
    return {"level": state._replace(params=outputs[-1], tick=state.tick + ticks)}, outputs


@jax.custom_batching.custom_vmap
def doubled_in_batches(x):
    return x


@doubled_in_batches.def_vmap
def _(size, batched, x):
    return 2 * x, True


def weakly_typed(states, contexts):
    states, outputs = running_sum(states, contexts)
    params = jnp.where(outputs[-1] > 0, 1.0, 2.0)
    return {"level": states["level"]._replace(params=params)}, outputs


def forgetful(states, contexts):
    return running_sum({"level": states["level"]._replace(params=jnp.zeros(()))}, contexts)


def mixing_rows(states, contexts):
    states, outputs = running_sum(states, contexts)
    return states, doubled_in_batches(outputs)


def looking_ahead(states, contexts):
    """Right at any length that is seen whole; peeks at the next tick where there is one."""
    states, outputs = running_sum(states, contexts)
    return states, outputs + (jnp.roll(contexts, -1) if contexts.shape[0] == T else 0)


def subject(scan):
    start = lambda params, tick: {"level": nlx.LevelState(params, (), tick)}
    return testing._Subject(
        start, lambda s, c: (s, c), scan, {"level": nlx.Level(lambda key: None)}
    )


FAKES = {
    "one compilation": weakly_typed,
    "split law at 3": forgetful,
    "vmap == loop, row 0": mixing_rows,
    "causality, outputs up to 0": looking_ahead,
}


@pytest.mark.parametrize("law", FAKES)
def test_runs_name_the_law_that_a_scan_breaks(x64, law):
    contexts, params = jnp.arange(1.0, T + 1), jnp.ones(())
    splits = [] if "causality" in law else None
    testing._check_runs(subject(running_sum), params, contexts, splits, 1e-9)
    with pytest.raises(AssertionError, match=law):
        testing._check_runs(subject(FAKES[law]), params, contexts, splits, 1e-9)


def test_contexts_without_a_tick_axis_get_a_sentence():
    memory = memories.linear(2, 2)
    level = nlx.associative_memory(memory, objectives.l2, writes.gated(), nlx.Clock(1))
    contexts = nlx.Association(jnp.ones((4, 2)), jnp.ones((4, 2)), retain=0.95)
    with pytest.raises(ValueError, match="`contexts` must be arrays with one leading tick axis"):
        testing.check_level(level, contexts)


def decayed_sum(x, decay, state=None, start=None):
    """y_t = decay_t y_{t-1} + x_t over axis 1, by a loop."""
    state = start if state is None else state
    state = jnp.zeros_like(x[:, 0]) if state is None else state

    def tick(y, now):
        y = now[1][:, None] * y + now[0]
        return y, y

    state, y = jax.lax.scan(tick, state, (x.swapaxes(0, 1), decay.swapaxes(0, 1)))
    return y.swapaxes(0, 1), state


def parallel_sum(x, decay, state=None, start=None):
    """The same as one product with a triangular matrix of decays."""
    state = start if state is None else state
    state = jnp.zeros_like(x[:, 0]) if state is None else state
    ticks = x.shape[1]
    past = jnp.tril(jnp.ones((1, ticks, ticks)))
    logs = jnp.cumsum(jnp.log(decay), axis=1)
    weights = past * jnp.exp(past * (logs[:, :, None] - logs[:, None, :]))
    y = jnp.einsum("bts,bsd->btd", weights, x) + jnp.exp(logs)[..., None] * state[:, None]
    return y, y[:, -1]


def op_case():
    random = np.random.default_rng(0)
    x, decay = random.normal(size=(2, 7, 3)), random.uniform(0.5, 1, size=(2, 7))
    start = random.normal(size=(2, 3))
    args = {"x": jnp.asarray(x), "decay": jnp.asarray(decay), "start": jnp.asarray(start)}
    options = {"sequence": ("x", "decay"), "splits": (3, 6), "initial": "start"}
    return args, options


def test_check_op_accepts_a_right_op(x64):
    args, options = op_case()
    testing.check_op(parallel_sum, decayed_sum, args, **options)


def with_output(change):
    def op(x, decay, state=None, start=None):
        return change(x, decay, *decayed_sum(x, decay, state, start))

    return op


OPS = {
    "op law, values": with_output(lambda x, decay, y, s: (1.01 * y, s)),
    "op law, gradients": with_output(
        lambda x, decay, y, s: (y + decay[..., None] - jax.lax.stop_gradient(decay[..., None]), s)
    ),
    "split law at 3": lambda x, decay, state=None, start=None: decayed_sum(
        x, decay, None if state is None else 2 * state, start
    ),
    "causality in `x`": with_output(lambda x, decay, y, s: (y + x.sum(1, keepdims=True), s)),
    "no leak across the batch in `x`": with_output(lambda x, decay, y, s: (y + x[::-1], s)),
}


@pytest.mark.parametrize("law", OPS)
def test_check_op_names_the_law_that_an_op_breaks(x64, law):
    args, options = op_case()
    reference = OPS[law] if "in `x`" in law else decayed_sum
    options = options | {"splits": ()} if "in `x`" in law else options
    with pytest.raises(AssertionError, match=law):
        testing.check_op(OPS[law], reference, args, **options)


PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}


def stateful(update, init=lambda params: jnp.zeros(())):
    return optax.GradientTransformation(init, update)


def test_check_transform_accepts_optax():
    testing.check_transform(optax.chain(optax.clip(1.0), optax.adamw(1e-3)), PARAMS)


def strict_extra(updates, state, params=None, *, value=0.0):
    return updates, state


TRANSFORMS = {
    "init under eval_shape": stateful(
        lambda g, s, p=None: (g, s),
        lambda p: jnp.zeros(1 + isinstance(jax.tree.leaves(p)[0], jax.core.Tracer)),
    ),
    "updates are like the parameters": stateful(lambda g, s, p=None: (jax.tree.map(jnp.sum, g), s)),
    "state in == state out": stateful(lambda g, s, p=None: (g, jnp.zeros(2))),
    "pure": stateful(lambda g, s, p=None: (jax.tree.map(lambda x: x * next(counter), g), s)),
    "unknown extra arguments": optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(()), strict_extra
    ),
    "jit == no jit": stateful(
        lambda g, s, p=None: (g, s + (1 if isinstance(s, jax.core.Tracer) else 0))
    ),
    "one compilation": stateful(lambda g, s, p=None: (g, jnp.where(s > 0, 1.0, 2.0))),
    "zero gradient, first step": stateful(
        lambda g, s, p=None: (jax.tree.map(lambda x: x / jnp.linalg.norm(x), g), s)
    ),
}


@pytest.mark.parametrize("law", TRANSFORMS)
def test_check_transform_names_the_law_that_a_transformation_breaks(law):
    with pytest.raises(AssertionError, match=law):
        testing.check_transform(TRANSFORMS[law], PARAMS)
