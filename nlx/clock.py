# SPDX-License-Identifier: Apache-2.0
"""Clocks: when the parameters that others see are replaced."""

import dataclasses
from numbers import Integral

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Tick = int | Int[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Clock:
    """A period and a phase: fires after tick t (0-based) when (t + 1 - phase) % period == 0.

    period: ticks from one firing to the next, an integer >= 1, or None: never fires (frequency 0).
    phase: ticks by which every firing is delayed, any integer; only its value modulo period counts.

    Raises ValueError for any other period or phase.
    Source: Behrouz et al. (2025), Nested Learning, definition 2: a level is known by its frequency.
    """

    period: int | None
    phase: int = 0

    def __post_init__(self):  # noqa: D105
        if self.period is not None and not (isinstance(self.period, Integral) and self.period >= 1):
            raise ValueError(f"`period` must be None or an integer >= 1, got {self.period!r}.")
        if not isinstance(self.phase, Integral):
            raise ValueError(f"`phase` must be an integer, got {self.phase!r}.")

    def fires(self, tick: Tick) -> bool | Bool[Array, "..."]:
        """Whether the clock fires after `tick`: a Python bool for an integer, else an array.

        tick: 0-based tick, an integer or an integer array of any shape, traced or not.
        """
        if self.period is None:
            return False if isinstance(tick, Integral) else jnp.zeros(jnp.shape(tick), bool)
        firing = self._since(tick, 1 - self.phase) == 0
        return bool(firing) if isinstance(tick, Integral) else firing

    def until(self, tick: Tick) -> Tick:
        """Ticks from `tick` to the next firing, both included: period - (tick - phase) % period.

        tick: as in `fires`. Raises ValueError for a clock that never fires.
        """
        if self.period is None:
            raise ValueError("`until` needs a clock that fires, and `period` is None.")
        return self.period - self._since(tick, -self.phase)

    def _since(self, tick: Tick, shift: int) -> Tick:
        """(tick + shift) % period, without a step below 0 or above the tick's own range."""
        assert self.period is not None
        return (tick % self.period + shift % self.period) % self.period


def as_array(tick: Tick) -> Int[Array, "..."]:
    """A tick as an array of its own integer type, int32 for a Python integer."""
    return jax.lax.convert_element_type(tick, getattr(tick, "dtype", jnp.int32))
