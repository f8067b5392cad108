# SPDX-License-Identifier: Apache-2.0
"""The rows of `nlx run optimizers`: problem, competitors, and who is declared to win."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from optax import contrib

from nlx import optim
from nlx_experiments import compare_rules as rules
from nlx_experiments import compare_tasks as tasks
from nlx_experiments.compare_rules import Rule
from nlx_experiments.compare_search import Row

FIRST, NEAR = 1.0, 1.02  # the largest loss over the best one's

DECAYS: rules.Settings = [{"decay": d} for d in (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]


def toy() -> Row:
    """(i) Eq. 53."""
    delta = functools.partial(optim.delta_momentum, scale_decay=0.999, precondition=False)
    deep = {
        "delta momentum": Rule(lambda rate, momentum: delta(rate, momentum), deep=True),
        "dmgd": rules.DMGD,
    }
    declared = {"constant": ("delta momentum", FIRST)}
    competitors = {**rules.rivals(), **deep}
    return Row(tasks.toy(), competitors, declared, (-3, 0), seeds=40, tuning=40, batch=40)


SHORTENED = ("muon", "schedule_free", "soap")


def shortened(rule: Rule) -> Rule:
    """A rival that sees gradients whose outliers are shortened as robust DMGD shortens them."""
    raw = {"hidden": (), "inner_lr": 0.0, "nesterov": False, "scale_decay": 0.99}
    first = optim.scale_by_deep_momentum(0.0, robust=1.5, **raw)
    return rule._replace(
        make=lambda rate, momentum: optax.chain(first, rule.make(rate, momentum)),
        weights=lambda state, params: rule.weights(state[1], params),
    )


def quadratic(noise: str) -> Row:
    """(ii) An ill-conditioned linear layer with bad labels."""
    raw = {"hidden": (), "precondition": False, "scale_decay": 0.99}
    learning = {**raw, "decay": 0.0, "retention": 0.999}
    rates: rules.Settings = [{"inner_lr": rate} for rate in (0.3, 0.2, 0.4)]
    robust = lambda rate, inner_lr: optim.dmgd(rate, inner_lr=inner_lr, robust=1.5, **learning)
    control = lambda rate, momentum: optim.dmgd(rate, momentum, inner_lr=0.0, robust=1.5, **raw)
    deep = {
        "dmgd": Rule(robust, rates, deep=True),
        "dmgd, l2": Rule(
            lambda rate, inner_lr: optim.dmgd(rate, inner_lr=inner_lr, **learning), rates, deep=True
        ),
        "robust momentum": Rule(control, deep=True),
        **{f"{name}, shortened": shortened(rules.rivals()[name]) for name in SHORTENED},
        "delta momentum": rules.DELTA,
        "m3": rules.M3,
    }
    declared = {"constant": ("dmgd", FIRST)}
    competitors = {**rules.rivals(), **deep}
    task = tasks.quadratic(noise)
    return Row(task, competitors, declared, (-3, 0), seeds=10, tuning=5, batch=5)


def digits() -> Row:
    """(iii) An MLP on scikit-learn's digits."""
    linear: dict[str, Any] = {"hidden": (), "inner_lr": 0.05}

    def in_soap(rate, momentum):
        """Eq. 47 with DMGD's memory for M and SOAP's eigenbasis and second moment for P."""
        memory = optim.scale_by_deep_momentum(momentum, **linear)
        scaled = optim.preconditioned(memory, optim.scale_by_soap(0.0))
        return optax.chain(scaled, optax.scale_by_learning_rate(rate))

    def averaged(rate, momentum):
        return contrib.schedule_free(in_soap(rate, 0.0), rate, momentum)

    weights = contrib.schedule_free_eval_params
    deep = {
        "dmgd in soap": Rule(in_soap, deep=True),
        "dmgd in soap, averaged": Rule(averaged, deep=True, weights=weights, aside=True),
        "dmgd": Rule(lambda rate, momentum: optim.dmgd(rate, momentum, **linear), deep=True),
        "delta momentum": rules.DELTA,
        "m3": rules.M3,
        "dgd": Rule(
            lambda rate, gamma: optim.dgd(rate, gamma=gamma),
            [{"gamma": g} for g in (3e-4, 1e-4, 1e-3)],
            deep=True,
            reads_inputs=True,
        ),
    }
    declared = {"constant": ("dmgd in soap", FIRST), "cosine": ("dmgd in soap", NEAR)}
    competitors = {**rules.rivals(), "soap, averaged": rules.AVERAGED_SOAP, **deep}
    return Row(tasks.digits(), competitors, declared, (-3, 0), seeds=20, tuning=20, batch=20)


def text() -> Row:
    """(iv) A small transformer on the standard library's source."""

    def orthogonal(rate, momentum):
        """DMGD as Eq. 52 has it: a linear memory, read out through Newton-Schulz."""
        memory = optim.scale_by_deep_momentum(momentum, hidden=())
        return optax.chain(
            optim.scale_by_second_moment(),
            memory,
            optim.scale_by_newton_schulz(),
            optax.scale_by_learning_rate(rate),
        )

    def averaged(rate, momentum):
        return contrib.schedule_free(orthogonal(rate, 0.8), rate, momentum)

    deep = {
        "dmgd, orthogonal": Rule(orthogonal, deep=True),
        "dmgd, averaged": Rule(averaged, deep=True, weights=contrib.schedule_free_eval_params),
        "dmgd": rules.DMGD,
        "delta momentum": rules.DELTA,
        "m3": rules.M3,
        "m3 without V": Rule(
            lambda rate, momentum: optim.m3(rate, momentum, second_moment=False), deep=True
        ),
    }
    declared = {"cosine": ("dmgd, orthogonal", NEAR), "constant": ("dmgd, averaged", NEAR)}
    competitors = {**rules.rivals(), "muon, averaged": rules.AVERAGED_MUON, **deep}
    task = tasks.transformer()
    return Row(task, competitors, declared, (-3, -1), seeds=5, tuning=2, batch=1, log=False)


def permuted() -> Row:
    """(v) Labels that keep being permuted."""
    gammas: rules.Settings = [{"gamma": g} for g in (3e-3, 1e-3, 1e-2)]
    deep = {
        "dgd": Rule(
            lambda rate, gamma: optim.dgd(rate, gamma=gamma), gammas, deep=True, reads_inputs=True
        ),
        "m3": Rule(lambda rate, decay: optim.m3(rate, weight_decay=decay), DECAYS, deep=True),
        "dmgd": Rule(lambda rate, decay: optim.dmgd(rate, weight_decay=decay), DECAYS, deep=True),
    }
    declared = {"constant": ("dgd", FIRST)}
    competitors = {**rules.rivals(DECAYS), **deep}
    task = tasks.permuted()
    return Row(
        task, competitors, declared, (-3, 0), 5, 2, batch=10, log=False, schedules=("constant",)
    )


FULL: Mapping[str, Callable[[], Row]] = {
    "toy": toy,
    **{f"quadratic, {n}": functools.partial(quadratic, n) for n in tasks.NOISES},
    "digits": digits,
    "text": text,
    "permuted labels": permuted,
}


def _tiny(row: Callable[[], Row], task: Callable[[], tasks.Task]) -> Callable[[], Row]:
    """Few steps, seeds and rates; AdamW and what is declared."""

    def make() -> Row:
        full = row()
        kept = ["adamw", *(name for name, _ in full.declared.values())]
        competitors = {name: full.rules[name] for name in dict.fromkeys(kept)}
        low = full.grid[1] - 0.5
        return full._replace(
            task=task(), rules=competitors, grid=(low, full.grid[1]), seeds=2, tuning=1, batch=2
        )

    return make


TINY: Mapping[str, Callable[[], Row]] = {
    "toy": _tiny(toy, lambda: tasks.toy(20)),
    "quadratic, outliers": _tiny(
        functools.partial(quadratic, "outliers"),
        lambda: tasks.quadratic("outliers", 50, rows=8, columns=4),
    ),
    "digits": _tiny(digits, lambda: tasks.digits(40, 4)),
    "text": _tiny(text, lambda: tasks.transformer(10, width=16, layers=1, context=16, batch=2)),
    "permuted labels": _tiny(permuted, lambda: tasks.permuted(3, 5, 4)),
}
