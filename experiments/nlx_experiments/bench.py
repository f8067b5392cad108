# SPDX-License-Identifier: Apache-2.0
"""`nlx bench`: every op, implementation and shape against what the device reaches at best.

command    nlx bench [--ops linear_memory ...] [--shapes batch ...] [--implementations xla ...]
           nlx bench --ops linear_memory --tune      block sizes, kept for this kind of device
           nlx bench --ahead-of-time h200            compiles instead, for a GPU that is not there
           nlx bench --ahead-of-time tpu:v5p:2x2x1   or for TPUs
shows      median milliseconds, nanoseconds a token and head, TFLOP/s and GB/s by the formulas of
           `bench_ops`, and their share of a measured matrix product and a measured copy; ahead of
           time: seconds to compile, memory, registers and bytes spilled, or fast memory (VMEM)
takes      some seconds for each line, most of them to compile
"""

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import matplotlib.pyplot as plt
from nlx_kernels import Implementation, ahead_of_time, ahead_of_time_gpu
from nlx_kernels.ahead_of_time_gpu import TARGETS

from nlx_experiments import bench_ops, bench_tune, report, runs
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

GPUS = ("h100", "h200")
NUMBERS = ("ms", "ns/token/head", "TFLOP/s", "GB/s", "% of product", "% of copy")


@dataclasses.dataclass
class Bench:
    """What to time.

    Attributes:
      ops: names of ops; empty: all.
      shapes: names of shapes, of `BENCH` in an op's shapes.py; empty: "cpu", or on a GPU "batch".
      implementations: what is timed; empty: what None chooses.
      ahead_of_time: h100, h200, or TPUs such as tpu:v5p:2x2x1: compile for it, time nothing.
      out: folder for bench.json, bench.md and bench.png.
      tune: time the block sizes of linear_memory, and keep those that are quicker.
      record: with `ahead_of_time`, keep registers and spills as what tests compare with.
    """

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    implementations: tuple[Implementation, ...] = ()
    ahead_of_time: str | None = None
    out: pathlib.Path = pathlib.Path("runs/bench")
    record: bool = False
    tune: bool = False


def main(options: Bench) -> None:
    """Measures, prints a line for each, and writes table and picture."""
    chosen = choose(options)
    if options.tune:
        if {op for op, *_ in chosen} != {bench_tune.OP} or options.ahead_of_time is not None:
            raise Refused(f"`tune` is for `--ops {bench_tune.OP}`, on this machine's device.")
        return bench_tune.tune([shape for _, shape, _ in chosen])
    options.out.mkdir(parents=True, exist_ok=True)
    if options.ahead_of_time is not None:
        return compile_(options, chosen)
    best = (
        bench_ops.ceilings()
        if jax.default_backend() != "cpu"
        else bench_ops.ceilings(1024, 1 << 24)
    )
    say(f"a product reaches {best['TFLOP/s']:.3g} TFLOP/s, a copy {best['GB/s']:.4g} GB/s")
    found = []
    for op, shape, workload in chosen:
        arguments = workload.make()
        for implementation in options.implementations or (None,):
            for which, run in bench_ops.passes(workload, implementation).items():
                found.append(
                    {"op": op, "shape": shape, "implementation": implementation or "None"}
                    | {"pass": which, **measure(workload, which, run, arguments, best)}
                )
                say(_line(found[-1]))
                environment = runs.environment() | {"ceilings": best}
                runs.write_json(
                    options.out / "bench.json", {"environment": environment, "lines": found}
                )
    shown = report.Table("Ops", (*list(found[0])[:4], *NUMBERS), [_row(line) for line in found])
    runs.write_whole(options.out / "bench.md", shown.markdown() + "\n")
    plot(options.out / "bench.png", found)
    say(shown.text())


def choose(options: Bench) -> list[tuple[str, str, bench_ops.Workload]]:
    """The workloads asked for; an op without a shape of that name is left out."""
    known = bench_ops.workloads()
    for name in options.ops:
        if name not in known:
            raise Refused(f"there is no op {name!r} to time; there are {', '.join(known)}.")
    away = options.ahead_of_time is not None or jax.default_backend() != "cpu"
    shapes = options.shapes or (("batch",) if away else ("cpu",))
    chosen = [
        (op, shape, workload)
        for op in options.ops or known
        for shape, workload in known[op].items()
        if shape in shapes
    ]
    if not chosen:
        raise Refused(f"no op has a shape called {' or '.join(map(repr, shapes))}.")
    return chosen


def measure(
    workload: bench_ops.Workload, which: str, run: Any, arguments: Any, best: dict[str, float]
) -> dict[str, float]:
    """Times of one pass, what they mean, and the seconds of the first call."""
    slope = ()
    if which != bench_ops.PASSES[0]:
        y = jax.eval_shape(lambda: workload.call(arguments, "xla"))
        slope = (jax.random.normal(jax.random.key(1), y.shape, y.dtype),)
    begun = time.perf_counter()
    jax.block_until_ready(run(arguments, *slope))
    first = time.perf_counter() - begun
    times = bench_ops.milliseconds(run, arguments, *slope)
    median = statistics.median(times)
    means = bench_ops.rates(workload, which, median, best)
    return {"ms": median, "least ms": min(times), "most ms": max(times), **means, "first s": first}


def compile_(options: Bench, chosen: list[tuple[str, str, bench_ops.Workload]]) -> None:
    """Compiles every workload for a device that is not there."""
    target = options.ahead_of_time or ""
    compiler = _for_gpu if target in GPUS else _for_tpu if target.startswith("tpu:") else None
    if compiler is None:
        raise Refused(
            f"`ahead_of_time` is {target!r}; it must be h100, h200, or TPUs such as tpu:v5p:2x2x1."
        )
    kernels: dict[str, dict[str, int]] = {}
    found = []
    for op, shape, workload in chosen:
        arguments = jax.eval_shape(workload.make)
        y = jax.eval_shape(lambda a, w=workload: w.call(a, "xla"), arguments)
        for implementation in options.implementations or (None,):
            for which, run in bench_ops.passes(workload, implementation).items():
                slope = () if which == bench_ops.PASSES[0] else (y,)
                got, takes = compiler(target, run, arguments, *slope)
                kernels |= takes
                found.append(
                    {"op": op, "shape": shape, "implementation": implementation or "None"}
                    | {"pass": which, "seconds": round(got.seconds, 1)}
                    | {"temporaries MiB": round(got.temporaries / 2**20, 1)}
                    | {n: ", ".join(f"{v:,} {k}" for k, v in t.items()) for n, t in takes.items()}
                )
                say("  ".join(f"{name} {value}" for name, value in found[-1].items()))
    runs.write_json(options.out / "ahead_of_time.json", {"lines": found, "kernels": kernels})
    if options.record and target in GPUS:
        path = TARGETS / "compiled.json"
        runs.write_whole(path, json.dumps(json.loads(path.read_text()) | kernels, indent=1) + "\n")


Takes = dict[str, dict[str, int]]  # kernel -> what it takes


def _for_gpu(target: str, run: Any, *arguments: Any) -> tuple[ahead_of_time_gpu.Report, Takes]:
    """Registers of a thread and bytes spilled."""
    if (package := ahead_of_time_gpu.missing()) is not None:
        raise Refused(f'{package} is not installed; it must be: pip install "nlx[aot]".')
    got = ahead_of_time_gpu.compile_for_gpu(run, *arguments, target=target)
    return got, {name: kernel._asdict() for name, kernel in got.kernels.items()}


def _for_tpu(target: str, run: Any, *arguments: Any) -> tuple[ahead_of_time.Report, Takes]:
    """Bytes of fast memory."""
    if not ahead_of_time.available():
        raise Refused('libtpu is not installed; it must be: pip install "nlx[aot]".')
    got = ahead_of_time.compile_for_tpu(run, *arguments, topology=target.removeprefix("tpu:"))
    return got, {name: {"VMEM": held} for name, held in got.kernels.items()}


def plot(path: pathlib.Path, found: list[dict[str, Any]]) -> None:
    """Draws nanoseconds a token and head, one bar a line."""
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.35 * len(found)), layout="constrained")
    names = [", ".join(str(line[n]) for n in list(line)[:4]) for line in found]
    axes.barh(names, [line["ns/token/head"] for line in found], color=report.COLOURS[0])
    axes.invert_yaxis()
    axes.set(xlabel="nanoseconds a token and head", xscale="log")
    report.save(figure, path)


def _row(line: dict[str, Any]) -> list[Any]:
    return [*list(line.values())[:4], *(line[name] for name in NUMBERS)]


def _line(line: dict[str, Any]) -> str:
    named = ", ".join(str(line[name]) for name in list(line)[:4])
    return f"{named}: {line['ms']:.3f} ms, {line['ns/token/head']:.3g} ns/token/head"
