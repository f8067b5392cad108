# SPDX-License-Identifier: Apache-2.0
"""What a device can do, by the name that jax gives it: for rooflines and for MFU.

Makers' numbers: Google Cloud TPU's pages on system architecture (v4, v5e, v5p, v6e), NVIDIA's data
sheets (H100 SXM, H200).
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device."""

    bfloat16: float  # products and sums of dense matrices, operations/s
    memory: float  # high-bandwidth memory, bytes
    bandwidth: float  # of it, bytes/s
    links: float  # to the other devices of a slice or a node, bytes/s it can send


GIB = 2**30
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.228e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.819e12, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.765e12, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.64e12, 448e9),
    "NVIDIA H100 80GB HBM3": Chip(989.5e12, 80e9, 3.35e12, 450e9),
    "NVIDIA H200": Chip(989.5e12, 141e9, 4.8e12, 450e9),
}
OTHER_NAMES = {"TPU v5p": "TPU v5", "TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}


def of(kind: str) -> Chip | None:
    """The device that jax calls `kind`; None where nothing is known of it, as of a CPU."""
    return CHIPS.get(OTHER_NAMES.get(kind, kind))
