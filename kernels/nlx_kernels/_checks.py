# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, shared by the ops: one sentence each, raised before anything compiles."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

INPUT_DTYPES = ("float64", "float32", "bfloat16")


class Checker:
    """Checks one call of one op; axis letters keep the size they were first met with."""

    def __init__(self, op: str):
        """Starts a call of `op`, with no axis known."""
        self.op = op
        self.sizes: dict[str, int] = {}
        self.dtype = jnp.dtype(jnp.float32)

    def array(self, name: str, value: Any, axes: str, dtypes: Sequence[str]) -> jax.Array:
        """`value` as an array, if it has the axes, such as "b t h k", and one of the dtypes."""
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise TypeError(
                f"{self.op}: {name} is {value!r}; it must be an array [{', '.join(axes.split())}]."
            )
        value = jnp.asarray(value)
        self._shape(name, value.shape, axes.split())
        return self._typed(name, value, dtypes)

    def inputs(self, **arrays: tuple[Any, str]) -> list[jax.Array]:
        """Arrays of one dtype, which the output will have; each is given as (value, axes)."""
        checked: list[jax.Array] = []
        for name, (value, axes) in arrays.items():
            allowed = (checked[0].dtype.name,) if checked else INPUT_DTYPES
            checked.append(self.array(name, value, axes, allowed))
        self.dtype = checked[0].dtype
        return checked

    def accumulator(self) -> jnp.dtype:
        """The dtype of gates, states and sums: float64 for float64 inputs, else float32."""
        return jnp.promote_types(jnp.float32, self.dtype)

    def weights(self, name: str, value: Any, axes: str) -> jax.Array:
        """Parameters of any dtype that the accumulator holds, in the accumulator's."""
        wide = self.accumulator().name
        allowed = [dtype for dtype in INPUT_DTYPES if jnp.promote_types(wide, dtype) == wide]
        return self.array(name, value, axes, allowed).astype(wide)

    def gate(self, name: str, value: Any) -> jax.Array:
        """A gate [b, t, h]: at least float32, since bfloat16 turns a retention of 0.9985 into 1."""
        wide = self.accumulator().name
        return self.array(name, value, "b t h", sorted({"float32", wide})).astype(wide)

    def state(self, name: str, value: Any, axes: str) -> jax.Array:
        """A state, of the accumulator's dtype: what comes out is what goes in."""
        return self.array(name, value, axes, (self.accumulator().name,))

    def segments(self, value: Any) -> jax.Array | None:
        """Integer segment ids [b, t], or None."""
        if value is None:
            return None
        return self.array("segment_ids", value, "b t", ("int8", "int16", "int32", "int64"))

    def start(self, name: str, start: Any, state: Any, segments: Any) -> None:
        """What a memory starts from, or the state it goes on from; both only with segments."""
        if start is None and (state is None or segments is not None):
            when = "with segment_ids, whose segments start from it"
            when = "without state" if state is None else when
            raise ValueError(f"{self.op}: {name} is None; it must be given {when}.")
        if start is not None and state is not None and segments is None:
            raise ValueError(
                f"{self.op}: {name} and state are both given; without segment_ids it must be one "
                f"of them: {name} to start, state to go on."
            )

    def fields(self, name: str, value: Any, kind: type) -> None:
        """A value of a NamedTuple type."""
        if not isinstance(value, kind):
            raise TypeError(
                f"{self.op}: {name} is a {type(value).__name__}; it must be a {kind.__name__}."
            )

    def buffer(self, buffer: Any, momentum: bool) -> None:
        """A state has a momentum buffer exactly when the call has momentum."""
        if (buffer is not None) != momentum:
            raise ValueError(
                f"{self.op}: momentum is {'given' if momentum else 'None'}, but state.momentum is "
                f"{'None' if momentum else 'not'}; momentum must be given in all calls or none."
            )

    def matrices(self, name: str, value: Any, dtypes: Sequence[str]) -> jax.Array:
        """Matrices behind any leading axes, which may be empty."""
        if not hasattr(value, "shape") or len(value.shape) < 2:
            raise ValueError(
                f"{self.op}: {name} is {_shown(value)}; it must be matrices [..., i, o]."
            )
        return self._typed(name, jnp.asarray(value), dtypes)

    def size(self, name: str, value: Any, least: int = 1) -> int:
        """A Python integer of at least `least`."""
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
        if number < least or isinstance(value, bool):
            raise ValueError(
                f"{self.op}: {name} is {_shown(value)}; it must be an integer >= {least}."
            )
        return number

    def limit(self, name: str, value: Any) -> float | None:
        """A positive Python number, or None for no limit."""
        if value is None or (isinstance(value, int | float) and value > 0):
            return value
        raise ValueError(f"{self.op}: {name} is {_shown(value)}; it must be a number > 0, or None.")

    def option(self, name: str, value: Any, allowed: Sequence[Any]) -> None:
        """One of a few values."""
        if not any(isinstance(value, type(o)) and value == o for o in allowed):
            raise ValueError(
                f"{self.op}: {name} is {_shown(value)}; it must be {_any_of(allowed)}."
            )

    def _typed(self, name: str, value: jax.Array, dtypes: Sequence[str]) -> jax.Array:
        if value.dtype.name not in dtypes:
            raise TypeError(
                f"{self.op}: {name} has dtype {value.dtype.name}; it must be {_any_of(dtypes)}."
            )
        return value

    def _shape(self, name: str, shape: tuple[int, ...], axes: list[str]) -> None:
        known = {axis: self.sizes[axis] for axis in axes if axis in self.sizes}
        fits = len(shape) == len(axes) and all(
            size > 0 and known.get(axis, size) == size
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            where = ", ".join(f"{axis}={size}" for axis, size in known.items())
            raise ValueError(
                f"{self.op}: {name} has shape {shape}; it must be [{', '.join(axes)}]"
                f"{' with ' + where if where else ''}, no axis empty."
            )
        self.sizes.update(zip(axes, shape, strict=True))


def resets(segment_ids: jax.Array | None) -> jax.Array | None:
    """Where a segment begins inside a row; the first token goes on from the state."""
    if segment_ids is None:
        return None
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def numbered(segment_ids: jax.Array | None, like: jax.Array) -> jax.Array | None:
    """The segments of each row numbered from 0, with the same resets, as numbers like the gates.

    Then they can be an argument of a function with a derivative of its own: what such a function
    only closes over may belong to a trace that has ended (`jax.grad` of a `jit`).
    """
    reset = resets(segment_ids)
    return None if reset is None else jnp.cumsum(reset, 1).astype(like.dtype)


def _shown(value: Any) -> str:
    return f"an array of shape {value.shape}" if hasattr(value, "shape") else repr(value)


def _any_of(options: Sequence[Any]) -> str:
    words = [option if isinstance(option, str) else repr(option) for option in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
