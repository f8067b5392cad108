# SPDX-License-Identifier: Apache-2.0
"""Deep momentum: a memory of the gradients that is an MLP, learning while the optimizer runs."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from nlx import memories, objectives, writes
from nlx.clock import Clock
from nlx.level import Association, associative_memory
from nlx.memories import Memory
from nlx.nest import Nest
from nlx.optim.alias import with_learning_rate
from nlx.optim.averages import Share, average, stored
from nlx.optim.gradient_memory import Gate, check_range, debiased, wide
from nlx.optim.level import leafwise, wide_dtype
from nlx.optim.matrices import gathered, split_like
from nlx.optim.momentum import scale_by_second_moment

Form = Literal["rows", "coordinates"]
Storing = Literal["predictive", "l2", "dot"]


class DeepMomentumState(NamedTuple):
    """State of `scale_by_deep_momentum`; everything in at least float32."""

    tick: Int[Array, ""]  # gradients seen
    mu: PyTree[Float[Array, "..."]]  # debiased average of the gradients, like the parameters
    scale: PyTree[Float[Array, ""]]  # debiased mean square of each leaf's gradients
    phi: tuple[PyTree[Float[Array, "..."]], ...]  # weights, layer by layer; 0 for a leaf with none


class Deep(NamedTuple):
    """What a deep memory is and what it stores; fields as in `scale_by_deep_momentum`."""

    memory: Form
    objective: Storing
    hidden: Sequence[int]
    inner_lr: Gate
    retention: Gate
    nesterov: bool
    clip: Gate


class Moment(NamedTuple):
    """One tick of a gradient stream, the context of a leaf's nest."""

    gradient: Float[Array, "..."]
    scale: Float[Array, ""]  # root mean square of the stream, > 0
    share: Float[Array, ""]  # of this gradient in the average, in (0, 1]
    ahead: Float[Array, ""]  # of the next one


def scale_by_deep_momentum(
    decay: Gate = 0.9,
    *,
    memory: Form = "rows",
    objective: Storing = "predictive",
    hidden: Sequence[int] = (16,),
    inner_lr: Gate = 0.1,
    retention: Gate = 1.0,
    nesterov: bool = True,
    scale_decay: Gate = 0.999,
    clip: Gate = 10.0,
    robust: Gate | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum whose memory is an MLP that learns, online, from the stream of gradients u.

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

    memory: "rows", or "coordinates": one map R -> R for all entries of a leaf, of any axes.
    objective: "predictive", as above; or the printed eq. 50 with u under itself, without z + :
        "l2": k = v = u / s, the memory learns what subspace the gradients are in and filters q;
        "dot", the printed example to the letter: least <m_phi(u), 1>, eta = inner_lr, no scale, no
        average, update = -m_phi(u). It is unbounded below and, as a rule, diverges.
    decay: of the average, in [0, 1]. hidden: channels of the hidden layers, integers >= 1; () gives
        the linear memory z + z W. inner_lr: >= 0, useful in 0.02 to 0.3; 0 gives Nesterov momentum.
    retention: in [0, 1], what the memory keeps each step. scale_decay: in [0, 1]. clip: >= 0,
        in units of s.
    robust: >= 1; both memories store a row of u that is longer than `robust` times the root mean
        square of rows so far (so shortened themselves) as if it were just that long, as Huber's
        objective does. For gradients with outliers: 1.5. None: as they are.

    Raises ValueError for any other argument. With `optax.inject_hyperparams` all numbers may vary.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 50, 52, 89; only a target made of u gives
    descent from every start, and only a key that isn't u itself leaves something to learn.
    """
    for name, value, most in (
        ("decay", decay, 1),
        ("inner_lr", inner_lr, None),
        ("retention", retention, 1),
        ("scale_decay", scale_decay, 1),
        ("clip", clip, None),
    ):
        check_range(name, value, most)
    if isinstance(robust, int | float) and not robust >= 1:
        raise ValueError(f"`robust` must be >= 1 or None, got {robust!r}.")
    if isinstance(hidden, int) or any(not isinstance(n, int) or n < 1 for n in hidden):
        raise ValueError(f"`hidden` must be a sequence of integers >= 1, got {hidden!r}.")
    for name, value, names in (("memory", memory, Form), ("objective", objective, Storing)):
        if value not in get_args(names):
            options = ", ".join(f'"{option}"' for option in get_args(names))
            raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")
    deep = Deep(memory, objective, hidden, inner_lr, retention, nesterov, clip)

    def nest(leaf):
        return _nest(leaf, deep)

    def context(gradient, scale, tick) -> Moment:
        share = debiased(decay)
        return Moment(gradient, scale, share(tick), share(tick + 1))

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
        if robust is not None:
            gradient = _shortened(gradient, square, robust, memory, tick)
        size, slow = average(square), debiased(scale_decay)(tick).astype(square.dtype)
        taken = stored(_mean_square(gradient), Share(slow, 1 - slow))
        square = size.step(size.start(square), taken).params
        moment = context(gradient, _root(square), tick)
        leaf_nest, weights = nest(gradient), {"average": mu, "deep": phi}
        states = leaf_nest.start({name: weights[name] for name in leaf_nest.levels})
        states, update = leaf_nest.step(states, moment)
        return _fields(states, square, phi), update

    return leafwise(DeepMomentumState, init, step)


def dmgd(
    learning_rate: optax.ScalarOrSchedule,
    decay: Gate = 0.9,
    *,
    memory: Form = "rows",
    objective: Storing = "predictive",
    hidden: Sequence[int] = (16,),
    inner_lr: Gate = 0.1,
    retention: Gate = 1.0,
    nesterov: bool = True,
    scale_decay: Gate = 0.999,
    clip: Gate = 10.0,
    robust: Gate | None = None,
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
        memory=memory,
        objective=objective,
        hidden=hidden,
        inner_lr=inner_lr,
        retention=retention,
        nesterov=nesterov,
        scale_decay=scale_decay,
        clip=clip,
        robust=robust,
    )
    first = scale_by_second_moment() if precondition else optax.identity()
    return with_learning_rate(learning_rate, first, deep, weight_decay=weight_decay, mask=mask)


def _nest(like, deep: Deep) -> Nest:
    """The levels of one leaf: the average of its gradients and the deep memory that reads it."""
    write = writes.gated(momentum=False)
    memory = _deep_memory(like, deep) if _learns(like, deep.memory) else None
    slow = associative_memory(memories.constant(like), objectives.l2, write, Clock(1))
    turned, entries = (_rows, _rows) if deep.memory == "rows" else (_singles, _single)
    vectors = lambda x: turned(gathered(x))
    levels = {"average": slow}
    if memory is not None:
        storing = _printed if deep.objective == "dot" else objectives.l2
        levels["deep"] = associative_memory(memory, storing, write, Clock(1))

    def association(params, moment: Moment) -> Association:
        retain = wide(deep.retention)
        if deep.objective == "dot":
            key = vectors(moment.gradient)
            return Association(key, jnp.ones_like(key), wide(deep.inner_lr), retain)
        source = params["average"] if deep.objective == "predictive" else moment.gradient
        key, value = (
            jnp.clip(vectors(x) / moment.scale, -deep.clip, deep.clip)
            for x in (source, moment.gradient)
        )
        return Association(key, value, deep.inner_lr / _power(_whole(params["deep"]), key), retain)

    def forward(params, moment: Moment):
        contexts = {"average": Association((), moment.gradient, moment.share)}
        if memory is not None:
            contexts["deep"] = association(params, moment)
        return (), contexts

    def read(working, _, moment: Moment):
        if memory is not None and deep.objective == "dot":
            recalled = memory.read(working["deep"], vectors(moment.gradient))
            return -split_like(entries(recalled), moment.gradient)
        query = working["average"]
        if deep.nesterov:
            query = query + moment.ahead * (moment.gradient - query)
        if memory is None:
            return query
        recalled = memory.read(working["deep"], vectors(query) / moment.scale)
        return moment.scale * split_like(entries(recalled), moment.gradient)

    return Nest(levels, forward, read=read)


def _printed(output, value) -> Float[Array, ""]:
    """<m(u), 1>: the objective of eq. 50's example."""
    return -objectives.dot_product(output, value)


def _deep_memory(like, deep: Deep) -> Memory:
    """An MLP on rows or entries whose last layer starts at zero; predicting, it is residual."""
    width = like.shape[-2] if deep.memory == "rows" else 1
    sizes = (width, *deep.hidden, width)

    def init(key):
        del key
        shapes = zip(sizes[:-1], sizes[1:], strict=True)
        weights = [_cosines(*shape, wide_dtype(like)) for shape in shapes]
        return (*weights[:-1], jnp.zeros_like(weights[-1]))

    memory = memories.mlp(sizes, jnp.tanh, residual=deep.objective == "predictive")
    read = lambda params, key: memory.read(_whole(params), key)
    return memory._replace(init=init, read=read)


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


def _whole(weights):
    return jax.tree.map(gathered, weights)


def _learns(leaf, memory: Form) -> bool:
    """Whether a leaf has vectors enough: one can't teach a map."""
    if memory == "coordinates":
        return leaf.size >= 2
    return leaf.ndim >= 2 and leaf.shape[-2] > 0 and leaf.size >= 2 * leaf.shape[-2]


def _rows(x: Float[Array, "... i o"]) -> Float[Array, "... o i"]:
    return jnp.moveaxis(x, -2, -1)


def _singles(x: Float[Array, "..."]) -> Float[Array, "... 1"]:
    return x[..., None]


def _single(x: Float[Array, "... 1"]) -> Float[Array, "..."]:
    return x[..., 0]


def _power(weights, key: Float[Array, "... o i"]) -> Float[Array, ""]:
    """n (1 + the mean over the n rows of the squared inputs of all layers)."""
    total = jnp.asarray(key.size // key.shape[-1], key.dtype)
    for i, weight in enumerate(weights):
        total += jnp.sum(jnp.square(key))
        key = jnp.tanh(key @ weight) if i < len(weights) - 1 else key
    return total


def _mean_square(gradient: Float[Array, "..."]) -> Float[Array, ""]:
    """Of all entries, at most half the largest finite number; 0 of none."""
    mean = jnp.sum(jnp.square(gradient)) / max(gradient.size, 1)
    return jnp.minimum(mean, jnp.finfo(gradient.dtype).max / 2)


def _shortened(gradient, square, robust, memory: Form, tick) -> Float[Array, "..."]:
    """Rows of mean square above robust^2 `square` scaled down to it; at first, the median's."""
    rows = _rows(gradient) if memory == "rows" and gradient.ndim >= 2 else gradient[..., None]
    size = jnp.mean(jnp.square(rows), -1, keepdims=True)
    size = jnp.minimum(size, jnp.finfo(size.dtype).max)
    if gradient.size == 0:
        return gradient
    usual = jnp.where(tick == 0, jnp.median(gathered(size)), square)
    most = jnp.square(robust).astype(size.dtype) * usual
    rows = rows * jnp.sqrt(jnp.where(size > most, most / jnp.where(size > 0, size, 1), 1))
    return _rows(rows) if memory == "rows" and gradient.ndim >= 2 else rows[..., 0]


def _root(square: Float[Array, ""]) -> Float[Array, ""]:
    """The scale of a stream, 1 where its mean square is not a normal number."""
    return jnp.sqrt(jnp.where(square >= jnp.finfo(square.dtype).tiny, square, 1))
