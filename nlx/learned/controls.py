# SPDX-License-Identifier: Apache-2.0
"""Rules that learn a few numbers: momentum, Adam, hypergradients, and deep momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from nlx import optim
from nlx.learned.rule import Rule
from nlx.optim.level import wide_dtype


def momentum_rule(rate: float = 1e-2, decay: float = 0.9) -> Rule:
    """Heavy ball whose two numbers are learned: the control of what more of them are worth.

    m <- sigmoid(d) m + g ;  u = -exp(r) m

    rate: > 0, decay: in (0, 1), where learning begins; theta is {"log_rate", "decay_logit"}.
    """
    start = {"log_rate": _log("rate", rate), "decay_logit": _logit("decay", decay)}

    def make(theta):
        trace = optax.trace(jax.nn.sigmoid(theta["decay_logit"]))
        return _scaled(trace, theta["log_rate"])

    return Rule(_starting(start), make)


def adam_rule(rate: float = 1e-2, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Rule:
    """Adam whose four numbers are learned.

    rate, eps: > 0, b1, b2: in (0, 1), where learning begins. theta is {"log_rate", "b1_logit",
    "b2_logit", "log_eps"}. Source: Kingma and Ba (2015), algorithm 1.
    """
    start = {
        "log_rate": _log("rate", rate),
        "b1_logit": _logit("b1", b1),
        "b2_logit": _logit("b2", b2),
        "log_eps": _log("eps", eps),
    }

    def make(theta):
        b1, b2 = (jax.nn.sigmoid(theta[name]) for name in ("b1_logit", "b2_logit"))
        # The smallest root: theta has a slope where a coordinate's gradients were all 0, as well.
        adam = optax.scale_by_adam(b1, b2, jnp.exp(theta["log_eps"]), eps_root=1e-30)
        return _scaled(adam, theta["log_rate"])

    return Rule(_starting(start), make)


class HypergradientState(NamedTuple):
    """State of `hypergradient_rule`'s transformation."""

    log_rate: Float[Array, ""]
    before: PyTree[Float[Array, "..."]]  # the gradient of the step before


def hypergradient_rule(rate: float = 1e-2, hyper: float = 0.02) -> Rule:
    """Gradient descent whose rate descends as well, by the gradient of the loss by the rate.

    log a_t = log a_{t-1} + beta cos(g_t, g_{t-1}) ;  u_t = -a_t g_t

    The loss after a step of rate a falls with a as <g_t, g_{t-1}>; here that is divided by both
    lengths and the rate moves by a share of itself, so that beta has no unit.

    rate, hyper (beta): > 0, where learning begins. theta is {"log_rate", "log_hyper"}.
    Source: Baydin et al. (2018), Online learning rate adaptation with hypergradient descent, with
    its multiplicative form.
    """
    start = {"log_rate": _log("rate", rate), "log_hyper": _log("hyper", hyper)}

    def make(theta):
        def init(params):
            zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
            rate = jnp.asarray(theta["log_rate"], jnp.float32)
            return HypergradientState(jnp.zeros((), jnp.float32) + rate, zeros)

        def update(updates, state, params=None, **extra):
            del params, extra
            wide = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
            product = optax.tree.sum(jax.tree.map(jnp.multiply, wide, state.before))
            sizes = [optax.tree.norm(tree) for tree in (wide, state.before)]
            alike = product / jnp.maximum(sizes[0] * sizes[1], 1e-30)
            log_rate = state.log_rate + jnp.exp(theta["log_hyper"]) * alike
            rate = jnp.exp(log_rate)
            moved = jax.tree.map(lambda g: (-rate * g.astype(jnp.float32)).astype(g.dtype), updates)
            return moved, HypergradientState(log_rate.astype(jnp.float32), wide)

        return optax.GradientTransformationExtraArgs(init, update)

    return Rule(_starting(start), make)


def dmgd_rule(
    rate: float = 1e-2,
    *,
    inner_lr: float = 0.1,
    retention: float = 0.999,
    decay: float = 0.9,
    hidden: int = 16,
    precondition: bool = True,
) -> Rule:
    """Deep momentum whose inner rate, retention and initial memory are learned.

    `nlx.optim.scale_by_deep_momentum(memory="coordinates")`: one map R -> R for each leaf, an MLP
    that learns to foretell the next gradient while the optimizer runs. All leaves begin with the
    one memory of theta: an optimizer that is a nested system of three levels, its averages, its
    memory, and where that begins. A leaf of one number, which has nothing to foretell, has none.

    rate, inner_lr: > 0. retention, decay: in (0, 1). hidden: units of the memory, >= 1. All but the
    last are where learning begins. precondition: as in `nlx.optim.dmgd`.
    theta is {"log_rate", "log_inner_lr", "retention_logit", "decay_logit", "memory"}, the last of
    {"layer_0": [1, h], "layer_1": [h, 1]}; the rule raises ValueError for one of another size.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 47, 50; for learned initial states section
    1.4's transfer by initialisation.
    """
    memory = optim.scale_by_deep_momentum(memory="coordinates", hidden=(hidden,))
    first_of_all: Any = memory.init(jnp.zeros(2))
    start = {
        "log_rate": _log("rate", rate),
        "log_inner_lr": _log("inner_lr", inner_lr),
        "retention_logit": _logit("retention", retention),
        "decay_logit": _logit("decay", decay),
        "memory": {f"layer_{n}": weights for n, weights in enumerate(first_of_all.phi)},
    }

    shapes = jax.tree.map(jnp.shape, start["memory"])

    def make(theta):
        if (given := jax.tree.map(jnp.shape, theta["memory"])) != shapes:
            raise ValueError(f"`theta` has a memory of {given}; it must be of {shapes}.")
        deep = optim.scale_by_deep_momentum(
            jax.nn.sigmoid(theta["decay_logit"]),
            memory="coordinates",
            hidden=(hidden,),
            inner_lr=jnp.exp(theta["log_inner_lr"]),
            retention=jax.nn.sigmoid(theta["retention_logit"]),
        )

        def begin(params):
            state: Any = deep.init(params)
            given = [theta["memory"][f"layer_{n}"] for n in range(len(state.phi))]
            same = lambda old, new: old.shape == new.shape
            put = lambda old, new: jnp.zeros_like(old) + new if same(old, new) else old
            phi = tuple(
                jax.tree.map(lambda old, new=new: put(old, new), tree)
                for tree, new in zip(state.phi, given, strict=True)
            )
            return state._replace(phi=phi)

        learned = optax.GradientTransformationExtraArgs(begin, deep.update)
        first = optim.scale_by_second_moment() if precondition else optax.identity()
        return _scaled(optax.chain(first, learned), theta["log_rate"])

    return Rule(_starting(start), make)


def _starting(start: dict[str, Any]):
    return lambda key: jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), start)


def _scaled(rule: optax.GradientTransformation, log_rate) -> optax.GradientTransformationExtraArgs:
    """-exp(log_rate) times its updates; it sees gradients in at least float32."""

    def init(params):
        return rule.init(jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), params))

    def update(updates, state, params=None, **extra):
        del params, extra
        wide = jax.tree.map(lambda g: g.astype(wide_dtype(g)), updates)
        moved, state = rule.update(wide, state)
        rate = -jnp.exp(log_rate)
        return jax.tree.map(lambda u, g: (rate * u).astype(g.dtype), moved, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _log(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"`{name}` is {value}; it must be > 0.")
    return float(jnp.log(value))


def _logit(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"`{name}` is {value}; it must be in (0, 1).")
    return float(jnp.log(value) - jnp.log1p(-value))
