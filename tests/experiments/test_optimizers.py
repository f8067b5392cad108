# SPDX-License-Identifier: Apache-2.0
"""The optimizer of `nlx train` against the chain written out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nlx_experiments import config, optimizers

from nlx import Clock, optim

LABELS = {"fast": {"w": "outer", "b": "outer"}, "slow": {"w": "cms_1"}}
CLOCKS = {"outer": Clock(1), "cms_1": Clock(3)}
PARAMS = {
    "fast": {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3)},
    "slow": {"w": jnp.linspace(0.5, 2.0, 8).reshape(4, 2)},
}
STEPS = 12


def chosen(**fields):
    base = config.make("hope-tiny", steps=STEPS, warmup=0.25, learning_rate=0.1, clip=0.5)
    return dataclasses.replace(base, **fields)


def gradient(step):
    """Global norm above and below what is clipped."""
    size = 3.0 if step % 2 else 0.05
    return jax.tree.map(
        lambda p: size * jnp.cos(step + jnp.arange(p.size)).reshape(p.shape), PARAMS
    )


def rate(step):
    """Linear to 0.1 over the first 3 steps, then half a cosine to 0.01 at step 12."""
    if step <= 3:
        return 0.1 * step / 3
    return 0.01 + 0.09 * (1 + np.cos(np.pi * (step - 3) / 9)) / 2


def clipped(tree):
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: x * min(1.0, 0.5 / norm), tree)


@pytest.mark.parametrize("name", ["adamw", "dmgd"])
def test_levels_learn_on_their_clocks_with_the_rates_of_their_steps(name):
    tx = optimizers.make(chosen(optimizer=name), LABELS, CLOCKS, {})
    direction = (
        optax.scale_by_adam(b2=0.99)
        if name == "adamw"
        else optax.chain(optim.scale_by_second_moment(), optim.scale_by_deep_momentum())
    )
    ours, state = PARAMS, tx.init(PARAMS)
    hand = jax.tree.map(np.asarray, PARAMS)
    directions = {n: direction.init(PARAMS[n]) for n in PARAMS}
    waiting = []
    for step in range(1, STEPS + 1):
        update, state = tx.update(gradient(step), state, ours)
        ours = optax.apply_updates(ours, update)
        u = clipped(gradient(step))
        waiting.append(u["slow"])
        moves = {"fast": u["fast"]}
        if step % 3 == 0:
            moves["slow"] = jax.tree.map(lambda *x: sum(x) / 3, *waiting)
            waiting = []
        for level, mean in moves.items():
            d, directions[level] = direction.update(mean, directions[level], hand[level])
            now = rate(step)
            decay = jax.tree.map(lambda p: 0.1 * p * (p.ndim >= 2), hand[level])
            hand[level] = jax.tree.map(
                lambda p, x, y, now=now: p - now * (x + y), hand[level], d, decay
            )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, hand
        )


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.9), (10, 0.96)])
def test_any_warmup_has_a_schedule(steps, warmup):
    curve = optimizers.learning_rate(chosen(steps=steps, warmup=warmup))
    assert all(0 < float(curve(n)) <= 0.1 + 1e-6 for n in range(steps))
