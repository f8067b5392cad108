# SPDX-License-Identifier: Apache-2.0
"""What the body of a request to `nlx serve` may be."""

import json
from collections.abc import Mapping
from typing import Any

from nlx_experiments.serve_http import Request


class Bad(Exception):
    """A request that can't be done: status, sentence."""


def fields(request: Request, known: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a request's body. Raises Bad."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Bad(400, f"`Content-Type` is {kind[:80]!r}; it must be application/json.")
    try:
        given = json.loads(request.body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        told_of = " ".join(str(error).split())[:120]
        raise Bad(400, f"the body is not JSON ({told_of}).") from None
    if not isinstance(given, dict):
        raise Bad(400, f"the body is JSON's {type(given).__name__}; it must be an object.")
    for name, value in given.items():
        if name not in known:
            listed = ", ".join(f"`{field}`" for field in known) or "no fields"
            raise Bad(400, f"`{name[:40]}` is unknown; {request.path} takes {listed}.")
        wanted = known[name]
        fits = isinstance(value, (int, float) if wanted is float else wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            words = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
            raise Bad(400, f"`{name}` is {json.dumps(value)[:40]}; it must be {words[wanted]}.")
    return given


def number(given: Mapping[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    """A field within its range, both ends included. Raises Bad."""
    if (value := given.get(name, default)) is None:
        raise Bad(400, f"`{name}` is missing; it must be in [{low}, {high}].")
    if not low <= value <= high:
        raise Bad(400, f"`{name}` is {value}; it must be in [{low}, {high}].")
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON's")
