# SPDX-License-Identifier: Apache-2.0
"""`nlx bench --tune`: which block size `linear_memory`'s XLA form takes on this kind of device.

Every size is timed forward and backward, in turn with the others, and all of it twice. An entry of
`nlx_kernels/tuned` is written where both times the same size was the quickest, by more than 5 % of
the default's median; else an entry there was is taken away.
"""

import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import nlx_kernels
from nlx_kernels import _tuned
from nlx_kernels.linear_memory.shapes import BENCH

from nlx_experiments import bench_ops, runs
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

OP = "linear_memory"
SIZES, ROUNDS, GAIN = (16, 32, 64, 128), 9, 1.05
DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))


def tune(shapes: list[str], folder: pathlib.Path = _tuned.FOLDER) -> None:
    """Times the shapes in both precisions and writes what is quicker than the default.

    Raises Refused, before anything is timed, where the file there is is damaged.
    """
    kind = jax.devices()[0].device_kind
    file = _tuned.path(folder, kind)
    try:
        entries: dict[str, Any] = dict(_tuned.table(folder, kind))
    except ValueError as error:
        raise Refused(f"{str(error).partition(';')[0]}; mend it, or take it away.") from error
    for name in shapes:
        given = bench_ops.linear(BENCH[name]).make()
        for dtype in DTYPES:
            given |= {name: given[name].astype(dtype) for name in "qkv"}
            first, second = medians(given), medians(given)
            key = _tuned.key(OP, dtype, BENCH[name].k)
            size = quicker(first, second)
            entries.pop(key, None)
            if size is not None:
                both = {str(n): [round(t[n], 1) for t in (first, second)] for n in SIZES}
                entries[key] = {"block_size": size, "shape": name, "ms": both}
            shown = "  ".join(f"{n} {first[n]:.1f} {second[n]:.1f}" for n in SIZES)
            say(f"{name} {key}: {shown} ms; {size or f'the default, {_tuned.DEFAULT}'}")
    file.parent.mkdir(exist_ok=True)
    runs.write_whole(file, json.dumps(entries, indent=1, sort_keys=True) + "\n")
    _tuned.table.cache_clear()  # what was read before is no longer true


def medians(given: dict[str, Any]) -> dict[int, float]:
    """Milliseconds of both passes, by block size."""
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    run = {size: _both(size) for size in SIZES}
    for turn in range(ROUNDS + 1):
        for size in SIZES:
            begun = time.perf_counter()
            jax.block_until_ready(run[size](given))
            if turn:  # the first one compiles
                times[size].append(1e3 * (time.perf_counter() - begun))
    return {size: statistics.median(ms) for size, ms in times.items()}


def quicker(first: dict[int, float], second: dict[int, float]) -> int | None:
    """The size that is the quickest in both, if it is so by enough in both."""
    best = min(first, key=first.__getitem__)
    enough = all(GAIN * t[best] < t[_tuned.DEFAULT] for t in (first, second))
    return best if enough and best == min(second, key=second.__getitem__) else None


def _both(size: int):
    def loss(given):
        y, _ = nlx_kernels.linear_memory(**given, block_size=size, implementation="xla")
        return jnp.sum(y.astype(jnp.float32))

    return jax.jit(jax.value_and_grad(loss))
