# SPDX-License-Identifier: Apache-2.0
"""What a model's memories do with a held-out text while it is being trained: probe.jsonl.

Every so many steps the same first tokens of the held-out text are read tick by tick
(`nlx.inspect.watch`): the means of what surprises each memory, how far it is written, and what it
keeps.
"""

from collections.abc import Callable
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from nlx import inspect
from nlx_experiments import learner, runs
from nlx_experiments.config import TrainConfig
from nlx_experiments.tokenization import Tokens

Probe = Callable[[int, PyTree[Array]], dict[str, Any]]


def make(config: TrainConfig, tokens: Tokens, stream: TextIO) -> Probe:
    """(step, parameters) -> the record, written to `stream` too; compiled when first called."""
    graph = nnx.graphdef(learner.abstract(config))
    text = tokens.heldout[None, : config.length].astype("int32")

    @jax.jit
    def means(params: PyTree[Array], text: Array) -> Any:
        seen = inspect.watch(nnx.merge(graph, params), text)
        shown = ("surprise", "update", "retain")
        of_level = lambda trace: {name: jnp.mean(getattr(trace, name)) for name in shown}
        return jnp.mean(seen.bits), {name: of_level(trace) for name, trace in seen.levels.items()}

    def probe(step: int, params: PyTree[Array]) -> dict[str, Any]:
        bits, levels = jax.device_get(means(params, text))
        of_level = lambda level: {name: round(float(x), 6) for name, x in level.items()}
        told = {name: of_level(level) for name, level in levels.items()}
        record = {"step": step, "bits_per_token": round(float(bits), 6), "levels": told}
        runs.append(stream, [record])
        return record

    return probe
