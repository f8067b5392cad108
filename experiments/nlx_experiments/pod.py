# SPDX-License-Identifier: Apache-2.0
"""`nlx compile`: what a training step takes of a slice of TPUs that is not there.

    nlx compile hope-1.3b --topology v5p:4x4x4 --mesh.fsdp 16 --mesh.tensor 4 --batch 64

The step is compiled by the TPUs' own compiler, on this machine's CPU: a program that does not fit
into a chip's memory is refused here as it is there. The roofline says how long a step takes at
least: the longest of what its products take at the chips' peak, its memory at full bandwidth, and
what the devices send at all of their links; they overlap at best. Needs `pip install "nlx[aot]"`.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from nlx_kernels import ahead_of_time

from nlx import nn
from nlx_experiments import chips, collectives, learner, report, runs
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import say
from nlx_experiments.errors import Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile(TrainConfig):
    """Compiles a training step for a slice of TPUs, and says what it takes."""

    topology: str = "v5e:2x2"
    """Kind of chip and its numbers along each axis, such as v5e:16x16 or v5p:4x4x4."""
    out: pathlib.Path | None = None
    """A JSON file for the numbers."""


def main(options: Compile) -> dict[str, Any]:
    """Prints the table; returns the numbers."""
    say(f"Compiling for {options.topology}: minutes for a large model.")
    found = measure(options, options.topology)
    if options.out is not None:
        runs.write_json(options.out, found)
    say(table(found).text())
    return found


def measure(config: TrainConfig, topology: str) -> dict[str, Any]:
    """What one step takes of one device, and the least time that it takes.

    Raises Refused: no compiler, an unknown topology, a mesh that does not fit it, or a program that
    the compiler refuses.
    """
    if not ahead_of_time.available():
        raise Refused('the compiler for TPUs is not installed: pip install "nlx[aot]".')
    try:
        devices = ahead_of_time.devices_of(topology)
    except Exception as error:
        raise Refused(
            f"`topology` is {topology!r}, which the compiler does not know "
            f"({' '.join(str(error).split())[:200]}); it must be such as v5e:16x16 or v5p:4x4x4."
        ) from error
    chip = chips.of(devices[0].device_kind)
    if chip is None:
        raise Refused(
            f"`topology` is {topology!r}, chips called {devices[0].device_kind!r}; they must be "
            f"among {', '.join(chips.CHIPS)}."
        )
    began = time.monotonic()
    program = compiled(config, devices)
    seconds = time.monotonic() - began
    memory: Any = program.memory_analysis()
    state = memory.argument_size_in_bytes
    held = state + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = program.as_text() or ""
    sent = collectives.sent(text, len(devices))
    total = sum(one.bytes for one in sent.values())
    moved = state + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    tokens = config.batch * config.length
    analytic = tokens * learner.flops_a_token(config)
    times = {
        "products": analytic / len(devices) / chip.bfloat16,
        "memory": moved / chip.bandwidth,
        "links": total / chip.links,
    }
    step = max(times.values())
    return {
        "preset": config.preset,
        "parameters": nn.parameter_count(learner.abstract(config)),
        "topology": topology,
        "devices": len(devices),
        "mesh": dataclasses.asdict(config.mesh),
        "batch": config.batch,
        "length": config.length,
        "accumulate": config.accumulate,
        "bytes_per_device": {
            "state": state,
            "temporaries": memory.temp_size_in_bytes,
            "all": held,
            "of": chip.memory,
        },
        "fits": held < chip.memory,
        "sent": {kind: one._asdict() for kind, one in sorted(sent.items())},
        "sent_per_token": total * len(devices) / tokens,
        "exchanged_at_every_chunk": collectives.in_loops_of_loops(
            text, outer=1 + (config.accumulate > 1)
        ),
        "flops_per_token": analytic / tokens,
        "seconds_at_least": {**times, "step": step},
        "mfu_at_most": times["products"] / step,
        "tokens_per_second_at_most": tokens / step,
        "compiled_in": round(seconds, 1),
        "kernels": sorted(ahead_of_time.kernels_of(text)),
    }


def compiled(config: TrainConfig, devices: Any) -> Any:
    """The compiled step."""
    shapes = learner.abstract(config)
    mesh = learner.mesh_of(config, devices)
    if mesh is None:
        raise Refused("the mesh is one device; `nlx compile` is for several.")
    made = learner.parts(config, shapes, mesh)
    described = lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
    state = jax.tree.map(described, jax.eval_shape(made.init), made.placed)
    tokens = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32, sharding=made.rows)
    run = jax.jit(made.step, donate_argnums=0, out_shardings=(made.placed, made.whole))
    try:
        return ahead_of_time.compiled(run, state, state.params, {"tokens": tokens}, mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise Refused(f"the compiler for TPUs refuses {config.preset}: {reason}") from error


def table(found: dict[str, Any]) -> report.Table:
    """The numbers for a terminal."""
    held, at_least = found["bytes_per_device"], found["seconds_at_least"]
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    sent = [
        (f"sent, {kind}", f"{one['times']:,} times, {gib(one['bytes'])}")
        for kind, one in found["sent"].items()
    ]
    rows = [
        ("parameters", f"{found['parameters']:,}"),
        ("devices", f"{found['devices']}, {found['mesh']}"),
        ("state", gib(held["state"])),
        ("temporaries", gib(held["temporaries"])),
        ("all", f"{gib(held['all'])} of {gib(held['of'])}: {fits(found)}"),
        *sent,
        ("sent per token", f"{found['sent_per_token']:,.0f} bytes by all devices"),
        ("products", f"{found['flops_per_token'] / 1e9:.2f} GFLOP a token"),
        *((f"at least, {what}", f"{1e3 * s:.1f} ms") for what, s in at_least.items()),
        ("MFU at most", f"{100 * found['mfu_at_most']:.0f} %"),
        ("tokens a second at most", f"{found['tokens_per_second_at_most']:,.0f}"),
        ("kernels", ", ".join(found["kernels"]) or "none"),
    ]
    title = f"{found['preset']} on {found['topology']}, compiled in {found['compiled_in']:.0f} s"
    return report.Table(title, ("of one device and step", ""), rows)


def fits(found: dict[str, Any]) -> str:
    """Whether the program fits into a chip."""
    return "fits" if found["fits"] else "does not fit"
