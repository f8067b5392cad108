# SPDX-License-Identifier: Apache-2.0
"""What a stream of tasks leaves behind, from the matrix of its examinations.

R[i, j] is how well task j is done after task i was learned, i, j in [0, T); higher is better. Of a
stream that examines only what it has met, entries above the diagonal are NaN.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

from nlx_experiments import report

Matrix = Float[np.ndarray, "t t"]


def average(matrix: Matrix) -> float:
    """Mean over i of mean_{j <= i} R[i, j]: how well it stood all along.

    matrix: R. Raises ValueError where it is no square, or holds a NaN on or below its diagonal.
    Source: Rebuffi et al. (2017), iCaRL, section 4.1 ("average incremental accuracy").
    """
    matrix = _checked(matrix)
    return float(np.mean([row[: i + 1].mean() for i, row in enumerate(matrix)]))


def final(matrix: Matrix) -> float:
    """ACC = 1/T sum_j R[T - 1, j].

    matrix, errors: as of `average`. Source: Lopez-Paz and Ranzato (2017), Eq. 2.
    """
    return float(_checked(matrix)[-1].mean())


def learned(matrix: Matrix) -> float:
    """1/T sum_j R[j, j]: how well each task is done just after it was learned.

    matrix, errors: as of `average`. Source: Riemer et al. (2019), Learning to Learn without
    Forgetting, section 5 ("learning accuracy").
    """
    return float(np.diag(_checked(matrix)).mean())


def backward_transfer(matrix: Matrix) -> float:
    """BWT = 1/(T - 1) sum_{j < T-1} R[T - 1, j] - R[j, j]; below 0 what was learned is lost.

    matrix, errors: as of `average`; 0 of one task. Source: Lopez-Paz and Ranzato (2017), Eq. 3.
    """
    matrix = _checked(matrix)
    return _mean((matrix[-1] - np.diag(matrix))[:-1])


def forward_transfer(matrix: Matrix, untrained: Float[np.ndarray, " t"]) -> float:
    """FWT = 1/(T - 1) sum_{j > 0} R[j - 1, j] - b_j; above 0 what was learned helps what comes.

    matrix: R with the entries just above its diagonal; otherwise as of `average`; 0 of one task.
    untrained: b, the same examination before anything was learned. Raises ValueError where those
    entries are NaN, or b has another length.
    Source: Lopez-Paz and Ranzato (2017), Eq. 4.
    """
    matrix, before = _checked(matrix), np.asarray(untrained, float)
    above = np.diag(matrix, 1)
    if before.shape != (len(matrix),) or np.isnan(above).any():
        raise ValueError(
            f"`matrix` must hold R[j - 1, j] for all j > 0 and `untrained` {len(matrix)} numbers; "
            f"they have {int(np.isnan(above).sum())} NaN and shape {before.shape}."
        )
    return _mean(above - before[1:])


def forgetting(matrix: Matrix) -> float:
    """F = 1/(T - 1) sum_{j < T-1} max_{j <= i < T-1} R[i, j] - R[T - 1, j].

    matrix, errors: as of `average`; 0 of one task. Below 0 where tasks ended better than they ever
    were. Source: Chaudhry et al. (2018), Riemannian Walk, Eq. 3 (i runs from j: before that the
    task is not known).
    """
    matrix = _checked(matrix)
    return _mean([matrix[j:-1, j].max() - matrix[-1, j] for j in range(len(matrix) - 1)])


def plasticity(matrix: Matrix, share: float = 0.2) -> float:
    """mean of R[j, j] over the last tasks less that over the first; below 0 it learns less well.

    matrix, errors: as of `average`. share: of the tasks that count as first and as last, in
    (0, 0.5]; at least one each. Raises ValueError for another.
    Source: Dohare et al. (2024), Loss of plasticity in deep continual learning, Fig. 1: accuracy
    just after each task against the number of tasks.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"`share` is {share}; it must be in (0, 0.5].")
    diagonal = np.diag(_checked(matrix))
    count = max(1, int(share * len(diagonal)))
    return float(diagonal[-count:].mean() - diagonal[:count].mean())


def summary(matrix: Matrix, untrained: Float[np.ndarray, " t"]) -> dict[str, float]:
    """All of the above by name; arguments as of `forward_transfer`."""
    return {
        "average": average(matrix),
        "final": final(matrix),
        "learned": learned(matrix),
        "backward": backward_transfer(matrix),
        "forward": forward_transfer(matrix, untrained),
        "forgetting": forgetting(matrix),
        "plasticity": plasticity(matrix),
    }


def _mean(values: Any) -> float:
    """0 of none: a stream of one task."""
    return float(np.mean(values)) if len(values) else 0.0


def _checked(matrix: Any) -> Matrix:
    matrix = np.asarray(matrix, float)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or np.isnan(matrix[np.tril_indices(len(matrix))]).any():
        raise ValueError(
            f"`matrix` has shape {matrix.shape}; it must be square, one task or more, without NaN "
            "on or below its diagonal."
        )
    return matrix


def draw(path: Any, matrices: Mapping[str, Matrix], tasks: Sequence[str]) -> None:
    """Draws matrices side by side: learned down, examined across, NaN left white.

    path: the PNG. matrices: title -> R. tasks: their names, written beside up to 15 of them.
    """
    columns = min(4, len(matrices))
    lines = -(-len(matrices) // columns)
    size = (3.4 * columns + 1.2, 3.2 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(matrices) :]:
        axes.set_visible(False)
    image: Any = None
    for axes, (title, matrix) in zip(grid.flat, matrices.items(), strict=False):
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axes.set(title=title)
        if len(tasks) <= 15:
            axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=6)
            axes.set_yticks(range(len(tasks)), tasks, fontsize=6)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("after learning")
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("examined")
    figure.colorbar(image, ax=grid, shrink=0.8)
    report.save(figure, path)


def draw_learned(path: Any, matrices: Mapping[str, Matrix]) -> None:
    """Draws R[j, j] against the number of tasks: plasticity. Arguments as of `draw`."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for n, (name, matrix) in enumerate(matrices.items()):
        colour = report.COLOURS[n % len(report.COLOURS)]
        dash = "-" if n < len(report.COLOURS) else "--"
        axes.plot(1 + np.arange(len(matrix)), np.diag(matrix), dash, color=colour, label=name)
    axes.set(xlabel="tasks learned", ylabel="just after learning the task", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8, ncols=2)
    report.save(figure, path)
