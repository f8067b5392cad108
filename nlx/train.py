# SPDX-License-Identifier: Apache-2.0
"""One step of training, pure and ready for jit."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

Loss = Callable[[Any, Any], Float[Array, ""]]
Metrics = dict[str, Float[Array, ""]]
RECENT, ENOUGH = 64, 16  # gradient norms that a spike is told by, and the fewest it takes


class TrainState(NamedTuple):
    """All that training carries from step to step, arrays only."""

    step: Int[Array, ""]  # steps taken, skipped ones included
    params: PyTree[Array]  # as `nnx.split(model)[1]`
    opt_state: PyTree[Array]
    skipped: Int[Array, ""]  # steps that changed nothing: not finite, or a spike
    recent: Float[Array, " n"]  # gradient norms of the last steps taken, newest last; NaN: none yet


def init_train_state(params: PyTree[Array], tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    recent = jnp.full(RECENT, jnp.nan, jnp.float32)
    return TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0), recent)


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    labels: PyTree[str] | None = None,
    *,
    accumulate: int = 1,
    weigh: Loss | None = None,
    spike: float | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (state, metrics) of one step: theta <- theta + tx(grad loss).

    Pure: compile it as `jax.jit(step, donate_argnums=0)`. Where the loss or a gradient is not
    finite, or the gradient's norm is above `spike` times the median of the last RECENT that were
    taken, parameters and the optimizer's memories stay as they were, bit by bit, and the step is
    counted in `skipped`.

    Args:
      loss: (params, batch) -> scalar, such as `language_model_loss`.
      tx: any optax transformation.
      labels: the level of each parameter, as `nlx.nn.labels_by_level`; None: all are "outer".
      accumulate: parts of a batch that are computed one after the other, in less memory, >= 1; it
        must divide the batch's rows. loss and gradient are the means of the parts'.
      weigh: (params, part) -> what a part counts, where its loss is a mean over another number of
        things than the other parts' are: `scored`, for `language_model_loss`. None: all the same.
      spike: > 1; None: no step is skipped for its size. From step ENOUGH on.

    Returns:
      The step; its metrics are scalars: "loss", "gradient_norm" (before `tx`), "skipped" and
      "spiked" (1 or 0), and for each level, Euclidean: "gradient_norm/<label>",
      "update_norm/<label>", how far it moved, and "parameter_norm/<label>", where it stands then.

    Raises ValueError for `accumulate` below 1 or `spike` that is not above 1; the step, where
    `accumulate` doesn't divide the rows.
    """
    if spike is not None and not spike > 1:
        raise ValueError(f"`spike` is {spike}; it must be above 1, or None.")
    if accumulate < 1:
        raise ValueError(f"`accumulate` is {accumulate}; it must be an integer >= 1.")
    slopes = jax.value_and_grad(loss)
    slopes = slopes if accumulate == 1 else _in_parts(slopes, accumulate, weigh)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        value, gradients = slopes(state.params, batch)
        norm = _norm(jax.tree.leaves(gradients))
        taken = jnp.isfinite(value) & jnp.isfinite(norm)
        spiked = (
            jnp.zeros((), bool) if spike is None else taken & _spiked(norm, state.recent, spike)
        )
        taken &= ~spiked
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        after = (optax.apply_updates(state.params, updates), opt_state)
        before = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(taken, a, b), after, before)
        skipped = (~taken).astype(jnp.int32)
        metrics = {"loss": value, "gradient_norm": norm, "skipped": skipped}
        metrics["spiked"] = spiked.astype(jnp.int32)
        for label, leaves in _by_label(updates, labels).items():
            metrics[f"update_norm/{label}"] = jnp.where(taken, _norm(leaves), 0)
        for name, tree in (("gradient", gradients), ("parameter", params)):
            for label, leaves in _by_label(tree, labels).items():
                metrics[f"{name}_norm/{label}"] = _norm(leaves)
        newest = jnp.append(state.recent[1:], norm.astype(state.recent.dtype))
        recent = jnp.where(taken, newest, state.recent)
        counted = state.skipped + skipped
        return TrainState(state.step + 1, params, opt_state, counted, recent), metrics

    return step


def _in_parts(slopes: Callable, count: int, weigh: Loss | None) -> Callable:
    """slopes(params, batch) as the weighted mean over `count` parts of the batch, in turn.

    Part n is of rows n, n + count, ...: where devices share the rows, each has some of every part.
    """

    def part(x: Array) -> Array:
        if x.shape[0] % count:
            raise ValueError(
                f"`accumulate` is {count}; it must be a divisor of the batch's {x.shape[0]} rows."
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    def run(params: Any, batch: Any) -> Any:
        def add(total: Any, some: Any) -> tuple[Any, None]:
            made = slopes(params, some)
            weight = jnp.float32(1) if weigh is None else weigh(params, some)
            sums, weights = total
            wide = lambda a, x: a + weight.astype(a.dtype) * x.astype(a.dtype)
            return (jax.tree.map(wide, sums, made), weights + weight), None

        parts = jax.tree.map(part, batch)
        shapes = jax.eval_shape(slopes, params, jax.tree.map(lambda x: x[0], parts))
        zero = lambda s: jnp.zeros(s.shape, jnp.promote_types(jnp.float32, s.dtype))
        first = jax.tree.map(zero, shapes), jnp.float32(0)
        (sums, weights), _ = jax.lax.scan(add, first, parts)
        mean = lambda a, s: (a / jnp.maximum(weights, 1).astype(a.dtype)).astype(s.dtype)
        return jax.tree.map(mean, sums, shapes)

    return run


def scored(params: Any, batch: Any) -> Float[Array, ""]:
    """How many tokens `language_model_loss` is a mean over; params change nothing."""
    del params
    tokens, segment_ids = _parts_of(batch)
    if segment_ids is None:
        return jnp.float32(tokens[:, 1:].size)
    return jnp.sum(segment_ids[:, 1:] == segment_ids[:, :-1]).astype(jnp.float32)


def next_token_loss(
    logits: Float[Array, "b t s"],
    tokens: Int[Array, "b t+1"],
    segment_ids: Int[Array, "b t+1"] | None = None,
) -> Float[Array, ""]:
    """Mean over positions of -log softmax(logits_t)[tokens_(t+1)], in nats per token.

    logits: of the tokens but the last, any scale. tokens: one more than were read. segment_ids: a
    position whose successor begins another segment is left out.

    Raises ValueError for shapes that do not belong together.
    """
    if tokens.shape != (logits.shape[0], logits.shape[1] + 1):
        raise ValueError(
            f"`tokens` has shape {tokens.shape}; it must be "
            f"{(logits.shape[0], logits.shape[1] + 1)}, one token more than logits {logits.shape}."
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:].astype(jnp.int32)
    )
    if segment_ids is None:
        return losses.mean()
    within = segment_ids[:, 1:] == segment_ids[:, :-1]
    return jnp.sum(losses, where=within) / jnp.maximum(within.sum(), 1)


def language_model_loss(graphdef: nnx.GraphDef) -> Loss:
    """(params, batch) -> `next_token_loss` of the model that `nnx.split` took apart.

    A batch is a mapping with "tokens" [b, t + 1] and, if rows are packed, "segment_ids" [b, t + 1].
    The loss raises TypeError for any other.
    """

    def loss(params, batch):
        tokens, segment_ids = _parts_of(batch)
        read = None if segment_ids is None else segment_ids[:, :-1]
        logits, _ = nnx.merge(graphdef, params)(tokens[:, :-1], segment_ids=read)
        return next_token_loss(logits, tokens, segment_ids)

    return loss


def _parts_of(batch: Any) -> tuple[Int[Array, "b t+1"], Int[Array, "b t+1"] | None]:
    """The tokens of a batch and its segment ids, if any. Raises TypeError for what has none."""
    if not isinstance(batch, Mapping) or "tokens" not in batch:
        raise TypeError(
            f"`batch` is of type {type(batch).__name__}; it must be a mapping with "
            '"tokens" and, if rows are packed, "segment_ids", both [b, t + 1].'
        )
    return batch["tokens"], batch.get("segment_ids")


def _spiked(norm: Float[Array, ""], recent: Float[Array, " n"], factor: float) -> Bool[Array, ""]:
    """Whether a gradient is far longer than those before it; never, as long as those are few."""
    enough = jnp.sum(~jnp.isnan(recent)) >= ENOUGH
    return enough & (norm > factor * jnp.nanmedian(recent))


def _norm(leaves) -> Float[Array, ""]:
    """Euclidean norm over all arrays, summed in at least float32."""
    wide = [x.astype(jnp.promote_types(jnp.float32, x.dtype)) for x in leaves]
    return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in wide), jnp.float32(0)))


def _by_label(updates, labels) -> dict[str, list[Array]]:
    leaves = jax.tree.leaves(updates)
    names = ["outer"] * len(leaves) if labels is None else jax.tree.leaves(labels)
    groups: dict[str, list[Array]] = {}
    for name, leaf in zip(names, leaves, strict=True):
        groups.setdefault(name, []).append(leaf)
    return groups
