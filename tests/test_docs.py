"""Pages whose code `make docs` runs: all of it is marked to run, short, and ends in a picture."""

import importlib.util
import inspect
import pathlib
import re
import types
import typing

import pytest

from nlx import level, nn, objectives
from nlx.nn import presets

DOCS = pathlib.Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python([^\n]*)\n(.*?)```", re.DOTALL)
PAGES = sorted([*(DOCS / "applications").glob("*.md"), *(DOCS / "write").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_code_runs_in_one_session(page):
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    sessions = {re.search(r'session="(\w+)"', marks)[1] for marks, _ in blocks}
    assert len(sessions) == 1
    assert all('exec="on"' in marks for marks, _ in blocks)
    for _, code in blocks:
        compile(code, page.name, "exec")


@pytest.mark.parametrize("page", sorted((DOCS / "applications").glob("*.md")), ids=lambda p: p.stem)
def test_an_application_begins_with_installation_and_ends_in_a_picture(page):
    text = page.read_text()
    assert text.index('pip install ".[experiments]"') < text.index("```python")
    assert "nlx[" not in text  # it is not on PyPI
    assert "savefig" in BLOCK.findall(text)[-1][1]


@pytest.mark.parametrize("page", sorted((DOCS / "write").glob("*.md")), ids=lambda p: p.stem)
def test_writing_your_own_takes_less_than_thirty_lines(page):
    own = BLOCK.findall(page.read_text())[0][1]
    code = [
        line
        for line in own.splitlines()
        if line.strip() and not line.startswith(("import", "from"))
    ]
    assert len(code) < 30


def test_every_page_is_in_the_sites_navigation():
    told = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert str(page.relative_to(DOCS)) in told, page


def test_every_public_name_is_in_the_reference():
    """Of the packages that list their names one by one."""
    for package, page in (
        ("optim", "optim"),
        ("nn", "nn"),
        ("learned", "learned"),
        ("inspect", "inspect"),
    ):
        init = (DOCS.parent / "nlx" / package / "__init__.py").read_text()
        reference = (DOCS / "api" / f"{page}.md").read_text()
        for module, name in re.findall(r"^from (\S+) import (\w+) as", init, re.MULTILINE):
            shown = f"::: {module}.{name}" in reference.splitlines()
            assert shown or name == "tasks", name


def test_the_reference_lists_what_a_configuration_may_name():
    page = (DOCS / "api" / "nn.md").read_text()
    told = re.findall(r"^\| (.+?) \| (`.+`) \|$", page, re.MULTILINE)
    shown = {where: re.findall(r"`([^`]+)`", names) for where, names in told}
    names = [name.rpartition("-") for name in nn.PRESETS]
    assert shown == {
        "`mixer`, `then`": list(typing.get_args(presets.MixerName)),
        "`feed_forward`": list(typing.get_args(presets.FeedForward)),
        "architectures of `PRESETS`": list(dict.fromkeys(name for name, _, _ in names)),
        "their sizes": list(dict.fromkeys(size for _, _, size in names)),
    }


@pytest.fixture(scope="module")
def docstrings():
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_shows_formulas_as_written(docstrings):
    shown = docstrings.markdown(inspect.getdoc(objectives.dot_product))
    assert "-&lt;output, value&gt;" in shown
    assert docstrings.markdown("`w <- w`; a w* <- 2 w*") == "`w <- w`; a w&#42; &lt;- 2 w&#42;"
    assert docstrings.markdown("Sum.\n\n    a < b") == "Sum.\n\n    a < b"


def test_the_reference_takes_an_argument_for_no_admonition(docstrings):
    assert docstrings.markdown("Rule.\n\nrate: > 0,\n    or None.") == (
        "Rule.\n\nrate: &gt; 0,\nor None."
    )
    section = "Layer.\n\nArgs:\n  x: inputs,\n    normalised.\n\n  state: as returned."
    assert docstrings.markdown(section) == section


def test_the_reference_explains_the_fields_of_a_named_tuple(docstrings):
    source = [line.strip() for line in inspect.getsource(level.Association).splitlines()]
    named = {line.split(":")[0]: [line] for line in source if "  # " in line}
    docstring = types.SimpleNamespace(value="One tick's context.")
    members = {name: types.SimpleNamespace(lines=lines) for name, lines in named.items()}
    known = types.SimpleNamespace(
        docstring=docstring, is_class=True, bases=["NamedTuple"], attributes=members
    )
    docstrings.Readable().on_object(obj=known)
    assert "Attributes:\n    key: what to store under\n    value:" in docstring.value
    assert "    rate: &gt;= 0, inner learning rate; None: 1" in docstring.value
