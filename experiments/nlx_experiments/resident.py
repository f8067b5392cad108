# SPDX-License-Identifier: Apache-2.0
"""How much memory this process holds, as the system counts it, or its accelerator."""

import ctypes
import os
import pathlib
import resource
import sys

import jax

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # of glibc


def now() -> float:
    """MiB resident now; where the system does not say, at the peak.

    What was freed is given back to the system first where its library can: what grows within it
    would not be seen.
    """
    if _trim is not None:
        _trim(0)
    counted = pathlib.Path("/proc/self/statm")
    if not counted.exists():
        return peak()
    return int(counted.read_text().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """MiB resident at the process' peak so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def on_device() -> float | None:
    """MiB in use on the first device now; None where it does not count them, as CPUs do not."""
    counted = jax.devices()[0].memory_stats() or {}
    return counted["bytes_in_use"] / 2**20 if "bytes_in_use" in counted else None
