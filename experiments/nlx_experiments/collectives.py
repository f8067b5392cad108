# SPDX-License-Identifier: Apache-2.0
"""What the devices of a compiled program send each other, read from its text."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (.*?) ((?:ragged-)?(?:{'|'.join(KINDS)}))(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|called_computations|branch_computations|true_computation"
    r"|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
# Of a mesh, those axes that exchange, whole or a part of one: mesh['data'=2,'fsdp'=4] {'fsdp':(1)2}
_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")
_OPENED = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


class Sent(NamedTuple):
    """Of one kind of exchange: how often it happens, and the bytes a device sends in all."""

    times: int
    bytes: int


def sent(program: str, devices: int) -> dict[str, Sent]:
    """Kind -> what one device sends in one run of a program, for the kinds that are there.

    With rings, of n devices in a group: all-gather and all-to-all send (n - 1) / n of what they
    make, reduce-scatter (n - 1) times what it makes, all-reduce twice (n - 1) / n of it, a permute
    all of it. The body of a loop counts as often as it runs: as the program says, or as its
    condition does, less than one constant; once where neither is so. Of an exchange that TPUs go on
    with beside other work, which stands in every piece of it, the start alone counts.

    program: the text of a compiled program. devices: of the mesh, where no groups are named.
    """
    found: dict[str, Sent] = {}
    computations, entry = _computations(program)
    times = _times(computations, entry)
    begun = _goes_on(computations)
    for name, lines in computations.items():
        for line in lines:
            operation = _OPERATION.search(line)
            if operation is None or not times.get(name) or name in begun:
                continue
            kind = operation[2].removeprefix("ragged-")
            size = times[name] * _bytes(kind, operation, _group(line, devices))
            before = found.get(kind, Sent(0, 0))
            found[kind] = Sent(before.times + times[name], before.bytes + size)
    return found


def in_loops_of_loops(program: str, outer: int = 1) -> dict[str, list[str]]:
    """The exchanges inside more loops than `outer`, one in the other, by computation.

    A model's blocks are a loop, the parts of an accumulated batch are another one around it; what
    stands in a loop inside these is exchanged at every chunk.
    """
    computations, entry = _computations(program)
    deepest, begun = dict.fromkeys(computations, -1), _goes_on(computations)

    def visit(name: str, depth: int) -> None:
        if name not in computations or deepest[name] >= depth:
            return
        deepest[name] = depth
        for line in computations[name]:
            for how, called in _calls(line):
                visit(called, depth + (how == "body"))

    visit(entry, 0)
    kinds = {
        name: [m[2] for line in lines if (m := _OPERATION.search(line))]
        for name, lines in computations.items()
        if deepest[name] > outer and name not in begun
    }
    return {name: of for name, of in kinds.items() if of}


def _goes_on(computations: Mapping[str, list[str]]) -> set[str]:
    """The fusions in which an exchange that was begun before goes on, or ends."""
    ends = {
        called
        for lines in computations.values()
        for line in lines
        if line.strip().startswith("%async-collective-done")
        for _, called in _calls(line)
    }
    return ends | {name for name in computations if name.startswith("async_collective_fusion")}


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines, and the name of the one that runs first."""
    found: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in program.splitlines():
        if opened := _OPENED.match(line):
            name = opened[2]
            entry = name if opened[1] else entry
            found[name] = []
        elif name:
            found[name].append(line)
    return found, entry


def _calls(line: str) -> list[tuple[str, str]]:
    """(how, name) of the computations that a line calls."""
    return [
        (how, name.strip().lstrip("%"))
        for how, names in _CALLED.findall(line)
        for name in names.strip("{}").split(",")
    ]


def _times(computations: Mapping[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times = dict.fromkeys(computations, 0)

    def run(name: str, often: int) -> None:
        if name not in computations:
            return
        times[name] += often
        for line in computations[name]:
            turns = _turns(line, computations)
            for how, called in _calls(line):
                loop = how in ("body", "condition")
                run(called, often * turns if loop else often)

    run(entry, 1)
    return times


def _turns(line: str, computations: Mapping[str, list[str]]) -> int:
    """How often the loop of a line runs, from 0 on; 1 where that is not known, or it is none."""
    if known := _TURNS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    if condition is None:
        return 1
    lines, waiting = [], [condition[1]]
    while waiting:
        own = computations.get(waiting.pop(), [])
        lines += own
        waiting += [name for line in own for _, name in _calls(line)]
    constants = [int(found[1]) for line in lines if (found := _CONSTANT.search(line))]
    counts = sum("direction=LT" in line for line in lines) == 1 and len(constants) == 1
    return constants[0] if counts else 1


def _bytes(kind: str, operation: re.Match[str], group: int) -> int:
    """What one device sends in one exchange."""
    made = _made(operation[1], begins=operation[3] is not None and kind != "all-reduce")
    if kind == "collective-permute":
        return made
    if kind == "reduce-scatter":
        return made * (group - 1)
    return (2 if kind == "all-reduce" else 1) * made * (group - 1) // group


def _made(kind: str, begins: bool) -> int:
    """Bytes of the arrays of a type.

    begins: of what begins an exchange in the background, (given, made, ...), those that are made.
    """
    if begins:
        depth, parts = 0, [""]
        for letter in kind[1:-1]:
            depth += (letter in "([{") - (letter in ")]}")
            if letter == "," and not depth:
                parts.append("")
            else:
                parts[-1] += letter
        kind = parts[1]
    return sum(_size(dtype, shape) for dtype, shape in _ARRAY.findall(kind))


def _size(dtype: str, shape: str) -> int:
    count = math.prod(int(n) for n in shape.split(",") if n)
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return count * bits // 8


def _group(line: str, devices: int) -> int:
    """Devices that exchange with each other; all where no groups are named.

    Raises ValueError for groups that are written in another way than is known here.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if named := _OF_MESH.search(line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(part or sizes[name]) for name, part in _AXIS.findall(named[2]))
    if re.search(r"replica_groups=(?!\{\})", line):
        raise ValueError(f"groups of devices that cannot be read: {line.strip()[:300]}")
    return devices
