# SPDX-License-Identifier: Apache-2.0
"""Named workloads of mlp_memory, shared by tests and benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One workload; axes as in `nlx_kernels.axes`, hidden the widths between the layers."""

    b: int
    t: int
    h: int
    k: int
    hidden: tuple[int, ...]
    v: int
    chunk_size: int

    @property
    def weights(self) -> list[tuple[int, int, int]]:
        """Shapes of the layers, [h, in, out]."""
        widths = (self.k, *self.hidden, self.v)
        return [(self.h, i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]


TESTS = {
    "token": Shape(2, 1, 2, 4, (5,), 4, 16),
    "ragged-63": Shape(2, 63, 2, 4, (5,), 4, 16),
    "whole-64": Shape(2, 64, 2, 4, (5,), 4, 16),
    "long-chunk-63": Shape(2, 63, 1, 4, (), 3, 64),
    "online-24": Shape(2, 24, 1, 4, (5,), 4, 1),
    "deep-100": Shape(1, 100, 1, 4, (5, 3, 6), 4, 7),
}

BENCH = {
    "cpu": Shape(4, 1024, 4, 64, (256,), 64, 64),
    "cpu-chunk-16": Shape(4, 1024, 4, 64, (256,), 64, 16),
    "batch": Shape(8, 4096, 16, 64, (256,), 64, 64),
    "long": Shape(1, 32768, 16, 64, (256,), 64, 512),
    "wide": Shape(8, 4096, 8, 128, (512,), 128, 512),
}
