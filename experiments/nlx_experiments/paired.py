# SPDX-License-Identifier: Apache-2.0
"""How far one model is ahead of another on the same seeds and rows, and whether that is certain."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

SURE = 0.975  # of Student's t: 95 % on both sides


class Difference(NamedTuple):
    """A mean difference."""

    mean: float
    error: float  # standard error; NaN where nothing tells it
    freedom: float  # degrees of freedom of the error

    def verdict(self, less: bool = False) -> str:
        """ahead, behind, or level: Student's t is not sure at 95 % that it is either.

        less: whether less is better.
        """
        if not math.isfinite(self.mean):
            return "a training diverged"
        if math.isnan(self.error):
            return "one seed: no error known"
        if abs(self.mean) <= stats.t.ppf(SURE, self.freedom) * self.error:
            return "level"
        return "ahead" if (self.mean < 0) == less else "behind"

    def told(self, digits: int, unit: str, less: bool = False) -> str:
        """The difference, its error if there is one, and the verdict."""
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        unit = f" {unit}" if unit else ""
        return f"{self.mean:+.{digits}f}{error}{unit}, {self.verdict(less)}"


def by_seed(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours less theirs, seed by seed."""
    apart = np.subtract(np.array(ours, float), np.array(theirs, float))
    if len(apart) < 2:
        return Difference(float(apart.mean()), math.nan, math.nan)
    error = apart.std(ddof=1) / len(apart) ** 0.5
    return Difference(float(apart.mean()), float(error), len(apart) - 1)


def by_seed_and_row(apart: Sequence[Float[np.ndarray, "seeds _"]]) -> Difference:
    """The mean over groups of rows, of differences of every seed at every row.

    Seeds are the same in all groups and their error is that of their means over all of them; rows
    are others in each. The errors of both are added, which counts what is a row's with one seed
    alone twice: it is rather too large. One seed: the error is of rows alone.

    apart: of each group, with two rows or more.
    """
    seeds = np.mean([group.mean(1) for group in apart], 0)
    of_rows = [group.mean(0) for group in apart]
    parts = [(x.var(ddof=1) / x.size / len(apart) ** 2, x.size - 1) for x in of_rows]
    if seeds.size > 1:
        parts.append((seeds.var(ddof=1) / seeds.size, seeds.size - 1))
    return Difference(float(seeds.mean()), *_added(parts))


def together(found: Sequence[Difference]) -> Difference:
    """The mean of differences that have no seed and no row in common."""
    parts = [((d.error / len(found)) ** 2, d.freedom) for d in found]
    return Difference(float(np.mean([d.mean for d in found])), *_added(parts))


def _added(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of a sum, and its degrees of freedom by Satterthwaite; (variance, freedom)."""
    whole = sum(variance for variance, _ in parts)
    if whole == 0:
        return 0.0, min(freedom for _, freedom in parts)
    spread = sum(variance**2 / freedom for variance, freedom in parts)
    return math.sqrt(whole), whole**2 / spread
