# SPDX-License-Identifier: Apache-2.0
"""fast_update: against NumPy, against the write of the level it stands for, form against form."""

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import optax
import pytest
from nlx_kernels.fast_update import shapes

import nlx
from nlx import writes

TICKS = 6
FIRES = np.array([[t % 2, t % 3 == 2, t == 5] for t in range(TICKS)], bool)
fast_update = jax.jit(nlx_kernels.fast_update, static_argnames=("implementation",))


def start(draw, shape):
    weights = tuple(draw.normal(shape.b, *w) for w in shape.weights)
    return weights, [tuple(draw.normal(*w.shape) for w in weights) for _ in range(TICKS)]


def gates(draw, momentum):
    rows = dict(rate=draw.gate(3, high=0.3), decay=draw.gate(3))
    return rows | (dict(momentum=draw.gate(3)) if momentum else {})


def run(weights, gradients, given, implementation):
    carry = None
    for gradient, fires in zip(gradients, FIRES, strict=True):
        options = dict(fires=jnp.asarray(fires), implementation=implementation)
        weights, carry = fast_update(weights, carry, gradient, **given, **options)
    return weights, carry


@pytest.mark.parametrize("momentum", [True, False])
def test_reference_is_its_equation(momentum, draw, x64, agree):
    """Each row by itself, firing when its own clock does."""
    weights, gradients = start(draw, shapes.TESTS["block"])
    given = gates(draw, momentum)
    got, carry = run(weights, gradients, given, "reference")
    for row in range(3):
        rate, decay = float(given["rate"][row]), float(given["decay"][row])
        keep = float(given["momentum"][row]) if momentum else 0.0
        for n, w in enumerate(weights):
            w, total, ticks, p = np.asarray(w[row]), 0.0, 0, 0.0
            for t in range(TICKS):
                total, ticks = total + np.asarray(gradients[t][n][row]), ticks + 1
                if FIRES[t, row]:
                    p = keep * p + total / ticks
                    w, total, ticks = w - rate * (p + decay * w), 0.0, 0
            agree(got[n][row], w, 1e-13)
            agree(carry.total[n][row], np.broadcast_to(total, w.shape), 1e-13)
            assert carry.ticks[row] == ticks
            if momentum:
                agree(carry.momentum[n][row], np.broadcast_to(p, w.shape), 1e-13)


def test_xla_is_the_reference(draw, gradients, x64, agree):
    """From the middle of a period, rows firing or not; gradients through the write."""
    weights, (gradient, total, momentum, *_) = start(draw, shapes.TESTS["block"])
    carry = nlx_kernels.FastCarry(total, jnp.array([3, 1, 0], jnp.int32), momentum)
    given = dict(weights=weights, carry=carry, gradient=gradient, **gates(draw, True))
    options = dict(fires=jnp.array([True, False, True]), ticks=2)

    def form(implementation):
        return gradients(
            lambda given: fast_update(**given, **options, implementation=implementation)
        )(given)

    agree(form("xla"), form("reference"), 1e-13)


@pytest.mark.parametrize("momentum", [0.7, None])
def test_is_the_write_of_its_level(momentum, draw, x64, agree):
    """Rows of a level under the task's loss: a summed write with plain optax rules (Eq. 71)."""
    weights, gradients = start(draw, shapes.TESTS["block"])
    trace = optax.identity() if momentum is None else optax.trace(momentum)
    rule = optax.chain(trace, optax.add_decayed_weights(0.2), optax.scale_by_learning_rate(0.3))
    write, clocks = writes.summed(rule), [nlx.Clock(2), nlx.Clock(3), nlx.Clock(6)]
    given = dict(rate=0.3, momentum=momentum, decay=0.2)
    got, carry = run(weights, gradients, {k: v for k, v in given.items() if v is not None}, "xla")
    for row, clock in enumerate(clocks):
        of = lambda tree, row=row: jax.tree.map(lambda x: x[row], tree)
        params = of(weights)
        pending = write.init(params)
        for t in range(TICKS):
            pending = write.tick(params, pending, of(gradients[t]), None)
            params, pending = writes.fire_if(write, clock.fires(t), params, pending)
        agree(of(got), params, 1e-13)
        agree(of(carry.total), pending.total, 1e-13)
        if momentum:
            agree(of(carry.momentum), pending.rule[0].trace, 1e-13)


def test_dtypes_stay_and_sums_are_wide():
    half = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    given = dict(rate=1e-3, momentum=0.9)
    weights, carry = fast_update(half, None, half, fires=False, **given)
    for _ in range(400):
        weights, carry = fast_update(half, carry, half, fires=False, **given)
    assert carry.total["w"].dtype == jnp.float32
    assert jnp.all(carry.total["w"] == 401)  # in bfloat16 a sum of ones stops at 256
    weights, carry = fast_update(half, carry, half, fires=True, **given)
    assert weights["w"].dtype == jnp.bfloat16
    assert jnp.all(carry.momentum["w"] == 1)


def test_one_call_may_stand_for_several_ticks(draw, x64, agree):
    weights, gradients = start(draw, shapes.TESTS["one"])
    carry, total = None, jax.tree.map(lambda *g: sum(g), *gradients)
    for gradient in gradients[:-1]:
        _, carry = nlx_kernels.fast_update(weights, carry, gradient, fires=False, rate=0.1)
    want = nlx_kernels.fast_update(weights, carry, gradients[-1], fires=True, rate=0.1)
    got = nlx_kernels.fast_update(weights, None, total, ticks=TICKS, fires=True, rate=0.1)
    agree(got, want, 1e-14)
