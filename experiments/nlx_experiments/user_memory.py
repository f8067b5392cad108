# SPDX-License-Identifier: Apache-2.0
"""One user's memory, and a fixed batch of users that are read bit by bit as each would be alone.

A memory is a row of the model's state, apart from the weights, with the token that came last: the
model reads it when the next one is known, so every token of a user is foretold, the first one too.

A batch is no batched product. On a CPU the number of rows decides how a product is blocked, so the
last bits of a row of eight are not those of the same row alone: measured with Hope, Titans,
DeltaNet and a Transformer. Here `jax.lax.map` runs one program, of one row, slot after slot; by its
form no slot can change another, whatever the device. An idle slot runs no branch and costs nothing.
Against a batched product of eight rows (width 64, two layers, two cores) that takes 0.8 to 1.6
times as long for 32 tokens a row and 1.0 to 1.6 times for one.

A slot that has a whole piece to read takes it at once, else its tokens one after the other. Who
watches levels has pieces of `every` tokens. So a user's memory depends, in its last bits, on how
the user's own text was cut into requests and how often it was watched, and on no other user.
"""

import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from nlx import nn
from nlx.inspect import surprise
from nlx.inspect.traces import norm
from nlx.nn.attention import Attention
from nlx_experiments.tokenization import BYTES, Tokenizer

PIECE = 32  # tokens that are read at once


class Memory(NamedTuple):
    """What is kept of one user."""

    state: PyTree[Any]  # a row of the model's state
    last: Any  # int32: the token that came last, not yet in the state
    position: Any  # int32: tokens in the state


class Asked(NamedTuple):
    """What every slot of a batch is to do in one call."""

    tokens: Int[np.ndarray, "b p"]  # to read
    targets: Int[np.ndarray, "b p"]  # the token that came after each
    count: Int[np.ndarray, " b"]  # how many of them, at most p; 0: the slot is idle
    watched: Bool[np.ndarray, " b"]  # whether its levels are measured
    seed: Int[np.ndarray, " b"]  # of the token drawn after the last one read
    index: Int[np.ndarray, " b"]  # which of the seed's tokens that is
    temperature: Float[np.ndarray, " b"]  # 0 takes the likeliest


class Answer(NamedTuple):
    """What every slot has done."""

    bits: Float[Array, "b p"]  # what each target cost; of the first `count`
    drawn: Int[Array, " b"]
    moved: Float[Array, "b l"]  # |W - W_start| of every level, 0 where not watched
    update: Float[Array, "b l"]  # |W - W_before|


class Level(NamedTuple):
    """What is written while a user's tokens are read."""

    name: str
    period: int  # tokens between two firings of its clock


class Reader:
    """A model, and a batch of slots that it reads for; one compiled function does it all."""

    def __init__(
        self,
        model: nn.LanguageModel,
        tokenizer: Tokenizer = BYTES,
        *,
        slots: int = 8,
        piece: int = PIECE,
    ):
        """All slots are empty. slots: users at once, >= 1. piece: tokens read at once, >= 1."""
        self.graph, weights = nnx.split(model)
        # What is put on a device is compiled for apart from what merely is there: all is put there.
        self._device = jax.devices()[0]
        self.weights = jax.device_put(weights, self._device)
        self.slots, self.piece, self.size = slots, piece, tokenizer.size
        self.levels = levels(model)
        row = jax.tree.map(lambda x: np.asarray(x[0]), model.init_state(1))
        self.start = Memory(row, np.int32(tokenizer.separator), np.int32(0))
        self.capacity = model.config.context if grows(model) else None
        self.identity = identity(model)
        self.clear()
        self._first = jax.device_put(self.start.state, self._device)
        self._advance = jax.jit(self._all, donate_argnums=2)
        self._put = jax.jit(
            lambda state, row, slot: jax.tree.map(lambda x, r: x.at[slot].set(r), state, row),
            donate_argnums=0,
        )
        self._take = jax.jit(lambda state, slot: jax.tree.map(lambda x: x[slot], state))

    @property
    def bytes(self) -> int:
        """Of one user's memory, as it is kept and saved."""
        return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(self.start))

    def clear(self) -> None:
        """Empties all slots."""
        repeat = lambda x: np.repeat(x[None], self.slots, 0)
        self.state = jax.device_put(jax.tree.map(repeat, self.start.state), self._device)

    def put(self, slot: int, state: PyTree[Any]) -> None:
        """A user's state into a slot."""
        self.state = self._put(self.state, state, slot)

    def take(self, slot: int) -> PyTree[np.ndarray]:
        """The state of a slot, copied to the host."""
        return jax.tree.map(np.array, self._take(self.state, slot))

    def nothing(self) -> Asked:
        """A call in which every slot is idle; arrays to be filled in."""
        of = lambda kind, *more: np.zeros((self.slots, *more), kind)
        tokens = of(np.int32, self.piece), of(np.int32, self.piece)
        last = of(np.int32), of(bool), of(np.int32), of(np.int32), of(np.float32)
        return Asked(*tokens, *last)

    def read(self, asked: Asked) -> Answer:
        """Does what is asked; the slots then hold what was read."""
        answer, self.state = self._advance(self.weights, self._first, self.state, asked)
        return jax.tree.map(np.asarray, answer)

    def _all(self, weights, first, state, asked: Asked):
        return jax.lax.map(lambda row: self._row(weights, first, *row), (asked, state))

    def _row(self, weights, first, asked: Any, state):
        """One slot. A whole piece is read at once, fewer tokens one by one, none not at all."""
        run = lambda tokens, state: jax.tree.map(
            lambda x: x[0],
            nnx.merge(self.graph, weights)(tokens[None], jax.tree.map(lambda x: x[None], state)),
        )
        key = jax.random.fold_in(jax.random.key(asked.seed), asked.index)

        def draw(scores: Float[Array, " s"]) -> Int[Array, ""]:
            scaled = scores / jnp.maximum(asked.temperature, 1e-6)
            drawn = jax.random.categorical(key, scaled)
            return jnp.where(asked.temperature > 0, drawn, jnp.argmax(scores)).astype(jnp.int32)

        def idle(state):
            return jnp.zeros(self.piece), jnp.int32(0), state

        def at_once(state):
            scores, state = run(asked.tokens, state)
            scores = scores[:, : self.size].astype(jnp.float32)
            return surprise(scores, asked.targets), draw(scores[-1]), state

        def one_by_one(state):
            def token(n, carry):
                bits, _, state = carry
                scores, state = run(asked.tokens[n][None], state)
                scores = scores[0, : self.size].astype(jnp.float32)
                cost = surprise(scores[None], asked.targets[n][None])[0]
                return bits.at[n].set(cost), scores, state

            begin = jnp.zeros(self.piece), jnp.zeros(self.size), state
            bits, scores, state = jax.lax.fori_loop(0, asked.count, token, begin)
            return bits, draw(scores), state

        kind = jnp.where(asked.count == 0, 0, jnp.where(asked.count == self.piece, 1, 2))
        bits, drawn, after = jax.lax.switch(kind, (idle, at_once, one_by_one), state)
        apart = lambda one, other: jnp.stack(
            [norm(jax.tree.map(jnp.subtract, a, b)) for a, b in zip(one, other, strict=True)]
            or [jnp.float32(0)]
        ).astype(jnp.float32)

        def measured():
            held = [list(written(tree).values()) for tree in (after, first, state)]
            return apart(held[0], held[1]), apart(held[0], held[2])

        unknown = lambda: (jnp.zeros(max(1, len(self.levels))),) * 2
        moved, update = jax.lax.cond(asked.watched, measured, unknown)
        return Answer(bits, drawn, moved, update), after


def written(state: PyTree[Array]) -> dict[str, list[Array]]:
    """Level -> its arrays, those that are written at every token: no windows, no caches.

    state: a row of a model's state, or all rows.
    """
    found: dict[str, list[Array]] = {}
    for n, block in enumerate(state):
        for path, leaf in jax.tree_util.tree_flatten_with_path(block.mixer)[0]:
            words = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
            if "memory" not in words:
                continue
            rest = words[words.index("memory") + 1 :]
            if rest and rest[0] != "weights":
                continue
            box = rest[1] if len(rest) > 2 else "memory"
            found.setdefault(f"blocks.{n}.{box}", []).append(leaf)
    return found


def levels(model: nn.LanguageModel) -> list[Level]:
    """Those that are written while the model reads, in the order of `written`."""
    state = jax.eval_shape(lambda: model.init_state(1, 1))
    found = []
    for name in written(state):
        _, n, box = name.split(".")
        mixer: Any = model.blocks[int(n)].mixer
        modules: Any = [module for _, module in nnx.iter_modules(mixer)]
        clocks = {
            level.split(".")[0]: own.clock.period
            for module in modules
            if hasattr(module, "ticks")
            for level, own in module.nest().levels.items()
        }
        found.append(Level(name, clocks[box] or 1))
    return found


def grows(model: nn.LanguageModel) -> bool:
    """Whether its state has room for so many tokens and no more."""
    of = (module for _, module in nnx.iter_modules(model) if isinstance(module, Attention))
    return any(attention.window is None for attention in of)


def identity(model: nn.LanguageModel) -> str:
    """A digest of the model's configuration and weights: whose memories are whose."""
    found = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(nnx.state(model)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def firings(position: int, count: int, period: int) -> int:
    """How often a clock fires while `count` tokens are read after `position` of them."""
    return (position + count) // period - position // period


def finite(bits: Float[np.ndarray, " n"]) -> list[float | None]:
    """Costs as JSON holds them: rounded, None for what is no number."""
    return [round(float(b), 4) if math.isfinite(b) else None for b in bits]
