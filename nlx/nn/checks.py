# SPDX-License-Identifier: Apache-2.0
"""Checks of what layers are given: one sentence each, raised before anything is compiled."""

from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from nlx.clock import Clock


def check_option(kind: Any, **options: Any) -> None:
    """Raises ValueError for what is none of a Literal's values."""
    for name, value in options.items():
        if value not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise ValueError(f"`{name}` is {value!r}; it must be one of {known}.")


def check_clocks(clocks: Sequence[Clock], variant: str) -> None:
    """Raises as `periods` does, and ValueError for clocks that a CMS of this variant can't have."""
    lengths = periods(clocks)
    if not lengths or lengths != sorted(lengths):
        raise ValueError(
            f"`clocks` have the periods {[c.period for c in clocks]}; there must be at least "
            "one, from the shortest to the longest."
        )
    if variant == "nested" and clocks[-1].period is None:
        raise ValueError("`clocks` hold a period of None; in the nested variant all must fire.")


def periods(clocks: Sequence[Clock]) -> list[float]:
    """Those of clocks, infinite where they never fire. Raises TypeError for what are no clocks."""
    if not isinstance(clocks, Sequence) or not all(isinstance(c, Clock) for c in clocks):
        raise TypeError(f"`clocks` is {clocks!r}; it must be a sequence of `nlx.Clock`s.")
    return [float("inf") if clock.period is None else clock.period for clock in clocks]


def check_integers(name: str, value: Any, shape: tuple[int, ...] | None = None) -> None:
    """Raises TypeError or ValueError for other than integers [b, t], of this shape if given."""
    if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)):
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"`{name}` is of type {kind}; it must be an array of integers.")
    if value.ndim != 2 or 0 in value.shape or value.shape != (shape or value.shape):
        must = f"{shape}, as tokens" if shape else "[b, t], neither empty"
        raise ValueError(f"`{name}` has shape {value.shape}; it must be {must}.")


def check_call(
    mixer: Any,
    width: int,
    x: Any,
    state: Any,
    segment_ids: Int[Array, "b t"] | None,
    capacity: int = 1,
) -> None:
    """What a mixer of so many channels is called with; capacity: of the state, if it has one."""
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        kind = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"`x` is of type {kind}; it must be an array of floats.")
    if x.ndim != 3 or 0 in x.shape or x.shape[2] != width:
        raise ValueError(f"`x` has shape {x.shape}; it must be [b, t, {width}], none empty.")
    if segment_ids is not None:
        check_integers("segment_ids", segment_ids, x.shape[:2])
    if state is not None:
        check_state("state", mixer, state, len(x), x.dtype, capacity)


def check_state(
    name: str, mixer: Any, state: Any, batch: int, dtype: DTypeLike, capacity: int = 1
) -> None:
    """Raises ValueError for a state unlike the mixer's own in structure, shapes or dtypes."""
    found = _arrays(state)
    own = _arrays(jax.eval_shape(lambda: mixer.init_state(batch, capacity, dtype)))
    for path in [*own, *found]:
        if found.get(path) != own.get(path):
            raise ValueError(
                f"`{name}{path}` is {found.get(path, 'missing')}; it must be "
                f"{own.get(path, 'left out')}, as in what `init_state` returns, or a call that "
                "went on from it."
            )


def _arrays(tree: Any) -> dict[str, str]:
    """The dtype and shape of every leaf, by its path."""
    kind = lambda leaf: str(getattr(leaf, "dtype", type(leaf).__name__))
    return {
        jax.tree_util.keystr(path): kind(leaf) + str(list(jnp.shape(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
