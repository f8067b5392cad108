# SPDX-License-Identifier: Apache-2.0
"""Text from a trained run, token by token, from its recurrent state in constant memory."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nlx import nn
from nlx_experiments import config, learner, tokenization
from nlx_experiments.tokenization import BYTES, Tokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt with the model of a run, token by token."""

    run: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, finished or not."""
    prompt: str = "def "
    """What comes first; nothing begins a new file."""
    length: int = 400
    """Tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token each time, 1 samples as the model predicts."""
    seed: int = 0
    """Of the sample."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for a number out of range."""
        if self.length < 1:
            raise ValueError(f"`length` is {self.length}; it must be at least 1.")
        if not 0 <= self.temperature < 100:
            raise ValueError(f"`temperature` is {self.temperature}; it must be in [0, 100).")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"`seed` is {self.seed}; it must be in [0, 2**31).")


def main(options: Generate) -> None:
    """Prints the prompt and, as they come, the tokens after it."""
    chosen = config.of_run(options.run)
    tokenizer = tokenization.of_run(options.run, chosen.tokenizer)
    model = learner.load(chosen)
    out = sys.stdout.buffer
    out.write(options.prompt.encode(errors="surrogateescape"))
    for token in stream(
        model,
        options.prompt,
        tokenizer,
        length=options.length,
        temperature=options.temperature,
        seed=options.seed,
    ):
        out.write(shown(token, tokenizer))
        out.flush()
    out.write(b"\n")
    out.flush()


def shown(token: int, tokenizer: Tokenizer = BYTES) -> bytes:
    """A token as it is printed: the end of a file as an empty line."""
    return b"\n\n" if token == tokenizer.separator else tokenizer.decode([token])


def stream(
    model: nn.LanguageModel,
    prompt: str,
    tokenizer: Tokenizer = BYTES,
    *,
    length: int,
    temperature: float,
    seed: int,
) -> Iterator[int]:
    """Yields `length` tokens: one pass over the prompt, then one compiled step a token.

    Args:
      model: a language model; its state is all that is carried from token to token.
      prompt: text, which may be empty.
      tokenizer: whose tokens the model knows; those above its size are never drawn.
      length: tokens to yield.
      temperature: divides the logits; 0 takes the largest.
      seed: of the sample; token i is drawn with the i-th key derived from it.
    """
    tokens = tokenizer.encode(prompt) if prompt else np.array([tokenizer.separator])
    graph, weights = nnx.split(model)
    run = functools.partial(_advance, graph)
    state = model.init_state(1, capacity=len(tokens) + length)
    key = jax.random.key(seed)
    logits, state = run(weights, jnp.asarray(tokens[None], jnp.int32), state)
    for i in range(length):
        known = logits[: tokenizer.size]
        token = _draw(known, temperature, jax.random.fold_in(key, i))
        yield int(token)
        if i + 1 < length:
            logits, state = run(weights, token[None, None], state)


@functools.partial(jax.jit, static_argnums=0)
def _advance(graph, weights, tokens: Int[Array, "b t"], state):
    logits, state = nnx.merge(graph, weights)(tokens, state)
    return logits[0, -1], state


@jax.jit
def _draw(logits: Float[Array, " s"], temperature: float, key: Key[Array, ""]) -> Int[Array, ""]:
    scaled = logits.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
    drawn = jax.random.categorical(key, scaled)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
