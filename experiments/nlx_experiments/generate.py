# SPDX-License-Identifier: Apache-2.0
"""Bytes from a trained run, one at a time, from its recurrent state in constant memory."""

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
from nlx_experiments import config, data, learner


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt with the model of a run, byte by byte."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Folder of a run, finished or not."""
    prompt: str = "def "
    """What comes first; nothing begins a new file."""
    length: int = 400
    """Bytes to add."""
    temperature: float = 0.8
    """0 takes the likeliest byte each time, 1 samples as the model predicts."""
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
    """Prints the prompt and, as they come, the bytes after it."""
    model = learner.load(config.of_run(options.run))
    out = sys.stdout.buffer
    out.write(options.prompt.encode(errors="surrogateescape"))
    for byte in stream(
        model,
        options.prompt,
        length=options.length,
        temperature=options.temperature,
        seed=options.seed,
    ):
        out.write(shown(byte))
        out.flush()
    out.write(b"\n")
    out.flush()


def shown(byte: int) -> bytes:
    """A byte as it is printed: the end of a file as an empty line."""
    return b"\n\n" if byte == data.SEPARATOR else bytes([byte])


def stream(
    model: nn.LanguageModel, prompt: str, *, length: int, temperature: float, seed: int
) -> Iterator[int]:
    """Yields `length` bytes: one pass over the prompt, then one compiled step a byte.

    Args:
      model: a language model of bytes; its state is all that is carried from byte to byte.
      prompt: text, which may be empty.
      length: bytes to yield.
      temperature: divides the logits; 0 takes the largest.
      seed: of the sample; byte i is drawn with the i-th key derived from it.
    """
    tokens = data.encode(prompt) if prompt else np.array([data.SEPARATOR], np.uint8)
    graph, weights = nnx.split(model)
    run = jax.jit(functools.partial(_advance, graph))
    state = model.init_state(1, capacity=len(tokens) + length)
    key = jax.random.key(seed)
    logits, state = run(weights, jnp.asarray(tokens[None], jnp.int32), state)
    for i in range(length):
        token = _draw(logits, temperature, jax.random.fold_in(key, i))
        yield int(token)
        if i + 1 < length:
            logits, state = run(weights, token[None, None], state)


def _advance(graph, weights, tokens: Int[Array, "b t"], state):
    logits, state = nnx.merge(graph, weights)(tokens, state)
    return logits[0, -1], state


@jax.jit
def _draw(logits: Float[Array, " s"], temperature: float, key: Key[Array, ""]) -> Int[Array, ""]:
    scaled = logits.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
    drawn = jax.random.categorical(key, scaled)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
