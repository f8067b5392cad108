# SPDX-License-Identifier: Apache-2.0
"""The table of mutations is of the sources as they are: each edit still finds its place."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "tests" / "mutations.py")
assert SPEC is not None
assert SPEC.loader is not None
mutations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.removes)
def test_an_edit_finds_its_place(mutation):
    assert mutation.old in (ROOT / mutation.file).read_text()
    file, _, test = mutation.tests.partition("::")
    assert f"def {test}" in (ROOT / "tests" / file).read_text()


def test_the_table_holds_every_mutation():
    table = (ROOT / "tests" / "mutations.md").read_text()
    missing = [m.removes for m in mutations.MUTATIONS if f"| {m.removes} | " not in table]
    assert not missing, "run `python tests/mutations.py` with words of these names"
    assert "**no test**" not in table
