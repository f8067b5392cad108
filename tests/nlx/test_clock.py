# SPDX-License-Identifier: Apache-2.0
"""Clocks: when they fire, and how long until they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nlx
from nlx.clock import as_array


@given(period=st.integers(1, 9), phase=st.integers(-12, 12), tick=st.integers(0, 40))
def test_fires_every_period_ticks_shifted_by_the_phase(period, phase, tick):
    clock = nlx.Clock(period, phase)
    firings = {n * period + phase - 1 for n in range(-40, 60)}
    assert clock.fires(tick) is (tick in firings)
    assert clock.until(tick) == min(f for f in firings if f >= tick) - tick + 1


def test_first_firing_ends_the_first_period():
    assert [t for t in range(12) if nlx.Clock(4).fires(t)] == [3, 7, 11]
    assert [t for t in range(12) if nlx.Clock(4, phase=1).fires(t)] == [0, 4, 8]


@pytest.mark.parametrize("jit", [False, True])
def test_arrays_of_ticks_agree_with_integers(jit):
    clock, ticks = nlx.Clock(5, 2), jnp.arange(30, dtype=jnp.int32)
    fires, until = (jax.jit(f) if jit else f for f in (clock.fires, clock.until))
    np.testing.assert_array_equal(fires(ticks), [clock.fires(t) for t in range(30)])
    np.testing.assert_array_equal(until(ticks), [clock.until(t) for t in range(30)])


def test_a_clock_without_period_never_fires():
    clock = nlx.Clock(None)
    assert clock.fires(7) is False
    assert not clock.fires(jnp.arange(6).reshape(2, 3)).any()
    assert clock.fires(jnp.arange(6).reshape(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="`until` needs a clock that fires"):
        clock.until(0)


@pytest.mark.parametrize("period", [0, -3, 2.5, "4"])
def test_a_bad_period_gets_a_sentence(period):
    with pytest.raises(ValueError, match="`period` must be None or an integer >= 1, got "):
        nlx.Clock(period)


def test_a_bad_phase_gets_a_sentence():
    with pytest.raises(ValueError, match="`phase` must be an integer, got 0.5."):
        nlx.Clock(4, 0.5)


def test_clocks_are_equal_and_hash_by_value():
    assert nlx.Clock(4) == nlx.Clock(4, 0)
    assert len({nlx.Clock(4), nlx.Clock(4), nlx.Clock(4, 1)}) == 2


def test_as_array_keeps_the_type_of_arrays():
    assert as_array(3).dtype == jnp.int32
    assert as_array(jnp.int16(3)).dtype == jnp.int16


@pytest.mark.parametrize("kind", [jnp.uint8, jnp.uint32, jnp.int32])
def test_ticks_may_be_unsigned_and_the_largest(kind):
    clock, last = nlx.Clock(7, 5), int(jnp.iinfo(kind).max)
    for tick in (0, 3, last - 1, last):
        assert bool(clock.fires(kind(tick))) is clock.fires(tick)
        assert int(clock.until(kind(tick))) == clock.until(tick)
