# SPDX-License-Identifier: Apache-2.0
"""Trains many small models on one sequence task at once: every seed at every learning rate."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from nlx import nn, optim, train
from nlx.nn.linear import Linear, normal
from nlx_experiments.sequence_tasks import Batch


class Decoder(nnx.Module):
    """y_i = W_2 gelu(W_1 (x + p_i)): every symbol from one vector and its place.

    Source: Poli et al. (2024), Mechanistic Design and Scaling of Hybrid Architectures, section 3.1.
    """

    def __init__(self, width: int, length: int, vocabulary: int, *, rngs: nnx.Rngs):
        """width: channels of x. length: places. vocabulary: scores at each."""
        self.places = normal(rngs, (length, width), (None, "embed"), 1.0)
        self.hidden = Linear(width, 2 * width, ("embed", "mlp"), rngs=rngs)
        self.output = Linear(2 * width, vocabulary, ("mlp", "vocabulary"), rngs=rngs)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b t s"]:
        """x: what is known of the row."""
        return self.output(jax.nn.gelu(self.hidden(x[:, None] + self.places[...][None])))


class SequenceModel(nnx.Module):
    """A language model that answers at every position, with what a task's form adds to it."""

    def __init__(self, config: nn.ModelConfig, decoded: int = 0, *, rngs: nnx.Rngs):
        """Draws it.

        config: of the model. decoded: places that a decoder answers from the last token, or 0:
        answers are the model's scores.
        """
        self.model = nn.LanguageModel(config, rngs=rngs)
        width = config.width
        self.decoder = Decoder(width, decoded, config.vocabulary, rngs=rngs) if decoded else None

    def __call__(
        self, tokens: Array, key: Array | None = None, noise: float = 0.0
    ) -> Float[Array, "b t s"]:
        """Scores of every answer. key, noise: where noise is added to the embedded tokens."""
        x = self.model.embed(tokens)
        if key is not None and noise:
            x = x + noise * jax.random.normal(key, x.shape, x.dtype)
        x, _ = self.model.mix(x)
        if self.decoder is None:
            return self.model.read_out(x)
        return self.decoder(self.model.norm(x[:, -1]))


class Scores(NamedTuple):
    """How much of a batch each model got right."""

    tokens: Float[np.ndarray, " m"]  # share of scored positions
    rows: Float[np.ndarray, " m"]  # share of rows right at every scored position
    loss: Float[np.ndarray, " m"]  # cross-entropy of a scored position, in nats
    places: Float[np.ndarray, "m t"]  # share of the rows that are scored there; 0 where none is


class Learners(NamedTuple):
    """The functions of a training, over models m = rates x seeds.

    init(seeds) -> state: weights drawn from seeds [m].
    learn(state, rates, key, batches) -> (state, losses [m, n]): n steps, one batch each, which all
        models share; rates [m] are multiplied by the schedule.
    score(params, batch) -> Scores, params being those of a state.
    """

    init: Callable[[Any], PyTree]
    learn: Callable[..., tuple[PyTree, Any]]
    score: Callable[[PyTree, Batch], Scores]
    parameters: int


@functools.lru_cache(maxsize=8)
def make(
    config: nn.ModelConfig,
    *,
    steps: int,
    noise: float = 0.0,
    decay: bool = False,
    decoded: int = 0,
) -> Learners:
    """The functions that train models of `config` on any task that its vocabulary holds.

    AdamW (b2 0.99, no weight decay), gradients clipped to norm 1; the rate rises over the first 50
    steps, then stands, or falls to a tenth by a cosine; levels of a continuum memory system learn
    on their clocks.

    Args:
      config: symbols and answers are integers below its vocabulary.
      steps: in all, for the schedule.
      noise: standard deviation of the noise on the embedded symbols while training, whose own
        root mean square is about 1.
      decay: whether the rate falls.
      decoded: see `SequenceModel`.
    """
    build = lambda rngs: SequenceModel(config, decoded, rngs=rngs)
    answer = lambda model, tokens, key: model(tokens, key, noise)
    return learners(build, answer, steps=steps, decay=decay, parameters=count(config, decoded))


def learners(
    build: Callable[[nnx.Rngs], nnx.Module],
    answer: Callable[[Any, Array, Array | None], Float[Array, "b t s"]],
    *,
    steps: int,
    decay: bool,
    parameters: int,
) -> Learners:
    """The functions that train what `build` draws and that answers by `answer`; see `make`.

    answer: (model, tokens [b, t], key or None) -> scores; a key is given while training.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def scores(params: PyTree, tokens: Array, key: Array | None = None) -> Array:
        return answer(nnx.merge(graph, params), tokens, key)

    def loss(model: Any, tokens: Array, answers: Array, scored: Array, key: Array) -> Array:
        return cross_entropy(answer(model, tokens, key), answers, scored)

    init, learn = trainer(build, loss, steps=steps, decay=decay)

    def right(params, tokens: Array, answers: Array, scored: Array) -> tuple[Array, ...]:
        given = scores(params, tokens)
        hits = jnp.argmax(given, -1) == answers
        whole = jnp.all(hits | (scored == 0), 1)
        right = jnp.sum(hits * scored) / jnp.sum(scored)
        places = jnp.sum(hits * scored, 0) / jnp.maximum(jnp.sum(scored, 0), 1)
        return right, jnp.mean(whole), cross_entropy(given, answers, scored), places

    right_all = jax.jit(jax.vmap(right, in_axes=(0, None, None, None)))

    def score(params: PyTree, batch: Batch) -> Scores:
        return Scores(*map(np.asarray, right_all(params, *arrays(batch))))

    return Learners(init, learn, score, parameters)


def trainer(
    build: Callable[[nnx.Rngs], nnx.Module],
    loss: Callable[..., Float[Array, ""]],
    *,
    steps: int,
    decay: bool,
) -> tuple[Callable[[Any], PyTree], Callable[..., tuple[PyTree, Any]]]:
    """`init` and `learn` of `Learners`, for what `build` draws and any loss; see `make`.

    loss: (model, *arrays of a batch, key) -> scalar.
    """
    shapes = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, labels = nnx.graphdef(shapes), nn.labels_by_level(shapes)
    rule = optimizer(shapes, steps=steps, decay=decay)

    def init(seed: Array) -> PyTree:
        params = nnx.split(build(nnx.Rngs(jax.random.key(seed))))[1]
        return train.init_train_state(params, rule(jnp.float32(0)))

    def learn(state, rate: Array, key: Array, batches: tuple[Array, ...]):
        lost = lambda params, batch: loss(nnx.merge(graph, params), *batch)
        step = train.make_train_step(lost, rule(rate), labels)

        def body(state, batch):
            state, metrics = step(state, (*batch, jax.random.fold_in(key, state.step)))
            return state, metrics["loss"]

        return jax.lax.scan(body, state, batches)

    learn_all = jax.jit(jax.vmap(learn, in_axes=(0, 0, 0, None)), donate_argnums=0)
    return jax.jit(jax.vmap(init)), learn_all


def optimizer(
    shapes: nnx.Module, *, steps: int, decay: bool
) -> Callable[[Array], optax.GradientTransformation]:
    """The function rate -> rule of what a model of these shapes learns by; see `make`."""
    labels, clocks = nn.labels_by_level(shapes), nn.clocks_by_level(shapes)

    def rule(rate: Array) -> optax.GradientTransformation:
        def level(clock):
            period = clock.period or 1
            curve = lambda firing: rate * schedule(steps, decay)((firing + 1) * period)
            own = optax.adam(curve, b2=0.99)
            return own if period == 1 else optim.on_clock(own, clock)

        levels: dict[Hashable, Any] = {name: level(clock) for name, clock in clocks.items()}
        return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(levels, labels))

    return rule


def cross_entropy(
    scores: Float[Array, "b t s"], answers: Array, scored: Float[Array, "b t"]
) -> Float[Array, ""]:
    """Mean over scored positions, in nats."""
    lost = optax.softmax_cross_entropy_with_integer_labels(scores, answers)
    return jnp.sum(lost * scored) / jnp.maximum(jnp.sum(scored), 1)


@functools.cache
def count(config: nn.ModelConfig, decoded: int = 0) -> int:
    """How many numbers a model of this configuration learns, its decoder's among them."""
    make = lambda: SequenceModel(config, decoded, rngs=nnx.Rngs(0))
    return nn.parameter_count(nnx.eval_shape(make))


def schedule(steps: int, decay: bool) -> optax.Schedule:
    """1 after 50 steps of warm-up; with `decay` a cosine to 0.1 at the end."""
    warmup = min(50, max(steps - 1, 1))
    if decay:
        return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(steps, warmup + 1), 0.1)
    return optax.linear_schedule(0.0, 1.0, warmup)


def arrays(batch: Batch) -> tuple[Array, Array, Array]:
    """A batch as jax takes it."""
    tokens, answers = (jnp.asarray(x, jnp.int32) for x in (batch.tokens, batch.answers))
    return tokens, answers, jnp.asarray(batch.scored, jnp.float32)


def better(
    now: tuple[PyTree, Float[np.ndarray, " m"]], before: tuple[PyTree, Float[np.ndarray, " m"]]
) -> tuple[PyTree, Float[np.ndarray, " m"]]:
    """Of each model the weights of the larger value, the later where they are equal."""
    (weights, values), (kept, best) = now, before
    won = jnp.asarray(values >= best)
    choose = lambda a, b: jnp.where(won.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(choose, weights, kept), np.maximum(values, best)


def stacked(batches: list[Batch]) -> tuple[Array, Array, Array]:
    """Batches of one shape as arrays with a leading step axis."""
    parts = [arrays(batch) for batch in batches]
    tokens, answers, scored = (jnp.stack(part) for part in zip(*parts, strict=True))
    return tokens, answers, scored
