# SPDX-License-Identifier: Apache-2.0
"""What is computed from what: a function traced, and marks followed through its equations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import PyTree

from nlx.level import Association
from nlx.nn.attention import GIVEN, READ

Part = tuple[str, str]  # level, and the part of what it is told


class Start(NamedTuple):
    """Where a level starts, as a part of what it is told."""

    initial_state: Any


class Asking(NamedTuple):
    """What a level is asked, as a part of what it is told."""

    query: Any


class Lookup(NamedTuple):
    """What was met on the way: the parts of attention that are computed from the marks."""

    read: list[str]


def moved(
    function: Callable[..., dict[str, Any]], at: PyTree, *rest: PyTree, only: Any = None
) -> list[Part]:
    """(level, part) of every part of what `function` tells levels that reads its first argument.

    Only shapes are needed. What attention gives reads nothing: it is a source of its own.
    only: the leaves of `at` that count, as booleans in a list; None: all that hold floats.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(at, *rest)
    own = [is_float(leaf) for leaf in jax.tree.leaves(at)] if only is None else only
    others = [False] * (len(traced.jaxpr.invars) - len(own))
    return _parts_read(_reading(traced.jaxpr, own + others, False, Lookup([])), shapes)


def moved_by_attention(function: Callable[..., dict[str, Any]], *at: PyTree) -> list[Part]:
    """(level, part) of every part that reads what attention gives."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*at)
    none = [False] * len(traced.jaxpr.invars)
    return _parts_read(_reading(traced.jaxpr, none, True, Lookup([])), shapes)


def read_by_attention(function: Callable, at: PyTree, *rest: PyTree, only: Any = None) -> list[str]:
    """Which of "query", "key", "value" of attention in `function` read its first argument."""
    traced = jax.make_jaxpr(function)(at, *rest).jaxpr
    own = [is_float(leaf) for leaf in jax.tree.leaves(at)] if only is None else only
    met = Lookup([])
    _reading(traced, own + [False] * (len(traced.invars) - len(own)), False, met)
    return [name.rpartition(".")[2] for name in READ if name in met.read]


def is_float(leaf: Any) -> bool:
    """Whether an array, or its shape, holds floats."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _parts_read(marks: list[bool], shapes: dict[str, Any]) -> list[Part]:
    read, found = iter(marks), []
    for level, told in shapes.items():
        for part, shape in _parts(told):
            leaves = [(next(read), leaf) for leaf in jax.tree.leaves(shape)]
            if any(reads and is_float(leaf) for reads, leaf in leaves):
                found.append((level, part.replace("_", " ")))
    return found


def _reading(jaxpr: Any, read: list[bool], attention: bool, met: Lookup) -> list[bool]:
    """Which results are computed from the arguments that `read` marks, or from attention."""
    marked = {variable for variable, mark in zip(jaxpr.invars, read, strict=True) if mark}
    is_marked = lambda atom: not isinstance(atom, core.Literal) and atom in marked
    for equation in jaxpr.eqns:
        marks = [is_marked(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        kind = equation.primitive.name
        if kind == "name" and equation.params["name"] in (*READ, GIVEN):
            name = equation.params["name"]
            met.read.extend([name] * any(marks))
            results = [attention] if name == GIVEN else marks
        elif kind == "scan":
            results = _looping(equation, inner, marks, attention, met)
        elif inner is not None and kind != "while" and len(inner.invars) == len(marks):
            results = _reading(inner, marks, attention, met)
        else:
            results = [any(marks)] * len(equation.outvars)
        marked |= {out for out, mark in zip(equation.outvars, results, strict=True) if mark}
    return [is_marked(atom) for atom in jaxpr.outvars]


def _looping(scan: Any, body: Any, marks: list[bool], attention: bool, met: Lookup) -> list[bool]:
    """`_reading` of a scan: the carry is marked by what any of its rounds marks."""
    whole = lambda out, ins: sum(
        a.aval.shape == b.aval.shape for a, b in zip(out, ins, strict=True)
    )
    carried = whole(scan.outvars, body.outvars)  # what is stacked has one axis more outside
    first = whole(scan.invars, body.invars) - carried
    while True:
        results = _reading(body, marks, attention, met)
        carry = marks[first : first + carried]
        both = [a or b for a, b in zip(carry, results[:carried], strict=True)]
        if both == carry:
            return both + results[carried:]
        marks = marks[:first] + both + marks[first + carried :]


def _parts(told: Any) -> list[tuple[str, Any]]:
    """A context by field."""
    known = isinstance(told, Association | Start | Asking)
    return list(told._asdict().items()) if known else [("context", told)]
