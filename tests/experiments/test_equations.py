"""The map from equations to functions and tests is whole, true and up to date."""

import ast
import pathlib

import pytest
from nlx_experiments import equations

TESTS = pathlib.Path(__file__).parents[1]
ROWS = [(paper, row) for paper, rows in equations.EQUATIONS.items() for row in rows]


def test_the_page_is_up_to_date():
    assert equations.PAGE.read_text() == equations.page()


@pytest.mark.parametrize(("paper", "last"), [("Nested Learning", 121), ("Titans", 33)])
def test_every_equation_of_the_papers_has_a_row(paper, last):
    listed = [n for row in equations.EQUATIONS[paper] for n in equations.numbers(row.numbers)]
    assert sorted(listed) == list(range(1, last + 1))


def test_every_equation_that_is_cited_has_a_row_and_no_two():
    listed = [(paper, n) for paper, row in ROWS for n in equations.numbers(row.numbers)]
    assert len(listed) == len(set(listed))
    assert set(equations.functions()) <= set(listed)


def test_every_row_has_functions_and_a_test_or_says_why_not():
    known = equations.functions()
    for paper, row in ROWS:
        them = [known.get((paper, n)) for n in equations.numbers(row.numbers)]
        assert bool(row.instead) == (not row.test), row
        assert bool(row.instead) == (not any(them)), row


def test_the_tests_exist():
    for _, row in ROWS:
        if row.test:
            path, name = row.test.split("::")
            tree = ast.parse((TESTS / path).read_text())
            assert name in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], row


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("Source: A (2025), Titans, eq. 7.", [7]),
        ("Source: A, Titans, eqs. 7 (the sum), 9-10.", [7, 9, 10]),
        ("Source: A, Titans,\n  Eq. 3; Eq. 5 (there); B, RetNet, Eq. 6.", [3, 5]),
        ("References:\n  A, RetNet, Eq. 8; B, Titans, section 4.\n\nTitans, Eq. 9", []),
        ("As in Titans, Eq. 9.", []),
    ],
)
def test_what_a_docstring_cites(docstring, found):
    assert equations.cited(docstring) == [("Titans", n) for n in found]
