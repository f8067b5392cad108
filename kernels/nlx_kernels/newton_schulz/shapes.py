# SPDX-License-Identifier: Apache-2.0
"""Named workloads of newton_schulz, shared by tests and benchmark: shapes of x."""

TESTS = {
    "wide": (3, 5),
    "tall": (2, 6, 3),
    "square": (2, 2, 4, 4),
    "row": (1, 5),
    "one": (1, 1),
}

BENCH = {
    "cpu": (256, 1024),
    "layers": (12, 768, 3072),
    "large": (4096, 4096),
}
