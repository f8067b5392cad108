# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own and a small run for it to serve: for what tries servers out."""

import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import Any

from nlx import nn
from nlx_experiments import config, loop

PATIENCE = 120.0


def small_run(folder: pathlib.Path, width: int = 16) -> pathlib.Path:
    """A DeltaNet, which is compiled in the least time, after two steps; returns the run's folder.

    width: of which a user's memory is 2 width^2 bytes and some.
    """
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for n in range(9):
        (texts / f"{n}.txt").write_text("".join(f"{n} and {i}, " for i in range(90)))
    sizes = dict(width=width, layers=1, heads=2, hidden=16)
    model = dataclasses.replace(nn.preset("deltanet-tiny"), **sizes)
    made = config.make(
        "deltanet-tiny",
        model=model,
        run=folder / "run",
        data=(texts,),
        steps=2,
        batch=2,
        length=8,
        eval_bytes=100,
        optimizer="adamw",
    )
    loop.train(made)
    return made.folder


class Server:
    """`nlx serve` in a process of its own; `with` kills it at the end if it still runs."""

    def __init__(self, run: pathlib.Path, *flags: Any):
        """Starts it on any free port, and waits until it serves. Raises RuntimeError if not."""
        command = [sys.executable, "-m", "nlx_experiments.run", "serve", str(run), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert self.process.stdout is not None
        self.printed = ""
        while "Serving" not in self.printed:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not begin: {self.printed}")
            self.printed += line
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", self.printed)
        assert found is not None
        self.port = int(found[1])

    def ask(
        self, method: str, path: str, body: Any = None, token: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """(status, value) of one request. body: bytes, or what becomes JSON. Raises OSError."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            named["Authorization"] = f"Bearer {token}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            named.setdefault("Content-Type", "application/json")
        talk = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(talk):
            talk.request(method, path, body, named)
            answer = talk.getresponse()
            content, kind = answer.read(), answer.headers["Content-Type"]
        return answer.status, json.loads(content) if "json" in kind else content.decode()

    def user(self) -> str:
        """The token of a new user. Raises RuntimeError where there is none."""
        status, made = self.ask("POST", "/v1/users", {})
        if status != 201:
            raise RuntimeError(f"no user was made: {made}")
        return made["token"]

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Ends it by a signal; returns its exit code and all it printed."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, self.printed + rest

    def __enter__(self) -> "Server":
        """Returns itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Kills it."""
        self.process.kill()
        self.process.communicate()
