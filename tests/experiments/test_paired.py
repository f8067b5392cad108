"""Differences on the same seeds and rows against hand computations and drawn errors."""

import math

import numpy as np
import pytest
from nlx_experiments.paired import Difference, by_seed, by_seed_and_row, together


def test_seeds_are_paired_and_few_of_them_need_more():
    found = by_seed([1.0, 2.0, 6.0], [0.0, 0.0, 0.0])
    assert found.mean == 3.0
    assert found.error == pytest.approx(math.sqrt(7 / 3))
    assert found.freedom == 2
    # Student's t of two degrees of freedom is 4.303, the normal's 1.96.
    assert [Difference(d, 1.0, 2).verdict() for d in (4.2, 4.4, -4.2, -4.4)] == [
        "level", "ahead", "level", "behind",
    ]  # fmt: skip
    assert Difference(4.4, 1.0, 2).verdict(less=True) == "behind"
    assert Difference(-4.4, 1.0, 2).verdict(less=True) == "ahead"
    assert Difference(1.0, 0.0, 2).verdict() == "ahead"
    assert Difference(0.0, 0.0, 2).verdict() == "level"


def test_one_seed_has_no_error_and_a_training_without_a_number_no_verdict():
    assert by_seed([1.25], [1.0]).told(2, "points") == "+0.25 points, one seed: no error known"
    assert by_seed([1.0, math.nan], [1.0, 1.0]).verdict() == "a training diverged"
    assert by_seed([1.0, 2.0], [0.0, 0.0]).told(1, "bits") == "+1.5 ± 0.5 bits, level"


def test_rows_and_seeds_both_have_errors():
    apart = np.array([[1.0, 3.0, 5.0], [1.0, 3.0, 5.0]])  # seeds agree
    found = by_seed_and_row([apart])
    assert found.mean == 3.0
    assert found.error == pytest.approx(math.sqrt(4 / 3))
    assert found.freedom == pytest.approx(2)
    found = by_seed_and_row([apart.T])  # rows agree
    assert found.error == pytest.approx(math.sqrt(4 / 3))
    assert by_seed_and_row([apart[:1]]).error == pytest.approx(math.sqrt(4 / 3))
    # Two groups: rows are others, seeds the same.
    assert by_seed_and_row([apart, apart]).error == pytest.approx(math.sqrt(4 / 3 / 2))
    assert by_seed_and_row([apart.T, apart.T]).error == pytest.approx(math.sqrt(4 / 3))
    assert by_seed_and_row([0 * apart]).error == 0


@pytest.mark.parametrize("of", ["rows", "seeds", "both"])
def test_equal_models_are_called_level_about_as_often_as_said(of):
    draw, said = np.random.default_rng(0), []
    for _ in range(400):
        rows, seeds = draw.normal(size=(2, 1, 12)), draw.normal(size=(3, 1))
        noise = draw.normal(size=(2, 3, 12))
        groups = noise + (of != "seeds") * rows + (of != "rows") * seeds
        said.append(by_seed_and_row([*groups]).verdict())
    assert 0.93 < said.count("level") / 400 <= 1


def test_the_mean_of_tasks_has_the_error_of_them_all():
    found = together([Difference(1.0, 3.0, 2), Difference(3.0, 4.0, 2)])
    assert (found.mean, found.error) == (2.0, 2.5)
    assert found.freedom == pytest.approx(25**2 / (9**2 / 2 + 16**2 / 2))
