# SPDX-License-Identifier: Apache-2.0
"""linear_memory's kernels on a Hopper GPU: right? and how fast beside FLA's Triton kernels?

command    python -m nlx_experiments.bench_fla [FOLDER]
shows      how far reads, state and every slope are from the token loop in float32; then the
           milliseconds of both, forward and with the backward pass, on shapes of `nlx bench`;
           then ops whose form is XLA's. JSON in FOLDER.
measures   both in one process: many calls under way at once; FLA by CUDA events, ours by the clock
           around them. FLA's rule is Gated DeltaNet's on the same shapes, its final state asked for
expects    distances below 1e-2 for reads and 2e-2 for slopes, 3e-2 and 5e-2 for correlated keys
takes      about 4 minutes on an H100, most of them to compile
needs      torch, triton, fla-core==0.6.0. Triton 3.4 to 3.7.0 miscompiles one of FLA's backward
           kernels on Hopper, so FLA refuses it: there it is timed all the same, marked "refused"
"""

import json
import os
import pathlib
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory as well

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
from nlx_kernels.linear_memory.shapes import BENCH

from nlx_experiments import bench_ops

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


def check(implementation: str, read: Any, segments: bool):
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


def fla_runs():
    """FLA's gated delta rule by shape and pass, each (run, mark), and how to time one."""
    import torch  # pyright: ignore[reportMissingImports]
    from fla.ops.common import chunk_o  # pyright: ignore[reportMissingImports]
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule,
    )

    refused = chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    chunk_o.TRITON_ABOVE_3_7_1 = True
    found: dict[tuple[str, str], tuple[Any, str]] = {}
    for name in SHAPES:
        b, t, h, d, _, _ = BENCH[name]
        random = lambda *shape: torch.randn(*shape, device="cuda")
        unit = lambda x: torch.nn.functional.normalize(x, dim=-1).bfloat16()
        q, k = unit(random(b, t, h, d)), unit(random(b, t, h, d))
        v, do = random(b, t, h, d).bfloat16(), random(b, t, h, d).bfloat16()
        g, beta = torch.log(0.9 + 0.1 * torch.rand_like(random(b, t, h))), random(b, t, h).sigmoid()
        leaves = [x.requires_grad_() for x in (q, k, v, g, beta.bfloat16())]

        def forward(leaves=leaves):
            q, k, v, g, beta = leaves
            return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True)[0]

        def alone(forward=forward):
            with torch.no_grad():
                forward()

        def both(forward=forward, leaves=leaves, do=do):
            forward().backward(do)
            for leaf in leaves:
                leaf.grad = None

        for which, run in zip(bench_ops.PASSES, (alone, both), strict=True):
            run()  # compiles and tunes
            note("FLA is ready for", name, which)
            found[name, which] = run, "refused" if refused and run is both else ""

    def median(run, calls: int = 20) -> float:
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

    return found, median


def main(folder: pathlib.Path) -> None:
    """Compiles everything at once, then checks, then times."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit("bench_fla: there is no GPU; it must be run beside one.")
    result: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    save = lambda: (folder / "bench_fla.json").write_text(json.dumps(result, indent=1) + "\n")
    known = bench_ops.workloads()
    known["mlp_memory"] |= {
        f"{n}-chunk-2048": bench_ops.mlp(bench_ops.of_mlp.BENCH[n]._replace(chunk_size=2048))
        for n in ("long", "wide")
    }
    lines = [("linear_memory", name) for name in SHAPES] + OTHERS
    jobs: dict[Any, Any] = {}
    given, ids = case(0.0)
    wide = lambda given: {n: x.astype(jnp.float32) for n, x in given.items()}
    for kind in dict.fromkeys(c[:2] for c in CASES):
        jobs["kernel", *kind] = lambda kind=kind: check("mosaic_gpu", *kind)(given, ids)
        jobs["reference", *kind] = lambda kind=kind: check("reference", *kind)(wide(given), ids)
    for op, name in lines:
        workload = known[op][name]
        arguments = jax.eval_shape(workload.make)
        y = jax.eval_shape(lambda a, w=workload: w.call(a, "xla"), arguments)
        implementation = "mosaic_gpu" if op == "linear_memory" else "xla"
        for which, run in bench_ops.passes(workload, implementation).items():
            a = (arguments,) if which == bench_ops.PASSES[0] else (arguments, y)
            jobs[op, name, which] = lambda run=run, a=a: run.lower(*a).compile()
    with ThreadPoolExecutor(12) as pool:
        compiled = {name: pool.submit(job) for name, job in jobs.items()}
        rivals: dict[Any, Any] = {}
        try:
            rivals, median = fla_runs()
        except Exception as error:  # what FLA says is a result, too
            note("FLA:", result.setdefault("FLA", repr(error)[:500]))
    note("compiled")
    result["distances"] = {}
    for read, segments, correlation in CASES:
        given, ids = case(correlation)
        got = compiled["kernel", read, segments].result()(given, ids)
        want = compiled["reference", read, segments].result()(wide(given), ids)
        far = {n: _distance(got[n], want[n]) for n in want}
        result["distances"][f"{read}, {segments=}, {correlation=}"] = far
        note(read, segments, correlation, {n: f"{x:.1e}" for n, x in far.items()})
    result["ceilings"] = best = bench_ops.ceilings()
    result["lines"] = []
    for op, name in lines:
        workload = known[op][name]
        try:
            arguments = jax.block_until_ready(workload.make())
        except Exception as error:
            note(op, name, repr(error)[:300])
            continue
        for which in bench_ops.PASSES:
            try:
                run = compiled[op, name, which].result()
                shape = jax.eval_shape(lambda a, w=workload: w.call(a, "xla"), arguments)
                slope = jax.random.normal(jax.random.key(1), shape.shape, shape.dtype)
                a = (arguments,) if which == bench_ops.PASSES[0] else (arguments, slope)
                times = bench_ops.milliseconds(run, *a)
                line = {"op": op, "shape": name, "pass": which, "ms": statistics.median(times)}
                line |= bench_ops.rates(workload, which, line["ms"], best)
                if op == "linear_memory" and (name, which) in rivals:
                    rival, mark = rivals[name, which]
                    line |= {"FLA ms": median(rival), "FLA": mark}
                result["lines"].append(line)
                note({n: f"{x:.4g}" if isinstance(x, float) else x for n, x in line.items()})
            except Exception as error:
                note(op, name, which, repr(error)[:300])
            save()


def _distance(x: Any, y: Any) -> float:
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "."))
