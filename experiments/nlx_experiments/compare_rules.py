# SPDX-License-Identifier: Apache-2.0
"""The optimizers that `nlx run optimizers` compares: a line each, add another here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax
from optax import contrib

from nlx import optim

Settings = Sequence[Mapping[str, float]]
Transformation = optax.GradientTransformation

# What is tried of every optimizer besides learning rates; the first of a list with all of the grid.
MOMENTA: Settings = ({"momentum": 0.9}, {"momentum": 0.8}, {"momentum": 0.95})
NONE: Settings = ({},)


class Rule(NamedTuple):
    """An optimizer: (learning rate as a schedule, **setting) -> transformation."""

    make: Callable[..., Transformation]
    settings: Settings = MOMENTA
    deep: bool = False
    weights: Callable[[Any, Any], Any] = lambda state, params: params  # (state, params), to score
    aside: bool = False  # shown, and no part of what "first" is of
    reads_inputs: bool = False  # whether `update` takes the Gram matrices of the layers' inputs


def _sgd(rate, momentum=None, decay=0.0, nesterov=False):
    return optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum, nesterov=nesterov)
    )


def _adamw(rate, momentum=0.9, decay=0.0):
    return optax.adamw(rate, momentum, weight_decay=decay)


def _nadam(rate, momentum=0.9, decay=0.0):
    return optax.nadamw(rate, momentum, weight_decay=decay)


def _muon(rate, momentum=0.9, decay=0.0, **given):
    """With updates of the size of Adam's, and the same decay for its Adam."""
    adam = {"adam_b1": momentum, "adam_weight_decay": decay}
    return contrib.muon(
        rate, beta=momentum, weight_decay=decay, consistent_rms=0.2, **adam, **given
    )


def _schedule_free(rate, momentum=0.9, decay=0.0):
    return contrib.schedule_free_adamw(rate, b1=momentum, weight_decay=decay)


def _averaged_muon(rate, momentum=0.9):
    """The step of Muon with momentum 0.8, its best, and averaged weights."""
    muon = contrib.muon(rate, beta=0.8, consistent_rms=0.2, adam_b1=0.8)
    return contrib.schedule_free(muon, rate, momentum)


def _shampoo(rate, momentum=0.9, decay=0.0):
    return optim.shampoo(rate, momentum, weight_decay=decay)


def _soap(rate, momentum=0.9, decay=0.0):
    return optim.soap(rate, momentum, weight_decay=decay)


def rivals(settings: Settings = MOMENTA) -> dict[str, Rule]:
    """What the deep optimizers compete with; SGD has no momentum to tune."""
    averaged = contrib.schedule_free_eval_params
    return {
        "sgd": Rule(_sgd, NONE if settings is MOMENTA else settings),
        "momentum": Rule(
            lambda rate, momentum=0.9, decay=0.0: _sgd(rate, momentum, decay), settings
        ),
        "nesterov": Rule(
            lambda rate, momentum=0.9, decay=0.0: _sgd(rate, momentum, decay, True), settings
        ),
        "nadam": Rule(_nadam, settings),
        "adamw": Rule(_adamw, settings),
        "muon": Rule(_muon, settings),
        "schedule_free": Rule(_schedule_free, settings, weights=averaged),
        "shampoo": Rule(_shampoo, settings),
        "soap": Rule(_soap, settings),
    }


def _momentum_of(make: Callable[..., Transformation], **given) -> Callable[..., Transformation]:
    """The setting `momentum` as the optimizer's decay."""
    return lambda rate, momentum=0.9: make(rate, momentum, **given)


DELTA = Rule(_momentum_of(optim.delta_momentum), deep=True)
DMGD = Rule(_momentum_of(optim.dmgd), deep=True)
DMGD_LINEAR = Rule(_momentum_of(optim.dmgd, hidden=()), deep=True)
M3 = Rule(_momentum_of(optim.m3), deep=True)
AVERAGED_SOAP = Rule(
    lambda rate, momentum=0.9: contrib.schedule_free(optim.soap(rate, 0.0), rate, momentum),
    weights=contrib.schedule_free_eval_params,
    aside=True,
)
AVERAGED_MUON = Rule(_averaged_muon, weights=contrib.schedule_free_eval_params)
