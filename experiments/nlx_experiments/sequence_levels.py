# SPDX-License-Identifier: Apache-2.0
"""Models whose blocks learn in every row too, trained through their writes in the context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nlx import nn, writes
from nlx.clock import Clock
from nlx_experiments import sequence_learner
from nlx_experiments.sequence_learner import Learners


@dataclasses.dataclass(frozen=True)
class InContext:
    """A model, and which of its blocks learn in the context, how fast."""

    config: nn.ModelConfig
    """Of the model; with as many blocks of a continuum memory system as there are periods."""
    periods: tuple[int | None, ...]
    """Chunks from one write of a block to the next, fast to slow; None: it stands still."""
    rate: float
    """Of gradient descent in the context, the same for all."""
    chunk_size: int
    """Tokens of a chunk."""

    def __post_init__(self) -> None:
        """Raises ValueError, a sentence that names the field."""
        given = len(self.config.cms_periods) if self.config.feed_forward == "cms" else 0
        if len(self.periods) != given or self.periods[:1] in ((), (None,)):
            raise ValueError(
                f"`periods` is {self.periods}; there must be one for each of the model's {given} "
                "blocks, and the first must fire."
            )
        if not self.rate >= 0:
            raise ValueError(f"`rate` is {self.rate}; it must be >= 0.")
        if self.chunk_size < 1:
            raise ValueError(f"`chunk_size` is {self.chunk_size}; it must be an integer >= 1.")


@functools.lru_cache(maxsize=8)
def make(
    config: InContext, *, steps: int, noise: float = 0.0, decay: bool = False, decoded: int = 0
) -> Learners:
    """As `sequence_learner.make`, for models that learn in the context.

    Training differentiates through all that the blocks learn in a row; see `answer`.

    noise, decoded: must be 0. Raises ValueError otherwise.
    """
    if noise or decoded:
        raise ValueError(
            f"`noise` is {noise} and `decoded` is {decoded}; a model that learns in the context "
            "reads symbols and answers where they stand: both must be 0."
        )

    build = lambda rngs: nn.LanguageModel(config.config, rngs=rngs)
    count = sequence_learner.count(config.config)
    reads = lambda model, tokens, key: answer(config, model, tokens)
    return sequence_learner.learners(build, reads, steps=steps, decay=decay, parameters=count)


def answer(
    config: InContext, model: nn.LanguageModel, tokens: Int[Array, "b t"]
) -> Float[Array, "b t s"]:
    """Scores of the answer at every symbol, from what was written before its chunk.

    Every row begins with the model's weights. At the end of its period each block goes down the
    gradient of the next symbol's loss, the answers that the row shows among them.

    tokens: t a multiple of the chunk's size. Raises ValueError otherwise.
    """
    write = writes.summed(optax.sgd(config.rate))
    nest = nn.in_context(model, write, [Clock(period) for period in config.periods])
    mixers = model.init_state(len(tokens), tokens.shape[1])
    start = nn.begin(nest, nest.init(jax.random.key(0)), mixers)
    followed = jnp.pad(tokens, ((0, 0), (0, 1)))  # what follows the last one is read by none
    size, window = config.chunk_size, max(1, tokens.shape[1] // config.chunk_size)
    return nn.stream(nest, start, followed, chunk_size=size, window=window)[0]
