# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations a function's matrix products take, counted in its trace."""

import math
from collections.abc import Callable
from typing import Any

import jax


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of a call's matrix products and convolutions: 2 b m n k for `[b, m, k] [b, k, n]`.

    Nothing is compiled or run: the function is traced. A loop's body counts as often as it runs, of
    branches the dearest one, a body that runs until something holds once. All other operations, a
    few percent of a model's, are left out, as is usual; so is what a kernel hides, so trace with
    XLA's forms (on a CPU they are the default). What is made again in the backward pass counts
    again: trace without `remat` for what a model needs.

    function: of arrays. arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> int:
    name, given = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = given["dimension_numbers"]
        if not contracted:  # nothing is summed: an outer product is elementwise
            return 0
        shape = equation.invars[0].aval.shape
        made = math.prod(equation.outvars[0].aval.shape)
        return 2 * made * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        inside = given["dimension_numbers"].rhs_spec
        products = math.prod(kernel[axis] for axis in inside[1:])
        return 2 * math.prod(equation.outvars[0].aval.shape) * products
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in given["branches"])
    inner = sum(map(_count, _jaxprs(given)))
    if name == "scan":
        return given["length"] * inner
    if name == "shard_map":
        return math.prod(given["mesh"].shape[axis] for axis in given["manual_axes"]) * inner
    return inner


def _jaxprs(given: Any) -> list[Any]:
    """The programs among the parameters of an operation; a derivative's rule is none of them."""
    found = []
    for value in given.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found
