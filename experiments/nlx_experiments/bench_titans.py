# SPDX-License-Identifier: Apache-2.0
"""`mlp_memory` against titans-pytorch's NeuralMemory, forward and backward, on the CPU.

command    python -m nlx_experiments.bench_titans        (needs `pip install torch titans-pytorch`)
shows      tokens per second of both in one run, interleaved, medians; ratio ours / theirs
measures   depth 2, width 64, hidden 256, one head, 4 rows of 1,024 tokens, momentum and decay per
           token, chunk 64 and 16 (their `batch_size` = `chunk_size`, so that gradients are taken at
           the chunk's start), maps for queries, keys, values and gates on both sides, gradients of
           every weight and of the input. They read a chunk late; we read either from the chunk's
           start, the like of theirs, or after every token's write, which costs more.
takes      about 3 minutes on two cores
"""

import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nlx import ops

ROWS, TOKENS, WIDTH, HIDDEN, REPEATS = 4, 1024, 64, 256, 5


def ours(chunk_size: int, read) -> Callable[[], None]:
    """One forward and backward pass of `mlp_memory` with its maps."""
    shapes = {name: (WIDTH, WIDTH) for name in ("q", "k", "v")} | {"gates": (WIDTH, 3)}
    keys = iter(jax.random.split(jax.random.key(0), 8))
    maps = {n: jax.random.normal(next(keys), s) / WIDTH**0.5 for n, s in shapes.items()}
    weights = (
        jax.random.normal(next(keys), (1, WIDTH, HIDDEN)) / WIDTH**0.5,
        jax.random.normal(next(keys), (1, HIDDEN, WIDTH)) / HIDDEN**0.5,
    )
    x = jax.random.normal(next(keys), (ROWS, TOKENS, WIDTH))

    def loss(maps, weights, x):
        q, k, v = (jnp.expand_dims(x @ maps[name], 2) for name in ("q", "k", "v"))
        rate, retain, momentum = jnp.moveaxis(jax.nn.sigmoid(x @ maps["gates"]), -1, 0)[..., None]
        y, _ = ops.mlp_memory(
            q, k, v, weights=weights, rate=0.1 * rate, retain=retain, momentum=momentum,
            chunk_size=chunk_size, read=read, residual=False,
        )  # fmt: skip
        return jnp.mean(y**2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(gradient(maps, weights, x))


def theirs(chunk_size: int) -> Callable[[], None]:
    """One forward and backward pass of NeuralMemory."""
    import torch  # pyright: ignore[reportMissingImports]
    from titans_pytorch import NeuralMemory  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    memory = NeuralMemory(
        dim=WIDTH, chunk_size=chunk_size, batch_size=chunk_size, momentum=True, pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
        default_model_kwargs={"depth": 2, "expansion_factor": HIDDEN / WIDTH},
    )  # fmt: skip
    x = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)

    def run() -> None:
        memory.zero_grad()
        y, _ = memory(x)
        (y**2).mean().backward()

    return run


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    """Prints a line a chunk size."""
    try:
        import titans_pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit("bench_titans compares with titans-pytorch: pip install torch titans-pytorch.")
    for chunk_size in (64, 16):
        runs = {
            "theirs": theirs(chunk_size),
            "chunk_start": ours(chunk_size, "chunk_start"),
            "after_write": ours(chunk_size, "after_write"),
        }
        for run in runs.values():
            run()
        times = {name: [] for name in runs}
        for _ in range(REPEATS):
            for name, run in runs.items():
                times[name].append(seconds(run))
        rate = {name: ROWS * TOKENS / statistics.median(t) for name, t in times.items()}
        print(
            f"chunk {chunk_size}: titans-pytorch {rate['theirs']:,.0f} tokens/s; "
            + "; ".join(
                f"mlp_memory, read={read!r}, {rate[read]:,.0f} tokens/s, "
                f"{rate[read] / rate['theirs']:.1f} times"
                for read in ("chunk_start", "after_write")
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
