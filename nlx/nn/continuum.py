# SPDX-License-Identifier: Apache-2.0
"""Continuum memory systems in context: every row's blocks learn from the tokens it has seen."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nlx import writes
from nlx.clock import Clock
from nlx.level import Level, LevelState
from nlx.nest import Nest
from nlx.nn.checks import check_clocks, check_integers
from nlx.nn.cms import CMS
from nlx.nn.linear import check_sizes
from nlx.nn.model import LanguageModel, ModelState, by_level, clocks_by_level, restarts_by_level
from nlx.train import next_token_loss as mean_loss
from nlx.writes import Write


class Chunk(NamedTuple):
    """One tick's context of `in_context`: some tokens of one row."""

    tokens: Int[Array, " t"]
    successors: Int[Array, " t"]  # the token after each; the write waits for the last one
    state: ModelState  # of the mixers before the chunk, without the rows' axis


class StreamState(NamedTuple):
    """What `stream` carries from one call to the next; a row for each user."""

    levels: dict[str, LevelState]  # params and carries [b, ...]; of "outer" shared by all rows
    mixers: ModelState


def in_context(
    model: LanguageModel, write: Write | Sequence[Write], clocks: Sequence[Clock] | None = None
) -> Nest:
    """A row's context as a nest: block l of every layer is level "cms_<l>", one tick a chunk.

    Each level holds {path: parameter}, starts where the model stands, and at the end of its period
    learns from the loss of the next token, averaged over each chunk, through the chunk: Eq. 71. The
    level "outer", all that is no block of a continuum memory system, stands still. In the nested
    variant what a level adds to others' initial states starts anew as `restarts_by_level` says.

    Contexts are `Chunk`s of one row, of any length; the output is (scores [t, s], the mixers' state
    after the chunk), made before the write. Rows are mapped over: see `stream`.

    Args:
      model: with at least one block that has a clock.
      write: of every level, or one per level, high to low frequency: `writes.summed` of any optax
        rule, `writes.fast`.
      clocks: in chunks, one per level, high to low frequency; None: the model's own.

    Raises:
      ValueError, TypeError: no block with a clock; what are no writes or clocks, or not as many
        as levels; clocks that `CMS` would refuse.
    """
    graphdef, parts, join = by_level(model)
    names = [name for name in parts if name != "outer"]
    if not names:
        raise ValueError("`model` has no block with a clock; see `nlx.nn.from_pretrained_mlps`.")
    by_name = dict(clocks_by_level(model))
    if clocks is not None:
        variants = [m.variant for _, m in nnx.iter_modules(model) if isinstance(m, CMS)]
        check_clocks(clocks, variants[0])
        by_name |= _each("clocks", clocks, names)
    several = [write] * len(names) if isinstance(write, Write) else write
    if not isinstance(several, Sequence) or not all(isinstance(w, Write) for w in several):
        raise TypeError(
            f"`write` is a {type(write).__name__}; it must be an `nlx.Write`, such as "
            "`nlx.writes.summed` makes of an optax rule, or one for each level."
        )
    restarts = restarts_by_level(model, by_name)

    def level(name: str, write: Write) -> Level:
        own = writes.restarted(write, restarts[name]) if name in restarts else write
        return Level(lambda key: parts[name], None, own, by_name[name])

    def forward(params_by_name, chunk: Chunk):
        one_row = jax.tree.map(lambda x: x[None], (chunk.tokens, chunk.state))
        after = nnx.merge(graphdef, join(params_by_name))(*one_row)
        return jax.tree.map(lambda x: x[0], after), {}

    def next_token_loss(params_by_name, chunk: Chunk):
        (scores, _), _ = forward(params_by_name, chunk)
        tokens = jnp.concatenate([chunk.tokens[:1], chunk.successors])
        return mean_loss(scores[None], tokens[None])

    levels = {name: level(name, own) for name, own in _each("write", several, names).items()}
    levels["outer"] = Level(lambda key: parts["outer"])
    return Nest(levels, forward, next_token_loss)


def begin(nest: Nest, params: dict[str, Any], mixers: ModelState) -> StreamState:
    """Where every row stands before its first token: `stream` goes on from it.

    nest: of `in_context`. params: by level, as `nest.init` returns them. mixers: as the model's
    `init_state`, whose rows these are.
    """
    rows = jax.tree.leaves(mixers)[0].shape[0]
    own = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), tree)
    levels = nest.start(params, jnp.int32(0))
    for name, (shared, carry, tick) in levels.items():
        if _learns(nest, name):
            levels[name] = LevelState(own(shared), own(carry), tick)
    return StreamState(levels, mixers)


def anew(state: StreamState, start: StreamState, rows: Bool[Array, " b"]) -> StreamState:
    """Rows that begin another sample: what their blocks and mixers learned of the last is gone.

    Clocks are the batch's: a row's first period ends where the others' does.

    state: as `stream` returned it. start: of `begin`, of as many rows. rows: which of them.
    Raises ValueError where `rows` is no boolean for each row.
    """
    if jnp.shape(rows) != (count := len(jax.tree.leaves(state.mixers)[0]),):
        raise ValueError(f"`rows` has shape {jnp.shape(rows)}; it must be {count} booleans.")
    mask = lambda x: rows.reshape(-1, *[1] * (x.ndim - 1))
    pick = lambda new, old: jax.tree.map(lambda a, b: jnp.where(mask(a), a, b), new, old)
    levels = {
        name: held
        if held.carry == ()
        else held._replace(
            params=pick(start.levels[name].params, held.params),
            carry=pick(start.levels[name].carry, held.carry),
        )
        for name, held in state.levels.items()
    }
    return StreamState(levels, pick(start.mixers, state.mixers))


def stream(
    nest: Nest,
    state: StreamState,
    tokens: Int[Array, "b t+1"],
    *,
    chunk_size: int,
    window: int = 1,
) -> tuple[Float[Array, "b t s"], StreamState]:
    """Scores of the next token, chunk by chunk, while every row's blocks learn from its own.

    One tick of the nest for every chunk of every row. A chunk is scored by what the rows wrote from
    the chunks before it. No row sees another's tokens, weights or memories of its rule.

    Args:
      nest: of `in_context`.
      state: as `begin` or an earlier call returned it.
      tokens: one more than are read, t a multiple of `chunk_size`: the last one is only learned
        from, and the next call begins with it.
      chunk_size: tokens of one tick.
      window: chunks of this call through whose writes an outer gradient flows. At the end of each
        window the weights become constants plus what the window began with, so an initial state
        gets the gradients of all that came of it, as if later writes did not depend on it. 1: no
        gradient flows through any write. Between chunks the mixers' states are always
        differentiated.

    Returns:
      Scores as the model gives them, and the state after the last chunk.

    Raises:
      ValueError, TypeError: tokens that are no integers [b, t+1], no whole chunks, or of other rows
        than the state; sizes below 1.
    """
    check_sizes(chunk_size=chunk_size, window=window)
    check_integers("tokens", tokens)
    if len(tokens) != (held := len(jax.tree.leaves(state.mixers)[0])):
        raise ValueError(
            f"`tokens` are of {len(tokens)} rows; they must be of {held}, as the state."
        )
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    if length < 1 or length % chunk_size:
        raise ValueError(
            f"`tokens` has shape {tokens.shape}; its length must be one more than a multiple of "
            f"chunk_size = {chunk_size}."
        )
    cut = lambda x: jnp.moveaxis(x.reshape(rows, -1, chunk_size), 1, 0)
    chunks = cut(tokens[:, :-1]), cut(tokens[:, 1:])
    outer = {name: level for name, level in state.levels.items() if not _learns(nest, name)}
    inner = {name: level for name, level in state.levels.items() if name not in outer}
    carry, parts, count = (inner, state.mixers), [], length // chunk_size
    whole = count // window * window
    run = jax.checkpoint(functools.partial(_window, nest, outer), prevent_cse=False)
    for part, size in (
        ([x[:whole] for x in chunks], window),
        ([x[whole:] for x in chunks], count - whole),
    ):
        if len(part[0]):
            windows = [x.reshape(-1, size, *x.shape[1:]) for x in part]
            carry, scores = jax.lax.scan(run, carry, windows)
            parts.append(scores.reshape(-1, *scores.shape[2:]))
    scores = jnp.moveaxis(jnp.concatenate(parts), 0, 1)
    inner, mixers = carry
    tick = next(iter(inner.values())).tick
    levels = inner | {name: level._replace(tick=tick) for name, level in outer.items()}
    return scores.reshape(rows, length, -1), StreamState(levels, mixers)


def _learns(nest: Nest, name: str) -> bool:
    return nest.levels[name].clock.period is not None


def _each(name: str, given: Sequence, levels: Sequence[str]) -> dict[str, Any]:
    """One for each level."""
    if len(given) != len(levels):
        raise ValueError(
            f"`{name}` has {len(given)} entries; it must have {len(levels)}, one for each level."
        )
    return dict(zip(levels, given, strict=True))


def _window(nest: Nest, outer: dict[str, LevelState], carry, chunks):
    """(carry, [tokens, successors] [n, b, t]) -> (carry, scores): n ticks of all rows."""
    first = {name: level.params for name, level in carry[0].items()}
    scores = []
    if (before := len(chunks[0]) - 1) > 0:
        tick = functools.partial(_tick, nest, outer, nest.step)
        carry, early = jax.lax.scan(tick, carry, [x[:before] for x in chunks])
        scores.append(early)

    def last(states, chunk):
        """A tick whose write is a constant to outer gradients, and costs them nothing."""
        after, _ = nest.step(*jax.lax.stop_gradient((states, chunk)))
        return after, nest.forward({name: s.params for name, s in states.items()}, chunk)[0]

    (levels, mixers), final = _tick(nest, outer, last, carry, [x[before] for x in chunks])
    levels = {
        name: LevelState(
            jax.tree.map(_as_if, first[name], params), jax.lax.stop_gradient(written), tick
        )
        for name, (params, written, tick) in levels.items()
    }
    return (levels, mixers), jnp.concatenate([*scores, final[None]])


def _tick(nest: Nest, outer: dict[str, LevelState], step: Callable, carry, chunk):
    """One tick of every row."""
    levels, mixers = carry
    at = next(iter(levels.values())).tick
    states = levels | {name: level._replace(tick=at) for name, level in outer.items()}
    shared: Any = 0 if jnp.ndim(at) else None
    axes: dict[str, Any] = {
        name: LevelState(0, 0, shared) if name in levels else LevelState(None, None, shared)
        for name in states
    }
    rows = jax.vmap(step, in_axes=(axes, 0), out_axes=(axes, 0))
    after, (scores, mixers) = rows(states, Chunk(chunk[0], chunk[1], mixers))
    return ({name: after[name] for name in levels}, mixers), scores


@jax.custom_jvp
def _as_if(x, y):
    """y, but what flows back goes to x."""
    del x
    return y


@_as_if.defjvp
def _as_if_jvp(primals, tangents):
    return primals[1], tangents[0]
