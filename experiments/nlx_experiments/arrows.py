# SPDX-License-Identifier: Apache-2.0
"""The arrows of a picture of nested levels: what each level hands to others."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from nlx.inspect import Row
from nlx_experiments import report

GRADIENT = "gradient"
KINDS = {
    "initial state": ("initial state",),
    "keys and values": ("query", "key", "value", "context"),
    "gates": ("rate", "retain", "momentum", "erase"),
    "gradient": ("gradient",),
}
COLOUR = dict(zip(KINDS, report.COLOURS, strict=False))
PITCH, WIDTH, HEIGHT = 2.9, 2.4, 1.3  # from column to column, and the size of a box


Key = tuple[str, str]
Handed = dict[tuple[str | Key, Key], list[str]]


class Box(NamedTuple):
    """One level, or equal ones together, in the picture."""

    group: str  # what it belongs to: pre-training, a mixer, an optimizer's transformation
    label: str
    row: Row
    x: float
    y: float


def extent(group: str, boxes: dict[Key, Box]) -> tuple[float, float, float, float]:
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


def within(axes: Axes, boxes: dict[Key, Box], handed: Handed) -> None:
    """Arrows within a group: one line that all read, where most boxes read most others."""
    own = {pair: parts for pair, parts in handed.items() if set(pair) <= set(boxes)}
    across = [pair for pair in own if pair[0] != pair[1]]
    sources = {source for source, _ in across}
    if len(boxes) > 2 and len(across) >= len(sources) * (len(boxes) - 1) > 0:
        _bus(axes, boxes, own)
        return
    for (source, target), parts in own.items():
        if source == target or isinstance(source, str):  # a gradient comes from no level
            continue
        both = own.get((target, source)) == parts
        if both and str(target) < str(source):
            continue
        _arrow(axes, boxes[source], boxes[target], parts, both)


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


def from_outer(axes: Axes, boxes: dict[Key, Box], handed: Handed) -> None:
    """One arrow a kind from the slow parameters to every group above them."""
    outer = ("pre-training", "outer")
    others = [box for box in boxes.values() if box.group != outer[0]]
    if outer not in boxes or not others:
        return
    arrows = []
    for group in dict.fromkeys(box.group for box in others):
        left, right, bottom, _ = extent(group, boxes)
        for key, words in _ends(group, outer, boxes, handed):
            kinds = list(_kinds(words).items())
            if key is not None:
                left, right = (boxes[key].x + side * WIDTH / 2 for side in (-1, 1))
                bottom = boxes[key].y - HEIGHT / 2
            for n, (kind, of_kind) in enumerate(kinds):
                x = left + (n + 1) / (len(kinds) + 1) * (right - left)
                lower = 0.42 + (0.26 * n if right - left < 2 * PITCH else 0)
                lower += 1.0 if key is not None and bottom - extent(group, boxes)[2] > HEIGHT else 0
                arrows.append(Arrow(x, bottom, kind, of_kind, lower))
    if not arrows:
        return
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


def _ends(
    group: str, source: Key, boxes: dict[Key, Box], handed: Handed
) -> list[tuple[Key | None, list[str]]]:
    """What a source hands to a group: to all of its boxes (None), where it has many, or to one."""
    own = [key for key, box in boxes.items() if box.group == group]
    told = {key: handed.get((source, key), []) for key in own}
    common = [p for p in told[own[0]] if len(own) > 2 and all(p in told[key] for key in own)]
    ends: list[tuple[Key | None, list[str]]] = [(None, common)] if common else []
    rest = [(key, [p for p in parts if p not in common]) for key, parts in told.items()]
    return ends + [(key, parts) for key, parts in rest if parts]


def across(axes: Axes, boxes: dict[Key, Box], handed: Handed) -> None:
    """From a box to those of another group: from above to what is on its left, else from below."""
    for source, box in boxes.items():
        groups = dict.fromkeys(other.group for other in boxes.values())
        for group in groups if source != ("pre-training", "outer") else ():
            if group == box.group:
                continue
            for n, (key, words) in enumerate(_ends(group, source, boxes, handed)):
                _, right, bottom, top = extent(group, boxes)
                x = right - 0.3 if key is None else boxes[key].x
                y = top if key is None else boxes[key].y + HEIGHT / 2
                if key is not None and box.y == boxes[key].y and x < box.x:  # side by side
                    points = [(box.x - WIDTH / 2, box.y), (x + WIDTH / 2, box.y)]
                elif x < box.x:
                    height = box.y + 0.25 - 0.5 * n
                    points = [(box.x - WIDTH / 2, height), (x, height), (x, y)]
                else:
                    y = bottom if key is None else boxes[key].y - HEIGHT / 2
                    level = box.y - HEIGHT / 2 - 0.3
                    points = [(box.x, box.y - HEIGHT / 2), (box.x, level), (x, level), (x, y)]
                kind, told = next(iter(_kinds(words))), ", ".join(_kinds(words).values())
                axes.plot(*zip(*points[:-1], strict=True), color=COLOUR[kind], linewidth=1.4)
                axes.annotate("", points[-1], points[-2], arrowprops=_style(COLOUR[kind]))
                place = points[-2][0], points[-2][1] + 0.2
                if len(points) == 2:
                    place = (points[0][0] + points[1][0]) / 2, box.y + 0.2
                elif len(points) == 4:
                    place = x + 0.45, (points[-1][1] + points[-2][1]) / 2
                _words(axes, *place, told, kind)


def from_gradients(axes: Axes, boxes: dict[Key, Box], handed: Handed, y: float) -> None:
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
    aside = 0.45 * side if a.y != b.y else 0  # up on the left, down on the right: both may be there
    start, end = ((x - aside, y) for x, y in (start, end))
    axes.annotate("", end, start, arrowprops=style)
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    words = (
        ", ".join(parts).replace("retain, ", "retain,\n") if len(parts) > 3 else ", ".join(parts)
    )
    y += (HEIGHT / 2 + 0.2) if a.y == b.y else -0.25 * side
    _words(axes, x, y, words, kind)


def _words(axes: Axes, x: float, y: float, words: str, kind: str) -> None:
    box = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none")
    axes.text(
        x, y, words, ha="center", va="center", fontsize=7.5, color=COLOUR[kind], bbox=box, zorder=5
    )


def _style(colour: str) -> dict:
    return dict(arrowstyle="-|>", color=colour, linewidth=1.4, shrinkA=0, shrinkB=0)


def rounded(axes: Axes, x, y, width, height, face: str, edge: str) -> None:
    """A rectangle with round corners, from its left lower one."""
    style = "round,pad=0,rounding_size=0.12"
    patch = FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge)
    axes.add_patch(patch)


def legend(axes: Axes, handed: Handed) -> None:
    """What the colours mean, as far as they occur."""
    used = {kind for parts in handed.values() for kind in _kinds(parts)}
    for kind in KINDS:
        if kind in used:
            axes.plot([], [], color=COLOUR[kind], label=kind)
    if used:
        axes.legend(loc="lower right", ncols=len(used), frameon=False, fontsize=8)


def _kinds(parts: Sequence[str]) -> dict[str, str]:
    """Kind -> its parts in words."""
    found = {kind: [p for p in of if p in parts] for kind, of in KINDS.items()}
    return {kind: ", ".join(of) for kind, of in found.items() if of}
