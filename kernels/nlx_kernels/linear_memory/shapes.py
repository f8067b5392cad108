# SPDX-License-Identifier: Apache-2.0
"""Named workloads of linear_memory, shared by tests and benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One workload; axes as in `nlx_kernels.axes`, block_size None for the default."""

    b: int
    t: int
    h: int
    k: int
    v: int
    block_size: int | None = None


TESTS = {
    "token": Shape(2, 1, 2, 5, 3),
    "ragged-63": Shape(2, 63, 2, 5, 3, 16),
    "whole-64": Shape(2, 64, 2, 5, 3, 16),
    "ragged-100": Shape(1, 100, 1, 5, 3, 24),
}

BENCH = {
    "cpu": Shape(4, 1024, 8, 64, 64),
    "cpu-narrow": Shape(4, 1024, 8, 32, 32),
    "cpu-wide": Shape(4, 1024, 4, 128, 128),
    "many-heads": Shape(1, 32768, 32, 128, 128),
    "batch": Shape(8, 4096, 16, 128, 128),
    "short": Shape(4, 2048, 16, 128, 128),
    "narrow": Shape(8, 4096, 16, 64, 64),
}
