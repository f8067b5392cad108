# SPDX-License-Identifier: Apache-2.0
"""Language models: tokens and a state in, scores of the next token and a state out."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from nlx import writes
from nlx.clock import Clock
from nlx.level import Level
from nlx.nest import Nest
from nlx.nn.block import Block, BlockState
from nlx.nn.cms import CMS
from nlx.nn.feedforward import MLP, SwiGLU
from nlx.nn.linear import Embedding, Linear
from nlx.nn.mixer import make_mixer
from nlx.nn.norm import RMSNorm
from nlx.nn.presets import MixerName, ModelConfig
from nlx.train import language_model_loss

ModelState = tuple[BlockState, ...]


class LanguageModel(nnx.Module):
    """Embedding, blocks, a last norm, a read-out; one code path trains, prefills and decodes.

    Parameters are float32, or float64 where it was enabled when the model was made.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """config: what it is made of; see `preset`. rngs: `nnx.Rngs(seed)`."""
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width, rngs=rngs)
        mixers = config.mixers * (config.layers // len(config.mixers))
        self.blocks = nnx.List([_block(config, mixer, rngs) for mixer in mixers])
        self.norm = RMSNorm(config.width)
        self.readout = (
            None
            if config.tied
            else Linear(config.width, config.vocabulary, ("embed", "vocabulary"), rngs=rngs)
        )

    def init_state(self, batch: int, capacity: int | None = None) -> ModelState:
        """The state before the first token: of constant size, a row per user.

        batch: rows, >= 1. capacity: tokens that attention's caches hold, >= 1; None: the
        configuration's `context`. Without attention it changes nothing.
        """
        capacity = self.config.context if capacity is None else capacity
        return tuple(block.init_state(batch, capacity, self._dtype()) for block in self.blocks)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        state: ModelState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t s"], ModelState]:
        """Scores of the next token after each, from all tokens up to it.

        Args:
          tokens: integers in [0, vocabulary).
          state: as `init_state` or an earlier call returned; None: nothing came before. Then
            attention builds no cache, so what is returned can't be gone on from.
          segment_ids: where they differ from the previous token's, everything starts anew. The
            first token goes on from the state.

        Returns:
          Scores of the token after each (log-probabilities up to a constant), at least float32,
          and the state after the last.

        Raises:
          ValueError, TypeError: one sentence, before anything is compiled.
        """
        self._check(tokens, state, segment_ids)
        x = self.embedding(tokens).astype(self._dtype())
        x, after = self._scan_blocks(x, state, segment_ids)
        x = self.norm(x)
        scores = self.embedding.scores(x) if self.readout is None else self.readout(x)
        return scores.astype(jnp.promote_types(jnp.float32, scores.dtype)), after

    def _scan_blocks(self, x, state: ModelState | None, segment_ids):
        """All blocks in order: those of one pattern are compiled, and scanned over its repeats."""
        period = len(self.config.mixers)
        repeats = lambda blocks: [blocks[n::period] for n in range(period)]
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        graphs = [nnx.split(block)[0] for block in self.blocks[:period]]
        parameters = [stack([nnx.state(block) for block in b]) for b in repeats(list(self.blocks))]
        before = [None] * period if state is None else list(map(stack, repeats(state)))

        def body(x, pattern):
            after = []
            for graph, own, block_state in zip(graphs, *pattern, strict=True):
                x, block_state = nnx.merge(graph, own)(x, block_state, segment_ids)
                after.append(block_state)
            return x, after

        x, after = jax.lax.scan(body, x, (parameters, before))
        take = lambda n: jax.tree.map(lambda leaf: leaf[n // period], after[n % period])
        return x, tuple(take(n) for n in range(len(self.blocks)))

    def _dtype(self):
        return jnp.bfloat16 if self.config.bfloat16 else self.embedding.table.dtype

    def _check(self, tokens, state, segment_ids) -> None:
        _check_integers("tokens", tokens, None)
        if segment_ids is not None:
            _check_integers("segment_ids", segment_ids, tokens.shape)
        if state is None:
            return
        rows = {leaf.shape[0] for leaf in jax.tree.leaves(state)}
        if len(state) != len(self.blocks) or rows != {len(tokens)}:
            raise ValueError(
                f"`state` is of {len(state)} blocks and {sorted(rows)} rows; it must be of "
                f"{len(self.blocks)} blocks and {len(tokens)} rows, as tokens."
            )


def _check_integers(name: str, value: Any, shape: tuple[int, ...] | None) -> None:
    """Integers [b, t], of this shape if given."""
    if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)):
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"`{name}` is of type {kind}; it must be an array of integers.")
    if value.ndim != 2 or 0 in value.shape or value.shape != (shape or value.shape):
        must = f"{shape}, as tokens" if shape else "[b, t], neither empty"
        raise ValueError(f"`{name}` has shape {value.shape}; it must be {must}.")


def _block(config: ModelConfig, mixer: MixerName, rngs: nnx.Rngs) -> Block:
    clocks = [Clock(None)]
    if config.feed_forward == "cms":
        clocks = [Clock(period) for period in config.cms_periods]
    mlp = MLP if config.feed_forward == "cms" else SwiGLU
    feed_forward = CMS(config.width, config.hidden, clocks, mlp=mlp, rngs=rngs)
    return Block(config.width, make_mixer(config, mixer, rngs=rngs), feed_forward)


def labels_by_level(model: nnx.Module) -> PyTree[str]:
    """The level of every parameter, in the structure of `nnx.split(model)[1]`.

    "cms_<l>" for the blocks of a continuum memory system that have a clock of their own, l = 0 the
    fastest, and "outer" for all else: for `optax.partition`.
    """
    levels = {path + ("levels", n): f"cms_{n}" for path, n, _ in _clocked(model)}

    def label(path, variable):
        own = [name for start, name in levels.items() if path[: len(start)] == start]
        return variable.replace(own[0] if own else "outer")

    return nnx.map_state(label, nnx.state(model, nnx.Param))


def clocks_by_level(model: nnx.Module) -> dict[str, Clock]:
    """The clock of every label of `labels_by_level`, in steps of the optimizer."""
    return {"outer": Clock(1)} | {f"cms_{n}": clock for _, n, clock in _clocked(model)}


def pretraining(model: nnx.Module, rule: optax.GradientTransformation) -> Nest:
    """Pre-training as a nest of the levels of `labels_by_level`, one tick a batch.

    Each holds {path: parameter}, starts where the model stands, and learns by the mean gradient of
    its period, under one shared objective: the loss of the next token. Its contexts are batches as
    `nlx.train.language_model_loss` takes them, its output is the loss before the step. It equals a
    train step whose rules run on their clocks (`nlx.optim.on_clock`).

    rule: of every level, an optax transformation.
    """
    graphdef, params = nnx.split(model)
    task = language_model_loss(graphdef)
    placed, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in placed]
    labels = jax.tree.leaves(labels_by_level(model))

    def part(label: str) -> dict[str, Array]:
        mine = zip(paths, placed, labels, strict=True)
        return {path: leaf for path, (_, leaf), level in mine if level == label}

    def next_token_loss(params_by_name, batch):
        whole = {path: leaf for part in params_by_name.values() for path, leaf in part.items()}
        return task(jax.tree.unflatten(tree, [whole[path] for path in paths]), batch)

    levels = {
        label: Level(lambda key, label=label: part(label), None, writes.summed(rule), clock)
        for label, clock in clocks_by_level(model).items()
    }
    return Nest(levels, lambda params, batch: (next_token_loss(params, batch), {}), next_token_loss)


def parameter_count(model: nnx.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _clocked(model):
    """(path, index, clock) of every block of a continuum memory system with a clock of its own."""
    return [
        (path, n, level.clock)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, CMS)
        for n, level in enumerate(module.levels)
        if level.clock.period is not None
    ]
