# SPDX-License-Identifier: Apache-2.0
"""What every preset takes: `nlx run sizes`, a few seconds.

Parameters, and the bytes that one row of the state takes after 4,096 tokens. Prints the table and
writes it into README.md.
"""

import dataclasses
import pathlib

from nlx import inspect, nn
from nlx_experiments import report, runs
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

BEGIN, END = "<!-- sizes -->", "<!-- end of sizes -->"
PLACE = pathlib.Path(__file__).parents[1]
TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shows parameters and state of every preset."""

    place: pathlib.Path = PLACE
    """Where README.md is."""


def main(options: Sizes) -> None:
    """Prints the table, and writes it between README.md's markers."""
    readme = options.place / "README.md"
    if not readme.exists():
        raise Refused(
            f"`place` is {options.place}, which holds no README.md to write the table to."
        )
    made = table()
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    runs.write_whole(readme, f"{before}{BEGIN}\n{made.markdown()}\n{END}{after}")
    say(made.text())


def table() -> report.Table:
    """A row for every architecture, a column for every size."""
    cells: dict[str, dict[str, str]] = {}
    for name, config in nn.PRESETS.items():
        architecture, _, size = name.rpartition("-")
        cells.setdefault(architecture, {})[size] = _cell(*inspect.size(config, TOKENS))
    columns = list(next(iter(cells.values())))
    rows = [(name, *(row[size] for size in columns)) for name, row in cells.items()]
    title = f"Parameters; state of a row after {TOKENS:,} tokens"
    return report.Table(title, ("architecture", *columns), rows)


def _cell(parameters: int, state: int) -> str:
    return f"{_short(parameters / 1e6)} M; {_short(state / 2**20)} MiB"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
