# SPDX-License-Identifier: Apache-2.0
"""The finished cells of an experiment's table: each is kept, none is run twice."""

import json
from collections.abc import Mapping
from typing import Any

from nlx_experiments import runs


class Store:
    """The finished cells of a run folder, by what they are."""

    def __init__(self, run: runs.Run):
        """Reads what is there; a line that is damaged or unfinished is dropped."""
        path = run.folder / "cells.jsonl"
        records = runs.read_lines(path, past_damage=True)
        runs.write_whole(path, "".join(json.dumps(r) + "\n" for r in records))
        self.path, self.known = path, {r["what"]: r for r in records}

    def add(self, record: Mapping[str, Any]) -> None:
        """Keeps a cell, on disk too."""
        self.known[record["what"]] = dict(record)
        with open(self.path, "a") as stream:
            runs.append(stream, [record])
