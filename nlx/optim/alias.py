# SPDX-License-Identifier: Apache-2.0
"""The end of every alias: decoupled weight decay and a learning rate."""

from typing import Any

import optax

from nlx.optim.gradient_memory import Gate


def with_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
    *directions: optax.GradientTransformation,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """-learning_rate (direction + weight_decay w); without decay no parameters are asked for."""
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    decay = optax.identity() if none else optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(*directions, decay, optax.scale_by_learning_rate(learning_rate))
