# SPDX-License-Identifier: Apache-2.0
"""Gradients of what whole runs cost, estimated a piece at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from nlx.learned.runs import Unrolled


class Run(NamedTuple):
    """What an estimator saw of some runs: the context of the outer level."""

    loss: Float[Array, ""]  # mean of the pieces
    gradient: PyTree[Array]  # by theta, as estimated


class Estimator(NamedTuple):
    """How a gradient is found.

    begin(theta, key) -> state.
    step(theta, state, key) -> (state, `Run`): the next piece of all runs; ended ones begin anew.
    """

    begin: Callable[[Any, Key[Array, ""]], Any]
    step: Callable[[Any, Any, Key[Array, ""]], tuple[Any, Run]]


class Several(NamedTuple):
    """Runs side by side, all at the same piece."""

    runs: Any  # states, a leading axis of runs
    keys: Key[Array, " n"]  # that the first ones begin with
    piece: Int[Array, ""]  # how many are behind them


class Pairs(NamedTuple):
    """Runs in pairs under opposite perturbations, with the sum of those since they began."""

    above: Any  # states under theta + what is drawn, a leading axis of pairs
    below: Any
    summed: PyTree[Array]
    piece: Int[Array, ""]


def backpropagation(system: Unrolled, runs: int) -> Estimator:
    """The gradient of each piece, its start held fixed: exact where a run is one piece.

    system: see `nlx.learned.unrolled`. runs: side by side, >= 1.
    Source: Werbos (1990); Andrychowicz et al. (2016), truncated to 20 of 100 steps.
    """
    _check(runs=runs)

    def begin(theta, key):
        keys = jax.random.split(key, runs)
        return Several(jax.vmap(lambda k: system.begin(theta, k))(keys), keys, jnp.int32(0))

    def step(theta, state: Several, key):
        ended, keys = _begin_with(system, state, key, runs)

        def cost(theta):
            ready = _fresh(
                ended,
                lambda: jax.vmap(lambda k: system.begin(theta, k))(keys),
                lambda: state.runs,
            )
            after, losses = jax.vmap(lambda s: system.advance(theta, s))(ready)
            return losses.mean(), after

        (loss, after), gradient = jax.value_and_grad(cost, has_aux=True)(theta)
        after = Several(after, state.keys, state.piece % system.pieces + 1)
        return after, Run(loss, gradient)

    return Estimator(begin, step)


def es(system: Unrolled, pairs: int, sigma: float = 0.01) -> Estimator:
    """Evolution strategies, antithetic: the slope of a piece along drawn directions.

    mean_i e_i (L(theta + e_i) - L(theta - e_i)) / (2 sigma^2),  e_i ~ N(0, sigma^2)

    Both begin a piece where the run under theta is, so that, as in truncated backpropagation, what
    theta did before does not count.

    system: see `nlx.learned.unrolled`. pairs: of runs, >= 1. sigma: > 0.
    Source: Salimans et al. (2017); Metz et al. (2019), Understanding and correcting pathologies.
    """
    _check(pairs=pairs, sigma=sigma)
    plain = backpropagation(system, pairs).begin

    def step(theta, state: Several, key):
        first, second = jax.random.split(key)
        ended, keys = _begin_with(system, state, first, pairs)
        drawn = _drawn(theta, second, pairs, sigma)

        def piece(sign):
            def one(state, key, noise):
                moved = jax.tree.map(lambda t, e: t + sign * e, theta, noise)
                ready = _fresh(ended, lambda: system.begin(moved, key), lambda: state)
                return system.advance(moved, ready)

            return jax.vmap(one)(state.runs, keys, drawn)

        (_, above), (_, below), (after, losses) = piece(1), piece(-1), piece(0)
        gradient = _slope(drawn, above - below, sigma)
        after = Several(after, state.keys, state.piece % system.pieces + 1)
        return after, Run(losses.mean(), gradient)

    return Estimator(plain, step)


def pes(system: Unrolled, pairs: int, sigma: float = 0.01) -> Estimator:
    """Persistent evolution strategies: unbiased however short the pieces are.

    xi_i <- xi_i + e_i ;  mean_i xi_i (L(s_i+, theta + e_i) - L(s_i-, theta - e_i)) / (2 sigma^2)

    Each of a pair goes on from its own state, so a piece's cost is also put down to what was drawn
    for the pieces before it. The mean is the gradient of the run's cost smoothed by N(0, sigma^2)
    at every piece, for a theta that stays; one that moves with each piece, as in `meta_train`, has
    it as nearly as it moves less than sigma in a run.

    system: see `nlx.learned.unrolled`. pairs: of runs, >= 1. sigma: > 0, of a piece's e.
    Source: Vicol et al. (2021), Unbiased gradient estimation in unrolled computation graphs with
    persistent evolution strategies, eq. 12, algorithm 2.
    """
    _check(pairs=pairs, sigma=sigma)

    def begin(theta, key):
        del key
        keys = jax.random.split(jax.random.key(0), pairs)
        runs = jax.vmap(lambda k: system.begin(theta, k))(keys)  # all begin anew at the first step
        nothing = jax.tree.map(lambda t: jnp.zeros((pairs, *t.shape), t.dtype), theta)
        return Pairs(runs, runs, nothing, jnp.int32(system.pieces))

    def step(theta, state: Pairs, key):
        first, second = jax.random.split(key)
        keys, drawn = jax.random.split(first, pairs), _drawn(theta, second, pairs, sigma)
        ended = state.piece == system.pieces
        summed = jax.tree.map(lambda s, e: jnp.where(ended, 0, s) + e, state.summed, drawn)

        def piece(sign, runs):
            def one(run, key, noise):
                moved = jax.tree.map(lambda t, e: t + sign * e, theta, noise)
                ready = _fresh(ended, lambda: system.begin(moved, key), lambda: run)
                return system.advance(moved, ready)

            return jax.vmap(one)(runs, keys, drawn)

        (above, more), (below, less) = piece(1, state.above), piece(-1, state.below)
        run = Run((more + less).mean() / 2, _slope(summed, more - less, sigma))
        return Pairs(above, below, summed, state.piece % system.pieces + 1), run

    return Estimator(begin, step)


def _begin_with(system: Unrolled, state: Several, key, runs: int):
    """Whether runs begin with this piece, the first or one after the last, and their keys.

    They then begin inside it, so that a start that depends on theta has its share of the gradient.
    """
    keys = jnp.where(state.piece == 0, state.keys, jax.random.split(key, runs))
    return (state.piece == 0) | (state.piece == system.pieces), keys


def _fresh(ended, begin: Callable[[], Any], going: Callable[[], Any]) -> Any:
    """A run that begins anew, or goes on."""
    return jax.tree.map(lambda a, b: jnp.where(ended, a, b), begin(), going())


def _drawn(theta, key, pairs: int, sigma) -> PyTree[Array]:
    leaves, tree = jax.tree.flatten(theta)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, x: sigma * jax.random.normal(k, (pairs, *x.shape), x.dtype)
    return tree.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=True)])


def _slope(along: PyTree[Array], apart: Float[Array, " n"], sigma) -> PyTree[Array]:
    """mean_i along_i apart_i / (2 sigma^2)."""
    share = apart / (2 * sigma**2 * len(apart))
    return jax.tree.map(lambda x: jnp.tensordot(share.astype(x.dtype), x, 1), along)


def _check(sigma: float = 1.0, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be an integer >= 1.")
    if not sigma > 0:
        raise ValueError(f"`sigma` is {sigma}; it must be > 0.")
