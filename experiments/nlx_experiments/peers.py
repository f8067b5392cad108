# SPDX-License-Identifier: Apache-2.0
"""Where independent code lies that we compare with: packages of the registry, none of them ours."""

import importlib
import importlib.util
from importlib import metadata
from types import ModuleType
from typing import Any

import jax
import numpy as np

from nlx_experiments.errors import Refused

Errors = dict[str, float]  # what was compared -> the largest difference over the largest number
INSTALL = {
    "torch": "torch==2.13.0 (its build for the CPU is of Python 3.11)",
    "fla": "einops; pip install --no-deps fla-core==0.6.0",
    "nested_learning": "--no-deps nested-learning==0.2.0",
}


def torch() -> ModuleType:
    """PyTorch.

    Raises:
      Refused: it is not installed.
    """
    return load("torch")


def load(name: str) -> ModuleType:
    """A module of a peer.

    Raises:
      Refused: the package is not installed; says which to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(name.partition(".")[0]) from error


def fla_naive(op: str) -> ModuleType:
    """The file `naive.py` of one op of flash-linear-attention, without the rest: that needs Triton.

    Raises:
      Refused: fla-core or what the file imports is not installed.
    """
    try:
        files = metadata.files("fla-core") or []
    except metadata.PackageNotFoundError as error:
        raise _missing("fla") from error
    (found,) = [f for f in files if f.as_posix() == f"fla/ops/{op}/naive.py"]
    spec = importlib.util.spec_from_file_location(f"fla_naive_{op}", found.locate())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise _missing("torch" if error.name == "torch" else "fla") from error
    return module


def error(got: Any, want: Any) -> float:
    """The largest difference of two trees, over the largest number in the second."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def _missing(package: str) -> Refused:
    return Refused(
        f"the package `{package}`, with which this compares, is not installed: "
        f"pip install {INSTALL[package]}."
    )
