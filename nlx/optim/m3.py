# SPDX-License-Identifier: Apache-2.0
"""M3: momentum on two clocks, read out through Newton-Schulz."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nlx import ops, writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.nest import Nest
from nlx.objectives import dot_product
from nlx.optim.adam_memory import scale_by_adam_memory
from nlx.optim.alias import with_learning_rate
from nlx.optim.averages import (
    average,
    check_decays,
    look_ahead,
    matrices_and_others,
    moments,
    stored,
    value_less,
)
from nlx.optim.gradient_memory import Gate, check_range
from nlx.optim.level import nestwise
from nlx.optim.matrices import across, is_matrix, like_adam, resized
from nlx.optim.published import published

Transformation = optax.GradientTransformationExtraArgs


def scale_by_m3(
    b1: Gate = 0.9,
    b2: Gate = 0.999,
    b3: Gate = 0.9,
    *,
    alpha: Gate = 0.2,
    clock: Clock = Clock(10),
    second_moment: bool = True,
    eps: Gate = 1e-8,
    ns_steps: int = 5,
    literal: bool = False,
) -> Transformation:
    """Multi-scale Momentum Muon: a fast memory of the gradients and one on a slower clock.

    M1 = debiased average of u ;  V = debiased average of u^2
    at the start of each block of `clock.period` steps:
        M2 <- b3 M2 + (1 - b3) mean of the last block's u ;  O2 = NS(M2), 0 in the first block
    O = NS(M1 looked ahead) + alpha O2
    update = 0.2 sqrt(max(in, out)) O |/ (sqrt(V) + eps), rescaled to the norm of O|

    The part between bars only with `second_moment`. Updates have the size of Adam's. Leaves that
    aren't matrices have Adam's update, `scale_by_adam_memory(b1, b2)`.

    b1, b2, b3: decays of M1, V, M2, in [0, 1]. alpha: >= 0, weight of the slow memory; 0 without
        second moment is `optax.contrib.muon(consistent_rms=0.2)`. clock: of the slow memory.
    second_moment: as the paper has it; without it the state is smaller and, in our runs, the result
        no worse. With b2 near 0.95 an entry whose gradient has died down gets the whole step.
    eps: >= 0. ns_steps: of `nlx.ops.newton_schulz`, >= 0; with `optax.inject_hyperparams` name it
        in `static_args`.
    literal: Algorithm 1 as printed, sums that never decay, no look-ahead, no rescaling:
        M1 <- M1 + b1 u ;  V <- V + b2 u^2 ;  M2 <- M2 + b3 (sum of the last block's u)
        update = (NS(M1) + alpha NS(M2)) / (sqrt(V) + eps)

    State: 5 times the parameters, 4 without second moment.
    Raises ValueError for an argument out of range, TypeError for a clock without a period.
    Source: Behrouz et al. (2025), Nested Learning, eq. 75, algorithm 1.
    """
    check_decays(b1, b2, clock)
    check_range("b3", b3, 1)
    check_range("alpha", alpha)
    check_range("eps", eps)

    def orthogonal(matrix):
        return across(lambda m: ops.newton_schulz(m, ns_steps), matrix)

    def collect(gradients, memory):
        """The slow memory's rule: gradients of the dot product are -u."""
        move = lambda g, m: -b3 * g if literal else (1 - b3) * (-g - m)
        return jax.tree.map(move, gradients, memory)

    def nest(leaf) -> Nest:
        write = writes.summed(optax.stateless(collect), "sum" if literal else "mean")
        slow = associative_memory(
            value_less(leaf), dot_product, published(write, orthogonal), clock
        )
        levels = {"fast": average(leaf), "slow": slow}
        if second_moment:
            levels["second"] = average(leaf)

        def forward(params, moment):
            del params
            u = moment.gradient
            contexts = {"fast": stored(u, moment.first), "slow": Association((), u)}
            if second_moment:
                contexts["second"] = stored(jnp.square(u), moment.second)
            return (), contexts

        return Nest(levels, forward)

    def readout(before, after, moment):
        fast = after["fast"] if literal else look_ahead(after["fast"], moment, b1)
        both = orthogonal(fast) + alpha * before["slow"]
        divided = both / (jnp.sqrt(after["second"]) + eps) if second_moment else both
        if literal:
            return divided
        return like_adam(both) * (resized(divided, both) if second_moment else both)

    return matrices_and_others(
        nestwise(nest, readout, moments(b1, b2, literal)),
        scale_by_adam_memory(b1, b2),
        is_matrix,
    )


def m3(
    learning_rate: optax.ScalarOrSchedule,
    b1: Gate = 0.9,
    b2: Gate = 0.999,
    b3: Gate = 0.9,
    *,
    alpha: Gate = 0.2,
    clock: Clock = Clock(10),
    second_moment: bool = True,
    eps: Gate = 1e-8,
    ns_steps: int = 5,
    literal: bool = False,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> Transformation:
    """Descent along `scale_by_m3`, at learning rates of AdamW.

    weight_decay: >= 0, decoupled; mask: of the leaves to decay, as in `optax.adamw`.
    """
    scaled = scale_by_m3(
        b1,
        b2,
        b3,
        alpha=alpha,
        clock=clock,
        second_moment=second_moment,
        eps=eps,
        ns_steps=ns_steps,
        literal=literal,
    )
    return with_learning_rate(learning_rate, scaled, weight_decay=weight_decay, mask=mask)
