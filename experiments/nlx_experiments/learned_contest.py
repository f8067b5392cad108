# SPDX-License-Identifier: Apache-2.0
"""Rules and hand-made optimizers on the same problems: meta-training, grids of rates, curves."""

import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from nlx import learned
from nlx.learned import Rule
from nlx_experiments.learned_tasks import HORIZON, Exam

RATES = tuple(10.0 ** (n / 4) for n in range(-20, 13))  # four to a decade, 1e-5 to 1,000
AT_ONCE = 32  # problems that are trained side by side
CHOSEN, EXAMINED = 1, 2  # which problems: to choose by, to report on; meta-training draws its own
POINTS = 60  # of a curve that are kept


class Plan(NamedTuple):
    """How a rule is meta-trained.

    estimator: what finds gradients. runs: side by side, for PES in as many pairs. pieces: in all.
    rate: the outer one, of Adam, falling by a cosine to a hundredth. sigma: of PES. truncation:
    steps of a piece, of HORIZON. looks: at the problems that choose theta, evenly spaced. most:
    what a step costs at most, see `nlx.learned.unrolled`.
    """

    estimator: Literal["backpropagation", "pes"]
    runs: int
    pieces: int
    rate: float
    sigma: float = 0.01
    truncation: int = 20
    looks: int = 20
    most: float | None = None


def by_rate(make: Callable[[Any], optax.GradientTransformation]) -> Rule:
    """An optimizer as a rule whose theta is its learning rate."""
    with_extra = lambda theta: optax.with_extra_args_support(make(theta["rate"]))
    return Rule(lambda key: {"rate": jnp.float32(1e-3)}, with_extra)


@functools.cache
def _curves(rule: Rule, exam: Exam):
    """(theta, keys [n]) -> costs after each step [n, steps]."""

    def one(theta, key):
        first = learned.start(rule, exam.task, theta, key)
        more = exam.objective == "training"  # a step's cost is told before it: one step more
        _, costs = learned.train(
            rule, exam.task, theta, first, exam.steps + more, objective=exam.objective
        )
        return costs[1:] if more else costs

    return jax.jit(
        lambda theta, keys: jax.lax.map(functools.partial(one, theta), keys, batch_size=AT_ONCE)
    )


def curves(rule: Rule, exam: Exam, theta: PyTree[Array], part: int) -> Float[np.ndarray, "n t"]:
    """Costs after each step of the problems of a part; what is not finite is infinity."""
    found = np.asarray(_curves(rule, exam)(theta, _keys(part, exam.count)), np.float64)
    return np.where(np.isfinite(found), found, np.inf)


def chosen(exam: Exam) -> Exam:
    """The problems that choose: HORIZON steps of them."""
    return exam._replace(steps=min(exam.steps, HORIZON))


def tuned(rule: Rule, exam: Exam) -> dict[str, Any]:
    """The rate with the least mean cost after HORIZON steps, of problems that choose.

    Returns "rate", "edge": whether it is RATES' first or last, "reached": by every rate.
    """
    exam = chosen(exam)
    reached = {
        rate: float(curves(rule, exam, {"rate": jnp.float32(rate)}, CHOSEN)[:, -1].mean())
        for rate in RATES
    }
    best = min(reached, key=lambda rate: reached[rate])
    told = {f"{rate:.3g}": _finite(cost) for rate, cost in reached.items()}
    return {"rate": best, "edge": best in (RATES[0], RATES[-1]), "reached": told}


def meta_trained(
    rule: Rule, exam: Exam, plan: Plan, seed: int, leave: Callable[[], None]
) -> tuple[PyTree[Array], dict[str, Any]]:
    """The theta that did best on problems that choose, of those that meta-training came by.

    exam: what is trained on. seed: of all that is drawn. leave: called between pieces; may raise.

    Returns theta, and "seconds" that it took, with the looks; "pieces" that it had seen;
    "looks": what the problems that choose cost after HORIZON steps.
    """
    exam = chosen(exam)
    system = learned.unrolled(
        rule, exam.task, horizon=plan.truncation * max(1, exam.steps // plan.truncation),
        truncation=plan.truncation, objective=exam.objective, most=plan.most,
    )  # fmt: skip
    estimator = learned.backpropagation(system, plan.runs)
    if plan.estimator == "pes":
        estimator = learned.pes(system, plan.runs, plan.sigma)
    curve = optax.cosine_decay_schedule(plan.rate, plan.pieces, 0.01)
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(curve))
    level = learned.meta_level(rule, outer)
    step, every = learned.meta_step(level, estimator), max(1, plan.pieces // plan.looks)
    some = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s), state, None, every))
    state = learned.meta_start(level, estimator, jax.random.key(seed))
    begun, kept, at = time.monotonic(), state.level.params, 0
    look = lambda theta: float(curves(rule, exam, theta, CHOSEN)[:, -1].mean())
    looks = [look(kept)]
    for n in range(plan.pieces // every):
        leave()
        state, _ = some(state)
        looks.append(look(state.level.params))
        if looks[-1] == min(looks):
            kept, at = state.level.params, (n + 1) * every
    seconds = round(time.monotonic() - begun, 1)
    return kept, {"seconds": seconds, "pieces": at, "looks": [_finite(x) for x in looks]}


def examined(rule: Rule, exam: Exam, theta: PyTree[Array]) -> dict[str, Any]:
    """What an optimizer makes of problems that chose nothing.

    "costs": of each after HORIZON steps. "at", "curve": steps, and the mean cost after them.
    """
    found = curves(rule, exam, theta, EXAMINED)
    steps = found.shape[1]
    at = np.unique(np.geomspace(1, steps, POINTS).round().astype(int))
    return {
        "costs": [_finite(x) for x in found[:, min(steps, HORIZON) - 1]],
        "at": at.tolist(),
        "curve": [_finite(x) for x in found.mean(0)[at - 1]],
    }


def _keys(part: int, count: int) -> Key[Array, " n"]:
    return jax.random.split(jax.random.fold_in(jax.random.key(71), part), count)


def _finite(cost: float) -> float | None:
    """As JSON has it: no number where there is none."""
    return float(f"{cost:.5g}") if np.isfinite(cost) else None
