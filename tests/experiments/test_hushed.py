# SPDX-License-Identifier: Apache-2.0
"""What is left behind by a failed reading says nothing; all else is said as before."""

import sys
import types

import pytest
from nlx_experiments import hushed


@pytest.fixture
def heard(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(error))
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(found.exc_value))
    hushed.hush.__wrapped__()
    return told


def _of(error, trace=None):
    return types.SimpleNamespace(exc_type=type(error), exc_value=error, exc_traceback=trace)


def _raised_in(name):
    try:
        exec(compile("raise ValueError('broken')", name, "exec"), {})
    except ValueError as error:
        return error


def test_left_behind_is_silent(heard):
    closed = RuntimeError("Event loop is closed")
    sys.excepthook(RuntimeError, closed, None)
    sys.unraisablehook(_of(closed))
    error = _raised_in("/lib/orbax/checkpoint/_src/serialization/serialization.py")
    sys.unraisablehook(_of(error, error.__traceback__))
    assert heard == []


def test_all_else_is_told(heard):
    other, own = RuntimeError("no loop"), _raised_in("/lib/other.py")
    sys.excepthook(RuntimeError, other, None)
    sys.unraisablehook(_of(own, own.__traceback__))
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert heard[:2] == [other, own]
    assert len(heard) == 3
