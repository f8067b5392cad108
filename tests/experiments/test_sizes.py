# SPDX-License-Identifier: Apache-2.0
"""The table of presets in experiments/README.md is what the command writes."""

import pathlib
import shutil

import pytest
from nlx_experiments import run, sizes
from nlx_experiments.errors import Refused


def test_table_is_fresh(tmp_path, capsys):
    before = (sizes.PLACE / "README.md").read_text()
    shutil.copy(sizes.PLACE / "README.md", tmp_path)
    assert run.main(["run", "sizes", "--place", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == before
    assert "transformer++" in capsys.readouterr().out


def test_place_without_a_readme_is_refused():
    with pytest.raises(Refused, match="`place` is nowhere, which holds no README.md"):
        sizes.main(sizes.Sizes(place=pathlib.Path("nowhere")))
