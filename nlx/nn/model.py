# SPDX-License-Identifier: Apache-2.0
"""Language models: tokens and a state in, scores of the next token and a state out."""

from collections.abc import Callable, Mapping
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
from nlx.nn.attention import Attention, capacity_of, check_room
from nlx.nn.block import Block, BlockState
from nlx.nn.checks import check_call, check_integers, check_state
from nlx.nn.cms import CMS
from nlx.nn.feedforward import MLP, SwiGLU
from nlx.nn.linear import Embedding, Linear
from nlx.nn.mixer import make_mixer
from nlx.nn.norm import RMSNorm
from nlx.nn.presets import MixerName, ModelConfig
from nlx.parallel import by_rows, by_tokens
from nlx.train import language_model_loss
from nlx.writes import Write

ModelState = tuple[BlockState, ...]


class LanguageModel(nnx.Module):
    """Embedding, blocks, a last norm, a read-out; one code path trains, prefills and decodes.

    Parameters are float32, or float64 where it was enabled when the model was made.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """config: what it is made of; see `preset`. rngs: `nnx.Rngs(seed)`.

        Raises TypeError for a `config` that is no `ModelConfig`.
        """
        if not isinstance(config, ModelConfig):
            raise TypeError(
                f"`config` is {config!r}; it must be an nlx.nn.ModelConfig, such as "
                '`nlx.nn.preset("hope-tiny")`.'
            )
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width, rngs=rngs)
        mixers = config.mixers * (config.layers // len(config.mixers))
        self.blocks = nnx.List([make_block(config, mixer, rngs=rngs) for mixer in mixers])
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
        check_integers("tokens", tokens)
        x, after = self.mix(self.embed(tokens), state, segment_ids)
        return self.read_out(x), after

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """What the first block is given."""
        return by_tokens(self.embedding(tokens).astype(self._dtype()))

    def read_out(self, x: Float[Array, "b t d"]) -> Float[Array, "b t s"]:
        """Scores of the next token, at least float32, from what the last block gave."""
        x = self.norm(x)
        scores = self.embedding.scores(x) if self.readout is None else self.readout(x)
        return scores.astype(jnp.promote_types(jnp.float32, scores.dtype))

    def mix(
        self,
        x: Float[Array, "b t d"],
        state: ModelState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], ModelState]:
        """All blocks in order, from what `embed` gave to what `read_out` takes.

        Those of one pattern are compiled, and scanned over its repeats.

        Args:
          x: what the first block is given, or that with something added to it.
          state, segment_ids: as of the call of the model.

        Returns:
          What the last block gave, and the state after the last token.

        Raises:
          ValueError, TypeError: one sentence, before anything is compiled.
        """
        self._check(x, state, segment_ids)
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
                x = by_tokens(x)
                after.append(by_rows(block_state))
            return x, after

        if self.config.remat:
            name = self.config.remat
            policy = None if name is True else getattr(jax.checkpoint_policies, name)
            # inside a scan there is nothing to join
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        x, after = jax.lax.scan(body, x, (parameters, before))
        take = lambda n: jax.tree.map(lambda leaf: leaf[n // period], after[n % period])
        return x, tuple(take(n) for n in range(len(self.blocks)))

    def _dtype(self):
        return jnp.bfloat16 if self.config.bfloat16 else self.embedding.table.dtype

    def _check(self, x, state, segment_ids) -> None:
        check_call(self, self.config.width, x, None, segment_ids)
        if state is None:
            return
        rows = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(state)}
        if len(state) != len(self.blocks) or not rows <= {x.shape[:1]}:
            raise ValueError(
                f"`state` is of {len(state)} blocks and {sorted(sum(rows, ()))} rows; it must be "
                f"of {len(self.blocks)} blocks and {len(x)} rows, as tokens."
            )
        for n, (block, carried) in enumerate(zip(self.blocks, state, strict=True)):
            cache: Any = getattr(carried, "mixer", None)
            name, capacity = f"state[{n}].mixer", capacity_of(cache)
            check_state(name, block.mixer, cache, len(x), x.dtype, capacity)
            grows = isinstance(block.mixer, Attention) and block.mixer.window is None
            if grows and segment_ids is None:  # inside the scan over blocks nothing is known
                check_room(cache.position, x.shape[1], capacity)


def make_block(config: ModelConfig, mixer: MixerName, *, rngs: nnx.Rngs) -> Block:
    """A block of this mixer and the configuration's feed-forward, at its sizes."""
    clocks = [Clock(None)]
    if config.feed_forward == "cms":
        clocks = [Clock(period) for period in config.cms_periods]
    mlp = MLP if config.feed_forward == "cms" else SwiGLU
    variant = config.cms_variant if config.feed_forward == "cms" else "sequential"
    feed_forward = CMS(config.width, config.hidden, clocks, mlp=mlp, variant=variant, rngs=rngs)
    return Block(config.width, make_mixer(config, mixer, rngs=rngs), feed_forward)


def labels_by_level(model: nnx.Module) -> PyTree[str]:
    """The level of every parameter, in the structure of `nnx.split(model)[1]`.

    "cms_<l>" for what the levels of continuum memory systems with a clock of their own hold, l = 0
    the fastest, and "outer" for all else: for `optax.partition`.
    """
    levels = {path: f"cms_{level.rank}" for path, level in _clocked(model)}

    def label(path, variable):
        own = [name for start, name in levels.items() if path[: len(start)] == start]
        return variable.replace(own[0] if own else "outer")

    return nnx.map_state(label, nnx.state(model, nnx.Param))


def clocks_by_level(model: nnx.Module) -> dict[str, Clock]:
    """The clock of every label of `labels_by_level`, in steps of the optimizer."""
    inner = sorted({level.rank: level.clock for _, level in _clocked(model)}.items())
    return {"outer": Clock(1)} | {f"cms_{rank}": clock for rank, clock in inner}


def restarts_by_level(
    model: nnx.Module, clocks: Mapping[str, Clock] | None = None
) -> dict[str, int]:
    """After how many firings the levels of nested continuum memory systems begin anew, by label.

    ceil(C_{l+1} / C_l) for level l, the slowest and "outer" left out; no other levels restart.

    clocks: of the labels, where others than the model's own count.
    Source: Behrouz et al. (2025), Nested Learning, Eq. 72.
    """
    clocks = clocks_by_level(model) if clocks is None else clocks
    systems = (m for _, m in nnx.iter_modules(model) if isinstance(m, CMS))
    nested = [[level.rank for level in m.levels] for m in systems if m.variant == "nested"]
    period = lambda rank: clocks[f"cms_{rank}"].period or 1
    return {
        f"cms_{fast}": -(-period(slow) // period(fast))
        for ranks in nested
        for fast, slow in zip(ranks[:-1], ranks[1:], strict=True)
    }


def pretraining(model: nnx.Module, rule: optax.GradientTransformation) -> Nest:
    """Pre-training as a nest of the levels of `labels_by_level`, one tick a batch.

    Each holds {path: parameter}, starts where the model stands, and learns by the mean gradient of
    its period, under one shared objective: the loss of the next token. Its contexts are batches as
    `nlx.train.language_model_loss` takes them, its output is the loss before the step. It equals a
    train step whose rules run on their clocks (`nlx.optim.on_clock`).

    rule: of every level, an optax transformation.
    """
    graphdef, parts, join = by_level(model)
    task, restarts = language_model_loss(graphdef), restarts_by_level(model)

    def next_token_loss(params_by_name, batch):
        return task(join(params_by_name), batch)

    def write(label: str) -> Write:
        own = writes.summed(rule)
        return writes.restarted(own, restarts[label]) if label in restarts else own

    levels = {
        label: Level(lambda key, label=label: parts[label], None, write(label), clock)
        for label, clock in clocks_by_level(model).items()
    }
    return Nest(levels, lambda params, batch: (next_token_loss(params, batch), {}), next_token_loss)


def by_level(
    model: nnx.Module,
) -> tuple[nnx.GraphDef, dict[str, dict[str, Array]], Callable[[Mapping], nnx.State]]:
    """A model as levels: its graph, {label: {path: parameter}}, and back to one tree of parameters.

    Labels are those of `labels_by_level`; the last part joins what the second has, or had later.
    """
    graphdef, params = nnx.split(model)
    placed, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in placed]
    parts: dict[str, dict[str, Array]] = {label: {} for label in clocks_by_level(model)}
    labels = jax.tree.leaves(labels_by_level(model))
    for path, (_, leaf), label in zip(paths, placed, labels, strict=True):
        parts[label][path] = leaf

    def join(parts: Mapping[str, Mapping[str, Array]]) -> nnx.State:
        whole = {path: leaf for part in parts.values() for path, leaf in part.items()}
        return jax.tree.unflatten(tree, [whole[path] for path in paths])

    return graphdef, parts, join


def parameter_count(model: nnx.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _clocked(model: nnx.Module) -> list[tuple[tuple, Any]]:
    """(path, level) of every level of a continuum memory system with a clock of its own."""
    return [
        ((*path, "levels", n), level)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, CMS)
        for n, level in enumerate(module.levels)
        if level.clock.period is not None
    ]
