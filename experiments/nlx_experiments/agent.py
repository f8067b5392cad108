# SPDX-License-Identifier: Apache-2.0
"""An agent: what it is told, blocks with a memory, a policy and a value."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx import nn
from nlx.clock import Clock
from nlx.nn.checks import check_call
from nlx.nn.feedforward import SwiGLU
from nlx.nn.linear import Linear, check_sizes, normal
from nlx.nn.model import make_block
from nlx.nn.norm import RMSNorm

FIRST_CODE = 0.5  # of an encoder: about four of the numbers that are told at a step are 1
FIRST_SCORES = 0.01  # of an agent that has learned nothing: it tries all actions alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent:
    """A model like those of `nlx.nn.ModelConfig`, its mixer a GRU."""

    width: int
    """Channels."""
    layers: int
    """Blocks, each a GRU and a feed-forward."""
    hidden: int
    """Hidden units of the SwiGLU."""


class GRUState(NamedTuple):
    """What a GRU carries from one call to the next."""

    hidden: Float[Array, "b d"]


class GRU(nnx.Module):
    """y_t = h_t: a mixer of one `flax.nnx.GRUCell`, as wide as its input.

    Source: Cho et al. (2014), Learning Phrase Representations, Eq. 5-8.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        """width: channels of x and y."""
        check_sizes(width=width)
        self.width = width
        self.cell = nnx.GRUCell(width, width, rngs=rngs)

    def init_state(
        self, batch: int, capacity: int | None = None, dtype: DTypeLike | None = None
    ) -> GRUState:
        """Zeros; the capacity changes nothing. dtype: of x, None for float32."""
        del capacity
        return GRUState(jnp.zeros((batch, self.width), dtype or jnp.float32))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: GRUState | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], GRUState]:
        """state: as returned; None: nothing came before. Raises as every mixer does."""
        check_call(self, self.width, x, state, segment_ids)
        start = self.init_state(len(x), dtype=x.dtype) if state is None else state
        anew = jnp.zeros(x.shape[:2], bool)
        if segment_ids is not None:
            anew = anew.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
        graph, params = nnx.split(self.cell)

        def step(hidden, told):
            x, anew = told
            hidden = jnp.where(anew[:, None], 0, hidden)
            hidden, y = nnx.merge(graph, params)(hidden, x)
            return hidden, y

        by_time = lambda z: jnp.swapaxes(z, 0, 1)
        hidden, y = jax.lax.scan(step, start.hidden, (by_time(x), by_time(anew)))
        return by_time(y), GRUState(hidden)


class Agent(nnx.Module):
    """x = p W + silu(p W_1) W_2;  x = block(x), ...;  scores = RMSNorm(x) W_policy,  value so too.

    What is told at a step, p, is made into one vector before any block sees it: a sum of what each
    number means, and of what action and reward mean together. One code path for a lifetime whole,
    in pieces, or step by step.
    """

    def __init__(
        self, config: nn.ModelConfig | Recurrent, percept: int, actions: int, *, rngs: nnx.Rngs
    ):
        """Draws it.

        config: of the blocks; what it says of tokens changes nothing. percept: numbers that it is
        told at a step. actions: that it can choose among.
        """
        check_sizes(percept=percept, actions=actions)
        width = config.width
        self.told = normal(rngs, (percept, width), (None, "embed"), FIRST_CODE)
        self.encoder = normal(rngs, (percept, 2 * width), (None, "mlp"), FIRST_CODE)
        self.encoded = Linear(2 * width, width, ("mlp", "embed"), rngs=rngs)
        self.blocks = nnx.List(_blocks(config, rngs))
        self.norm = RMSNorm(width)
        scale = FIRST_SCORES * width**-0.5
        self.policy = normal(rngs, (width, actions), ("embed", None), scale)
        self.value = normal(rngs, (width, 1), ("embed", None), scale)

    def init_state(self, batch: int, capacity: int) -> tuple[nn.BlockState, ...]:
        """The state before a lifetime. capacity: steps that attention's caches hold."""
        return tuple(block.init_state(batch, capacity) for block in self.blocks)

    def __call__(
        self, percepts: Float[Array, "b t p"], state: tuple[nn.BlockState, ...]
    ) -> tuple[Float[Array, "b t a"], Float[Array, "b t"], tuple[nn.BlockState, ...]]:
        """Scores of the actions (log-probabilities up to a constant), values, the state after."""
        x = percepts @ self.told[...] + self.encoded(jax.nn.silu(percepts @ self.encoder[...]))
        after = []
        for block, carried in zip(self.blocks, state, strict=True):
            x, carried = block(x, carried)
            after.append(carried)
        x = self.norm(x)
        return x @ self.policy[...], (x @ self.value[...])[..., 0], tuple(after)


def _blocks(config: nn.ModelConfig | Recurrent, rngs: nnx.Rngs) -> list[nn.Block]:
    if isinstance(config, nn.ModelConfig):
        names = config.mixers * (config.layers // len(config.mixers))
        return [make_block(config, name, rngs=rngs) for name in names]
    check_sizes(layers=config.layers)
    forward = lambda: nn.CMS(config.width, config.hidden, [Clock(None)], mlp=SwiGLU, rngs=rngs)
    mixer = lambda: GRU(config.width, rngs=rngs)
    return [nn.Block(config.width, mixer(), forward()) for _ in range(config.layers)]


@functools.cache
def count(config: nn.ModelConfig | Recurrent, percept: int, actions: int) -> int:
    """How many numbers an agent of this configuration learns."""
    make = lambda: Agent(config, percept, actions, rngs=nnx.Rngs(0))
    return nn.parameter_count(nnx.eval_shape(make))


def equal(config: Any, percept: int, actions: int, parameters: int) -> Any:
    """The configuration with the `hidden` that brings its parameters nearest to a number.

    Raises ValueError where none comes within 1 %, or by half of what one unit more would take.
    """
    sized = lambda hidden: dataclasses.replace(config, hidden=hidden)
    least, more = (count(sized(hidden), percept, actions) for hidden in (1, 2))
    made = sized(max(1, 1 + round((parameters - least) / (more - least))))
    found = count(made, percept, actions)
    if abs(found - parameters) > max(0.01 * parameters, (more - least) / 2):
        raise ValueError(
            f"`parameters` is {parameters}; it must be at least {least} for {type(config).__name__}"
            f" of width {config.width}."
        )
    return made
