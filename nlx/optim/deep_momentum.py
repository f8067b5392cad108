# SPDX-License-Identifier: Apache-2.0
"""Deep momentum: a memory of the gradients that is an MLP, learning while the optimizer runs."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from nlx import memories, objectives, writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.memories import Memory
from nlx.nest import Nest
from nlx.optim.gradient_memory import Gate, check_range, debiased, gradient_memory
from nlx.optim.level import leafwise, wide_dtype


class DeepMomentumState(NamedTuple):
    """State of `scale_by_deep_momentum`; everything in at least float32."""

    tick: Int[Array, ""]  # gradients seen
    mu: PyTree[Float[Array, "..."]]  # debiased average of the gradients, like the parameters
    scale: PyTree[Float[Array, ""]]  # debiased mean square of each leaf's gradients
    phi: tuple[PyTree[Float[Array, "..."]], ...]  # weights, layer by layer; 0 for a leaf with none


class Moment(NamedTuple):
    """One tick of a gradient stream, the context of a leaf's nest."""

    gradient: Float[Array, "..."]
    scale: Float[Array, ""]  # root mean square of the stream, > 0
    share: Float[Array, ""]  # of this gradient in the average, in (0, 1]
    ahead: Float[Array, ""]  # of the next one


def scale_by_deep_momentum(
    decay: Gate = 0.9,
    *,
    hidden: Sequence[int] = (16,),
    inner_lr: Gate = 0.1,
    retention: Gate = 1.0,
    nesterov: bool = True,
    scale_decay: Gate = 0.999,
    clip: Gate = 10.0,
) -> optax.GradientTransformationExtraArgs:
    """Momentum whose memory is an MLP that learns, online, to predict the next gradient.

    mu_t = debiased average of u ;  s_t^2 = debiased average of mean(u^2)
    phi <- retention phi - eta grad_phi 1/(2n) sum_n |m_phi(k_n) - v_n|^2
    k = mu_{t-1} / s ;  v = u_t / s
    m_phi(z) = z + tanh(z W_1) W_2 ;  eta = inner_lr / (1 + mean_n(|k_n|^2 + |tanh(k_n W_1)|^2))
    update = s m_phi(q / s) ;  q = mu_t, or (Nesterov) as mu would be if u came once more

    The n rows are the vectors along the input axis, -2 of a kernel; k and v are clipped. W_2 starts
    at zero, so the first step is plain momentum. The average is a value-less memory, the best
    constant prediction; the deep one, nested over it, predicts from an informative key. Predicting
    the gradient where the step lands tends to the implicit step u / (1 + lr curvature).
    Leaves with less than 2 axes or rows have the value-less memory alone.

    decay: of the average, in [0, 1]. hidden: channels of the hidden layers, integers >= 1; () gives
        the linear memory z + z W. inner_lr: >= 0, useful in 0.02 to 0.3; 0 gives Nesterov momentum.
    retention: in [0, 1], what the memory keeps each step. scale_decay: in [0, 1]. clip: >= 0,
        in units of s.

    Raises ValueError for any other argument. With `optax.inject_hyperparams` all numbers may vary.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 50, 52, 89; the printed objective,
    <m(u), 1>, is unbounded, so this is the predictive reading of its target.
    """
    for name, value, most in (
        ("decay", decay, 1),
        ("inner_lr", inner_lr, None),
        ("retention", retention, 1),
        ("scale_decay", scale_decay, 1),
        ("clip", clip, None),
    ):
        check_range(name, value, most)
    if isinstance(hidden, int) or any(not isinstance(n, int) or n < 1 for n in hidden):
        raise ValueError(f"`hidden` must be a sequence of integers >= 1, got {hidden!r}.")

    def nest(leaf):
        return _nest(leaf, hidden, inner_lr, retention, nesterov, clip)

    def init(param, position):
        del position
        levels, dtype = nest(param).levels, wide_dtype(param)
        key = jax.random.key(0)  # of no effect: both memories start without chance
        states = {name: level.start(level.init(key)) for name, level in levels.items()}
        absent = tuple(jnp.zeros((), dtype) for _ in (*hidden, 0))
        return _fields(states, jnp.zeros((), dtype), absent)

    def step(fields, gradient, param, tick):
        del param
        mu, square, phi = fields
        share, slow = debiased(decay), debiased(scale_decay)(tick)
        square = square + slow.astype(square.dtype) * (_mean_square(gradient) - square)
        moment = Moment(gradient, _root(square), share(tick), share(tick + 1))
        leaf_nest, weights = nest(gradient), {"average": mu, "deep": phi}
        states = leaf_nest.start({name: weights[name] for name in leaf_nest.levels})
        states, update = leaf_nest.step(states, moment)
        return _fields(states, square, phi), update

    return leafwise(DeepMomentumState, init, step)


def dmgd(
    learning_rate: optax.ScalarOrSchedule,
    decay: Gate = 0.9,
    *,
    hidden: Sequence[int] = (16,),
    inner_lr: Gate = 0.1,
    retention: Gate = 1.0,
    nesterov: bool = True,
    scale_decay: Gate = 0.999,
    clip: Gate = 10.0,
    precondition: bool = True,
    weight_decay: Gate = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Deep Momentum Gradient Descent: `scale_by_deep_momentum` on the preconditioned gradient.

    -learning_rate (deep_momentum(u / (sqrt(debiased mean of u^2) + 1e-8)) + weight_decay w)

    learning_rate: a number or a schedule. precondition: whether to divide by the root of the
        second moment (decay 0.999), which makes learning rates those of AdamW.
    weight_decay: >= 0, decoupled. mask: of the leaves to decay, as in `optax.adamw`.
    The others, and the errors: see `scale_by_deep_momentum`. State, in float32: twice the
    parameters, plus a share of 2 hidden / n for each kernel of n rows.

    Source: Behrouz et al. (2025), Nested Learning, eqs. 47, 50, 52.
    """
    deep = scale_by_deep_momentum(
        decay,
        hidden=hidden,
        inner_lr=inner_lr,
        retention=retention,
        nesterov=nesterov,
        scale_decay=scale_decay,
        clip=clip,
    )
    return optax.chain(
        _second_moment() if precondition else optax.identity(),
        deep,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _second_moment(decay: float = 0.999, eps: float = 1e-8):
    """u / (sqrt(debiased average of u^2) + eps): the preconditioner, itself a value-less memory.

    It equals `optax.scale_by_rms`, but in at least float32, and entries whose square would overflow
    count as the largest whose doesn't.
    """

    def bounded(gradient):
        most = 0.5 * jnp.sqrt(jnp.finfo(gradient.dtype).max)
        return jnp.clip(gradient, -most, most)

    return gradient_memory(
        memories.constant,
        objectives.l2,
        target=lambda gradient: jnp.square(bounded(gradient)),
        rate=debiased(decay),
        readout=lambda read, gradient: bounded(gradient) / (jnp.sqrt(read(gradient)) + eps),
    )


def _nest(like, hidden, inner_lr, retention, nesterov, clip) -> Nest:
    """The levels of one leaf: the average of its gradients and the deep memory that reads it."""
    write = writes.gated(momentum=False)
    memory = _row_memory(like, hidden) if _learns(like) else None
    average = associative_memory(memories.constant(like), objectives.l2, write, Clock(1))
    levels = {"average": average}
    if memory is not None:
        levels["deep"] = associative_memory(memory, objectives.l2, write, Clock(1))

    def forward(params, moment: Moment):
        contexts = {"average": Association((), moment.gradient, moment.share)}
        if memory is not None:
            key, value = (
                jnp.clip(_rows(x) / moment.scale, -clip, clip)
                for x in (params["average"], moment.gradient)
            )
            rate = inner_lr / _power(params["deep"], key)
            contexts["deep"] = Association(key, value, rate, jnp.asarray(retention))
        return (), contexts

    def read(working, _, moment: Moment):
        query = working["average"]
        if nesterov:
            query = query + moment.ahead * (moment.gradient - query)
        if memory is None:
            return query
        return moment.scale * _rows(memory.read(working["deep"], _rows(query) / moment.scale))

    return Nest(levels, forward, read=read)


def _row_memory(like, hidden: Sequence[int]) -> Memory:
    """A residual MLP on rows, the identity at first: its last layer starts at zero."""
    sizes = (like.shape[-2], *hidden, like.shape[-2])

    def init(key):
        del key
        shapes = zip(sizes[:-1], sizes[1:], strict=True)
        weights = [_cosines(*shape, wide_dtype(like)) for shape in shapes]
        return (*weights[:-1], jnp.zeros_like(weights[-1]))

    return memories.mlp(sizes, jnp.tanh)._replace(init=init)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _cosines(inputs: int, outputs: int, dtype) -> Float[Array, "i o"]:
    """A first layer without chance: cosines of evenly spread frequencies, orthonormal if i >= o.

    Entries have the variance 1 / i of a random layer. On noisy quadratics the two learn alike, and
    this one needs no key, is the same everywhere, and compiles several times faster.
    """
    longest = max(inputs, outputs)
    place = jnp.arange(inputs, dtype=dtype)[:, None] + 0.5
    frequency = (jnp.arange(outputs) * longest // outputs).astype(dtype)[None, :] + 0.5
    return jnp.sqrt(2 / inputs).astype(dtype) * jnp.cos(jnp.pi / longest * place * frequency)


def _fields(states, square, absent):
    """A leaf's fields of `DeepMomentumState`: with period 1 the working weights are the state."""
    weights = {name: state.carry.weights for name, state in states.items()}
    return weights["average"], square, weights.get("deep", absent)


def _learns(leaf) -> bool:
    """Whether a leaf has rows enough: one row can't teach a map of rows."""
    return leaf.ndim >= 2 and leaf.shape[-2] > 0 and leaf.size >= 2 * leaf.shape[-2]


def _rows(x: Float[Array, "... i o"]) -> Float[Array, "... o i"]:
    return jnp.moveaxis(x, -2, -1)


def _power(weights, key: Float[Array, "... o i"]) -> Float[Array, ""]:
    """n (1 + the mean over the n rows of the squared inputs of all layers)."""
    total = jnp.asarray(key.size // key.shape[-1], key.dtype)
    for i, weight in enumerate(weights):
        total += jnp.sum(jnp.square(key))
        key = jnp.tanh(key @ weight) if i < len(weights) - 1 else key
    return total


def _mean_square(gradient: Float[Array, "..."]) -> Float[Array, ""]:
    """Of all entries, at most the largest finite number; 0 of none."""
    mean = jnp.sum(jnp.square(gradient)) / max(gradient.size, 1)
    return jnp.minimum(mean, jnp.finfo(gradient.dtype).max)


def _root(square: Float[Array, ""]) -> Float[Array, ""]:
    """The scale of a stream, 1 where its mean square is not a normal number."""
    return jnp.sqrt(jnp.where(square >= jnp.finfo(square.dtype).tiny, square, 1))
