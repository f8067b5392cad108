# SPDX-License-Identifier: Apache-2.0
"""Named workloads of fast_update, shared by tests and benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One workload: rows, and the shapes of one row's weights."""

    b: int
    weights: tuple[tuple[int, ...], ...]


TESTS = {
    "one": Shape(1, ((3, 2),)),
    "block": Shape(3, ((4,), (4, 5), (5, 4))),
}

BENCH = {
    "cpu": Shape(8, ((128,), (128, 256), (256, 128))),
    "rows": Shape(8, ((1024,), (1024, 2048), (2048, 1024))),
}
