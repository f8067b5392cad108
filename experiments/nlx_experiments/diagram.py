# SPDX-License-Identifier: Apache-2.0
"""A picture of nested levels: slow ones at the bottom, arrows for what each hands to others."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from nlx.inspect import Link, Row
from nlx_experiments import arrows, report
from nlx_experiments.arrows import GRADIENT, HEIGHT, PITCH, WIDTH, Box, Handed, Key

CONVOLUTIONS = "convolutions"
STEP, GAP = 2.5, 1.4  # from band to band, and more between steps and tokens


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
    top = heights[bands[-1]] + (3.2 if given else 1.5)
    size = (max(7.0, 0.62 * (right - left + 2.4)), 0.72 * (top + 1.8) + 0.4)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for n, (clock, y) in enumerate(heights.items()):
        shade = "#f4f4f0" if n % 2 else "#eaeae4"
        axes.axhspan(y - STEP / 2, y + STEP / 2, color=shade, linewidth=0, zorder=-2)
        axes.text(left - 2.2, y, clock, va="center", fontsize=10, color="#444444")
    _frames(axes, boxes, below=given)
    for key, box in boxes.items():
        _box(axes, box, handed.get((key, key), []))
    if given:
        arrows.from_gradients(axes, boxes, handed, top - 0.75)
    for group in dict.fromkeys(box.group for box in boxes.values()):
        arrows.within(axes, {k: b for k, b in boxes.items() if b.group == group}, handed)
    arrows.from_outer(axes, boxes, handed)
    arrows.across(axes, boxes, handed)
    arrows.legend(axes, handed)
    axes.set(xlim=(left - 2.4, right), ylim=(-1.8, top), title=title)
    axes.axis("off")
    report.save(figure, path)


def _key(name: str) -> Key:
    """(group, label) of a level."""
    if "convolution" in name:
        return CONVOLUTIONS, CONVOLUTIONS
    prefix, mixer, inside = name.partition(".mixer")
    if mixer and not inside:  # attention is all of its block's mixer
        return name + " ", "attention"
    if mixer:
        return prefix + mixer, [part for part in inside.split(".") if part != "*"][-1]
    group, _, label = name.rpartition(".")
    return (group or ("pre-training" if name.startswith(("outer", "cms")) else name)), label


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
    place = lambda key: (key[0] != "pre-training", key[0] == CONVOLUTIONS, not key[0].endswith(" "))
    ordered = sorted(merged, key=place)
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


def _box(axes: Axes, box: Box, itself: Sequence[str]) -> None:
    """A box with its name, and what it hands to itself."""
    arrows.rounded(axes, box.x - WIDTH / 2, box.y - HEIGHT / 2, WIDTH, HEIGHT, "white", "#333333")
    row = box.row
    write = row.write.split("(")
    lines = [row.objective, ", ".join(write[:2] if write[0] == "restarted" else write[:1])]
    if write[0] == "restarted":
        lines[1] = f"{write[1]}, restarted at {write[-1].partition('firings=')[2].strip(')')}"
    lines.append(f"{row.copies} × {row.parameters // row.copies:,}")
    lines += [f"↺ {', '.join(itself)}"] * bool(itself)
    size = min(10, 140 / len(box.label))
    text: dict[str, Any] = dict(ha="center", va="center", zorder=4)
    axes.text(box.x, box.y + 0.43, box.label, fontsize=size, weight="bold", **text)
    for n, line in enumerate(lines):
        size = min(7, 160 / len(line))
        axes.text(box.x, box.y + 0.13 - 0.22 * n, line, fontsize=size, color="#444444", **text)


def _frames(axes: Axes, boxes: dict[Key, Box], *, below: bool) -> None:
    """A frame around every group of several boxes, and a name away from where arrows come in."""
    for group in dict.fromkeys(box.group for box in boxes.values()):
        x0, x1, y0, y1 = arrows.extent(group, boxes)
        if x1 - x0 > PITCH:
            arrows.rounded(axes, x0, y0, x1 - x0, y1 - y0, "none", "#999999")
            under = below or group == "pre-training"
            y, side = (y0 - 0.35, "top") if below else (y0 - 0.05, "top")
            y, side = (y, side) if under else (y1 + 0.05, "bottom")
            axes.text(x0 + 0.05, y, group, va=side, fontsize=8, color="#777777", zorder=4)
