# SPDX-License-Identifier: Apache-2.0
"""Kills who saves users' memories, and demands everything that was said to be saved.

    python -m nlx_experiments.save_kills --writers 500 --servers 20

Writers: a process saves memories of some users one after the other and tells of each that is done;
it is killed (SIGKILL) at a random moment, often within a save. Then every file must be whole, hold
what was told last or the save after it, and that one wholly.

Servers: `nlx serve` is killed while several clients at once let it remember; it is started anew,
and each user must have in memory as many tokens as were answered last, or those of the request
under way too. At the end every user's file must be, byte by byte, that of an undisturbed server
which was told the same, and what both foretell the same, to the digits that are answered.
"""

import concurrent.futures
import dataclasses
import http.client
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time
import warnings

import numpy as np
import tyro

from nlx_experiments import user_files
from nlx_experiments.errors import Refused
from nlx_experiments.serve_process import Server, small_run
from nlx_experiments.user_memory import Memory
from nlx_experiments.users import digests

MODEL = "one for trying"
NUMBERS = 60_000  # of a memory that writers save: 240 KB
USERS = 4
PROBE = {"length": 4, "prompt": "3 and 4, ", "seed": 1, "temperature": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveKills:
    """Kills processes that save."""

    writers: int = 500
    """How many processes that only save are killed."""
    servers: int = 20
    """How often a server is killed."""
    seed: int = 0
    """Chooses the moments."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for a number out of range."""
        for name in ("writers", "servers"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` is {value}; it must be at least 0.")


def of_count(count: int) -> Memory:
    """A memory that tells which save it is of, everywhere."""
    state = np.full(NUMBERS, count, np.float32)
    return Memory(state, np.int32(count % 256), np.int32(count))


def write_without_end(folder: pathlib.Path, first: int, told: int) -> None:
    """Saves the users' memories in turn, and tells of each that is done by a line of its count."""
    for count in range(first, sys.maxsize):
        user_files.write(folder / f"{count % USERS}.memory", of_count(count), MODEL)
        os.write(told, f"{count}\n".encode())


def kill_writers(folder: pathlib.Path, times: int, seed: int) -> tuple[list[str], int]:
    """What was lost or damaged, nothing if all is well; and how many kills fell within a save."""
    folder.mkdir(parents=True)
    rng, wrong, within, last = random.Random(seed), [], 0, -1
    for _ in range(times):
        reading, told = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jax's threads are not wanted in the other process
            child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                write_without_end(folder, last + 1, told)
            finally:
                os._exit(1)
        os.close(told)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        within += any(folder.glob(f"*{user_files.HALF}"))
        with open(reading) as stream:
            said = [int(line) for line in stream.read().split()]
        last = max([last, *said])
        wrong += [sentence for n in range(USERS) if (sentence := damage(folder, n, last))]
        last += held(folder, (last + 1) % USERS) == last + 1  # done, and killed before it was told
        for half in folder.glob(f"*{user_files.HALF}"):  # as `Users` does at its start
            half.unlink()
    return wrong, within


def held(folder: pathlib.Path, user: int) -> int:
    """Of which save the user's file is; -1: there is none."""
    path = folder / f"{user}.memory"
    if not path.exists():
        return -1
    memory = user_files.read(path, of_count(0), MODEL)
    if (memory.state != memory.position).any() or memory.last != memory.position % 256:
        raise Refused("the saved memory is of two saves.")
    return int(memory.position)


def damage(folder: pathlib.Path, user: int, last: int) -> str | None:
    """What is wrong with a user's file when `last` was the last save that was told of."""
    newest = last - (last - user) % USERS if last >= user else -1
    try:
        found = held(folder, user)
    except Refused as error:
        return f"user {user}: {error}"
    late = found == last + 1 and found % USERS == user
    return None if found == newest or late else f"user {user}: save {found}, told of {newest}"


def kill_servers(folder: pathlib.Path, times: int, seed: int) -> tuple[list[str], int]:
    """What was lost, nothing if all is well; and how many saves were answered."""
    run, memories = small_run(folder / "small", width=128), folder / "users"
    rng, wrong = random.Random(seed), []
    texts: list[list[str]] = [[] for _ in range(USERS)]
    with Server(run, "--memories", memories) as server:
        tokens = [server.user() for _ in range(USERS)]
    for _ in range(times):
        begun: list[list[str]] = [[] for _ in range(USERS)]
        with Server(run, "--memories", memories) as server:
            wrong += recovered(server, tokens, texts)
            go = threading.Event()

            def remember(n: int, server=server, begun=begun, go=go) -> None:
                go.wait()
                try:
                    while True:
                        begun[n].append(f"{len(texts[n])} and {n}, ")
                        body = {"text": begun[n][-1]}
                        if server.ask("POST", "/v1/remember", body, tokens[n])[0] != 200:
                            return
                        texts[n].append(begun[n].pop())
                except (OSError, http.client.HTTPException):
                    return

            with concurrent.futures.ThreadPoolExecutor(USERS) as pool:
                for n in range(USERS):
                    pool.submit(remember, n)
                enough = size_of(texts) + rng.randint(1, 30)
                go.set()
                while size_of(texts) < enough and server.process.poll() is None:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0.0, 0.03))
                server.process.kill()
        with Server(run, "--memories", memories) as server:
            for n in range(USERS):  # the request under way is done or not
                position = server.ask("GET", "/v1/memory", token=tokens[n])[1]["position"]
                if begun[n] and position == size([*texts[n], begun[n][-1]]):
                    texts[n].append(begun[n][-1])
            wrong += recovered(server, tokens, texts)
    with Server(run, "--memories", memories) as server:
        probed = [server.ask("POST", "/v1/generate", PROBE, token)[1] for token in tokens]
    with Server(run, "--memories", folder / "undisturbed") as server:
        others = [server.user() for _ in tokens]
        for n, (token, found) in enumerate(zip(others, probed, strict=True)):
            for text in texts[n]:
                server.ask("POST", "/v1/remember", {"text": text}, token)
            expected = server.ask("POST", "/v1/generate", PROBE, token)[1]
            if (found["bits"], found["drawn"]) != (expected["bits"], expected["drawn"]):
                wrong.append(f"user {n}: the memory foretells other than an undisturbed one")
        of = lambda place, who: [saved(folder / place, token) for token in who]
        wrong += differing(of("users", tokens), of("undisturbed", others))
    return wrong, size_of(texts)


def saved(folder: pathlib.Path, token: str) -> bytes | None:
    """A user's file; None: nothing was saved."""
    path = folder / f"{digests(token)[0]}.memory"
    return path.read_bytes() if path.exists() else None


def differing(files: list[bytes | None], undisturbed: list[bytes | None]) -> list[str]:
    """Which users' files are not those of an undisturbed server."""
    pairs = enumerate(zip(files, undisturbed, strict=True))
    return [f"user {n}: the file is not an undisturbed one's" for n, (a, b) in pairs if a != b]


def recovered(server: Server, tokens: list[str], texts: list[list[str]]) -> list[str]:
    """What users have in memory that is not what was remembered."""
    wrong = []
    for n, token in enumerate(tokens):
        status, value = server.ask("GET", "/v1/memory", token=token)
        if status != 200 or value["position"] != size(texts[n]):
            wrong.append(f"user {n}: {status} {value}, remembered {size(texts[n])} tokens")
    return wrong


def size_of(texts: list[list[str]]) -> int:
    """How many texts there are."""
    return sum(map(len, texts))


def size(texts: list[str]) -> int:
    """Tokens of some texts."""
    return sum(map(len, texts))


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if nothing was lost."""
    options = tyro.cli(SaveKills, args=argv, prog="python -m nlx_experiments.save_kills")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        wrong, within = kill_writers(folder / "writers", options.writers, options.seed)
        told = f"{options.writers} writers killed, {within} of them within a save"
        print(f"{told}: {len(wrong)} files lost or damaged.", flush=True)
        if options.servers:
            lost, answered = kill_servers(folder / "servers", options.servers, options.seed)
            told = f"{options.servers} servers killed, {answered} remembered texts"
            print(f"{told}: {len(lost)} users with another memory.", flush=True)
            wrong += lost
    for sentence in wrong[:20]:
        print(sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
