# SPDX-License-Identifier: Apache-2.0
"""A picture of nested levels: slow ones at the bottom, arrows for what each hands to others."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from nlx.inspect import Link, Row
from nlx_experiments import report

GRADIENT = "gradient"
CONVOLUTIONS = "convolutions"
KINDS = {
    "initial state": ("initial state",),
    "keys and values": ("key", "value", "context"),
    "gates": ("rate", "retain", "momentum", "erase"),
    "gradient": ("gradient",),
}
COLOUR = dict(zip(KINDS, report.COLOURS, strict=False))
PITCH, WIDTH, HEIGHT, STEP, GAP = 2.9, 2.4, 1.05, 2.2, 1.3


class Box(NamedTuple):
    """One level, or equal ones together, in the picture."""

    group: str  # what it belongs to: pre-training, a mixer, an optimizer's transformation
    label: str
    row: Row
    x: float
    y: float


def draw(path: pathlib.Path, title: str, rows: Sequence[Row], links: Sequence[Link]) -> None:
    """Draws levels as boxes in bands of equal clocks, and links as arrows.

    Args:
      path: the PNG.
      title: above it.
      rows: as `nlx.inspect.levels` has them; what never fires is left out.
      links: as `nlx.inspect.wiring` has them.
    """
    boxes, bands = _place(rows)
    if not boxes:
        return
    handed = _between(links, {row.name: _key(row.name) for row in rows}, boxes)
    left = min(box.x for box in boxes.values()) - WIDTH
    right = max(box.x for box in boxes.values()) + WIDTH
    given = any(source == GRADIENT for source, _ in handed)
    heights = _heights(bands)
    top = heights[bands[-1]] + (3.2 if given else 1.2)
    size = (max(7.0, 0.62 * (right - left + 2.4)), 0.72 * (top + 1.6) + 0.4)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for n, (clock, y) in enumerate(heights.items()):
        shade = "#f4f4f0" if n % 2 else "#eaeae4"
        axes.axhspan(y - 1.1, y + 1.1, color=shade, linewidth=0, zorder=-2)
        axes.text(left - 2.2, y, clock, va="center", fontsize=10, color="#444444")
    _frames(axes, boxes)
    for box in boxes.values():
        _box(axes, box)
    if given:
        _gradient(axes, boxes, handed, top - 0.75)
    for group in dict.fromkeys(box.group for box in boxes.values()):
        _inside(axes, {k: b for k, b in boxes.items() if b.group == group}, handed)
    _from_outer(axes, boxes, handed)
    _legend(axes, handed)
    axes.set(xlim=(left - 2.4, right), ylim=(-1.6, top), title=title)
    axes.axis("off")
    report.save(figure, path)


Key = tuple[str, str]
Handed = dict[tuple[str | Key, Key], list[str]]


def _key(name: str) -> Key:
    """(group, label) of a level."""
    if "convolution" in name:
        return CONVOLUTIONS, CONVOLUTIONS
    if ".mixer" in name:
        group, _, label = name.partition(".mixer")
        return group + ".mixer" + label.rpartition(".")[0].removesuffix(".memory"), _short(label)
    group, _, label = name.rpartition(".")
    return (group or ("pre-training" if name.startswith(("outer", "cms")) else name)), label


def _short(label: str) -> str:
    return label.strip(".").removesuffix(".*") or "attention"


def _place(rows: Sequence[Row]) -> tuple[dict[Key, Box], list[str]]:
    """Boxes in columns of their own, and the clocks of the bands from the bottom up."""
    kept = [row for row in rows if row.clock != "never"]
    merged: dict[Key, Row] = {}
    for row in kept:
        key = _key(row.name)
        if (same := merged.get(key)) is not None:
            copies, parameters = same.copies + row.copies, same.parameters + row.parameters
            row = same._replace(copies=copies, parameters=parameters)
        merged[key] = row
    bands = sorted({row.clock for row in merged.values()}, key=_pace)
    ordered = sorted(merged, key=lambda key: (key[0] != "pre-training", key[0] == CONVOLUTIONS))
    groups = [list(keys) for _, keys in itertools.groupby(ordered, key=lambda key: key[0])]
    heights = _heights(bands)
    own = [groups[0]] if groups and groups[0][0][0] == "pre-training" else []
    boxes: dict[Key, Box] = {}
    for line in (own, groups[len(own) :]):  # pre-training stands below all others
        wide = sum(len(group) for group in line) + 0.35 * (len(line) - 1)
        x = -PITCH * (wide - 1) / 2
        for group in line:
            for key in group:
                boxes[key] = Box(*key, merged[key], x, heights[merged[key].clock])
                x += PITCH
            x += 0.35 * PITCH
    return boxes, bands


def _heights(bands: Sequence[str]) -> dict[str, float]:
    """Where each band lies: there is more room between steps and tokens."""
    apart = lambda clock: GAP if _pace(clock)[0] and not _pace(bands[0])[0] else 0
    return {clock: STEP * n + apart(clock) for n, clock in enumerate(bands)}


def _pace(clock: str) -> tuple[bool, int]:
    """Slow clocks first: steps before tokens, long periods before short ones."""
    first, unit = clock.split(" ")
    return unit.startswith("token"), -1 if first == "every" else -int(first)


def _between(links: Sequence[Link], keys: dict[str, Key], boxes: dict[Key, Box]) -> Handed:
    """What is handed from box to box."""
    handed: Handed = {}
    for source, target, what in links:
        start: str | Key = source if source == GRADIENT else keys.get(source, (source, source))
        end = keys.get(target)
        if end in boxes and (start == GRADIENT or start in boxes):
            parts = handed.setdefault((start, end), [])
            if what not in parts:
                parts.append(what)
    return handed


def _kinds(parts: Sequence[str]) -> dict[str, str]:
    """Kind -> its parts in words."""
    found = {kind: [p for p in of if p in parts] for kind, of in KINDS.items()}
    return {kind: ", ".join(of) for kind, of in found.items() if of}


def _box(axes: Axes, box: Box) -> None:
    _rounded(axes, box.x - WIDTH / 2, box.y - HEIGHT / 2, WIDTH, HEIGHT, "white", "#333333")
    row = box.row
    write = row.write.split("(")[0]
    size = 10 if len(box.label) < 14 else 8
    lines = (f"{row.objective}, {write}", f"{row.copies} × {row.parameters // row.copies:,}")
    axes.text(
        box.x, box.y + 0.27, box.label, ha="center", va="center", fontsize=size, weight="bold"
    )
    for n, line in enumerate(lines):
        y = box.y - 0.06 - 0.25 * n
        axes.text(box.x, y, line, ha="center", va="center", fontsize=7, color="#444444")


def _frames(axes: Axes, boxes: dict[Key, Box]) -> None:
    """A frame and a name around every group of several boxes."""
    for group in dict.fromkeys(box.group for box in boxes.values()):
        x0, x1, y0, y1 = _extent(group, boxes)
        if x1 - x0 > PITCH:
            _rounded(axes, x0, y0, x1 - x0, y1 - y0, "none", "#999999")
            axes.text(x0 + 0.05, y1 + 0.05, group, va="bottom", fontsize=8, color="#777777")


def _extent(group: str, boxes: dict[Key, Box]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a group, its bus included."""
    own = [box for box in boxes.values() if box.group == group]
    xs, ys = [box.x for box in own], [box.y for box in own]
    alone = len(own) == 1
    side, above = (0, 0) if alone else (0.22, 0.62)
    return (
        min(xs) - WIDTH / 2 - side,
        max(xs) + WIDTH / 2 + side,
        min(ys) - HEIGHT / 2 - (0 if alone else 0.15),
        max(ys) + HEIGHT / 2 + above,
    )


def _inside(axes: Axes, boxes: dict[Key, Box], handed: Handed) -> None:
    """Arrows within a group: one line that all read, where most boxes read most others."""
    own = {pair: parts for pair, parts in handed.items() if set(pair) <= set(boxes)}
    across = [pair for pair in own if pair[0] != pair[1]]
    sources = {source for source, _ in across}
    if len(boxes) > 2 and len(across) >= len(sources) * (len(boxes) - 1) > 0:
        _bus(axes, boxes, own)
        return
    for (source, target), parts in own.items():
        if source == target or source == GRADIENT:
            continue
        back: tuple[str | Key, Key] = (target, source)  # type: ignore[assignment]
        both = own.get(back) == parts
        if both and str(target) < str(source):
            continue
        a, b = boxes[source], boxes[target]  # type: ignore[index]
        _arrow(axes, a, b, parts, both)


def _bus(axes: Axes, boxes: dict[Key, Box], own: Handed) -> None:
    low = min(box.y for box in boxes.values())
    y = low + HEIGHT / 2 + 0.28
    xs = [box.x for box in boxes.values()]
    axes.plot([min(xs) - 0.4, max(xs) + 0.4], [y, y], color="#777777", linewidth=1.5)
    for key, box in boxes.items():
        edge = box.y + (HEIGHT / 2 if box.y < y else -HEIGHT / 2)
        given = [p for (source, target), ps in own.items() if source == key != target for p in ps]
        taken = any(target == key != source for source, target in own)
        for kind, words in list(_kinds(given).items())[:1]:
            others = [w for k, w in _kinds(given).items() if k != kind]
            x = box.x - 0.4
            axes.annotate("", (x, y), (x, edge), arrowprops=_style(COLOUR[kind]))
            height, side = (y + 0.14, "center") if edge < y else (edge - 0.3, "right")
            words = ", ".join([words, *others])
            axes.text(
                x - 0.05, height, words, fontsize=7.5, color=COLOUR[kind], va="center", ha=side
            )
        if taken:
            axes.annotate("", (box.x + 0.4, edge), (box.x + 0.4, y), arrowprops=_style("#777777"))


class Arrow(NamedTuple):
    """From the slow parameters to what stands above them."""

    x: float
    bottom: float
    kind: str
    words: str
    lower: float  # how far below the end the words stand


def _from_outer(axes: Axes, boxes: dict[Key, Box], handed: Handed) -> None:
    """One arrow a kind from the slow parameters to every group above them."""
    outer = ("pre-training", "outer")
    others = [box for box in boxes.values() if box.group != outer[0]]
    if outer not in boxes or not others:
        return
    arrows = []
    for group in dict.fromkeys(box.group for box in others):
        told = [p for (a, b), ps in handed.items() if a == outer and b[0] == group for p in ps]
        left, right, bottom, _ = _extent(group, boxes)
        kinds = list(_kinds(told).items())
        for n, (kind, words) in enumerate(kinds):
            x = left + (n + 1) / (len(kinds) + 1) * (right - left)
            lower = 0.42 + (0.24 * n if right - left < 2 * PITCH else 0)
            arrows.append(Arrow(x, bottom, kind, words, lower))
    box, start = boxes[outer], boxes[outer].y + HEIGHT / 2
    room = min(arrow.bottom for arrow in arrows) - 1.15 - (start + 0.55)
    far = sorted(arrows, key=lambda arrow: -abs(arrow.x - box.x))  # the farther, the lower
    for n, arrow in enumerate(sorted(arrows)):
        x = box.x + WIDTH * ((n + 1) / (len(arrows) + 1) - 0.5)
        y = start + 0.55 + room * far.index(arrow) / max(1, len(arrows) - 1)
        ys = [start, y, y, arrow.bottom - 0.1]
        axes.plot([x, x, arrow.x, arrow.x], ys, color=COLOUR[arrow.kind], linewidth=1.4, zorder=0)
        ends = (arrow.x, arrow.bottom), (arrow.x, arrow.bottom - 0.2)
        axes.annotate("", *ends, arrowprops=_style(COLOUR[arrow.kind]))
    for arrow in arrows:
        _words(axes, arrow.x, arrow.bottom - arrow.lower, arrow.words, arrow.kind)


def _gradient(axes: Axes, boxes: dict[Key, Box], handed: Handed, y: float) -> None:
    """The stream of gradients, which an optimizer's levels learn from, above them."""
    reached = [target for source, target in handed if source == GRADIENT]
    centre = sum(boxes[target].x for target in reached) / len(reached)
    axes.text(
        centre, y, "gradients", ha="center", va="center", fontsize=10, weight="bold",
        bbox=dict(boxstyle="round,pad=0.4", facecolor="#fbeaf3", edgecolor=COLOUR["gradient"]),
    )  # fmt: skip
    for target in reached:
        box, words = boxes[target], ", ".join(handed[GRADIENT, target])
        start = centre + max(-0.7, min(0.7, 0.3 * (box.x - centre))), y - 0.27
        end = box.x, box.y + HEIGHT / 2
        axes.annotate("", end, start, arrowprops=_style(COLOUR["keys and values"]))
        share = 0.55 if box.y == max(b.y for b in boxes.values()) else 0.8
        x, height = ((1 - share) * a + share * b for a, b in zip(start, end, strict=True))
        _words(axes, x, height, words, "keys and values")


def _arrow(axes: Axes, a: Box, b: Box, parts: Sequence[str], both: bool) -> None:
    """From one box to another of its group."""
    kind = next(iter(_kinds(parts)))
    if a.y == b.y:
        side = 1 if b.x > a.x else -1
        start, end = (a.x + side * WIDTH / 2, a.y), (b.x - side * WIDTH / 2, b.y)
    else:
        side = 1 if b.y > a.y else -1
        start, end = (a.x, a.y + side * HEIGHT / 2), (b.x, b.y - side * HEIGHT / 2)
    style = _style(COLOUR[kind]) | dict(arrowstyle="<|-|>" if both else "-|>")
    axes.annotate("", end, start, arrowprops=style)
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    _words(axes, x, y + (0.72 if a.y == b.y else 0), ", ".join(parts), kind)


def _words(axes: Axes, x: float, y: float, words: str, kind: str) -> None:
    box = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none", alpha=0.85)
    axes.text(x, y, words, ha="center", va="center", fontsize=7.5, color=COLOUR[kind], bbox=box)


def _style(colour: str) -> dict:
    return dict(arrowstyle="-|>", color=colour, linewidth=1.4, shrinkA=0, shrinkB=0)


def _rounded(axes: Axes, x, y, width, height, face: str, edge: str) -> None:
    style = "round,pad=0,rounding_size=0.12"
    patch = FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge)
    axes.add_patch(patch)


def _legend(axes: Axes, handed: Handed) -> None:
    used = {kind for parts in handed.values() for kind in _kinds(parts)}
    for kind in KINDS:
        if kind in used:
            axes.plot([], [], color=COLOUR[kind], label=kind)
    if used:
        axes.legend(loc="lower right", ncols=len(used), frameon=False, fontsize=8)
