# SPDX-License-Identifier: Apache-2.0
"""Delta gradient descent: weights as an L2 memory of their layer's inputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nlx.clock import Clock
from nlx.level import Level
from nlx.optim.alias import with_learning_rate
from nlx.optim.gradient_memory import Gate, check_range
from nlx.optim.level import increment, wide_dtype
from nlx.optim.matrices import across, gathered
from nlx.writes import Write


class DGDState(NamedTuple):
    """State of `scale_by_dgd`."""

    tick: Int[Array, ""]  # gradients seen


def scale_by_dgd(
    learning_rate: optax.ScalarOrSchedule, *, gamma: Gate = 3e-3
) -> optax.GradientTransformationExtraArgs:
    """Delta gradient descent: before it steps, a weight forgets along its layer's inputs x.

    W+ = argmin_W mean_n (gamma/2 ||x_n W||^2 + <x_n W, d_n>) + 1/(2 eta) ||W - W_t||^2
       = (I + eta gamma C)^-1 (W - eta G) ;  C = mean_n x_n x_n^T ;  G = mean_n x_n^T d_n
    update = (W - W+) / eta

    For one x and gamma 1 it is W - e (x x^T W + G) with e = eta / (1 + eta ||x||^2), at any norm of
    x (the printed rate, eta / (1 + eta), is that of norm 1); for a batch it is exact.

    `update` needs the weights, and C: tx.update(G, state, W, input_gram=C), in W's structure: for
    each kernel [in, out] its C [in, in], at least float32, from `tap` and `input_taps` (or
    `tap_inputs` and `split_taps` of a Flax NNX model); a scalar c acts as c I: 0 where nothing is
    forgotten, 1 for a bias.

    learning_rate: eta, >= 0, a number or a schedule, the same that scales the update.
    gamma: >= 0, how much is forgotten. With 1, as in the paper, training ends elsewhere, where
        G = -C W, however small the rate; so the default is small. 0 is gradient descent. It pays
        where tasks change (1e-3 to 3e-3 with permuted labels), not where they don't.

    Raises ValueError for a gamma out of range, and where `update` lacks parameters or input_gram.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 54-57; appendix C prints other signs.
    """
    check_range("gamma", gamma)

    def level(like, eta) -> Level:
        return _level(like, eta, jnp.asarray(gamma, wide_dtype(like)))

    def update_fn(updates, state, params=None, *, input_gram=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("`params` must be the weights, of which DGD forgets a part; got None.")
        if input_gram is None:
            raise ValueError(
                "`input_gram` must be the Gram matrices of the layers' inputs, from `tap` and "
                "`input_taps`: tx.update(gradients, state, params, input_gram=...); got None."
            )
        eta = learning_rate(state.tick) if callable(learning_rate) else learning_rate
        step = lambda g, w, c: g if _absent(g) else _step(g, w, c, eta, level)
        moved = jax.tree.map(step, updates, params, input_gram, is_leaf=_absent)
        return moved, DGDState(increment(state.tick))

    return optax.GradientTransformationExtraArgs(
        lambda params: DGDState(jnp.zeros((), jnp.int32)), update_fn
    )


def dgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: Gate = 3e-3,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """W <- W+ of `scale_by_dgd`, less decoupled weight decay as in `optax.adamw`.

    Where gradients are accumulated over several batches, C must be their mean too, and
    `optax.MultiSteps` passes none on, `on_clock` that of its last step: accumulate in the loss.
    """
    scaled = scale_by_dgd(learning_rate, gamma=gamma)
    return with_learning_rate(learning_rate, scaled, weight_decay=weight_decay, mask=mask)


def _absent(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


class Delta(NamedTuple):
    """One tick's context of a weight that learns by DGD."""

    gradient: Float[Array, "..."]  # G
    weight: Float[Array, "..."]  # W
    gram: Float[Array, "..."]  # C, or a scalar


def _step(gradient, weight, gram, eta, level):
    """The update of one leaf, in its dtype."""
    if gram.ndim not in (0, 2) or (gram.ndim == 2 and gram.shape != (weight.shape[0],) * 2):
        raise ValueError(
            f"`input_gram` must have a scalar or [in, in] for a parameter of shape {weight.shape}, "
            f"got {gram.shape}."
        )
    dtype = wide_dtype(gradient)
    g, w, c, eta = (jnp.asarray(x, dtype) for x in (gradient, weight, gram, eta))
    one = level(w, eta)
    state = one.start(jnp.zeros_like(w))
    return -one.step(state, Delta(g, w, c)).params.astype(gradient.dtype)


def _level(like, eta, gamma) -> Level:
    """The step of a weight, in units of eta, as a level: one implicit step on its objective.

    D <- D - (I + eta gamma C)^-1 (G + gamma C W) from D = 0: (W+ - W) / eta without cancellation.
    """

    def dot_product_and_norm(step, delta: Delta):
        moved = gathered(delta.weight + step)
        forgotten = 0.5 * jnp.sum(moved * _times(gathered(delta.gram), moved))
        return jnp.sum(step * delta.gradient) + gamma * forgotten

    write = _implicit(eta, gamma)
    return Level(lambda key: jnp.zeros_like(like), dot_product_and_norm, write, Clock(1))


def _implicit(eta, gamma) -> Write:
    """D <- D - (I + eta gamma C)^-1 g."""

    def tick(params, carry, gradient, delta: Delta):
        del params
        return carry - across(lambda g: _solve(eta * gamma, gathered(delta.gram), g), gradient)

    return Write(lambda params: params, tick, lambda params, carry: (carry, carry))


def _times(gram, x):
    return gram * x if gram.ndim == 0 else gram @ x


def _solve(rate, gram, right):
    """(I + rate C)^-1 right."""
    if gram.ndim == 0:
        return right / (1 + rate * gram)
    system = jnp.eye(len(gram), dtype=gram.dtype) + rate * gram
    return jax.scipy.linalg.solve(system, right, assume_a="pos")
