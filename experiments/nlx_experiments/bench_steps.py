# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on a GPU: Hope beside Transformer++ with cuDNN's attention.

command    python -m nlx_experiments.bench_steps FOLDER [TOKENS ...]      (4096 32768 131072)
           python -m nlx_experiments.bench_steps FOLDER --ahead-of-time [TOKENS ...] [PRESET ...]
shows      milliseconds of a step of gradient descent on one row, bfloat16, in turn, medians, and
           how many times the Transformer's; ahead of time: what a step takes of one H200 that is
           not there, hope-340m's or other presets'. JSON in FOLDER, written after every row
measures   hope-340m, gated-deltanet-340m and transformer++-340m; blocks are made again in the
           backward pass (`remat`) from 32,768 tokens on. The Transformer's attention is
           `jax.nn.dot_product_attention(implementation="cudnn")` in place of nlx's
takes      not yet run on a device to the end: 9 programs compile side by side, each for one to
           several minutes of several cores; ahead of time 2 to 5 minutes a row on two cores
"""

import contextlib
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nlx import nn, train
from nlx.nn import attention
from nlx_experiments import runs
from nlx_experiments.console import say

MODELS = ("hope-340m", "gated-deltanet-340m", "transformer++-340m")
TOKENS, REMAT_FROM, ROUNDS = (4096, 32768, 131072), 32768, 7


def config_of(name: str, tokens: int) -> nn.ModelConfig:
    """The preset in bfloat16, with `remat` where activations would not fit."""
    return dataclasses.replace(nn.preset(name), bfloat16=True, remat=tokens >= REMAT_FROM)


def step(config: nn.ModelConfig) -> tuple[Callable[[Any, Any], Any], Callable[[], Any]]:
    """A step of gradient descent, (params, tokens [b, t + 1]) -> params, and how to make params."""
    init = lambda: nnx.split(nn.LanguageModel(config, rngs=nnx.Rngs(0)))[1]
    graph = nnx.graphdef(nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0))))
    loss = train.language_model_loss(graph)

    def descend(params: Any, tokens: Any) -> Any:
        slopes = jax.grad(lambda params: loss(params, {"tokens": tokens}))(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, slopes)

    return descend, init


@contextlib.contextmanager
def library_attention(implementation: Any) -> Iterator[None]:
    """JAX's attention in place of nlx's, while a program is traced."""
    ours = attention.attend

    def attend(parts: list[attention.Part]) -> jax.Array:
        (part,) = parts  # causal, no cache and no prefix
        return jax.nn.dot_product_attention(
            part.query, part.key, part.value, is_causal=True, implementation=implementation
        )

    attention.attend = attend
    try:
        yield
    finally:
        attention.attend = ours


def compiled(
    pool: Executor, configs: dict[str, nn.ModelConfig], tokens: int, implementation: Any
) -> dict[str, Future]:
    """Every model's step, which compiles in the pool: (params, tokens [1, t + 1]) -> params."""
    batch = jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
    found = {}
    for name, config in configs.items():
        descend, init = step(config)

        def lower(descend=descend, init=init):
            with library_attention(implementation):
                return jax.jit(descend, donate_argnums=0).lower(jax.eval_shape(init), batch)

        try:
            found[name] = pool.submit(lower().compile)
        except Exception as error:  # what an attention refuses: the others are timed all the same
            found[name] = Future()
            found[name].set_exception(error)
    return found


def measure(
    configs: dict[str, nn.ModelConfig],
    tokens: int,
    steps: dict[str, Future],
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Milliseconds of every model's step, in turn; what failed says why.

    steps: see `compiled`.
    """
    ready: dict[str, list[Any]] = {}
    found: dict[str, Any] = {"tokens": tokens}
    batch = jnp.zeros((1, tokens + 1), jnp.int32)
    for name, config in configs.items():
        try:
            run = steps[name].result()
            params = jax.jit(step(config)[1])()
            ready[name] = [run, jax.block_until_ready(run(params, batch))]
        except Exception as error:  # of memory or of a compiler: the others are timed all the same
            found[name] = f"failed: {str(error).splitlines()[0]}"
            say(f"{name}, {tokens} tokens: {found[name]}")
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, held in ready.items():
            begun = time.perf_counter()
            held[1] = jax.block_until_ready(held[0](held[1], batch))
            times[name].append(1e3 * (time.perf_counter() - begun))
    found |= {name: statistics.median(ms) for name, ms in times.items()}
    rival = found.get(MODELS[-1])
    for name in ready:
        ratio = f", {found[name] / rival:.2f} times" if isinstance(rival, float) else ""
        say(f"{name}, {tokens} tokens: {found[name]:.1f} ms{ratio}")
    return found


def ahead_of_time(name: str, tokens: int) -> dict[str, Any]:
    """What a step takes of one H200, from a compiler alone."""
    from nlx_kernels import ahead_of_time_gpu

    descend, init = step(config_of(name, tokens))
    batch = jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
    report = ahead_of_time_gpu.compile_for_gpu(descend, jax.eval_shape(init), batch, target="h200")
    gib = lambda n: round(n / 2**30, 1)
    found = {"arguments_gib": gib(report.arguments), "temporaries_gib": gib(report.temporaries)}
    say(f"{name}, {tokens} tokens, one H200: {found}")
    return {"tokens": tokens, "model": name, "kernels": sorted(report.kernels), **found}


def main(argv: list[str]) -> None:
    """Times, or compiles, one length after the other."""
    folder = pathlib.Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    absent = "--ahead-of-time" in argv
    words = [word for word in argv[1:] if word != "--ahead-of-time"]
    lengths = [int(word) for word in words if word.isdigit()] or list(TOKENS)
    presets = [word for word in words if not word.isdigit()]
    for word in presets:
        if not absent or word not in nn.PRESETS:
            sys.exit(f"{word!r} must be a number of tokens, or with --ahead-of-time a preset.")
    rows: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        name = "steps-ahead-of-time.json" if absent else "steps.json"
        runs.write_json(folder / name, {"environment": runs.environment(), "rows": rows})

    if absent:
        for tokens in lengths:
            keep([ahead_of_time(name, tokens) for name in presets or MODELS[:1]])
        return
    configs = {tokens: {name: config_of(name, tokens) for name in MODELS} for tokens in lengths}
    with ThreadPoolExecutor() as pool:
        ready = {n: compiled(pool, made, n, "cudnn") for n, made in configs.items()}
    for tokens, steps in ready.items():
        keep([measure(configs[tokens], tokens, steps)])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
