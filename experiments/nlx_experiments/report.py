# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run as PNG, and one HTML page that carries them inside."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from nlx_experiments import runs

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 54rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
th { border-bottom: 1px solid #888 } td.number, th.number { text-align: right }
td { border-bottom: 1px solid #ddd }
img { width: 100% } pre { background: #f5f5f2; padding: 1rem; overflow-x: auto; font-size: 13px }
"""


class Table(NamedTuple):
    """A heading, column names and rows; numbers are shown with three decimals."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)

    def text(self) -> str:
        """The table in aligned columns, for a terminal."""
        cells = [list(self.columns), *[[_cell(c) for c in row] for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        pad = lambda row: "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        return "\n".join([self.title, *(f"  {pad(row)}" for row in cells)])


class Page(NamedTuple):
    """What a report holds, from top to bottom."""

    title: str
    summary: str
    tables: Sequence[Table]
    pictures: Mapping[str, pathlib.Path]  # caption -> PNG
    blocks: Mapping[str, str] = {}  # heading -> text, shown as it is
    details: Mapping[str, Any] = {}


def write(path: pathlib.Path, page: Page) -> None:
    """Writes the page as one self-contained HTML file."""
    parts = [f"<h1>{_text(page.title)}</h1>", f"<p>{_text(page.summary)}</p>"]
    parts += [_table(t) for t in page.tables]
    parts += [_picture(caption, png) for caption, png in page.pictures.items()]
    parts += [f"<h2>{_text(k)}</h2><pre>{_text(v)}</pre>" for k, v in page.blocks.items()]
    if page.details:
        rows = [(k, v if isinstance(v, str) else repr(v)) for k, v in page.details.items()]
        parts.append(_table(Table("Details", ("what", "value"), rows)))
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{_text(page.title)}</title><style>{STYLE}</style>'
    content = (
        f'<!doctype html><html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    )
    runs.write_whole(path, content)


def place(readme: pathlib.Path, name: str, content: str) -> None:
    """Replaces what stands between README.md's two comments of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = readme.read_text().partition(begin)
    _, _, after = rest.partition(end)
    runs.write_whole(readme, f"{before}{begin}\n{content}\n{end}{after}")


def plot_losses(
    path: pathlib.Path,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draws training bits per byte against bytes seen, smoothed, one curve a run.

    Args:
      path: the PNG.
      curves: name -> the records of metrics.jsonl.
      levels: name -> bits per byte, drawn as horizontal lines.
    """
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for (name, records), colour in zip(curves.items(), COLOURS, strict=False):
        seen = np.array([r["bytes"] for r in records]) / 1e6
        bits = np.array([r["bits_per_byte"] for r in records], np.float64)
        axes.plot(seen, bits, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(seen, _smooth(bits), color=colour, label=name)
    for (name, bits), dash in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(bits, color="#888888", linestyle=dash, label=name)
    axes.set(xlabel="bytes seen [millions]", ylabel="training loss [bits per byte]")
    axes.legend(frameon=False)
    save(figure, path)


def plot_levels(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws how far each level's initial parameters moved from where training began."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name, colour in zip(records[-1]["moved"] if records else (), COLOURS * 9, strict=False):
        seen = [r["bytes"] / 1e6 for r in records]
        axes.plot(seen, [r["moved"][name] for r in records], color=colour, label=name)
    axes.set(xlabel="bytes seen [millions]", ylabel="distance from the start, |p - p0| / |p0|")
    axes.legend(frameon=False)
    save(figure, path)


class Panel(NamedTuple):
    """Curves of one problem: name -> (values over the whole run, colour or None, line width)."""

    title: str
    steps: int
    log: bool
    curves: Mapping[str, tuple[Sequence[float | None], str | None, float]]


def plot_panels(path: pathlib.Path, panels: Sequence[Panel], columns: int = 4) -> None:
    """Draws panels side by side; a curve without a colour is a faint grey one."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 3.6 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, (values, colour, width) in panel.curves.items():
            y = np.array([np.nan if v is None else v for v in values], np.float64)
            x = (1 + np.arange(y.size)) * panel.steps / max(y.size, 1)
            label = name if colour else "_"  # not in the legend
            axes.plot(x, y, color=colour or "#bbbbbb", linewidth=width, label=label)
        axes.plot([], [], color="#bbbbbb", label="the others")
        axes.set(title=panel.title, xlabel="steps", yscale="log" if panel.log else "linear")
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over the last twentieth of the steps so far seen."""
    width = max(1, values.size // 20)
    known = np.isfinite(values)
    since = lambda x: np.cumsum(np.concatenate([[0.0], x]))
    total, count = since(np.where(known, values, 0)), since(known)
    last = np.arange(1, values.size + 1)
    first = np.maximum(last - width, 0)
    counted = count[last] - count[first]
    return np.where(counted > 0, (total[last] - total[first]) / np.maximum(counted, 1), np.nan)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a picture whole or not at all, and closes it."""
    half = path.with_name(path.name + ".half")
    figure.savefig(half, dpi=120, format="png")
    plt.close(figure)
    half.replace(path)


def _picture(caption: str, png: pathlib.Path) -> str:
    data = base64.b64encode(png.read_bytes()).decode()
    return (
        f'<h2>{_text(caption)}</h2><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
    )


def _table(table: Table) -> str:
    row = lambda tag, cells: "".join(
        f'<{tag} class="number">{_text(_cell(c))}</{tag}>'
        if isinstance(c, (int, float))
        else f"<{tag}>{_text(_cell(c))}</{tag}>"
        for c in cells
    )
    lines = [row("th", table.columns), *(row("td", cells) for cells in table.rows)]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<h2>{_text(table.title)}</h2>\n<table>\n{body}\n</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _text(value: str) -> str:
    return html.escape(value)
