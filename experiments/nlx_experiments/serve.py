# SPDX-License-Identifier: Apache-2.0
"""`nlx serve`: one model, many users, over HTTP on this machine; each has a memory of their own.

    nlx serve runs/hope-tiny --port 8321

Then http://127.0.0.1:8321/ is a page to watch a memory change as it reads; what programs can ask
is in `serve_api`. A user's memory is what mixers carry; blocks of a continuum memory system do not
learn here (`nlx.nn.in_context`). SIGTERM or SIGINT ends it: answers that are due are given, all
memories saved.
"""

import asyncio
import dataclasses
import ipaddress
import pathlib
import signal
from typing import Annotated

import tyro

from nlx_experiments import config, learner, tokenization
from nlx_experiments.console import say
from nlx_experiments.errors import Refused, Stopped
from nlx_experiments.serve_api import Allowed, Api
from nlx_experiments.serve_http import Http, Limits
from nlx_experiments.user_batches import Batches
from nlx_experiments.user_memory import Reader
from nlx_experiments.users import Users

NAMES = ("127.0.0.1", "localhost", "[::1]")


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves the model of a run to many users, each with a memory of their own.

    What may be asked over HTTP stands in docs/applications/personalisation.md.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, finished or not."""
    port: int = 8321
    """Where it listens; 0: any free port, which is told."""
    host: str = "127.0.0.1"
    """Address it listens at: of this machine alone, unless --beyond-loopback."""
    beyond_loopback: bool = False
    """Also serve other machines, without encryption: whoever reaches the port may make users."""
    memories: pathlib.Path | None = None
    """Folder of the users' memories; RUN/users by default."""
    slots: int = 8
    """Users that are read for at once."""
    held: int = 256
    """Memories kept in the process; the others lie on disk until they are asked for."""
    users: int = 10_000
    """How many there may be."""
    tokens: int = 8192
    """To read or to draw in one request."""
    body: int = 1 << 20
    """Bytes of one request."""
    waiting: int = 64
    """Requests that may wait for a slot."""
    connections: int = 256
    """Open at once."""
    seconds: float = 60.0
    """Within which a request is done."""
    arrive: float = 10.0
    """Seconds within which a request has come."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for a number out of range, or another host."""
        if not 0 <= self.port < 65_536:
            raise ValueError(f"`port` is {self.port}; it must be in [0, 65535].")
        for name in ("slots", "held", "users", "tokens", "body", "waiting", "connections"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        for name in ("seconds", "arrive"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` is {value}; it must be above 0.")
        if not self.beyond_loopback and not loopback(self.host):
            raise ValueError(
                f"`host` is {self.host!r}, which other machines may reach; it must be 127.0.0.1, "
                "::1 or localhost, unless --beyond-loopback is given."
            )


def loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_address(host: str) -> str:
    """A host as addresses name it."""
    return f"[{host}]" if ":" in host else host


def names(options: Serve) -> tuple[str, ...] | None:
    """What requests may call the server; None: anything."""
    return (
        None
        if options.beyond_loopback
        else tuple(dict.fromkeys((*NAMES, in_address(options.host))))
    )


def main(options: Serve) -> None:
    """Serves until a signal comes. Raises Refused, and Stopped when all is saved."""
    chosen = config.of_run(options.run)
    tokenizer = tokenization.of_run(options.run, chosen.tokenizer)
    reader = Reader(learner.load(chosen), tokenizer, slots=options.slots)
    folder = options.memories or options.run / "users"
    with Users(
        folder, reader.start, reader.identity, held=options.held, limit=options.users
    ) as users:
        with Batches(reader, users, waiting=options.waiting) as batches:
            allowed = Allowed(options.tokens, options.seconds)
            api = Api(chosen.preset, reader, users, batches, tokenizer, allowed, names(options))
            limits = Limits(
                body=options.body, arrive=options.arrive, connections=options.connections
            )
            number = asyncio.run(_serve(options, Http(api, limits), reader, users))
        wrong = users.save_all()
        for sentence in wrong:
            say(sentence)
    saved = "" if wrong else " Every memory is saved."
    raise Stopped(f"{number.name}: no more requests are taken.{saved}", number)


async def _serve(options: Serve, http: Http, reader: Reader, users: Users) -> signal.Signals:
    """Listens until a signal comes, gives the answers that are due, returns the signal."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    received: list[signal.Signals] = []

    def receive(number: signal.Signals) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)  # once more to leave at once
        received.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, receive, number)
    try:
        server = await http.listen(options.host, options.port)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise Refused(
            f"`port` is {options.port}; nothing can listen at {where} ({error})."
        ) from None
    port = server.sockets[0].getsockname()[1]
    kept = f"{reader.bytes:,} bytes a user, {len(users):,} users so far"
    where = f"http://{in_address(options.host)}:{port}/"
    say(f"Serving {options.run} at {where} ({kept}); Ctrl-C ends it.")
    await stop.wait()
    say(f"{received[0].name}: giving the answers that are due, then saving.")
    await http.close(server, options.seconds)
    return received[0]
