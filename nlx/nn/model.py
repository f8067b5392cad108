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
from nlx.nn.attention import Attention
from nlx.nn.block import Block, BlockState, Mixer
from nlx.nn.cms import CMS
from nlx.nn.feedforward import MLP, SwiGLU
from nlx.nn.hope import SelfModifying
from nlx.nn.linear import Embedding, Linear
from nlx.nn.norm import RMSNorm
from nlx.nn.presets import ModelConfig
from nlx.nn.titans import TitansLMM, TitansMAG, TitansMAL
from nlx.nn.titans_mac import TitansMAC
from nlx.train import language_model_loss

ModelState = tuple[BlockState, ...]

TITANS = {
    "titans_lmm": TitansLMM,
    "titans_mac": TitansMAC,
    "titans_mag": TitansMAG,
    "titans_mal": TitansMAL,
}


class LanguageModel(nnx.Module):
    """Embedding, blocks, a last norm, a read-out; one code path trains, prefills and decodes.

    Parameters are float32, or float64 where it was enabled when the model was made.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """config: what it is made of; see `preset`. rngs: `nnx.Rngs(seed)`."""
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width, rngs=rngs)
        self.blocks = nnx.List([_block(config, rngs) for _ in range(config.layers)])
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
        """All blocks in order; they are alike, so one is compiled and scanned over the others."""
        graph, _ = nnx.split(self.blocks[0])
        stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        parameters = stack(*(nnx.state(block) for block in self.blocks))
        before = None if state is None else stack(*state)

        def body(x, block):
            own, block_state = block
            return nnx.merge(graph, own)(x, block_state, segment_ids)

        x, after = jax.lax.scan(body, x, (parameters, before))
        take = lambda n: jax.tree.map(lambda leaf: leaf[n], after)
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


def _block(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    mixer = _mixer(config, rngs)
    clocks = [Clock(None)]
    if config.feed_forward == "cms":
        clocks = [Clock(period) for period in config.cms_periods]
    mlp = MLP if config.feed_forward == "cms" else SwiGLU
    feed_forward = CMS(config.width, config.hidden, clocks, mlp=mlp, rngs=rngs)
    return Block(config.width, mixer, feed_forward)


def _mixer(config: ModelConfig, rngs: nnx.Rngs) -> Mixer:
    if config.mixer == "attention":
        return Attention(config.width, heads=config.heads, kv_heads=config.kv_heads, rngs=rngs)
    if config.mixer in TITANS:
        return _titans(config, rngs)
    return SelfModifying(
        config.width,
        heads=config.heads,
        hidden=config.memory_hidden,
        chunk_size=config.chunk_size,
        projection_chunk_size=config.projection_chunk_size,
        read=config.read,
        momentum=config.momentum,
        erase=config.erase,
        adaptive_query=config.adaptive_query,
        rngs=rngs,
    )


def _titans(config: ModelConfig, rngs: nnx.Rngs) -> Mixer:
    kind = TITANS[config.mixer]
    window = {"window": config.window} if kind in (TitansMAG, TitansMAL) else {}
    return kind(
        config.width,
        heads=config.heads,
        hidden=config.memory_hidden,
        depth=config.memory_depth,
        chunk_size=config.chunk_size,
        persistent=config.persistent,
        momentum=config.momentum,
        read=config.read,
        rngs=rngs,
        **window,
    )


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
