# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("start", "compile", "data", "step", "save", "evaluation", "lost")


class Ledger:
    """Seconds by what they were spent on; what is on no line is "rest"."""

    def __init__(
        self,
        before: Mapping[str, Any] | None = None,
        since: float | None = None,
        lost: float = 0.0,
    ):
        """before: what `told` said when the run was stopped, to go on from.

        lost: seconds that the run went on after `before` was written, until it was killed; what it
        did in them is done again.

        since: when the command began, of `time.monotonic`; what went by since is "start": reading
        the text, meeting other processes, restoring. None: now.
        """
        now = time.monotonic()
        since = now if since is None else since
        held = (before or {}).get("seconds", {})
        self.seconds = {kind: float(held.get(kind, 0)) for kind in KINDS}
        self.seconds["start"] += now - since
        self.seconds["lost"] += lost
        self.began = since - float((before or {}).get("total", 0)) - lost

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts what happens inside as one of KINDS; not inside another one."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[kind] += time.monotonic() - start

    def told(self) -> dict[str, Any]:
        """{"seconds": kind -> seconds, "total", "goodput": the share of it spent on steps}."""
        total = time.monotonic() - self.began
        rest = max(0.0, total - sum(self.seconds.values()))
        seconds = {kind: round(value, 3) for kind, value in {**self.seconds, "rest": rest}.items()}
        goodput = self.seconds["step"] / total if total else 0.0
        return {"seconds": seconds, "total": round(total, 3), "goodput": round(goodput, 4)}
