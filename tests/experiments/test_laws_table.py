# SPDX-License-Identifier: Apache-2.0
"""The table of laws: says no where one is broken, and leaves out no architecture."""

import json

import pytest
from nlx_experiments import laws, report
from nlx_experiments.errors import Refused

from nlx import nn

GOOD = laws.Measured(1e-14, 1e-14, 0.0, 0.0, 1e-7, 1e-4, 5.0)


@pytest.mark.parametrize(
    ("law", "worst"),
    [
        ("tokens", 1e-8),
        ("split", float("inf")),
        ("causal", 1e-8),
        ("rows", 1e-8),
        ("slopes", 1e-4),
        ("reached", 0.0),
        ("long", float("inf")),
    ],
)
def test_a_broken_law_is_a_no(law, worst):
    assert GOOD.holds()
    assert not GOOD._replace(**{law: worst}).holds()


def test_every_architecture_is_there_with_its_references():
    architectures = {name.rpartition("-")[0] for name in nn.PRESETS}
    assert architectures < set(laws.architectures()) == set(laws.REFERENCES)


def test_references_that_fail_or_are_not_there():
    assert not laws.references(("test_laws.py::test_nobody_wrote",))


@pytest.mark.slow
def test_the_table_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(laws, "LONG", 64)
    monkeypatch.setattr(laws, "PIECE", 32)
    (tmp_path / "README.md").write_text("<!-- laws -->\n<!-- end of laws -->\n")
    laws.main(laws.Laws(only=("deltanet",), place=tmp_path))
    found = json.loads((tmp_path / "results" / "laws.json").read_text())["architectures"]
    assert found["deltanet"]["holds"] is True
    assert "| deltanet |" in (tmp_path / "README.md").read_text()
    assert "deltanet: every law holds" in capsys.readouterr().out
    assert isinstance(laws.table(found), report.Table)


def test_an_unknown_architecture_is_a_sentence(tmp_path):
    with pytest.raises(Refused, match="`only` holds 'delta'; it must be one of transformer"):
        laws.main(laws.Laws(only=("delta",), place=tmp_path))
