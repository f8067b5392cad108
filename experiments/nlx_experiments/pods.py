# SPDX-License-Identifier: Apache-2.0
"""`nlx run pods`: training steps compiled for slices of TPUs that are not there.

command    nlx run pods [--only LINE ...]
           nlx run pods-tiny: one small model on four chips, in a minute
shows      what one step takes of a chip's memory, what devices send each other, the least time and
           the largest share of the peak (`pod.py`): models of 1.3 billion parameters on 64 and 256
           chips, one of 7 billion on 512, and hope-340m on 4 to 512 chips; on paper to 6,144
takes      two to twelve minutes a line on one core, an hour and a half in all. A line that is
           stopped begins anew, finished ones are kept
expects    every line fits its chips, and nothing is exchanged at a chunk; what is sent is a tenth
           more than on paper, of which embeddings, gathered and summed in float32, are most

All steps compute in bfloat16 with float32 parameters and memories, AdamW, blocks made again in the
backward pass, which the least time does not count: the share of the peak is at most some three
quarters of what is told. Slopes of matrices are summed over devices in bfloat16, as they come;
those of embeddings, norms and gates in float32.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nlx import nn
from nlx_experiments import config, pod, report, runs
from nlx_experiments.cells import Store
from nlx_experiments.config import MeshConfig
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Refused, Stopped
from nlx_experiments.sequence_experiment import PLACE, published


class Line(NamedTuple):
    """One compiled step."""

    preset: str
    topology: str
    mesh: MeshConfig
    batch: int
    length: int = 4096
    fields: Mapping[str, Any] = {}  # of the model, replaced


def _fsdp(devices: int) -> MeshConfig:
    """So many share the parameters: 128 channels each of 2048 or 4096, a tile, so they gather."""
    return MeshConfig(data=-1, fsdp=devices)


# Of 7 billion parameters, in the proportions of the presets.
SEVEN: Mapping[str, Any] = dict(width=4096, layers=32, heads=32, hidden=4480, memory_hidden=128)
LINES: dict[str, Line] = {
    f"{preset}, {topology}": Line(preset, topology, _fsdp(16), devices)
    for topology, devices in (("v5p:4x4x4", 64), ("v5e:16x16", 256))
    for preset in ("hope-1.3b", "titans-mac-1.3b", "transformer++-1.3b")
}
LINES["hope-7b, v5p:8x8x8"] = Line("hope-1.3b", "v5p:8x8x8", _fsdp(32), 512, fields=SEVEN)
SCALES = {4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 512: "v5p:8x8x8"}
LINES |= {
    f"hope-340m, {topology}": Line("hope-340m", topology, _fsdp(4), 4 * devices)
    for devices, topology in SCALES.items()
}
TINY = {
    "hope-tiny, v5e:2x2": Line(
        "hope-tiny", "v5e:2x2", _fsdp(4), 4, 64, dict(width=64, heads=2, hidden=32)
    )
}
ON_PAPER = (1, 4, 16, 64, 512, 6144)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pods:
    """Training steps compiled for slices of TPUs."""

    runs: pathlib.Path = pathlib.Path("runs/pods")
    """Where finished lines are kept."""
    only: tuple[str, ...] = ()
    """Lines to compile; all by default."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Pods):
    """One small model on four chips: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/pods-tiny")
    place: pathlib.Path = pathlib.Path("runs/pods-tiny")


def main(options: Pods) -> dict[str, Any]:
    """Compiles what is not known yet; writes table and numbers.

    Raises Refused for an unknown line, or where there is no compiler; Stopped: a signal came.
    """
    lines = TINY if isinstance(options, Tiny) else LINES
    for name in options.only:
        if name not in lines:
            raise Refused(f"`only` holds {name!r}; it must be one of {'; '.join(lines)}.")
    with runs.Run(options.runs) as folder, StopRequest() as stop:
        runs.note_environment(folder, say)
        store = Store(folder)
        for name in options.only or lines:
            if stop.received is not None:
                raise Stopped(f"{stop.received.name}: finished lines are kept.", stop.received)
            what = f"{name}; {lines[name]}"
            if what not in store.known:
                found = pod.measure(chosen(lines[name]), lines[name].topology)
                store.add({"what": what, "line": name, **found})
                say(pod.table(found).text())
        path = options.place / "results" / "pods.json"
        known = published(path) | store.known
    wanted = {f"{name}; {line}": name for name, line in lines.items()}
    found = {wanted[what]: record for what, record in known.items() if what in wanted}
    write(options, {name: found[name] for name in lines if name in found})
    return found


def chosen(line: Line) -> config.TrainConfig:
    """The training of a line."""
    made = nn.preset(line.preset)
    model = dataclasses.replace(made, bfloat16=True, remat=True, **line.fields)
    return config.make(
        line.preset,
        model=model,
        mesh=line.mesh,
        batch=line.batch,
        length=line.length,
        optimizer="adamw",
    )


def write(options: Pods, found: Mapping[str, Any]) -> None:
    """Numbers and text of what is finished."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    cells = {"pods": {"models": {name: {"": record} for name, record in found.items()}}}
    runs.write_json(folder / "pods.json", {"environment": runs.environment(), "tasks": cells})
    text = shown(found)
    runs.write_whole(folder / "pods.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", "pods", text)
    say(f"\n{text}")


def shown(found: Mapping[str, Any]) -> str:
    """The table of lines, and bytes from one chip to thousands."""
    parts = [table(found).markdown()]
    scale = [record for name, record in found.items() if name.startswith("hope-340m")]
    if scale:
        parts += [
            "Bytes that a device sends in a step for each of its tokens, hope-340m, four devices "
            "sharing the parameters and replicas of these four, as many tokens a device:",
            scaling(scale).markdown(),
        ]
    return "\n\n".join(parts)


def table(found: Mapping[str, Any]) -> report.Table:
    """A row a line."""
    gib = lambda n: f"{n / 2**30:.1f}"
    rows = []
    for name, record in found.items():
        held, least = record["bytes_per_device"], record["seconds_at_least"]
        sent = sum(one["bytes"] for one in record["sent"].values())
        rows.append(
            (
                name,
                f"{record['parameters'] / 1e9:.2f}",
                f"{gib(held['all'])} of {gib(held['of'])}",
                pod.fits(record),
                f"{sent / 2**20:,.0f}",
                ", ".join(sorted(record["exchanged_at_every_chunk"])) or "nothing",
                f"{1e3 * least['step']:.0f}",
                f"{100 * record['mfu_at_most']:.0f}",
                f"{record['compiled_in']:.0f}",
            )
        )
    columns = (
        "preset, chips", "10^9 parameters", "GiB of a device", "", "MiB sent by a device",
        "exchanged at every chunk", "ms a step at least", "MFU at most, %", "s to compile",
    )  # fmt: skip
    return report.Table("", columns, rows)


def scaling(scale: list[Mapping[str, Any]]) -> report.Table:
    """From compiled programs, and on paper from the smallest one."""
    compiled = {record["devices"]: record for record in scale}
    of_token = lambda r: (
        sum(s["bytes"] for s in r["sent"].values()) * r["devices"] / (r["batch"] * r["length"])
    )
    least = compiled[min(compiled)]
    tokens = least["batch"] * least["length"] / least["devices"]
    rows = []
    for devices in ON_PAPER:
        there = f"{of_token(compiled[devices]):,.0f}" if devices in compiled else ""
        rows.append(
            (f"{devices:,}", there, f"{on_paper(least['parameters'], devices, tokens):,.0f}")
        )
    return report.Table("", ("chips", "compiled", "on paper"), rows)


def on_paper(parameters: int, devices: int, tokens: float, shared: int = 4) -> float:
    """Bytes a device sends for each of its tokens in one step.

    Of n devices that share N parameters, each gathers those of the others for the forward and for
    the backward pass, in bfloat16: 2 x 2 N (n - 1) / n. Slopes are summed over all D devices, in
    bfloat16, before each keeps its share: 2 x 2 N (D - 1) / D.
    """
    n = min(shared, devices)
    gathered = 4 * parameters * (n - 1) / n
    summed = 4 * parameters * (devices - 1) / devices
    return (gathered + summed) / tokens
