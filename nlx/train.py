# SPDX-License-Identifier: Apache-2.0
"""One step of training, pure and ready for jit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

Loss = Callable[[Any, Any], Float[Array, ""]]
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """All that training carries from step to step, arrays only."""

    step: Int[Array, ""]  # steps taken, skipped ones included
    params: PyTree[Array]  # as `nnx.split(model)[1]`
    opt_state: PyTree[Array]
    skipped: Int[Array, ""]  # steps that changed nothing, because a gradient was not finite


def init_train_state(params: PyTree[Array], tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0))


def make_train_step(
    loss: Loss, tx: optax.GradientTransformation, labels: PyTree[str] | None = None
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (state, metrics) of one step: theta <- theta + tx(grad loss).

    Pure: compile it as `jax.jit(step, donate_argnums=0)`. Where the loss or a gradient is not
    finite, parameters and the optimizer's memories stay as they were, bit by bit, and the step is
    counted in `skipped`.

    Args:
      loss: (params, batch) -> scalar, such as `language_model_loss`.
      tx: any optax transformation.
      labels: the level of each parameter, as `nlx.nn.labels_by_level`; None: all are "outer".

    Returns:
      The step; its metrics are scalars: "loss", "gradient_norm" (before `tx`), "skipped" (1 or 0),
      and "update_norm/<label>", how far each level moved (Euclidean).
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        value, gradients = jax.value_and_grad(loss)(state.params, batch)
        norm = _norm(jax.tree.leaves(gradients))
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        after = (optax.apply_updates(state.params, updates), opt_state)
        before = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)
        skipped = (~finite).astype(jnp.int32)
        metrics = {"loss": value, "gradient_norm": norm, "skipped": skipped}
        for label, leaves in _by_label(updates, labels).items():
            metrics[f"update_norm/{label}"] = jnp.where(finite, _norm(leaves), 0)
        return TrainState(state.step + 1, params, opt_state, state.skipped + skipped), metrics

    return step


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
    """

    def loss(params, batch):
        tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
        read = None if segment_ids is None else segment_ids[:, :-1]
        logits, _ = nnx.merge(graphdef, params)(tokens[:, :-1], segment_ids=read)
        return next_token_loss(logits, tokens, segment_ids)

    return loss


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
