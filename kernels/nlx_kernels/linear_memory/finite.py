# SPDX-License-Identifier: Apache-2.0
"""Keeps a token that is not finite to its row, head and segment, in forms that multiply masks."""

import functools
from collections.abc import Callable
from typing import Any

from nlx_kernels._finite import quarantine


def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    """A form of linear_memory between `quarantine` and its mark; y in q's dtype."""

    @functools.wraps(run)
    def call(q, k, v, *, retain, erase, rate, state, segment_ids, **options):
        written = {"k": k, "v": v, "retain": retain, "erase": erase, "rate": rate}
        dtype = q.dtype
        q, written, state, mark = quarantine(q, written, state, segment_ids)
        y, state = run(q, **written, state=state, segment_ids=segment_ids, **options)
        return mark(y.astype(dtype), state)

    return call
