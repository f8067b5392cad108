# SPDX-License-Identifier: Apache-2.0
"""Momentum and its relatives: a table of calls to `gradient_memory`, one row a function.

| function                 | objective         | stored  | read-out           | eq.    |
|--------------------------|-------------------|---------|--------------------|--------|
| momentum                 | dot               | u       | m                  | 33     |
| second_moment            | L2                | u^2     | u / sqrt(m)        | 40     |
| preconditioned_momentum  | dot               | P u     | m                  | 47     |
| delta_momentum           | dot, L2 of u^T m  | u       | m                  | 48, 49 |
| feature_momentum         | dot               | phi(u)  | m                  | 51     |
| orthogonal_momentum      | dot               | u       | Newton-Schulz of m | 42, 52 |

Each memory is value-less, one m like each leaf u of the gradient, on a clock of one step. The deep
memories, which learn a map of gradients, are in `nlx.optim.deep_momentum`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nlx import memories, ops, writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.memories import Memory
from nlx.nest import Nest
from nlx.objectives import dot_product, l2
from nlx.optim.adam_memory import scale_by_adam_memory
from nlx.optim.alias import with_learning_rate
from nlx.optim.averages import average, bounded, matrices_and_others, moments, stored
from nlx.optim.gradient_memory import Gate, Map, check_range, debiased, gradient_memory, wide
from nlx.optim.level import nestwise
from nlx.optim.matrices import across, gathered, is_matrix, like_adam, unit

Transformation = optax.GradientTransformationExtraArgs


def scale_by_momentum(decay: Gate = 0.9, *, nesterov: bool = False) -> Transformation:
    """Heavy-ball momentum: a value-less memory that stores gradients u by the dot product.

    m <- decay m + u ;  update = m, or (Nesterov) u + decay m

    decay: in [0, 1]. It is `optax.trace`, to the bit, in at least float32.
    Raises ValueError for a decay out of range.
    Source: Polyak (1964); Behrouz et al. (2025), Nested Learning, eqs. 10-13, 33, 34, 100.
    """
    _check(decay)
    return gradient_memory(
        memories.constant, dot_product, retain=decay, readout=_ahead(decay) if nesterov else None
    )


def momentum(
    learning_rate: optax.ScalarOrSchedule, decay: Gate = 0.9, *, nesterov: bool = False
) -> Transformation:
    """Descent along `scale_by_momentum`: w <- w - learning_rate m."""
    return with_learning_rate(learning_rate, scale_by_momentum(decay, nesterov=nesterov))


def scale_by_second_moment(decay: Gate = 0.999, *, eps: Gate = 1e-8) -> Transformation:
    """u / (sqrt(debiased average of u^2) + eps): a preconditioner that is itself a memory.

    decay: of the average, in [0, 1]. eps: > 0. It is `optax.scale_by_rms`, debiased, but in at
    least float32, and entries whose square would overflow count as the largest whose doesn't.
    Raises ValueError for an argument out of range.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 38-40.
    """
    _check(decay)
    check_range("eps", eps)
    return gradient_memory(
        memories.constant,
        l2,
        target=lambda u: jnp.square(bounded(u)),
        rate=debiased(decay),
        readout=lambda read, u: bounded(u) / (jnp.sqrt(read(u)) + eps),
    )


def scale_by_preconditioned_momentum(
    preconditioner: optax.GradientTransformation | None = None,
    decay: Gate = 0.9,
    *,
    nesterov: bool = False,
) -> Transformation:
    """Momentum of the preconditioned gradient: a more expressive association.

    m <- decay m + P_t u

    preconditioner: P, any optax transformation: a memory of its own. None:
        `scale_by_second_moment`.
    decay, nesterov, errors: as in `scale_by_momentum`.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 46, 47.
    """
    preconditioner = scale_by_second_moment() if preconditioner is None else preconditioner
    return optax.chain(preconditioner, scale_by_momentum(decay, nesterov=nesterov))


def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    preconditioner: optax.GradientTransformation | None = None,
    decay: Gate = 0.9,
    *,
    nesterov: bool = False,
) -> Transformation:
    """Descent along `scale_by_preconditioned_momentum`."""
    scaled = scale_by_preconditioned_momentum(preconditioner, decay, nesterov=nesterov)
    return with_learning_rate(learning_rate, scaled)


def scale_by_delta_momentum(
    decay: Gate = 0.9,
    *,
    erase: Gate = 1.0,
    scale_decay: Gate | None = None,
    nesterov: bool = True,
    literal: bool = False,
) -> Transformation:
    """Momentum that erases what it holds along each new gradient before it stores it.

    m <- (decay I - c u u^T) m + u ;  c = erase / s^2     for each kernel u, m [..., in, out]
    s^2 = debiased average of ||u||_F^2

    One step of descent on the L2 objective 1/2 ||m^T u - (-P)||^2, whose quadratic part has a rate
    of its own: value and erasure are <m, u> and c/2 ||u^T m||^2. Along directions that keep coming
    back (steep ones) m shrinks, the rest is kept. Vectors and scalars are kernels of one input,
    u^T u = ||u||^2; leading axes hold kernels of their own.

    decay: in [0, 1]. erase: >= 0, stable up to 1 + decay; 0 is `scale_by_momentum`.
    scale_decay: in [0, 1], of s^2; None: s^2 is ||u||_F^2 itself, so of a vector m all directions
        shrink alike. With an average a vector's m shrinks where gradients are large.
    nesterov: read u + decay m.
    literal: the printed rule, c = erase (1 in the paper) and update = m. Its recursion contains no
        learning rate, so it diverges, to inf and NaN, at any where erase ||u||^2 > 1 + decay, that
        is, as a rule.

    Raises ValueError for an argument out of range.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 48, 49 (right multiplication, in its
    [out, in] layout; the NeurIPS version prints a left one, which does not type-check).
    """
    _check(decay)
    check_range("erase", erase)
    if scale_decay is not None:
        check_range("scale_decay", scale_decay, 1)

    def objective(output, value):
        held, recalled = output
        return dot_product(held, value) + erase * l2(recalled, jnp.zeros_like(recalled))

    def direction(u: Float[Array, "..."]) -> Float[Array, "..."]:
        return u if literal else unit(u)

    readout = _first if literal or not nesterov else _ahead(decay, _first)
    if literal or scale_decay is None:
        return gradient_memory(
            _recalling,
            objective,
            features=direction,
            target=lambda u: u,
            retain=decay,
            readout=readout,
        )

    def nest(leaf) -> Nest:
        size = jax.ShapeDtypeStruct(_norms(leaf.shape), leaf.dtype)
        held = associative_memory(
            _recalling(leaf), objective, writes.gated(momentum=False), Clock(1)
        )

        def forward(params, moment):
            u, share = moment.gradient, moment.second
            square = jnp.sum(jnp.square(u), tuple(range(u.ndim))[-2:]).reshape(_norms(u.shape))
            mean = share.retain * params["size"] + share.rate * square
            mean = jnp.where(mean >= jnp.finfo(u.dtype).tiny, mean, 1)
            key = u / jnp.sqrt(mean)
            retain = wide(decay)
            return (), {"size": stored(square, share), "held": Association(key, u, retain=retain)}

        return Nest({"size": average(size), "held": held}, forward)

    def recall(before, after, moment):
        del before
        u = moment.gradient
        return readout(lambda query: _recalling(u).read(after["held"], query), u)

    return nestwise(nest, recall, moments(0.0, scale_decay))


def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: Gate = 0.9,
    *,
    erase: Gate = 1.0,
    scale_decay: Gate | None = None,
    nesterov: bool = True,
    literal: bool = False,
    precondition: bool = True,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> Transformation:
    """Descent along `scale_by_delta_momentum` of the gradient over the root of its second moment.

    `precondition=False`, `literal=True`: of the gradient itself. learning_rate: like AdamW's, else
    like that of SGD; a number or a schedule.
    weight_decay: >= 0, decoupled; mask: of the leaves to decay, as in `optax.adamw`.
    """
    scaled = scale_by_delta_momentum(
        decay, erase=erase, scale_decay=scale_decay, nesterov=nesterov, literal=literal
    )
    plain = literal or not precondition
    first = optax.identity() if plain else scale_by_second_moment()
    return with_learning_rate(learning_rate, first, scaled, weight_decay=weight_decay, mask=mask)


def scale_by_feature_momentum(
    features: Map, decay: Gate = 0.9, *, nesterov: bool = False
) -> Transformation:
    """Momentum of higher-order features of the gradient.

    m <- decay m + phi(u)

    features: phi, leaf -> leaf of the same shape, for instance `lambda u: u + u**3` or `jnp.sign`.
        With `optax.inject_hyperparams` name it in `static_args`.
    decay, nesterov, errors: as in `scale_by_momentum`.
    Source: Behrouz et al. (2025), Nested Learning, eq. 51.
    """
    _check(decay)
    look_ahead = lambda read, u: features(u) + decay * read(u)
    return gradient_memory(
        memories.constant,
        dot_product,
        target=features,
        retain=decay,
        readout=look_ahead if nesterov else None,
    )


def feature_momentum(
    learning_rate: optax.ScalarOrSchedule,
    features: Map,
    decay: Gate = 0.9,
    *,
    nesterov: bool = False,
) -> Transformation:
    """Descent along `scale_by_feature_momentum`."""
    scaled = scale_by_feature_momentum(features, decay, nesterov=nesterov)
    return with_learning_rate(learning_rate, scaled)


def scale_by_newton_schulz(ns_steps: int = 5) -> Transformation:
    """A nonlinear read-out for any memory of gradients: matrices made nearly orthogonal.

    update = 0.2 sqrt(max(in, out)) NS(u) for each matrix u [in, out], the usual size of Adam's

    Other leaves stay as they are. Behind `scale_by_deep_momentum` it reads DMGD.

    ns_steps: of `nlx.ops.newton_schulz`, >= 0; static for `optax.inject_hyperparams`.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 42, 52.
    """

    def orthogonal(u):
        if not is_matrix(u):
            return u
        return like_adam(u) * across(lambda m: ops.newton_schulz(m, ns_steps), u)

    read = optax.stateless(lambda updates, _: jax.tree.map(orthogonal, updates))
    return optax.with_extra_args_support(read)


def scale_by_orthogonal_momentum(
    decay: Gate = 0.95, *, nesterov: bool = True, ns_steps: int = 5
) -> Transformation:
    """Momentum read out through Newton-Schulz: Muon.

    m <- decay m + u ;  update = 0.2 sqrt(max(in, out)) NS(m), or (Nesterov) of NS(u + decay m)

    The factor gives updates the size of Adam's. Leaves that aren't matrices: Adam's update,
    `scale_by_adam_memory`.

    decay: in [0, 1]. ns_steps: of `nlx.ops.newton_schulz`, >= 0; static for
        `optax.inject_hyperparams`.
    Raises ValueError for an argument out of range.
    Source: Jordan et al. (2024); Behrouz et al. (2025), Nested Learning, eqs. 42, 52. Equal to
    `optax.contrib.muon(consistent_rms=0.2, eps=0)` on matrices, save that its Nesterov form weighs
    the first steps otherwise; that one is `m3` with alpha 0.
    """
    _check(decay)
    memory = scale_by_momentum(decay, nesterov=nesterov)
    memory = optax.chain(memory, scale_by_newton_schulz(ns_steps))
    return matrices_and_others(memory, scale_by_adam_memory(), is_matrix)


def orthogonal_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: Gate = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> Transformation:
    """Descent along `scale_by_orthogonal_momentum`, at learning rates of AdamW.

    weight_decay: >= 0, decoupled; mask: of the leaves to decay, as in `optax.adamw`.
    """
    scaled = scale_by_orthogonal_momentum(decay, nesterov=nesterov, ns_steps=ns_steps)
    return with_learning_rate(learning_rate, scaled, weight_decay=weight_decay, mask=mask)


def _check(decay: Gate) -> None:
    check_range("decay", decay, 1)


def _norms(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one number for each kernel, to be multiplied with a leaf of `shape`."""
    return (*shape[:-2], *(1 for _ in shape[-2:]))


def _first(read, u):
    """What the memory of `_recalling` holds."""
    return read(jnp.zeros_like(u))[0]


def _ahead(decay: Gate, held=lambda read, u: read(u)):
    """Nesterov's read-out: as m would be if u came once more."""
    return lambda read, u: u + decay * held(read, u)


def _recalling(leaf: Any) -> Memory:
    """A value-less memory that also recalls what it holds along a gradient, u -> (m, u^T m)."""

    def read(m, u):
        if m.ndim < 2:
            return m, jnp.sqrt(jnp.sum(jnp.square(u))) * m
        u, m_whole = gathered(u), gathered(m)
        return m, u.mT @ m_whole

    return memories.constant(leaf)._replace(read=read)
