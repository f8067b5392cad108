# SPDX-License-Identifier: Apache-2.0
"""linear_memory's kernels on a Hopper GPU: right? and how fast beside FLA's Triton kernels?

command    python -m nlx_experiments.bench_fla [FOLDER [check] [ours] [fla] [others]]
shows      how far reads, state and every slope are from the token loop in float32; then the
           milliseconds of both, forward and with the backward pass, on shapes of `nlx bench`;
           then ops whose form is XLA's. JSON in FOLDER.
measures   both in one process: many calls under way at once; FLA by CUDA events, ours by the clock
           around them. FLA's rule is Gated DeltaNet's on the same shapes, its final state asked for
expects    distances below 1e-2 for reads and 2e-2 for slopes, 3e-2 and 5e-2 for correlated keys
takes      on an H100, mostly to compile: check, ours and others 1 minute each, fla 3, alone on the
           machine: Triton tunes for each shape
needs      torch, triton, fla-core==0.6.0. Triton 3.4 to 3.7.0 miscompiles one of FLA's backward
           kernels on Hopper, so FLA refuses it: there it is timed all the same, marked "refused"
"""

import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory as well

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
from nlx_kernels.linear_memory.shapes import BENCH

from nlx_experiments import bench_ops

PARTS = ("check", "ours", "fla", "others")
SHAPES = ("many-heads", "batch", "short")
CASES = [
    (read, segments, correlation)
    for read, segments in (("after_write", False), ("chunk_start", True))
    for correlation in (0.0, 0.9, 1.0)
]
OTHERS = [
    ("mlp_memory", "long"),
    ("mlp_memory", "long-chunk-2048"),
    ("mlp_memory", "wide"),
    ("mlp_memory", "wide-chunk-2048"),
    ("self_modifying_memory", "batch"),
    ("cms_chain", "batch"),
    ("cms_chain", "rows-chunk-512"),
]
STARTED = time.perf_counter()


def note(*words: Any) -> None:
    """Prints a line with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f}]", *words, flush=True)


def case(correlation: float, b: int = 2, t: int = 1000, h: int = 4, d: int = 128):
    """Arguments on which forgetting, resets and correlated keys all happen, and segment ids."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape, dtype=np.float32)
    uniform = lambda low, high: random.uniform(low, high, (b, t, h)).astype(np.float32)
    keys = correlation**0.5 * normal(b, 1, h, d) + (1 - correlation) ** 0.5 * normal(b, t, h, d)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    retain = uniform(0.8, 1)
    if t > 40:
        retain[:, 5], retain[:, 9:20], retain[:, 31:33] = 0, 1, 0
    low = lambda x: jnp.asarray(x, jnp.bfloat16)
    given = {"q": low(normal(b, t, h, d)), "k": low(keys), "v": low(normal(b, t, h, d))}
    given |= {"retain": retain, "erase": uniform(0, 1.9), "rate": uniform(0, 1)}
    ids = np.cumsum(random.uniform(size=(b, t)) < 0.02, 1).astype(np.int32)
    return {n: jnp.asarray(x) for n, x in (given | {"state": normal(b, h, d, d)}).items()}, ids


def check(implementation: Any, read: Any, segments: bool):
    """(arguments, segment ids) -> reads, state, and slopes of a fixed weighting of both."""

    def weighed(given, ids):
        outputs = nlx_kernels.linear_memory(
            **given, read=read, segment_ids=ids if segments else None, implementation=implementation
        )
        cosines = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in outputs]
        total = sum(jnp.sum(x * w) for x, w in zip(outputs, cosines, strict=True))
        return total, dict(zip(("y", "S"), outputs, strict=True))

    def run(given, ids):
        slopes, outputs = jax.grad(weighed, has_aux=True)(given, ids)
        return outputs | {f"d{name}": x for name, x in slopes.items()}

    precision = "highest" if implementation == "reference" else "default"

    def compile_(*arguments):
        with jax.default_matmul_precision(precision):
            return jax.jit(run).lower(*arguments).compile()

    return compile_


def fla_times(name: str) -> dict[str, Any]:
    """Milliseconds of FLA's gated delta rule on a shape, by pass; a mark where FLA refuses."""
    import torch  # pyright: ignore[reportMissingImports]
    from fla.ops.common import chunk_o  # pyright: ignore[reportMissingImports]
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule,
    )

    refused = chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    chunk_o.TRITON_ABOVE_3_7_1 = True  # its time is right, its numbers may not be
    b, t, h, d, _, _ = BENCH[name]
    random = lambda *shape: torch.randn(*shape, device="cuda")
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1).bfloat16()
    q, k = unit(random(b, t, h, d)), unit(random(b, t, h, d))
    v, do = random(b, t, h, d).bfloat16(), random(b, t, h, d).bfloat16()
    g = torch.log(0.9 + 0.1 * torch.rand(b, t, h, device="cuda"))
    beta = random(b, t, h).sigmoid().bfloat16()
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]

    def forward():
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True)[0]

    def alone():
        with torch.no_grad():
            forward()

    def both():
        forward().backward(do)
        for leaf in leaves:
            leaf.grad = None

    def median(run, calls: int = 20) -> float:
        run()  # compiles and tunes
        times = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        return statistics.median(times)

    found = {which: median(run) for which, run in zip(bench_ops.PASSES, (alone, both), strict=True)}
    return {**found, "refused": refused}


class Job(NamedTuple):
    """One line to time: an op, a shape, a pass, what compiles it."""

    op: str
    shape: str
    which: str
    workload: bench_ops.Workload
    compile_: Callable[[], Any]


def jobs(lines: list[tuple[str, str]]) -> list[Job]:
    """Both passes of every line."""
    known = bench_ops.workloads()
    known["mlp_memory"] |= {
        f"{n}-chunk-2048": bench_ops.mlp(bench_ops.of_mlp.BENCH[n]._replace(chunk_size=2048))
        for n in ("long", "wide")
    }
    found = []
    for op, shape in lines:
        workload = known[op][shape]
        arguments = jax.eval_shape(workload.make)
        y = jax.eval_shape(lambda a, w=workload: w.call(a, "xla"), arguments)
        form = "mosaic_gpu" if op == "linear_memory" else "xla"
        for which, run in bench_ops.passes(workload, form).items():
            given = (arguments,) if which == bench_ops.PASSES[0] else (arguments, y)
            compile_ = lambda run=run, given=given: run.lower(*given).compile()
            found.append(Job(op, shape, which, workload, compile_))
    return found


def main(folder: pathlib.Path, parts: list[str]) -> None:
    """Does the parts one after another, and keeps what is done of each."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit("bench_fla: there is no GPU; it must be run beside one.")
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"bench_fla: there is no part {unknown[0]!r}; there are {PARTS}.")
    result: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}

    def keep(**more: Any) -> None:
        note(more)
        for name, value in more.items():
            result.setdefault(name, []).append(value)
        (folder / "bench_fla.json").write_text(json.dumps(result, indent=1) + "\n")

    if "check" in parts:
        checked(keep)
    if {"ours", "others"} & set(parts):
        best = bench_ops.ceilings()
        keep(ceilings=best)
        lines = [("linear_memory", name) for name in SHAPES] if "ours" in parts else []
        timed(jobs(lines + (OTHERS if "others" in parts else [])), best, keep)
    for name in SHAPES if "fla" in parts else ():
        try:
            keep(fla={"shape": name, **fla_times(name)})
        except Exception as error:  # what FLA says is a result, too
            keep(fla={"shape": name, "error": repr(error)[:500]})


def checked(keep: Callable[..., None]) -> None:
    """Distances of the kernels from the reference."""
    wide = lambda given: {n: x.astype(jnp.float32) for n, x in given.items()}
    given, ids = case(0.0)
    compiled = {}
    with ThreadPoolExecutor() as pool:
        for kind in dict.fromkeys(c[:2] for c in CASES):
            for form, a in (("mosaic_gpu", given), ("reference", wide(given))):
                compiled[form, kind] = pool.submit(check(form, *kind), a, ids)
    for read, segments, correlation in CASES:
        given, ids = case(correlation)
        got = compiled["mosaic_gpu", (read, segments)].result()(given, ids)
        want = compiled["reference", (read, segments)].result()(wide(given), ids)
        far = {n: _distance(got[n], want[n]) for n in want}
        keep(distances={"read": read, "segments": segments, "correlation": correlation} | far)


def timed(todo: list[Job], best: dict[str, float], keep: Callable[..., None]) -> None:
    """Times every job, after all were compiled at once."""
    with ThreadPoolExecutor() as pool:
        compiled = [pool.submit(job.compile_) for job in todo]
    for job, run in zip(todo, compiled, strict=True):
        line: dict[str, Any] = {"op": job.op, "shape": job.shape, "pass": job.which}
        try:
            arguments = job.workload.make()
            y = jax.eval_shape(lambda a, w=job.workload: w.call(a, "xla"), arguments)
            slope = jax.random.normal(jax.random.key(1), y.shape, y.dtype)
            given = (arguments,) if job.which == bench_ops.PASSES[0] else (arguments, slope)
            line["ms"] = statistics.median(bench_ops.milliseconds(run.result(), *given))
            keep(lines=line | bench_ops.rates(job.workload, job.which, line["ms"], best))
        except Exception as error:  # one that does not fit in memory, say
            keep(lines=line | {"error": repr(error)[:300]})


def _distance(x: Any, y: Any) -> float:
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "."), sys.argv[2:] or list(PARTS))
