# SPDX-License-Identifier: Apache-2.0
"""A memory of the gradients read out through a preconditioner that learns from them too."""

from typing import Any, NamedTuple

import optax


class PreconditionedState(NamedTuple):
    """State of `preconditioned`: its two parts'."""

    memory: Any
    preconditioner: Any


def preconditioned(
    memory: optax.GradientTransformation, preconditioner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Any memory of the gradients u_t, and any preconditioner of what it says.

    m_t = memory(u_t) ;  update = P_t(m_t)
    P_t: what the preconditioner makes of m_t where it has seen u_1 ... u_{t-1}; it then sees u_t.

    So the preconditioner's statistics are the gradients', not the memory's, as in Adam and SOAP:
    `optax.chain(memory, preconditioner)` would have it learn from m, and the other way around the
    memory would mix gradients measured by different yardsticks.

    memory, preconditioner: transformations. The preconditioner should have no momentum of its own:
        `scale_by_soap(0.0)`, `scale_by_second_moment()`. Both get the extra arguments.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 47, 50.
    """
    learns, scales = (optax.with_extra_args_support(tx) for tx in (memory, preconditioner))

    def init(params):
        return PreconditionedState(learns.init(params), scales.init(params))

    def update(updates, state, params=None, **extra_args):
        said, learned = learns.update(updates, state.memory, params, **extra_args)
        scaled, _ = scales.update(said, state.preconditioner, params, **extra_args)
        _, seen = scales.update(updates, state.preconditioner, params, **extra_args)
        return scaled, PreconditionedState(learned, seen)

    return optax.GradientTransformationExtraArgs(init, update)
