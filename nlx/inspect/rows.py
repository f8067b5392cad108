# SPDX-License-Identifier: Apache-2.0
"""Levels of a model or an optimizer as a table, read off its Levels and Nests."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from nlx.clock import Clock
from nlx.level import Level
from nlx.nest import Nest
from nlx.nn.model import LanguageModel, parameter_count, pretraining
from nlx.nn.presets import ModelConfig
from nlx.writes import Write


class Row(NamedTuple):
    """One level, and how often a model has it."""

    name: str  # path of the module, an index that runs over equal ones written *
    copies: int  # heads and layers
    parameters: int  # numbers it learns or keeps, all copies together
    context: str  # what one tick shows it
    objective: str
    write: str  # the factory in `nlx.writes`, with what it was given
    clock: str
    order: int  # of in-context learning


class Size(NamedTuple):
    """What a language model takes."""

    parameters: int
    state: int  # bytes of one row


def size(config: ModelConfig, tokens: int) -> Size:
    """Parameters of a model and bytes of one row of its state, without making either.

    tokens: capacity of attention's caches.
    """
    repeats = config.layers // len(config.mixers)
    model, state = nnx.eval_shape(lambda: _start(config, tokens))
    repeated = parameter_count(model.blocks)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return Size(parameter_count(model) + (repeats - 1) * repeated, repeats * kept)


def levels(thing: Any, params: Any = None) -> list[Row]:
    """The levels of a model or an optimizer, slowest first in each nest.

    A model: pre-training, which is `nlx.nn.pretraining`, then every module with a method `level` or
    `nest`, one for each of its `heads`. An optimizer: the functions `level` and `nest` among
    its closures, one for each leaf of `params`. The order is 0 for what learns from
    batches or not at all; in a context, tokens or gradients, it is the rank of the level's
    frequency in its nest, the slowest being 1. Of a model the rows that learn from batches add up
    to its parameters; the others count what the memories of each text hold.

    thing: a Flax NNX module, or any optax transformation. params: what the optimizer is for.
    Raises TypeError for anything else, and for an optimizer without `params`.
    """
    if isinstance(thing, nnx.Module):
        rows = _of_nest("", pretraining(thing, optax.identity()), "step", 1, in_context=False)
        for path, module in nnx.iter_modules(thing):
            if (nest := _own_nest(module)) is not None:
                name, copies = ".".join(map(str, path)), getattr(module, "heads", 1)
                rows += _of_nest(name, nest, "token", copies, in_context=True)
        return _together(rows)
    if not isinstance(thing, optax.GradientTransformation):
        raise TypeError(
            f"`thing` is of type {type(thing).__name__}; it must be a Module or an "
            "optax transformation."
        )
    if params is None:
        raise TypeError("`params` is None; it must be the parameters that the optimizer is for.")
    return _together(
        [
            row
            for leaf in jax.tree.leaves(params)
            for name, nest, *_ in nests_of(thing, leaf)
            for row in _of_nest(name, nest, "step", 1, in_context=True)
        ]
    )


def table(rows: Iterable[Row]) -> str:
    """The rows as a text table with a header."""
    head = ("level", "copies", "parameters", "context", "objective", "write", "clock", "order")
    cells = [head] + [tuple(_text(value) for value in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [name in ("copies", "parameters", "order") for name in head]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _start(config: ModelConfig, tokens: int) -> tuple[LanguageModel, Any]:
    """A model with its pattern of mixers once, and a state of one row."""
    once = dataclasses.replace(config, layers=len(config.mixers))
    model = LanguageModel(once, rngs=nnx.Rngs(0))
    return model, model.init_state(1, tokens)


def _of_nest(prefix: str, nest: Nest, unit: str, copies: int, *, in_context: bool) -> list[Row]:
    """The rows of a nest whose ticks are tokens or steps."""
    fires = {level.clock.period for level in nest.levels.values() if level.clock.period}
    slow_to_fast = sorted(fires, reverse=True) if in_context else []
    order = {period: 1 + rank for rank, period in enumerate(slow_to_fast)}
    rows = [
        Row(
            name=".".join(filter(None, (prefix, name))),
            copies=copies,
            parameters=copies * _size(level),
            context=_context(level.loss or nest.loss, unit),
            objective=_objective(level.loss or nest.loss),
            write=_write(level.write),
            clock=_clock(level.clock, unit),
            order=order.get(level.clock.period or 0, 0),
        )
        for name, level in sorted(nest.levels.items(), key=lambda item: -_period(item[1].clock))
    ]
    return rows


def _alone(level: Level) -> Nest:
    """A level as a nest of its own, of no further name."""
    return Nest({"": level}, lambda params, context: (None, {"": context}))


def _own_nest(module: nnx.Module) -> Nest | None:
    """What a module says it is, of itself."""
    nest, level = getattr(module, "nest", None), getattr(module, "level", None)
    return nest() if nest is not None else None if level is None else _alone(level())


def nests_of(
    tx: optax.GradientTransformation, leaf: Any
) -> list[tuple[str, Nest, Callable | None, Callable]]:
    """(factory, nest, context, function) for every `level` or `nest` that `tx` has for a leaf.

    context: the function of that name that stands beside it in a closure and makes what the levels
    are told of a gradient; None where there is none.
    """
    found, functions = [], reachable(tx, leaf)
    beside = {}
    for function in functions:
        inside = inspect.getclosurevars(function).nonlocals
        beside |= {id(inside.get(name)): inside.get("context") for name in ("level", "nest")}
    for function in functions:
        if function.__name__ in ("level", "nest"):
            more = len(inspect.signature(function).parameters) - 1  # rates, extra arguments
            made = function(leaf, *[{}] * more)
            if isinstance(made, Level | Nest):
                factory = function.__qualname__.split(".")[0]
                same = sum(name.split(" ")[0] == factory for name, *_ in found)
                factory += f" {same + 1}" if same else ""
                nest = _alone(made) if isinstance(made, Level) else made
                found.append((factory, nest, beside.get(id(function)), function))
    return found


def stages(tx: Any) -> list[optax.GradientTransformationExtraArgs]:
    """The transformations that `tx` applies one after the other: chains within chains, flat."""
    tx = optax.with_extra_args_support(tx)
    each = [
        inspect.getclosurevars(function).nonlocals.get(name)
        for function, name in ((tx.init, "init_fns"), (tx.update, "update_fns"))
    ]
    if None in each:
        return [tx]
    pairs = zip(*each, strict=True)
    return [s for pair in pairs for s in stages(optax.GradientTransformationExtraArgs(*pair))]


def starred(name: str) -> str:
    """A path with every index written *."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def reachable(root: Any, leaf: Any) -> list[Callable]:
    """All functions that closures, containers and partials lead to, each once.

    Of a partition that labels by shape, only what the leaf is labelled for.
    """
    functions, queue, seen = [], [root], set()
    while queue:
        thing = queue.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Mapping):
            queue += thing.values()
        elif isinstance(thing, tuple | list):
            queue += thing
        elif isinstance(thing, functools.partial):
            queue += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.isfunction(thing):
            inside = inspect.getclosurevars(thing).nonlocals
            if "transforms" in inside and callable(labels := inside.get("param_labels")):
                queue.append(inside["transforms"][labels(leaf)])  # optax.partition
                continue
            functions.append(thing)
            queue += inside.values()
    return functions


def _together(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ only in an index of their path, as one."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((starred(row.name), row[3:]), []).append(row)
    return [
        Row(name, sum(row.copies for row in group), sum(row.parameters for row in group), *rest)
        for (name, rest), group in groups.items()
    ]


def _period(clock: Clock) -> float:
    return float("inf") if clock.period is None else clock.period


def _size(level: Level) -> int:
    """Numbers in the level's parameters."""
    made = jax.eval_shape(level.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(made))


def _clock(clock: Clock, unit: str) -> str:
    if clock.period is None:
        return "never"
    return f"every {unit}" if clock.period == 1 else f"{clock.period} {unit}s"


def _context(loss: Any, unit: str) -> str:
    """The name of a loss's last argument."""
    shown = "context" if loss is None else list(inspect.signature(loss).parameters)[-1]
    return f"{shown} per {unit}"


def _objective(loss: Any) -> str:
    """The name of the objective, inside what `associative_memory` makes of it."""
    while isinstance(loss, functools.partial):
        named = [part for part in loss.args if inspect.isfunction(part)]
        loss = named[-1] if named else loss.func
    return "none" if loss is None else loss.__name__.lstrip("_")


def _write(write: Write | None) -> str:
    """The factory of a write, and what it was given: limits, a write inside; from closures."""
    if write is None:
        return "none"
    given: dict[str, Any] = {}
    for function in filter(None, write):
        given |= inspect.getclosurevars(function).nonlocals
    factory = write.init.__qualname__.split(".")[0].lstrip("_")
    return f"{factory}({', '.join(_given(given))})".removesuffix("()")


def _given(given: Mapping[str, Any]) -> list[str]:
    shown = []
    for name, value in sorted(given.items()):
        if name in ("erase", "momentum") and value:
            shown.append(name)
        elif isinstance(value, Write):
            shown.insert(0, _write(value))
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            shown.append(f"{name}={round(value, 3) if isinstance(value, float) else value}")
    return shown


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else value
