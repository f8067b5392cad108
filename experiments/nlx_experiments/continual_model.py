# SPDX-License-Identifier: Apache-2.0
"""The one model that every method of continual learning begins with, and how it is read.

A small byte Transformer++, trained on the standard library's source (`data.load`). A class is
scored against the mean over the bytes of a row,

    s_c = <u_c, 1/n sum_t x_t>,    x_t the last block's outputs, u_c the class's unit vector,

drawn once. A byte is scored as the language model does.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from nlx import nn, train
from nlx.nn.linear import parameter
from nlx_experiments import data
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Refused, Stopped

Keys = dict[str, Float[Array, "b t i"]]


class Reader(nnx.Module):
    """A language model and a unit vector for each class."""

    def __init__(self, model: nn.LanguageModel, classes: int, *, rngs: nnx.Rngs):
        """model: kept as it is. classes: how many, >= 1. rngs: draws their vectors."""
        width = model.config.width
        drawn = jax.random.normal(rngs.params(), (width, classes))
        unit = drawn / jnp.linalg.norm(drawn, axis=0, keepdims=True)
        self.model = model
        self.classes = parameter(unit, ("embed", None))

    def mix(self, tokens: Int[Array, "b t"]) -> tuple[Float[Array, "b t d"], Keys]:
        """As the model's `embed` and `mix`, and what the last layer's MLPs read their values by.

        Keys are hidden activations, "cms_<rank>" -> [b, t, units], by the rank of the level: what
        it adds is their product with its last matrix, the values. A layer's one MLP has rank 0.
        """
        x = self.model.embed(tokens)
        *before, last = self.model.blocks
        for block in before:
            x, _ = block(x, None, None)
        y, _ = last.mixer(last.norm(x), None, None)
        x, keys, added = x + y, {}, []
        system: Any = last.feed_forward
        weights = system.aggregate[...] if system.variant == "independent" else (1.0,)
        for level, weight in zip(system.levels, weights, strict=True):
            z = level.norm(x)
            hidden = jax.nn.silu(level.mlp.gate(z)) * level.mlp.up(z)
            keys[f"cms_{level.rank}"] = hidden
            added.append(weight * level.mlp.down(hidden))
        return x + sum(added), keys

    def class_scores(self, x: Float[Array, "b t d"], tokens: Int[Array, "b t"]) -> Array:
        """[b, classes]. x: of `mix`. tokens: bytes; 0 is none and counts for nothing."""
        return mean_over(x, tokens) @ self.classes[...]


def mean_over(x: Float[Array, "b t d"], tokens: Int[Array, "b t"]) -> Float[Array, "b d"]:
    """The mean over a row's bytes, those that are not 0."""
    there = (tokens > 0).astype(x.dtype)[..., None]
    return jnp.sum(x * there, 1) / jnp.maximum(jnp.sum(there, 1), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model, and of its training on the standard library's source."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 512
    steps: int = 2000
    rows: int = 8
    length: int = 256
    rate: float = 3e-3

    def config(self) -> nn.ModelConfig:
        """Transformer++ on bytes."""
        return nn.ModelConfig(
            mixer="attention",
            feed_forward="swiglu",
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
            context=self.length,
        )


def pretrained(
    size: Size, folder: pathlib.Path, stop: StopRequest | None = None
) -> nn.LanguageModel:
    """The trained model; trains it where the folder does not hold it yet.

    AdamW, the rate by a cosine to a tenth after a warm-up, gradients clipped to norm 1.

    Args:
      size: of it. folder: where its weights are kept, under a name that holds size and corpus.
      stop: ends the training where a signal came.

    Raises:
      Refused: what the folder holds is damaged. Stopped: a signal came; nothing is kept.
    """
    corpus = data.load()
    what = f"{dataclasses.asdict(size)} {corpus.sha256}"
    path = folder / f"model-{hashlib.sha256(what.encode()).hexdigest()[:12]}.npz"
    model = nn.LanguageModel(size.config(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    if path.exists():
        return nnx.merge(graph, _loaded(path, params))
    warm = max(1, size.steps // 20)
    curve = optax.warmup_cosine_decay_schedule(
        0.0, size.rate, warm, max(size.steps, warm + 1), size.rate / 10
    )
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(curve))
    step = jax.jit(train.make_train_step(train.language_model_loss(graph), rule), donate_argnums=0)
    state = train.init_train_state(jax.tree.map(jnp.copy, params), rule)
    generator, windows, bits = np.random.default_rng(0), np.arange(size.length + 1), np.nan
    for n in range(size.steps):
        if stop is not None and stop.received is not None:
            raise Stopped(f"{stop.received.name}: the model's training begins anew.", stop.received)
        starts = generator.integers(0, corpus.train.size - size.length, size.rows)
        batch = corpus.train[starts[:, None] + windows].astype(np.int32)
        state, metrics = step(state, {"tokens": batch})
        if n % 500 == 0 or n == size.steps - 1:
            bits = float(metrics["loss"]) / np.log(2)
            say(f"model: step {n + 1} of {size.steps}, {bits:.3f} bits per byte")
    half = path.with_suffix(".half.npz")
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    np.savez(half, allow_pickle=False, **{str(n): leaf for n, leaf in enumerate(leaves)})
    half.replace(path)
    return nnx.merge(graph, state.params)


def _loaded(path: pathlib.Path, like: Any) -> Any:
    """The weights in a file, in the structure of `like`."""
    leaves, tree = jax.tree.flatten(like)
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as held:
            found = [jnp.asarray(held[str(n)]) for n in range(len(leaves))]
    except Exception as error:  # a damaged archive raises whatever its part does
        raise Refused(f"{path} is damaged ({error}); remove it, it is made anew.") from error
    if [x.shape for x in found] != [x.shape for x in leaves]:
        raise Refused(f"{path} holds another model's weights; remove it, it is made anew.")
    return jax.tree.unflatten(tree, found)
