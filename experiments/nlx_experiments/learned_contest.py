# SPDX-License-Identifier: Apache-2.0
"""Rules and hand-made optimizers on the same problems: meta-training, grids of rates, curves."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree
from safetensors import safe_open

from nlx import learned
from nlx.learned import Rule
from nlx_experiments import weights
from nlx_experiments.learned_tasks import Exam

RATES = tuple(10.0 ** (n / 4) for n in range(-20, 13))  # four to a decade, 1e-5 to 1,000
AT_ONCE = 32  # problems that are trained side by side
CHOSEN, REPORTED = 1, 3  # which problems: to choose by, to report on (2: what pilots saw)
POINTS = 60  # of a curve that are kept
FIRST = 32  # problems whose curves go on


class Plan(NamedTuple):
    """How a rule is meta-trained.

    estimator: what finds gradients. runs: side by side, for PES in as many pairs. pieces: in all.
    rate: the outer one, of Adam, falling by a cosine to a hundredth. sigma: of PES. truncation:
    steps of a piece. looks: at the problems that choose theta, evenly spaced. most:
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
def _curves(rule: Rule, exam: Exam, steps: int):
    """(theta, keys [n]) -> costs after each step [n, steps]."""

    def one(theta, key):
        first = learned.start(rule, exam.task, theta, key)
        more = exam.objective == "training"  # a step's cost is told before it: one step more
        _, costs = learned.train(
            rule, exam.task, theta, first, steps + more, objective=exam.objective
        )
        return costs[1:] if more else costs

    return jax.jit(
        lambda theta, keys: jax.lax.map(functools.partial(one, theta), keys, batch_size=AT_ONCE)
    )


def curves(
    rule: Rule, exam: Exam, theta: PyTree[Array], part: int, count: int, steps: int
) -> Float[np.ndarray, "n t"]:
    """Costs after each step of the first problems of a part; what is no number is infinity."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(71), part), count)
    found = np.asarray(_curves(rule, exam, steps)(theta, keys), np.float64)
    return np.where(np.isfinite(found), found, np.inf)


def looked(rule: Rule, exam: Exam, theta: PyTree[Array]) -> float:
    """The mean cost after the last step, of problems that choose."""
    return float(curves(rule, exam, theta, CHOSEN, exam.choosing, exam.steps)[:, -1].mean())


def tuned(rule: Rule, exam: Exam) -> dict[str, Any]:
    """The rate with the least mean cost after the last step, of problems that choose.

    Returns "rate", "edge": whether it is RATES' first or last, "reached": by every rate.
    """
    reached = {rate: looked(rule, exam, {"rate": jnp.float32(rate)}) for rate in RATES}
    best = min(reached, key=lambda rate: reached[rate])
    told = {f"{rate:.3g}": _finite(cost) for rate, cost in reached.items()}
    return {"rate": best, "edge": best in (RATES[0], RATES[-1]), "reached": told}


def meta_trained(
    rule: Rule,
    exam: Exam,
    plan: Plan,
    seed: int,
    leave: Callable[[], None],
    path: pathlib.Path | None = None,
) -> tuple[PyTree[Array], dict[str, Any]]:
    """The theta that did best on problems that choose, of those that meta-training came by.

    What it lowers is the mean cost of all steps; what chooses theta, as a rate, is that after the
    last.

    exam: what is trained on. seed: of all that is drawn. leave: called between pieces; may raise.
    path: a file that it is kept in at every look, and goes on from, to the bit; None: nowhere.

    Returns theta, and "seconds" that it took, with the looks; "pieces" that it had seen; "looks":
    what the problems that choose cost after the last step.
    """
    system = learned.unrolled(
        rule, exam.task, horizon=exam.steps, truncation=plan.truncation, objective=exam.objective,
        most=plan.most,
    )  # fmt: skip
    estimator = learned.backpropagation(system, plan.runs)
    if plan.estimator == "pes":
        estimator = learned.pes(system, plan.runs, plan.sigma)
    curve = optax.cosine_decay_schedule(plan.rate, plan.pieces, 0.01)
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(curve))
    level = learned.meta_level(rule, outer)
    step, every = learned.meta_step(level, estimator), max(1, plan.pieces // plan.looks)
    some = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s), state, None, every))
    begun, state = time.monotonic(), learned.meta_start(level, estimator, jax.random.key(seed))
    held = {"state": state, "best": state.level.params}
    told: dict[str, Any] = {"looks": [looked(rule, exam, state.level.params)]}
    told |= {"pieces": 0, "seconds": 0.0}
    if path is not None and path.exists():
        held, told = restored(path, held)
    before = told["seconds"]
    for n in range(len(told["looks"]) - 1, plan.pieces // every):
        leave()
        state, _ = some(held["state"])
        told["looks"].append(looked(rule, exam, state.level.params))
        held["state"] = state
        if told["looks"][-1] == min(told["looks"]):
            held["best"], told["pieces"] = state.level.params, (n + 1) * every
        told["seconds"] = round(before + time.monotonic() - begun, 1)
        if path is not None:
            kept(path, held, told)
    return held["best"], told | {"looks": [_finite(x) for x in told["looks"]]}


def kept(path: pathlib.Path, tree: PyTree[Array], told: Mapping[str, Any]) -> None:
    """Writes arrays and keys of random numbers by name, and what is told of them."""
    weights.write(path, jax.tree.map(_plain, tree), {"told": json.dumps(told)})


def restored(path: pathlib.Path, like: PyTree[Array]) -> tuple[Any, dict[str, Any]]:
    """What `kept` wrote; like: a tree of the same form.

    Raises Refused for a file of another form.
    """
    found = weights.read(path, jax.tree.map(_plain, like), argument="runs", of="rule")
    with safe_open(path, "numpy") as held:
        told = json.loads(held.metadata()["told"])

    def whole(saved, leaf):
        saved = jnp.asarray(saved)
        return jax.random.wrap_key_data(saved) if _is_key(leaf) else saved

    return jax.tree.map(whole, found, like), told


def _plain(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)


def examined(rule: Rule, exam: Exam, theta: PyTree[Array]) -> dict[str, Any]:
    """What an optimizer makes of problems that chose nothing.

    "costs": of each after the last step. "curve": the mean cost of the first problems after each
    of `points`.
    """
    found = curves(rule, exam, theta, REPORTED, exam.count, exam.steps)
    on = found[:FIRST]
    if exam.longer > exam.steps:
        on = curves(rule, exam, theta, REPORTED, min(exam.count, FIRST), exam.longer)
    return {
        "costs": [_finite(x) for x in found[:, -1]],
        "curve": [_finite(x) for x in on.mean(0)[points(exam) - 1]],
    }


def points(exam: Exam) -> Int[np.ndarray, " p"]:
    """The steps that curves are kept at, as far from each other on a logarithmic scale."""
    return np.unique(np.geomspace(1, exam.longer, POINTS).round().astype(int))


def _finite(cost: float) -> float | None:
    """As JSON has it: no number where there is none."""
    return float(f"{cost:.4g}") if np.isfinite(cost) else None
