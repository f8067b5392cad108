# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the pure functions of its training: start, step, score."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer, PyTree

from nlx import inspect, nn, train
from nlx.train import TrainState
from nlx_experiments import optimizers
from nlx_experiments.checkpoints import Checkpoints
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import say
from nlx_experiments.errors import Refused, as_sentence

Measured = dict[str, Float[Array, ""]]


class Learner(NamedTuple):
    """The pure functions of one training; nothing is compiled before it is first called.

    init() -> state: weights drawn from the seed, and the optimizer's memories of nothing.
    step(state, start, tokens [b, t + 1]) -> (state, measured): one update; `start` are the initial
        weights; measured are the metrics of `nlx.train.make_train_step` and "moved/<level>"; the
        state is donated.
    bits(params, tokens [b, t + 1]) -> [b, t]: what each token but the first costs.
    """

    init: Callable[[], TrainState]
    step: Callable[[TrainState, PyTree, Any], tuple[TrainState, Measured]]
    bits: Callable[[PyTree, Any], Float[Array, "b t"]]
    parameters: int


def build(config: TrainConfig) -> nn.LanguageModel:
    """The model, its weights drawn from the seed."""
    with as_sentence():
        return nn.LanguageModel(config.model, rngs=nnx.Rngs(config.seed))


def abstract(config: TrainConfig) -> nn.LanguageModel:
    """The model with shapes in place of its weights."""
    return nnx.eval_shape(lambda: build(config))


def levels(config: TrainConfig) -> str:
    """The model's levels as a table."""
    return inspect.table(inspect.levels(abstract(config)))


def make(config: TrainConfig) -> Learner:
    """The functions of `nlx train` for a configuration."""
    shapes = abstract(config)
    labels, clocks = nn.labels_by_level(shapes), nn.clocks_by_level(shapes)
    rule = optimizers.make(config, labels, clocks, nn.restarts_by_level(shapes))
    graph = nnx.graphdef(shapes)
    advance = train.make_train_step(train.language_model_loss(graph), rule, labels)

    def init() -> TrainState:
        return train.init_train_state(nnx.split(build(config))[1], rule)

    def step(
        state: TrainState, start: PyTree[Array], tokens: Integer[Array, "b t+1"]
    ) -> tuple[TrainState, Measured]:
        state, metrics = advance(state, {"tokens": tokens})
        return state, metrics | _distances(state.params, start, labels)

    def bits(params: PyTree[Array], tokens: Integer[Array, "b t+1"]) -> Float[Array, "b t"]:
        logits, _ = nnx.merge(graph, params)(tokens[:, :-1])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -chosen[..., 0] / math.log(2)

    count = nn.parameter_count(shapes)
    return Learner(jax.jit(init), jax.jit(step, donate_argnums=0), jax.jit(bits), count)


def load(config: TrainConfig) -> nn.LanguageModel:
    """The model of a run with the weights of its newest good checkpoint.

    Raises:
      Refused: there is none.
    """
    graph, weights = nnx.split(build(config))
    folder = config.folder / "checkpoints"
    if folder.exists():
        with Checkpoints(folder, keep=None, say=say) as checkpoints:
            saved = checkpoints.restore({"weights": weights})
        if saved is not None:
            return nnx.merge(graph, saved.trees["weights"])
    raise Refused(f"{config.folder} holds no checkpoint yet; train it first.")


def _distances(
    params: PyTree[Array], start: PyTree[Array], labels: PyTree[str]
) -> dict[str, Float[Array, ""]]:
    """ "moved/<level>": |params - start| / |start|, Euclidean, over a level's arrays."""
    squares: dict[str, list[Any]] = {}
    leaves = (jax.tree.leaves(tree) for tree in (labels, params, start))
    for label, now, then in zip(*leaves, strict=True):
        moved, length = squares.setdefault(label, [0.0, 0.0])
        squares[label] = [moved + jnp.sum(jnp.square(now - then)), length + jnp.sum(then**2)]
    return {f"moved/{k}": jnp.sqrt(a / jnp.maximum(b, 1e-30)) for k, (a, b) in squares.items()}
