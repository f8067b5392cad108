# SPDX-License-Identifier: Apache-2.0
"""Named workloads of self_modifying_memory, shared by tests and benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One workload; axes as in `nlx_kernels.axes`."""

    b: int
    t: int
    h: int
    d: int
    f: int
    chunk_size: int
    projection_chunk_size: int


TESTS = {
    "token": Shape(2, 1, 2, 4, 3, 16, 64),
    "online-24": Shape(2, 24, 1, 4, 3, 1, 1),
    "mixed-63": Shape(2, 63, 2, 4, 3, 16, 64),
    "mixed-64": Shape(1, 64, 1, 4, 3, 64, 16),
    "undivided-100": Shape(2, 100, 1, 4, 3, 12, 7),
}

BENCH = {
    "cpu": Shape(8, 512, 4, 32, 64, 16, 64),
    "online": Shape(8, 256, 4, 16, 16, 1, 1),
    "batch": Shape(8, 4096, 16, 64, 128, 64, 256),
    "long": Shape(1, 32768, 16, 64, 128, 64, 512),
}
