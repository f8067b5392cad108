# SPDX-License-Identifier: Apache-2.0
"""Trains many small forecasters at once: every seed at every learning rate."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from nlx import nn
from nlx.nn.linear import Linear
from nlx_experiments import forecasting_tasks as tasks
from nlx_experiments import sequence_learner
from nlx_experiments.forecasting_tasks import Windows

PATCH = 4  # months


class Size(NamedTuple):
    """Of the models, and how they are trained."""

    context: int  # months of a window, a multiple of PATCH
    horizons: tuple[int, ...]
    width: int
    layers: int
    parameters: int
    steps: int
    every: int  # steps between two validations
    rates: tuple[float, ...]
    seeds: int
    rows: int


class Forecaster(nnx.Module):
    """A window in patches, a language model's blocks over them, its future from the last patch."""

    def __init__(self, config: nn.ModelConfig, horizon: int, *, rngs: nnx.Rngs):
        """config: of the blocks. horizon: months."""
        self.embed = Linear(PATCH, config.width, (None, "embed"), rngs=rngs)
        self.model = nn.LanguageModel(config, rngs=rngs)
        self.output = Linear(config.width, horizon, ("embed", None), rngs=rngs)

    def __call__(self, past: Float[Array, "b c"]) -> Float[Array, "b h"]:
        """past: normalised windows, of a multiple of PATCH months."""
        x, _ = self.model.mix(self.embed(past.reshape(len(past), -1, PATCH)))
        return self.output(self.model.norm(x[:, -1]))


def measure(
    config: nn.ModelConfig,
    horizon: int,
    size: Size,
    parts: tuple[Windows, Windows, Windows],
    control: bool = False,
    leave: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains every seed at every rate at once, and examines them.

    config: of the blocks. horizon: months. parts: to train, to choose, to report on. control:
    whether windows are trained with what follows others. leave: called after every validation; may
    raise.

    Returns "rates": rate -> {"validation", "mse", "mae"}, by seed; "rate": the best; "steps",
    "seconds", "parameters", "device".
    """
    begun = time.monotonic()
    build = lambda rngs: Forecaster(config, horizon, rngs=rngs)
    missed = lambda model, past, future, key: jnp.mean(jnp.square(model(past) - future))
    init, learn = sequence_learner.trainer(build, missed, steps=size.steps, decay=True)
    pairs = [(rate, seed) for rate in size.rates for seed in range(size.seeds)]
    rates = jnp.asarray([rate for rate, _ in pairs], jnp.float32)
    seeds = jnp.asarray([seed for _, seed in pairs], jnp.uint32)
    state, keys = init(seeds), jax.vmap(jax.random.key)(seeds)
    known, generator = tasks.normalised(parts[0])[0], np.random.default_rng(0)
    validation, test = (functools.partial(_errors, config, horizon, part) for part in parts[1:])
    kept = jax.tree.map(jnp.copy, state.params), np.full(len(pairs), -np.inf)
    for first in range(0, size.steps, size.every):
        count = min(size.every, size.steps - first)
        rows = generator.integers(0, len(known.past), (count, size.rows))
        after = rows if not control else generator.permutation(rows.ravel()).reshape(rows.shape)
        batches = known.past[rows], known.future[after]
        state, _ = learn(state, rates, keys, tuple(jnp.asarray(x, jnp.float32) for x in batches))
        lost = np.array([found["mse"] for found in validation(state.params)])
        value = np.where(np.isfinite(lost), -lost, -1e9)
        kept = sequence_learner.better((state.params, value), kept)
        leave()
    chosen = -kept[1].reshape(len(size.rates), size.seeds)
    errors = test(kept[0])
    by_rate = {}
    for n, rate in enumerate(size.rates):
        some = errors[n * size.seeds : (n + 1) * size.seeds]
        by_rate[f"{rate:g}"] = {
            "validation": [round(float(v), 4) for v in chosen[n]],
            **{of: [round(error[of], 4) for error in some] for of in ("mse", "mae")},
        }
    return {
        "rates": by_rate,
        "rate": f"{size.rates[int(chosen.mean(1).argmin())]:g}",
        "steps": size.steps,
        "seconds": round(time.monotonic() - begun, 1),
        "parameters": nn.parameter_count(nnx.eval_shape(lambda: build(nnx.Rngs(0)))),
        "device": jax.devices()[0].device_kind,
    }


def _errors(
    config: nn.ModelConfig, horizon: int, windows: Windows, params: PyTree[Array]
) -> list[dict[str, float]]:
    """Of every model, its forecasts scaled back."""
    scaled, mean, deviation = tasks.normalised(windows)
    forecasts = _forecaster(config, horizon)(params, jnp.asarray(scaled.past, jnp.float32))
    return [
        tasks.errors(np.asarray(f, float) * deviation + mean, windows.future) for f in forecasts
    ]


@functools.lru_cache(maxsize=2)
def _forecaster(config: nn.ModelConfig, horizon: int):
    graph = nnx.graphdef(nnx.eval_shape(lambda: Forecaster(config, horizon, rngs=nnx.Rngs(0))))
    return jax.jit(jax.vmap(lambda p, past: nnx.merge(graph, p)(past), in_axes=(0, None)))
