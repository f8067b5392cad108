# SPDX-License-Identifier: Apache-2.0
"""Tasks that rules learn to train: what is drawn, where training starts, what it is to lower."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nlx import nn, train


class Task(NamedTuple):
    """A distribution of problems.

    draw(key) -> instance: one problem's data, a pytree.
    init(instance, key) -> params: where its training starts.
    loss(params, instance, key) -> scalar: what is trained on; the key draws a batch of it.
    heldout(params, instance) -> scalar: what it is trained for, on data that `loss` never sees;
        None where there is none.
    """

    draw: Callable[[Key[Array, ""]], Any]
    init: Callable[[Any, Key[Array, ""]], Any]
    loss: Callable[[Any, Any, Key[Array, ""]], Float[Array, ""]]
    heldout: Callable[[Any, Any], Float[Array, ""]] | None = None


def quadratics(size: int = 10) -> Task:
    """|A w - y|^2 with A [n, n], y [n] and the start w [n] of independent standard normals.

    size: n, >= 1. Source: Andrychowicz et al. (2016), section 3.1.
    """
    _positive(size=size)

    def draw(key):
        a, y = jax.random.split(key)
        return jax.random.normal(a, (size, size)), jax.random.normal(y, (size,))

    def loss(params, instance, key):
        del key
        a, y = instance
        return jnp.sum(jnp.square(a @ params - y))

    return Task(draw, lambda instance, key: jax.random.normal(key, (size,)), loss)


def logistic(size: int = 8, rows: int = 64, *, noise: float = 0.5, decay: float = 1e-3) -> Task:
    """Logistic regression on labels sign(<x, w*> + noise), w* drawn for each problem.

    loss = mean log(1 + exp(-y <x, w>)) + decay |w|^2, of `rows` examples; as many are held out.
    size, rows: >= 1. noise, decay: >= 0.
    """
    _positive(size=size, rows=rows)

    def draw(key):
        truth, inputs, errors = jax.random.split(key, 3)
        x = jax.random.normal(inputs, (2, rows, size))
        clean = x @ jax.random.normal(truth, (size,))
        return x, jnp.sign(clean + noise * jax.random.normal(errors, (2, rows)))

    def lost(params, instance, part):
        x, y = instance[0][part], instance[1][part]
        return jnp.mean(jax.nn.softplus(-y * (x @ params)))

    def loss(params, instance, key):
        del key
        return lost(params, instance, 0) + decay * jnp.sum(jnp.square(params))

    start = lambda instance, key: 0.1 * jax.random.normal(key, (size,))
    return Task(draw, start, loss, lambda params, instance: lost(params, instance, 1))


class Labelled(NamedTuple):
    """Inputs and their classes, to train on and held out."""

    inputs: Float[Array, "n ..."]
    labels: Int[Array, " n"]
    heldout_inputs: Float[Array, "m ..."]
    heldout_labels: Int[Array, " m"]


def classification(
    data: Labelled,
    init: Callable[[Key[Array, ""]], Any],
    apply: Callable[[Any, Any], Float[Array, "b c"]],
    batch: int,
) -> Task:
    """A network on labelled data: cross-entropy in nats, of a batch drawn at every step.

    Problems differ in where they start and in their batches.
    data: at least `batch` rows to train on. init(key) -> params. apply(params, inputs) -> scores of
    the classes. batch: rows, >= 1. Raises ValueError for a batch that is larger than the data.
    """
    if not 1 <= batch <= len(data.labels):
        raise ValueError(f"`batch` is {batch}; it must be in [1, {len(data.labels)}].")

    def lost(params, inputs, labels):
        scores = apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def loss(params, instance, key):
        del instance
        rows = jax.random.randint(key, (batch,), 0, len(data.labels))
        return lost(params, data.inputs[rows], data.labels[rows])

    def heldout(params, instance):
        del instance
        return lost(params, data.heldout_inputs, data.heldout_labels)

    return Task(lambda key: (), lambda instance, key: init(key), loss, heldout)


def mlp(
    data: Labelled,
    hidden: Sequence[int] = (20,),
    *,
    batch: int = 128,
    activation: Callable[[Array], Array] = jax.nn.sigmoid,
) -> Task:
    """An MLP on flat inputs; hidden, activation: of its layers. Others as of `classification`.

    Source: Andrychowicz et al. (2016), section 3.2 (20 sigmoid units, batches of 128).
    """
    sizes = [data.inputs.shape[-1], *hidden, int(data.labels.max()) + 1]

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {"kernel": jax.random.normal(k, (i, o)) / i**0.5, "bias": jnp.zeros(o)}
            for k, (i, o) in zip(keys, itertools.pairwise(sizes), strict=True)
        ]

    def apply(params, x):
        for n, layer in enumerate(params):
            x = x @ layer["kernel"] + layer["bias"][None]
            x = activation(x) if n < len(params) - 1 else x
        return x

    return classification(data, init, apply, batch)


def convolution(data: Labelled, channels: int = 8, *, batch: int = 64) -> Task:
    """Two layers of 3 x 3 convolutions, their mean over the image, and a linear read-out.

    A convolution is the product of patches and kernel: so problems side by side are one product.

    data: images [n, height, width]. channels: of both layers, >= 1. batch: see `classification`.
    """
    _positive(channels=channels)
    classes = int(data.labels.max()) + 1

    def init(key):
        first, second, out = jax.random.split(key, 3)
        return {
            "first": jax.random.normal(first, (3, 3, 1, channels)) / 3,
            "second": jax.random.normal(second, (3, 3, channels, channels)) / (9 * channels) ** 0.5,
            "output": jax.random.normal(out, (channels, classes)) / channels**0.5,
            "bias": jnp.zeros(classes),
        }

    def apply(params, images):
        x = images[..., None]
        for name in ("first", "second"):
            x = jax.nn.relu(_patches(x) @ params[name].reshape(-1, channels))
        return x.mean((1, 2)) @ params["output"] + params["bias"][None]

    return classification(data, init, apply, batch)


def _patches(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 9*c"]:
    """The 3 x 3 neighbours of every place, with zeros beyond the edge."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(near, -1)


def language(
    tokens: Int[Array, " n"], model: nn.ModelConfig, *, batch: int = 4, length: int = 32
) -> Task:
    """A language model on a stream of tokens; the last tenth is held out.

    tokens: integers. model: `nlx.nn.ModelConfig`. batch: windows of a step; length: tokens of one.
    Raises ValueError for a stream whose tenth is shorter than a window and its next token.
    """
    cut = len(tokens) - len(tokens) // 10
    if len(tokens) - cut <= length:
        raise ValueError(f"`tokens` are {len(tokens)}; they must be more than {10 * length + 10}.")
    graph = nnx.split(nn.LanguageModel(model, rngs=nnx.Rngs(0)))[0]
    cost, window = train.language_model_loss(graph), jnp.arange(length + 1)

    def lost(params, starts):
        return cost(params, {"tokens": tokens[starts[:, None] + window[None]]})

    def init(instance, key):
        del instance
        return nnx.split(nn.LanguageModel(model, rngs=nnx.Rngs(params=key)))[1]

    def loss(params, instance, key):
        del instance
        return lost(params, jax.random.randint(key, (batch,), 0, cut - length))

    def heldout(params, instance):
        del instance
        return lost(params, jnp.linspace(cut, len(tokens) - length - 1, 4 * batch).astype(int))

    return Task(lambda key: (), init, loss, heldout)


def bandit(arms: int = 10, *, episodes: int = 16, noise: float = 1.0) -> Task:
    """A policy over arms by policy gradients; arms pay standard normal means, and noise.

    loss = -mean (r - mean r) log pi(a): its gradient is REINFORCE's, of `episodes` pulls a step;
    its value says nothing. What it is trained for is the regret max mean - E_pi mean, the held-out
    loss: choose that as meta-objective.

    arms, episodes: >= 2. noise: >= 0, of a reward. Source: Williams (1992), REINFORCE.
    """
    for name, value in (("arms", arms), ("episodes", episodes)):
        if value < 2:
            raise ValueError(f"`{name}` is {value}; it must be an integer >= 2.")

    def loss(params, instance, key):
        pulled, paid = jax.random.split(key)
        chosen = jax.random.categorical(pulled, jax.lax.stop_gradient(params), shape=(episodes,))
        reward = instance[chosen] + noise * jax.random.normal(paid, (episodes,))
        likely = jax.nn.log_softmax(params)[chosen]
        return -jnp.mean((reward - reward.mean()) * likely)

    def regret(params, instance):
        return jnp.max(instance) - jax.nn.softmax(params) @ instance

    draw = lambda key: jax.random.normal(key, (arms,))
    return Task(draw, lambda instance, key: jnp.zeros(arms), loss, regret)


def augmented(task: Task, spread: float = 3.0) -> Task:
    """The task with each parameter in units of its own: w = c v, c log-uniform in [1/s, s].

    What is trained is v, from w_0 / c: a rule that is trained on it can't rely on one scale.
    spread: s, >= 1. Raises ValueError otherwise.
    Source: Lv et al. (2017), Learning gradient descent: better generalization and longer horizons,
    section 4 (random scaling); Metz et al. (2022).
    """
    if not spread >= 1:
        raise ValueError(f"`spread` is {spread}; it must be >= 1.")
    times = lambda a, b: jax.tree.map(jnp.multiply, a, b)

    def draw(key):
        own, start, scales = jax.random.split(key, 3)
        instance = task.draw(own)
        leaves, tree = jax.tree.flatten(jax.eval_shape(task.init, instance, start))
        log = jnp.log(spread)
        drawn = [
            jnp.exp(jax.random.uniform(k, leaf.shape, leaf.dtype, -log, log))
            for k, leaf in zip(jax.random.split(scales, len(leaves)), leaves, strict=True)
        ]
        return instance, tree.unflatten(drawn)

    def init(instance, key):
        return jax.tree.map(jnp.divide, task.init(instance[0], key), instance[1])

    def loss(params, instance, key):
        return task.loss(times(params, instance[1]), instance[0], key)

    heldout = task.heldout
    if heldout is None:
        return Task(draw, init, loss)
    return Task(draw, init, loss, lambda p, instance: heldout(times(p, instance[1]), instance[0]))


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be an integer >= 1.")
