# SPDX-License-Identifier: Apache-2.0
"""Writes: what a gradient does on each tick, and what happens at a firing."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from nlx import ops


class Write(NamedTuple):
    """How a level turns gradients, taken at its visible parameters, into new parameters.

    init(params) -> carry
    tick(params, carry, gradient, context) -> carry: one tick; params stay frozen.
    fire(params, carry) -> (params, carry): the parameters that others see from now on.
    block(params, carry, pull, contexts, mask) -> carry: equal to `tick` over the ticks of a block
        that mask [t] selects; contexts carry a leading tick axis; pull(w) = sum_t w_t gradient_t is
        one backward pass. None: the ticks are looped over.
    view(params, carry) -> working parameters, as `read="after_write"` sees them. None: params.
    """

    init: Callable[[Any], Any]
    tick: Callable[[Any, Any, Any, Any], Any]
    fire: Callable[[Any, Any], tuple[Any, Any]]
    block: Callable[[Any, Any, Callable[[Float[Array, " t"]], Any], Any, Any], Any] | None = None
    view: Callable[[Any, Any], Any] | None = None


class Pending(NamedTuple):
    """Carry of `summed`."""

    total: PyTree[Array]  # sum of the gradients since the last firing
    ticks: Int[Array, ""]  # how many
    rule: PyTree  # state of the optax rule


class Restarted(NamedTuple):
    """Carry of `restarted`."""

    carry: Any  # of the write inside
    firings: Int[Array, ""]  # since it last began anew


class Working(NamedTuple):
    """Carry of `gated`."""

    weights: PyTree[Array]  # the weights as written so far; published at a firing
    momentum: PyTree[Array] | None  # P, or None where the write has no momentum


def summed(rule: optax.GradientTransformation, reduce: Literal["mean", "sum"] = "mean") -> Write:
    """Collects gradients g_t and at a firing gives their mean or sum to an optax rule.

    W <- W + rule(reduce_t g_t), over the ticks t since the last firing.

    rule: any optax transformation; the sign of its updates is optax's (added to W).
    reduce: "mean" (as `optax.MultiSteps`) or "sum". Raises ValueError otherwise.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 8, 9 (gradient descent, each tick),
    71 (there the sum).
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'`reduce` must be "mean" or "sum", got {reduce!r}.')

    def init(params):
        zeros = jax.tree.map(
            lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params
        )
        return Pending(zeros, jnp.zeros((), jnp.int32), rule.init(params))

    def tick(params, carry: Pending, gradient, context):
        del params, context
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), carry.total, gradient)
        return carry._replace(total=total, ticks=carry.ticks + 1)

    def block(params, carry: Pending, pull, contexts, mask: Bool[Array, " t"]):
        del params, contexts
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), carry.total, pull(mask))
        return carry._replace(total=total, ticks=carry.ticks + jnp.sum(mask, dtype=jnp.int32))

    def fire(params, carry: Pending):
        gradient = carry.total
        if reduce == "mean":
            gradient = jax.tree.map(lambda g: g / jnp.maximum(carry.ticks, 1), gradient)
        updates, state = rule.update(_like(gradient, params), carry.rule, params)
        total, ticks = jax.tree.map(jnp.zeros_like, (carry.total, carry.ticks))
        return optax.apply_updates(params, updates), Pending(total, ticks, state)

    return Write(init, tick, fire, block)


def fast(rate: float, momentum: float | None = None, decay: float = 0.0) -> Write:
    """Collects gradients g_t and at a firing descends along their mean: `nlx.ops.fast_update`.

    P <- momentum P + mean_t g_t ;  W <- W - rate (P + decay W), over the ticks since the last one.

    rate: learning rate, >= 0. momentum: share of P kept, in [0, 1]; None: no P. decay: >= 0.
    It is `summed` with heavy ball and decay as its rule. Its carry is an `nlx.ops.FastCarry`.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 33, 71.
    """

    def update(params, carry, gradient, ticks, fires):
        row = lambda tree: jax.tree.map(lambda x: x[None], tree)
        after = ops.fast_update(
            row(params), row(carry), row(gradient), ticks=ticks, fires=fires,
            rate=rate, momentum=momentum, decay=decay,
        )  # fmt: skip
        return jax.tree.map(lambda x: x[0], after)

    def init(params):
        return update(params, None, jax.tree.map(jnp.zeros_like, params), 0, False)[1]

    def tick(params, carry, gradient, context):
        del context
        return update(params, carry, gradient, 1, False)[1]

    def block(params, carry, pull, contexts, mask: Bool[Array, " t"]):
        del contexts
        return update(params, carry, pull(mask), jnp.sum(mask, dtype=jnp.int32), False)[1]

    def fire(params, carry):
        return update(params, carry, jax.tree.map(jnp.zeros_like, params), 0, True)

    return Write(init, tick, fire, block)


def restarted(write: Write, firings: int, origin: Callable[[Any], Any] | None = None) -> Write:
    """A write that begins anew at every so manieth firing: the slower context has ended.

    W <- origin(W) with a fresh carry at every `firings`-th firing, else as `write` has it.

    write: the write inside. firings: integer >= 1; raises ValueError otherwise.
    origin: where W begins anew; None: 0, for levels whose W is what they add to an initial state
        that a slower level learns.
    Source: Behrouz et al. (2025), Nested Learning, eq. 72: after ceil(C_s / C_{s+1}) steps.
    """
    if not isinstance(firings, int) or isinstance(firings, bool) or firings < 1:
        raise ValueError(f"`firings` must be an integer >= 1, got {firings!r}.")
    block, view = write.block, write.view
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)

    def init(params):
        return Restarted(write.init(params), jnp.zeros((), jnp.int32))

    def tick(params, carry: Restarted, gradient, context):
        return carry._replace(carry=write.tick(params, carry.carry, gradient, context))

    def fire(params, carry: Restarted):
        params, inner = write.fire(params, carry.carry)
        count = (carry.firings + 1) % firings
        anew = (zeros if origin is None else origin)(params), write.init(zeros(params))
        params, inner = jax.tree.map(
            lambda a, b: jnp.where(count == 0, a, b), anew, (params, inner)
        )
        return params, Restarted(inner, count)

    def in_block(params, carry: Restarted, pull, contexts, mask):
        assert block is not None
        return carry._replace(carry=block(params, carry.carry, pull, contexts, mask))

    def working(params, carry: Restarted):
        assert view is not None
        return view(params, carry.carry)

    return Write(init, tick, fire, block and in_block, view and working)


def gated(
    erase: Callable[[Any, Any], Any] | None = None,
    momentum: bool = True,
    clip: float | None = None,
    bound: float | None = None,
) -> Write:
    """Writes every tick into working weights, with gates, and publishes them at a firing.

    P_t = momentum_t P_{t-1} - rate_t g_t ;  W_t = (retain_t I - erase_t z_t z_t^T) W_{t-1} + P_t

    per weight matrix [in, out]; the gradient g_t and the direction z_t [in] are those of the
    visible parameters, frozen since the last firing. Gates are scalars of the tick's `Association`.

    erase: (params, key) -> the directions z in the structure of params, as `Memory.inputs`.
    momentum: whether to keep P; without it W_t gets -rate_t g_t.
    clip: if given, > 0: each matrix's g_t is scaled down to this Frobenius norm.
    bound: if given, > 0: at a firing each matrix is scaled down to this Frobenius norm, in the
        working and in the published weights.

    Raises ValueError for other bounds, where an association gates what this write lacks, and for
    gates that are not one number of at least float32 for each tick.
    Source: Behrouz et al. (2024), Titans, eqs. 13-14; (2025), Nested Learning, eqs. 57, 88.
    """
    for name, limit in (("clip", clip), ("bound", bound)):
        if limit is not None and not limit > 0:
            raise ValueError(f"`{name}` must be None or > 0, got {limit!r}.")

    def init(params):
        weights = _wide(params)
        return Working(weights, jax.tree.map(jnp.zeros_like, weights) if momentum else None)

    def tick(params, carry: Working, gradient, context):
        rate, retain, decay, strength = _gates(context, erase is not None, momentum, ())
        gradient = jax.tree.map(lambda g: _limit(g, clip), gradient)
        step = jax.tree.map(lambda g: -g if rate is None else -rate * g, gradient)
        if momentum and decay is not None:
            step = jax.tree.map(lambda p, s: decay * p + s, carry.momentum, step)
        kept = carry.weights
        if retain is not None:
            kept = jax.tree.map(lambda w: retain * w, kept)
        if erase is not None and strength is not None:
            directions = erase(params, context.key)
            kept = jax.tree.map(
                lambda k, z, w: k - strength * jnp.outer(z, z @ w), kept, directions, carry.weights
            )
        weights = jax.tree.map(lambda k, s, w: (k + s).astype(w.dtype), kept, step, carry.weights)
        return Working(weights, _like(step, carry.momentum) if momentum else None)

    def block(params, carry: Working, pull, contexts, mask: Bool[Array, " t"]):
        del params
        rate, retain, decay, _ = _gates(contexts, False, momentum, mask.shape)
        kept, carried, shares, decayed, left = _coefficients(mask, rate, retain, decay, momentum)
        weights = jax.tree.map(lambda w, g: kept * w - g, carry.weights, pull(shares))
        if not momentum:
            return Working(_like(weights, carry.weights), None)
        weights = jax.tree.map(lambda w, p: w + carried * p, weights, carry.momentum)
        steps = jax.tree.map(lambda p, g: decayed * p - g, carry.momentum, pull(left))
        return Working(_like(weights, carry.weights), _like(steps, carry.momentum))

    def fire(params, carry: Working):
        weights = jax.tree.map(lambda w: _limit(w, bound), carry.weights)
        return _like(weights, params), carry._replace(weights=weights)

    closed = erase is None and clip is None
    return Write(init, tick, fire, block if closed else None, lambda params, carry: carry.weights)


def fire_if(write: Write, firing: bool | Bool[Array, ""], params: Any, carry: Any):
    """`write.fire` where `firing`, else params and carry as they are; a Python bool costs nothing.

    firing: a Python bool, or a scalar that may be traced.
    """
    if isinstance(firing, bool):
        return write.fire(params, carry) if firing else (params, carry)
    return jax.lax.cond(firing, write.fire, lambda p, c: (p, c), params, carry)


def _gates(context: Any, erases: bool, momentum: bool, shape: tuple[int, ...]):
    """The gates of a context, None where neutral; refuses what the write would take wrongly."""
    names = ("rate", "retain", "momentum", "erase")
    gates = [getattr(context, name, None) for name in names]
    for name, gate in zip(names, gates, strict=True):
        if gate is None:
            continue
        if jnp.shape(gate) != shape:
            raise ValueError(
                f"`{name}` of an association has shape {jnp.shape(gate)}; it must be {shape}: one "
                "number for each tick."
            )
        dtype = jnp.result_type(gate)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"`{name}` of an association has dtype {dtype}; it must be at least float32: "
                "bfloat16 turns a retention of 0.9985 into 1."
            )
    if gates[2] is not None and not momentum:
        raise ValueError("`momentum` is gated by an association whose write has momentum=False.")
    if gates[3] is not None and not erases:
        raise ValueError("`erase` is gated by an association whose write was given no `erase`.")
    return gates


def _coefficients(mask, rate, retain, decay, momentum):
    """What W_0, P_0 and each g_t contribute to W and to P at the end of a block, masked ticks out.

    With s_t = prod_{i>t} retain_i and u_t = s_t + decay_{t+1} u_{t+1}:
        W = s_0 W_0 + decay_1 u_1 P_0 - sum_t u_t rate_t g_t
    and with n_t = prod_{i>t} decay_i likewise P = n_0 P_0 - sum_t n_t rate_t g_t.
    A masked tick keeps W and P, which no gate value does: it adds no s_t to u_t.
    """
    one = jnp.ones(mask.shape)
    rate = jnp.where(mask, one if rate is None else rate, 0)
    retain = jnp.where(mask, one if retain is None else retain, 1)
    whole, after = _products(retain)
    if not momentum:
        return whole, 0.0, after * rate, 0.0, 0.0
    decay = jnp.where(mask, 0 * one if decay is None else decay, 1)
    ahead = jnp.concatenate([decay[1:], jnp.zeros_like(decay[:1])])
    _, reach = jax.lax.associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]),
        (ahead, jnp.where(mask, after, 0)),
        reverse=True,
    )
    decayed, left = _products(decay)
    return whole, decay[0] * reach[0], reach * rate, decayed, left * rate


def _products(gate: Float[Array, " t"]) -> tuple[Float[Array, ""], Float[Array, " t"]]:
    """The product of all gates, and for each tick that of all later ones; exact with zeros."""
    products = jax.lax.cumprod(gate, reverse=True)
    return products[0], jnp.concatenate([products[1:], jnp.ones_like(products[:1])])


def _limit(x: Float[Array, "..."], limit: float | None) -> Float[Array, "..."]:
    """x scaled down to Frobenius norm `limit` where it is longer; smooth at 0. None: x."""
    if limit is None:
        return x
    square = jnp.sum(jnp.square(x))
    longer = square > limit**2
    scale = jnp.where(longer, limit * jax.lax.rsqrt(jnp.where(longer, square, 1)), 1)
    return (x * scale).astype(x.dtype)


def _wide(params: PyTree[Array]) -> PyTree[Array]:
    """Parameters in at least float32: in bfloat16 a retain of 0.9985 is 1 and forgets nothing."""
    return jax.tree.map(lambda p: jnp.array(p, _wide_dtype(p)), params)


def _wide_dtype(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
