# SPDX-License-Identifier: Apache-2.0
"""Named workloads of cms_chain, shared by tests and benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One workload; axes as in `nlx_kernels.axes`, hidden one width per block."""

    b: int
    t: int
    d: int
    hidden: tuple[int, ...]
    rows: bool = False  # whether every row has weights of its own
    gated: bool = False


TESTS = {
    "shared": Shape(2, 7, 8, (5,)),
    "rows": Shape(2, 7, 8, (3,), rows=True),
    "gated": Shape(2, 7, 8, (6,), gated=True),
    "rows-gated": Shape(2, 7, 8, (5,), rows=True, gated=True),
}

BENCH = {
    "cpu": Shape(8, 512, 128, (256, 256)),
    "cpu-rows": Shape(8, 512, 128, (256, 256), rows=True),
    "batch": Shape(8, 2048, 1024, (2048,) * 4),
    "rows": Shape(8, 2048, 1024, (2048,) * 4, rows=True),
    "rows-chunk-512": Shape(32, 512, 1024, (2048,) * 4, rows=True),
}
