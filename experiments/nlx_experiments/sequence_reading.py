# SPDX-License-Identifier: Apache-2.0
"""Reads rows of any length in pieces: the state goes from one to the next, nothing else is kept."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from nlx import nn
from nlx_experiments.sequence_learner import SequenceModel, arrays
from nlx_experiments.sequence_tasks import Batch, padded


class Piece(NamedTuple):
    """What m models made of a piece of b rows."""

    batch: Batch
    right: Bool[np.ndarray, "m b t"]  # whether the answer has the best score, and all are finite
    loss: Float[np.ndarray, "m b t"]  # cross-entropy of the answer, in nats
    carried: int = 0  # bytes of all states that go on from here


def read(
    config: nn.ModelConfig,
    weights: PyTree[Array],
    pieces: Iterable[Batch],
    *,
    capacity: int,
    leave: Callable[[], None] = lambda: None,
) -> Iterator[Piece]:
    """Answers at every symbol of rows that come in pieces, read by all models.

    Equal to reading whole rows. Memory is that of one piece and of the states, whatever the length,
    but for attention, whose caches hold `capacity` symbols.

    Args:
      config: of the models.
      weights: as `sequence_learner` trains them, m of each: [m, ...].
      pieces: of the same rows, one after the other, of one length; the last one may be shorter.
      capacity: symbols of a row, at most; without attention it changes nothing. Attention that is
        given less gives scores that are not finite.
      leave: called before every piece; may raise.
    """
    begin, go = _functions(config)
    state, size = None, 0
    for batch in pieces:
        leave()
        rows, length = batch.tokens.shape
        if state is None:
            state, size = begin(weights, rows, -(-capacity // length) * length), length
        tokens, answers, _ = arrays(padded(batch, size))
        right, loss, state = go(weights, state, tokens, answers)
        carried = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        right, loss = (np.asarray(of)[:, :, :length] for of in (right, loss))
        yield Piece(batch, right, loss, carried)


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Rows in pieces of `size` symbols; the last one may be shorter."""
    for start in range(0, batch.tokens.shape[1], size):
        part = slice(start, start + size)
        yield Batch(batch.tokens[:, part], batch.answers[:, part], batch.scored[:, part])


@functools.lru_cache(maxsize=2)
def _functions(config: nn.ModelConfig) -> tuple[Callable, Callable]:
    """States before the first piece; and a piece."""
    shapes = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    graph = nnx.graphdef(shapes)

    def begin(weights, rows: int, capacity: int):
        return nnx.merge(graph, weights).model.init_state(rows, capacity)

    def go(weights, state, tokens: Array, answers: Array):
        scores, state = nnx.merge(graph, weights).model(tokens, state)
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, answers)
        return (jnp.argmax(scores, -1) == answers) & jnp.isfinite(loss), loss, state

    begin_all = jax.jit(
        lambda weights, rows, capacity: jax.vmap(lambda w: begin(w, rows, capacity))(weights),
        static_argnums=(1, 2),
    )
    return begin_all, jax.jit(jax.vmap(go, in_axes=(0, 0, None, None)), donate_argnums=1)
