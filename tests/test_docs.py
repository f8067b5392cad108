"""Pages whose code `make docs` runs: all of it is marked to run, short, and ends in a picture."""

import pathlib
import re

import pytest

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
    assert text.index("pip install") < text.index("```python")
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
