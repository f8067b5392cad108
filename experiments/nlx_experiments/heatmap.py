# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run that reads: a text on coloured ground, and its memories token by token."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes

from nlx.inspect import Trace
from nlx_experiments import report

COLUMNS = 96
SMOOTH = 17
BLOCKS = 4  # at most this many are drawn side by side
MARKS = {"\n": "↵", "\t": "→", "\0": "∅"}


def draw(
    path: pathlib.Path,
    title: str,
    content: UInt8[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
    unit: str,
    scale: tuple[float, float] | None = None,
) -> None:
    """Draws a text, each byte on ground as dark as its value.

    Args:
      path: the PNG.
      title: above it.
      content: bytes in UTF-8; a character stands at its first one.
      values: of each byte.
      unit: beside the scale.
      scale: the values with the lightest and the darkest ground; None: those which one byte in
        fifty is below, or above.
    """
    places, rows = _places(content)
    grid = np.full((rows, max(places[:, 1].max() + 1, COLUMNS // 2)), np.nan)
    grid[tuple(places.T)] = values
    low, top = np.quantile(values, (0.02, 0.98)) if scale is None else scale
    size = (1.5 + 0.115 * grid.shape[1], 1.2 + 0.21 * rows)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid, cmap="YlOrRd", vmin=low, vmax=top, aspect="auto")
    for (row, column), mark, value in zip(places, _characters(content), values, strict=True):
        colour = "white" if value > low + 0.7 * (top - low) else "#222222"
        axes.text(
            column, row, mark, ha="center", va="center_baseline", fontsize=8, family="monospace",
            color=colour,
        )  # fmt: skip
    figure.colorbar(image, ax=axes, label=unit, pad=0.01, aspect=12, shrink=min(1, 8 / rows + 0.3))
    axes.set(title=title)
    axes.axis("off")
    report.save(figure, path)


def _places(content: UInt8[np.ndarray, " n"]) -> tuple[np.ndarray, int]:
    """Row and column of every byte, and the number of rows; a line ends after its mark."""
    places, row, column = [], 0, 0
    for byte in content:
        places.append((row, column))
        column += 1
        if byte == ord("\n") or column == COLUMNS:
            row, column = row + 1, 0
    return np.array(places), places[-1][0] + 1


def _characters(content: UInt8[np.ndarray, " n"]) -> list[str]:
    """What is written in the place of every byte."""
    marks: list[str] = []
    for character in content.tobytes().decode(errors="surrogateescape"):
        size = len(character.encode(errors="surrogateescape"))
        shown = MARKS.get(character, character)
        known = shown.isprintable() and (ord(shown) < 0x250 or shown in MARKS.values())
        marks += [shown if known else "□"] + [""] * (size - 1)
    return marks


def draw_traces(path: pathlib.Path, levels: Mapping[str, Trace]) -> None:
    """Draws update norms, retention, age and eigenvalues of memories, a column a block.

    Args:
      path: the PNG.
      levels: path of a level -> arrays [1, t, h]; drawn are means over heads, of eigenvalues the
        range over all heads. Strong lines are means over SMOOTH tokens.
    """
    groups: dict[str, dict[str, Trace]] = {}
    for name, trace in levels.items():
        block, _, level = name.partition(".mixer.")
        groups.setdefault(block, {})[level] = trace
    chosen = np.unique(np.linspace(0, len(groups) - 1, BLOCKS).round().astype(int))
    columns = [list(groups.items())[n] for n in chosen]
    figure, grid = plt.subplots(
        4, len(columns), figsize=(2 + 5 * len(columns), 9.5), layout="constrained",
        squeeze=False, sharex=True, sharey="row",
    )  # fmt: skip
    for axes, (block, traces) in zip(grid.T, columns, strict=True):
        axes[0].set_title(block)
        _curves(axes[0], traces, lambda t: t.update)
        _curves(axes[1], traces, lambda t: t.retain)
        _curves(axes[2], traces, lambda t: t.age)
        _ranges(axes[3], traces)
        axes[0].set_yscale("log")
        axes[0].legend(frameon=False, fontsize=8, ncols=2)
        axes[-1].set_xlabel("tokens read")
    for axes, label in zip(grid[:, 0], ROWS, strict=True):
        axes.set_ylabel(label)
    report.save(figure, path)


ROWS = (
    "update, $|W_t - W_{t-1}|$",
    "retention",
    "age of what is held [tokens]",
    "eigenvalues of the transition",
)


def _curves(axes: Axes, traces: Mapping[str, Trace], of: Callable[[Trace], Any]) -> None:
    """A line a level; one line for all where they are equal."""
    lines = {name: of(trace)[0].mean(-1) for name, trace in traces.items()}
    first = next(iter(lines.values()))
    if len(lines) > 1 and all(np.array_equal(first, line) for line in lines.values()):
        axes.plot(first, color="#444444", linewidth=1.0, label="all levels")
        axes.legend(frameon=False, fontsize=8)
        return
    for (name, line), colour in zip(lines.items(), report.COLOURS * 9, strict=False):
        shown = np.where(line > 0, line, np.nan) if axes.get_yscale() == "log" else line
        axes.plot(shown, color=colour, linewidth=0.7, alpha=0.25)
        axes.plot(_smooth(line), color=colour, linewidth=1.3, label=name)


def _ranges(axes: Axes, traces: Mapping[str, Trace]) -> None:
    """The range of eigenvalues of a level over all heads, as a band."""
    for trace, colour in zip(traces.values(), report.COLOURS * 9, strict=False):
        low, high = (np.asarray(end)[0] for end in trace.eigenvalues)
        low, high = low.min(-1), high.max(-1)
        axes.fill_between(np.arange(low.size), low, high, color=colour, alpha=0.07, linewidth=0)
        axes.plot(_smooth(low), color=colour, linewidth=1.3)
        axes.plot(_smooth(high), color=colour, linewidth=1.3)
    for value in (-1, 0, 1):
        axes.axhline(value, color="#999999", linewidth=0.7, linestyle=":")


def _smooth(values: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """The mean over the SMOOTH tokens around each, over fewer at both ends."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    first = np.maximum(np.arange(values.size) - SMOOTH // 2, 0)
    last = np.minimum(np.arange(values.size) + SMOOTH // 2 + 1, values.size)
    return (total[last] - total[first]) / (last - first)


def draw_updates(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws the norm of each level's update at every step of training at which it fired."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    steps = np.array([record["step"] for record in records])
    for name, colour in zip(records[-1]["updates"], report.COLOURS * 9, strict=False):
        sizes = np.array([record["updates"][name] for record in records], np.float64)
        fired = sizes > 0
        axes.plot(steps[fired], sizes[fired], color=colour, linewidth=0.9, label=name)
    axes.set(xlabel="steps", ylabel="update, Euclidean norm", yscale="log")
    axes.legend(frameon=False)
    report.save(figure, path)
