# SPDX-License-Identifier: Apache-2.0
"""Many users at random against a running server: does its memory stay flat, is nothing lost?

command    python -m nlx_experiments.soak [--run RUN] [--minutes 30] [--place FOLDER]
shows      resident memory, open files and threads of the server over time, requests a second, and
           answers by status; that every refusal was one that was asked for; and that at the end
           each user has as many tokens in memory as were read for them
takes      as long as it is told; few requests a second, so that it disturbs little
expects    memory within a few per cent from the second third to the last

Users come and go. Each of the clients draws a user and a request: to read, remember, draw, save,
load, forget, leave, or one that must be refused. The run served is --run, or a small one.
"""

import collections
import dataclasses
import pathlib
import random
import resource
import sys
import tempfile
import threading
import time
from typing import Any

import tyro

from nlx_experiments import report, runs
from nlx_experiments.console import say
from nlx_experiments.serve_process import Server, small_run

PLACE = pathlib.Path(__file__).parents[1]
WORDS = "the a memory reads writes of and forgets level clock fires user text token 7 42 ( ) = :"
BAD = (
    ("POST", "/v1/generate", {"length": 0}, 400),
    ("POST", "/v1/prefill", {"txt": ""}, 400),
    ("POST", "/v1/prefill", b"{", 400),
    ("GET", "/v1/other", None, 404),
    ("PUT", "/v1/memory", None, 405),
    ("POST", "/v1/prefill", {"text": "x" * 9000}, 413),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soak:
    """Asks a server for long."""

    run: pathlib.Path | None = None
    """What is served; a small run that is made first, by default."""
    minutes: float = 30.0
    """How long."""
    rate: float = 4.0
    """Requests a second, all clients together."""
    clients: int = 4
    """How many ask at once."""
    users: int = 200
    """How many there are."""
    held: int = 64
    """Memories that the server keeps in its process."""
    every: float = 10.0
    """Seconds between two looks at the server's memory."""
    seed: int = 0
    """Of what is asked."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for a number out of range."""
        for name in ("minutes", "rate", "clients", "users", "held", "every"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` is {value}; it must be above 0.")


class Client:
    """One of those who ask; has users of its own, and knows how much each must have in memory."""

    def __init__(self, server: Server, users: int, seed: int):
        """Makes its users."""
        self.server, self.rng = server, random.Random(seed)
        self.tokens = [server.user() for _ in range(users)]
        self.now, self.saved = [0] * users, [0] * users
        self.statuses: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0

    def ask(self) -> None:
        """One request at random, and whether it was answered as it must."""
        rng, n = self.rng, self.rng.randrange(len(self.tokens))
        kind = rng.choices(
            ("prefill", "remember", "generate", "save", "load", "forget", "memory", "leave", "bad"),
            (30, 20, 20, 5, 5, 4, 6, 2, 8),
        )[0]
        text = " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 40)))
        begun = time.monotonic()
        if kind in ("prefill", "remember"):
            expected = self.now[n] + len(text)
            self._told(n, kind, {"text": text, "every": rng.choice([4, 16, 32])}, expected)
            self.now[n] = expected
            self.saved[n] = expected if kind == "remember" else self.saved[n]
        elif kind == "generate":
            length, keep = rng.randint(1, 40), rng.random() < 0.3
            asked = {"length": length, "prompt": text, "keep": keep, "seed": rng.randint(0, 99)}
            self.now[n] += (len(text) + length) * keep
            self._told(n, kind, asked, self.now[n])
        elif kind == "save":
            self._told(n, kind, {}, self.now[n])
            self.saved[n] = self.now[n]
        elif kind == "load":
            self._told(n, kind, {}, self.saved[n], 200 if self.saved[n] else None)
            self.now[n] = self.saved[n] or self.now[n]
        elif kind == "forget":
            self._told(n, kind, {}, 0)
            self.now[n] = self.saved[n] = 0
        elif kind == "memory":
            self.check(n)
        elif kind == "leave":
            self._expect(200, *self.server.ask("DELETE", "/v1/user", token=self.tokens[n]))
            self._expect(401, *self.server.ask("GET", "/v1/memory", token=self.tokens[n]))
            self.tokens[n], self.now[n], self.saved[n] = self.server.user(), 0, 0
        else:
            method, path, body, status = rng.choice(BAD)
            told = self.server.ask(
                method, path, body, self.tokens[n], Content_Type="application/json"
            )
            self._expect(status, *told)
        self.slowest = max(self.slowest, time.monotonic() - begun)

    def check(self, n: int) -> None:
        """Whether the n-th user has as many tokens in memory as were read."""
        status, value = self.server.ask("GET", "/v1/memory", token=self.tokens[n])
        self._expect(200, status, value)
        if value.get("position") != self.now[n]:
            self.wrong.append(f"user {n} has {value}, and must have {self.now[n]} tokens")

    def _told(
        self, n: int, kind: str, body: Any, position: int, expected: int | None = 200
    ) -> None:
        """expected: the status; None: either, for a memory of no tokens may be saved too."""
        status, value = self.server.ask("POST", f"/v1/{kind}", body, self.tokens[n])
        self._expect(status if expected is None else expected, status, value)
        if status == 200 and expected is not None and value["position"] != position:
            self.wrong.append(f"{kind}: {value['position']} tokens, and must be {position}")
        if status == 200 and expected is None:
            self.now[n] = value["position"]

    def _expect(self, expected: int, status: int, value: Any) -> None:
        self.statuses[str(status)] += 1
        if status != expected:
            self.wrong.append(f"{status} in place of {expected}: {value}")


def main(options: Soak) -> dict[str, Any]:
    """Asks for so long; writes results/serve-soak.json and the README's lines."""
    environment = runs.environment()  # of what is run, not of what has changed since
    with tempfile.TemporaryDirectory() as temporary:
        run = options.run or small_run(pathlib.Path(temporary) / "small")
        flags = ("--memories", pathlib.Path(temporary) / "users", "--held", options.held)
        with Server(run, *flags) as server:
            found = soak(server, options)
            code, printed = server.end()
    found |= {"exit": code, "saved at the end": "Every memory is saved" in printed}
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        name: getattr(options, name) for name in ("minutes", "rate", "clients", "users", "held")
    }
    results = {"environment": environment, "asked": asked} | found
    runs.write_json(folder / "serve-soak.json", results)
    text = shown(results)
    if options.place == PLACE:
        report.place(options.place / "README.md", "serve-soak", text)
    say(text)
    return results


def soak(server: Server, options: Soak) -> dict[str, Any]:
    """What was measured."""
    model = server.ask("GET", "/v1/model")[1]
    each = -(-options.users // options.clients)
    clients = [Client(server, each, options.seed + n) for n in range(options.clients)]
    begun = time.monotonic()
    end = begun + 60 * options.minutes

    def work(client: Client) -> None:
        pause = options.clients / options.rate
        try:
            while time.monotonic() < end:
                client.ask()
                time.sleep(client.rng.uniform(0, 2 * pause))
        except Exception as error:
            client.wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    looks = []
    while time.monotonic() < end and any(thread.is_alive() for thread in threads):
        looks.append(look(server.process.pid, time.monotonic() - begun))
        time.sleep(min(options.every, max(0.0, end - time.monotonic())))
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begun
    looks.append(look(server.process.pid, seconds))
    for client in clients:
        for n in range(len(client.tokens)):
            client.check(n)
    statuses = sum((client.statuses for client in clients), collections.Counter())
    wrong = [sentence for client in clients for sentence in client.wrong]
    return {
        "model": model["model"],
        "bytes per user": model["bytes_per_user"],
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(statuses.items())),
        "slowest seconds": round(max(client.slowest for client in clients), 2),
        "wrong": wrong[:20],
        "wrong in all": len(wrong),
        "looks": looks,
    }


def look(pid: int, seconds: float) -> dict[str, float]:
    """Resident MiB, open files and threads of a process now."""
    process = pathlib.Path("/proc") / str(pid)
    pages = int((process / "statm").read_text().split()[1])
    return {
        "seconds": round(seconds, 1),
        "mib": round(pages * resource.getpagesize() / 2**20, 1),
        "files": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
    }


def shown(results: dict[str, Any]) -> str:
    """The README's lines."""
    looks, asked = results["looks"], results["asked"]
    third = lambda n: looks[n * len(looks) // 3 : max((n + 1) * len(looks) // 3, 1)]
    mean = lambda part, name: sum(x[name] for x in part) / max(1, len(part))
    lines = [
        (
            f"{name} third",
            f"{mean(third(n), 'mib'):.1f} ({min(x['mib'] for x in third(n)):.1f} to "
            f"{max(x['mib'] for x in third(n)):.1f})",
            f"{mean(third(n), 'files'):.1f}",
            f"{mean(third(n), 'threads'):.1f}",
        )
        for n, name in enumerate(("first", "second", "last"))
        if third(n)
    ]
    count = sum(results["statuses"].values())
    statuses = ", ".join(f"{n:,} of {status}" for status, n in results["statuses"].items())
    return "\n\n".join(
        [
            f"{results['seconds'] / 60:.0f} minutes, {asked['users']} users of "
            f"{results['bytes per user']:,} bytes, {asked['held']} of them held in the process; "
            f"{count:,} answers ({count / results['seconds']:.1f} a second): {statuses}. "
            f"{results['wrong in all']} of them not as they must be; the slowest took "
            f"{results['slowest seconds']:.2f} s.",
            report.Table("", ["", "resident MiB", "open files", "threads"], lines).markdown(),
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(Soak, args=sys.argv[1:], prog="python -m nlx_experiments.soak"))
