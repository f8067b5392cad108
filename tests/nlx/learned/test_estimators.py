"""Estimators of meta-gradients against whole runs, and the level above them."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlx import learned
from nlx.clock import Clock
from nlx.learned import tasks
from nlx.testing import check_level


def balance(size=23, positive=10, steps=100, piece=10):
    """Influence balancing: what theta does soon is outweighed by what it does later.

    s <- A s + theta (1, ..., 1, -1, ..., -1), A with halves on its diagonal and above it; a step
    costs (s_0 - 1)^2 / 2. Source: Tallec and Ollivier (2017); Vicol et al. (2021), section 5.1.
    """
    a = 0.5 * (np.eye(size) + np.eye(size, k=1))
    signs = np.where(np.arange(size) < positive, 1.0, -1.0)

    def advance(theta, state):
        def step(s, _):
            s = jnp.asarray(a) @ s + theta * jnp.asarray(signs)
            return s, 0.5 * jnp.square(s[0] - 1)

        state, costs = jax.lax.scan(step, state, None, piece)
        return state, costs.mean()

    begin = lambda theta, key: jnp.ones(size)
    return learned.Unrolled(begin, advance, steps // piece)


def whole(system, theta, key):
    """The mean cost of all pieces of one run."""
    state, costs = system.begin(theta, key), []
    for _ in range(system.pieces):
        state, cost = system.advance(theta, state)
        costs.append(cost)
    return sum(costs) / len(costs)


def means_of(estimator, theta, pieces, runs):
    """The mean gradient of all pieces of some runs, and its standard error."""
    state, found = estimator.begin(theta, jax.random.key(0)), []
    step = jax.jit(estimator.step)
    for n in range(pieces * runs):
        state, run = step(theta, state, jax.random.key(n))
        found.append(run.gradient)
    by_run = np.reshape(found, (runs, pieces)).mean(1)
    return by_run.mean(), by_run.std(ddof=1) / runs**0.5


def test_persistent_evolution_is_unbiased_where_truncated_gradients_are_wrong(x64):
    """Truncated backpropagation and evolution have the other sign; of a whole run none has."""
    system, theta = balance(), jnp.asarray(0.5)
    exact = float(jax.grad(lambda t: whole(system, t, None))(theta))
    truncated, _ = means_of(learned.backpropagation(system, 1), theta, 10, 2)
    assert exact > 0 > truncated
    short, error = means_of(learned.es(system, 500, 0.1), theta, 10, 30)
    assert short + 4 * error < 0
    mean, error = means_of(learned.pes(system, 500, 0.1), theta, 10, 60)
    assert error < abs(exact) / 10
    assert abs(mean - exact) < 4 * error
    long = balance(piece=100)
    np.testing.assert_allclose(
        means_of(learned.backpropagation(long, 1), theta, 1, 2)[0], exact, rtol=1e-9
    )
    mean, error = means_of(learned.es(long, 500, 0.1), theta, 1, 30)
    assert abs(mean - exact) < 4 * error < abs(exact) / 2


RULE = learned.momentum_rule(0.02, 0.5)


@pytest.mark.parametrize("objective", ["training", "held-out"])
@pytest.mark.parametrize("second_order", [True, False])
def test_one_piece_is_the_gradient_of_the_whole_run(x64, second_order, objective: Any):
    """Of both moments of a rule; every run is a problem of its own."""
    seen = lambda params, instance: jnp.sum(jnp.sin(instance[0] @ params))
    task = tasks.quadratics(3)._replace(heldout=seen)
    theta = RULE.init(jax.random.key(0))
    how: Any = dict(horizon=6, truncation=6, second_order=second_order, objective=objective)
    estimator = learned.backpropagation(learned.unrolled(RULE, task, **how), 4)
    state = estimator.begin(theta, jax.random.key(1))
    _, run = estimator.step(theta, state, jax.random.key(2))

    def cost(theta, instance, params):
        rate, decay = jnp.exp(theta["log_rate"]), jax.nn.sigmoid(theta["decay_logit"])
        a, y = instance
        trace, costs = jnp.zeros(3), []
        for _ in range(6):
            before = jnp.sum((a @ params - y) ** 2)
            gradient = 2 * a.T @ (a @ params - y)
            trace = decay * trace + (gradient if second_order else jax.lax.stop_gradient(gradient))
            params = params - rate * trace
            costs.append(before if objective == "training" else seen(params, instance))
        return jnp.stack(costs).mean()

    runs = state.runs
    many = lambda t: jax.vmap(lambda i, p: cost(t, i, p))(runs.instance, runs.params).mean()
    want = jax.value_and_grad(many)(theta)
    np.testing.assert_allclose(run.loss, want[0], rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), run.gradient, want[1])


def test_pieces_go_on_and_ended_runs_begin_anew_with_a_theta_that_is_learned():
    """Three pieces of two steps are six steps; a rule's first state moves with theta."""
    task, rule = tasks.quadratics(3), learned.hypergradient_rule(0.01)
    system = learned.unrolled(rule, task, horizon=6, truncation=2)
    theta = rule.init(jax.random.key(0))
    for make in (learned.backpropagation, learned.es, learned.pes):
        estimator = make(system, 4)
        state = estimator.begin(theta, jax.random.key(1))
        step = jax.jit(estimator.step)
        runs, seen = [], []
        for n in range(7):
            state, run = step(theta, state, jax.random.key(n))
            one = state.runs if hasattr(state, "runs") else state.above
            runs.append(run)
            seen.append(int(one.step[0]))
        assert seen == [2, 4, 6, 2, 4, 6, 2], make
        first = runs[3].gradient["log_rate"]  # of a piece that begins a run
        assert np.isfinite(first)
        assert first != 0
    runs, _ = learned.train(
        rule, task, theta, learned.start(rule, task, theta, jax.random.key(3)), 6
    )
    assert int(runs.step) == 6


def test_the_level_moves_theta_by_what_the_estimator_found():
    task = tasks.quadratics(3)
    system = learned.unrolled(RULE, task, horizon=4, truncation=2)
    estimator, outer = learned.backpropagation(system, 4), optax.adam(0.1)
    for period in (1, 2):
        level = learned.meta_level(RULE, outer, Clock(period))
        state = learned.meta_start(level, estimator, jax.random.key(0))
        theta, moments = state.level.params, outer.init(state.level.params)
        held, waiting = state.runs, []
        step = jax.jit(learned.meta_step(level, estimator))
        for n in range(4):
            key = jax.random.fold_in(state.key, n)
            held, run = estimator.step(theta, held, key)
            waiting.append(run.gradient)
            state, loss = step(state)
            np.testing.assert_allclose(loss, run.loss, rtol=1e-5)
            if len(waiting) == period:
                mean = jax.tree.map(lambda *x: sum(x) / len(x), *waiting)
                update, moments = outer.update(mean, moments, theta)
                theta, waiting = optax.apply_updates(theta, update), []
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                state.level.params, theta,
            )  # fmt: skip


def test_the_meta_level_keeps_the_laws_of_levels(x64):
    level = learned.meta_level(RULE, optax.adam(0.1), Clock(2))
    draw = np.random.default_rng(0)
    contexts = learned.Run(
        jnp.asarray(draw.normal(size=4)),
        {name: jnp.asarray(draw.normal(size=4)) for name in ("log_rate", "decay_logit")},
    )
    params = {"log_rate": jnp.asarray(0.5), "decay_logit": jnp.asarray(-0.5)}
    check_level(level, contexts, params=params)


@pytest.mark.parametrize("make", [learned.backpropagation, learned.pes])
def test_meta_training_goes_on_to_the_bit(make):
    rule = learned.lstm_rule(hidden=3, layers=1)
    system = learned.unrolled(rule, tasks.quadratics(3), horizon=4, truncation=2)
    level = learned.meta_level(rule, optax.adam(0.01))
    estimator = make(system, 4)
    key = jax.random.key(0)
    whole, losses = learned.meta_train(level, estimator, key, 6)
    half, first = learned.meta_train(level, estimator, key, 3)
    rest, second = learned.meta_train(level, estimator, key, 3, state=half)
    np.testing.assert_array_equal(losses, np.concatenate([first, second]))
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for a, b in zip(*map(jax.tree.leaves, (whole, rest)), strict=True):
        np.testing.assert_array_equal(data(a), data(b))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), whole.level.params, half.level.params)
    assert all(jax.tree.leaves(moved))


def test_meta_training_lowers_what_runs_cost():
    """A rate that is far too low is found by both kinds of estimators."""
    rule, task = learned.momentum_rule(1e-4, 0.5), tasks.quadratics(4)
    system = learned.unrolled(rule, task, horizon=20, truncation=10)
    level = learned.meta_level(rule, optax.adam(0.1))
    for estimator in (learned.backpropagation(system, 16), learned.pes(system, 16, 0.1)):
        state, losses = learned.meta_train(level, estimator, jax.random.key(0), 120)
        assert float(losses[-20:].mean()) < 0.6 * float(losses[:20].mean())
        assert -6 < float(state.level.params["log_rate"]) < -2


@pytest.mark.parametrize("make", [learned.backpropagation, learned.es])
def test_the_first_runs_too_begin_inside_the_first_piece(x64, make):
    """A rate that a run begins with is theta's: in one piece it has the gradient of the run."""
    rule = learned.hypergradient_rule(0.02, 0.02)
    system = learned.unrolled(rule, tasks.quadratics(3), horizon=5, truncation=5, second_order=True)
    theta, key = rule.init(jax.random.key(0)), jax.random.key(1)
    more = (4096, 1e-4) if make is learned.es else (3,)
    estimator = make(system, *more)
    state = estimator.begin(theta, key)
    found = jax.jit(estimator.step)(theta, state, jax.random.key(2))[1]
    keys = jax.random.split(key, more[0])
    cost = lambda theta: jax.vmap(lambda k: whole(system, theta, k))(keys).mean()
    want = jax.jit(jax.grad(cost))(theta)
    tolerance = 0.1 if make is learned.es else 1e-9
    np.testing.assert_allclose(found.gradient["log_rate"], want["log_rate"], rtol=tolerance)
    assert abs(want["log_rate"]) > 0.1


def test_a_run_that_diverges_costs_the_most_and_spoils_nothing():
    """Rates from too large to far too large: only by what they cost is it known to turn back."""
    task = tasks.quadratics(4)
    make = lambda most: learned.unrolled(RULE, task, horizon=60, truncation=20, most=most)
    theta = RULE.init(jax.random.key(0)) | {"log_rate": jnp.log(3.0)}
    advance = lambda system: system.advance(theta, system.begin(theta, jax.random.key(1)))[1]
    assert not advance(make(None)) < 1e6
    capped = make(100.0)
    assert advance(capped) <= 100
    runs = capped.begin(theta, jax.random.key(1))
    for _ in range(3):
        runs, cost = capped.advance(theta, runs)
    assert cost == 100  # no number any more
    level = learned.meta_level(RULE, optax.adam(0.1))
    first = theta | {"log_rate": jnp.log(0.15)}  # some runs diverge, some do not
    after = {}
    for most in (None, 100.0):
        estimator = learned.pes(make(most), 64, 0.1)
        state, _ = learned.meta_train(level, estimator, jax.random.key(0), 60, theta=first)
        after[most] = float(state.level.params["log_rate"])
    assert not np.isfinite(after[None])
    assert after[100.0] < np.log(0.1)


def test_bad_input_gets_a_sentence():
    task, none = tasks.quadratics(3), cast(Any, None)
    of = lambda **more: learned.unrolled(
        RULE, task, **cast(Any, {"horizon": 4, "truncation": 2} | more)
    )
    for make, said in (
        (lambda: of(horizon=0), "`horizon` is 0; it must be an integer >= 1"),
        (lambda: of(truncation=3), "`truncation` is 3; it must divide `horizon`, which is 4"),
        (lambda: of(objective="test"), "`objective` is 'test'; it must be \"training\" or"),
        (lambda: of(objective="held-out"), '`objective` is "held-out", of which the task has'),
        (lambda: of(most=np.inf), "`most` is inf; it must be a finite number, or None"),
        (
            lambda: learned.train(RULE, task, none, none, 1, objective="held-out"),
            '`objective` is "held-out", of which the task has none',
        ),
        (lambda: learned.pes(of(), 0), "`pairs` is 0; it must be an integer >= 1"),
        (lambda: learned.es(of(), 1, 0.0), "`sigma` is 0.0; it must be > 0"),
        (lambda: learned.backpropagation(of(), 0), "`runs` is 0; it must be an integer >= 1"),
        (lambda: learned.meta_train(none, none, none, 0), "`steps` is 0; it must be an integer"),
        (
            lambda: learned.meta_train(none, none, none, 1, state=cast(Any, 1), theta=2),
            "`theta` is given",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            make()


def test_persistent_evolution_sums_what_was_drawn_since_a_run_began():
    """One, two and three pieces' variance, and one again."""
    system = learned.unrolled(RULE, tasks.quadratics(2), horizon=3, truncation=1)
    estimator = learned.pes(system, 1000, 0.1)
    theta = RULE.init(jax.random.key(0))
    state, step, seen = estimator.begin(theta, jax.random.key(1)), jax.jit(estimator.step), []
    for n in range(7):
        state, _ = step(theta, state, jax.random.key(n))
        seen.append(np.square(state.summed["log_rate"]).mean() / 0.1**2)
    np.testing.assert_allclose(seen, [1, 2, 3, 1, 2, 3, 1], rtol=0.25)
