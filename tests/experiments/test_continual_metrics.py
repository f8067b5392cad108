"""Metrics of continual learning, against matrices worked out by hand."""

import numpy as np
import pytest
from nlx_experiments import continual_metrics as metrics

NAN = np.nan
# After task 1 the second was at 0.3; the first fell from 0.9 to 0.6 and rose to 0.7.
R = np.array([[0.9, 0.3, NAN], [0.6, 0.8, 0.2], [0.7, 0.4, 1.0]])
B = np.array([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("average", (0.9 + (0.6 + 0.8) / 2 + (0.7 + 0.4 + 1.0) / 3) / 3),
        ("final", 0.7),
        ("learned", 0.9),
        ("backward", ((0.7 - 0.9) + (0.4 - 0.8)) / 2),
        ("forward", ((0.3 - 0.2) + (0.2 - 0.3)) / 2),
        ("forgetting", ((0.9 - 0.7) + (0.8 - 0.4)) / 2),
        ("plasticity", 1.0 - 0.9),
    ],
)
def test_each_metric_is_what_a_hand_computes(name, value):
    assert metrics.summary(R, B)[name] == pytest.approx(value, abs=1e-12)


def test_forgetting_counts_from_the_best_and_backward_transfer_from_the_diagonal():
    """The first task was best after the second; the last row is no part of the maximum."""
    later = np.array([[0.5, NAN, NAN], [0.9, 0.5, NAN], [0.6, 0.7, 0.5]])
    assert metrics.forgetting(later) == pytest.approx(((0.9 - 0.6) + (0.5 - 0.7)) / 2)
    assert metrics.backward_transfer(later) == pytest.approx(((0.6 - 0.5) + (0.7 - 0.5)) / 2)


def test_what_a_later_task_gave_an_earlier_examination_counts_nowhere_else():
    """Entries above the diagonal belong to forward transfer alone."""
    changed = R.copy()
    changed[0, 1] = 1.0
    a, b = metrics.summary(R, B), metrics.summary(changed, B)
    assert {name for name in a if a[name] != b[name]} == {"forward"}


def test_plasticity_over_many_tasks_compares_the_last_fifth_with_the_first():
    learned = np.linspace(0.9, 0.4, 50)
    matrix = np.tril(np.full((50, 50), 0.1))
    np.fill_diagonal(matrix, learned)
    assert metrics.plasticity(matrix) == pytest.approx(learned[40:].mean() - learned[:10].mean())
    assert metrics.plasticity(matrix, 0.5) == pytest.approx(
        learned[25:].mean() - learned[:25].mean()
    )


def test_a_stream_of_one_task_transfers_and_forgets_nothing():
    one = metrics.summary(np.array([[0.6]]), np.array([0.1]))
    assert one["final"] == one["average"] == one["learned"] == 0.6
    assert one["backward"] == one["forward"] == one["forgetting"] == one["plasticity"] == 0


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match=r"`matrix` has shape \(2, 3\); it must be square"):
        metrics.final(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="without NaN on or below its diagonal"):
        metrics.forgetting(np.array([[0.1, 0.2], [NAN, 0.3]]))
    with pytest.raises(ValueError, match=r"must hold R\[j - 1, j\] for all j > 0 .* 1 NaN"):
        metrics.forward_transfer(np.array([[0.1, NAN], [0.1, 0.3]]), np.zeros(2))
    with pytest.raises(ValueError, match=r"`untrained` 3 numbers; .* shape \(2,\)"):
        metrics.forward_transfer(R, np.zeros(2))
    with pytest.raises(ValueError, match=r"`share` is 0.7; it must be in \(0, 0.5\]"):
        metrics.plasticity(R, 0.7)


def test_pictures_are_drawn(tmp_path):
    metrics.draw(tmp_path / "m.png", {"a": R, "b": R}, ["x", "y", "z"])
    metrics.draw_learned(tmp_path / "l.png", {"a": R})
    assert (tmp_path / "m.png").stat().st_size > 1000
    assert (tmp_path / "l.png").stat().st_size > 1000
