# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a training run, in one function: change it here."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from nlx import optim
from nlx.clock import Clock
from nlx_experiments.config import TrainConfig


def make(
    config: TrainConfig,
    labels: PyTree[str],
    clocks: Mapping[str, Clock],
    restarts: Mapping[str, int],
) -> optax.GradientTransformation:
    """Clips by the global norm, then lets each level learn on its own clock.

    Args:
      config: rule and hyper-parameters.
      labels: the level of every parameter.
      clocks: level -> its clock, in steps; a level fires with the mean gradient of its period.
      restarts: level -> firings after which it begins anew, where it does.
    """

    def rule(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        matrices = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
        if config.optimizer == "adamw":
            return optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay, mask=matrices)
        return optim.dmgd(rate, weight_decay=config.weight_decay, mask=matrices)

    def level(name: str, clock: Clock) -> optax.GradientTransformation:
        if name in restarts:  # the rate goes by steps: it does not begin anew with the rule
            anew = lambda rate: optim.on_clock(rule(rate), clock, restart=restarts[name])
            return optax.inject_hyperparams(anew)(rate=learning_rate(config))
        if clock == Clock(1):
            return rule(learning_rate(config))
        return optim.on_clock(rule(learning_rate(config, clock.period or 1)), clock)

    levels: dict[Hashable, Any] = {name: level(name, clock) for name, clock in clocks.items()}
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.partition(levels, labels))


def learning_rate(config: TrainConfig, period: int = 1) -> optax.Schedule:
    """Of the n-th firing of a level: linear warm-up, then a cosine down to a tenth.

    Args:
      config: peak, steps, share of warm-up.
      period: steps from one firing to the next, so that every level follows one curve in steps.
    """
    curve = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(round(config.warmup * config.steps), config.steps - 1),
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )
    return lambda firing: curve((firing + 1) * period)
