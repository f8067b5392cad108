# SPDX-License-Identifier: Apache-2.0
"""What `nlx serve` answers: users, and what is done with their memories, in JSON.

    POST   /v1/users                                     -> 201 {token}: given once, it is the user
    GET    /v1/model                                     -> the model, its levels, the limits
    GET    /v1/memory                                    -> what the user has in memory
    POST   /v1/prefill   {text, every?}                  reads a text into the memory
    POST   /v1/remember  {text, every?}                  the same, and it is on disk when answered
    POST   /v1/generate  {length, prompt?, temperature?, seed?, keep?, blank?, every?}
    POST   /v1/save      {}                              the memory as it is lasts
    POST   /v1/load      {}                              back to what was saved last
    POST   /v1/forget    {}                              back to the start, the file removed
    DELETE /v1/user                                      the user and the memory are no more

All but the first two need `Authorization: Bearer TOKEN`, and touch that user's memory alone: there
is no other way to name one. Whether a token is unknown, removed or malformed is not told apart.
Pages of other sites can't use the server: `Host` and `Origin` must be its own.
"""

import asyncio
import collections
import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from nlx_experiments.generate import shown
from nlx_experiments.serve_fields import Bad, fields, number
from nlx_experiments.serve_http import Reply, Request, refusal, told
from nlx_experiments.serve_page import page
from nlx_experiments.serve_refusals import Slow, refused
from nlx_experiments.tokenization import Tokenizer
from nlx_experiments.user_batches import Batches
from nlx_experiments.user_jobs import Done, Job, Late
from nlx_experiments.user_memory import Reader, finite
from nlx_experiments.users import Users

NOTHING = np.zeros(0, int)
NOBODY = ""  # no user's name
GRACE = 5.0  # seconds for what was begun to say that it is late
READING: dict[str, Any] = {"text": str, "every": int}
DRAWING: dict[str, Any] = {
    "length": int, "prompt": str, "temperature": float, "seed": int, "keep": bool, "blank": bool,
    "every": int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What one request may ask for."""

    tokens: int = 8192
    """To read or to draw."""
    seconds: float = 60.0
    """Until it is done."""
    at_once: int = 4
    """Requests of one user under way."""


class Api:
    """Answers requests for a model and its users."""

    def __init__(
        self,
        called: str,
        reader: Reader,
        users: Users,
        batches: Batches,
        tokenizer: Tokenizer,
        allowed: Allowed,
        hosts: tuple[str, ...] | None,
    ):
        """called: the model's name. hosts: names the server goes by; None: any."""
        self.called, self.reader, self.users, self.batches = called, reader, users, batches
        self.tokenizer, self.allowed, self.hosts = tokenizer, allowed, hosts
        self.at_once: collections.Counter[str] = collections.Counter()
        self.page = page()
        self.routes: dict[str, dict[str, Callable]] = {
            "/": {"GET": self._page, "HEAD": self._page},
            "/v1/model": {"GET": self._model},
            "/v1/users": {"POST": self._create},
            "/v1/user": {"DELETE": self._remove},
            "/v1/memory": {"GET": self._memory},
            "/v1/prefill": {"POST": self._prefill},
            "/v1/remember": {"POST": self._remember},
            "/v1/generate": {"POST": self._generate},
            "/v1/save": {"POST": self._save},
            "/v1/load": {"POST": self._load},
            "/v1/forget": {"POST": self._forget},
        }

    async def __call__(self, request: Request) -> Reply:
        """The answer; raises nothing but cancellation."""
        try:
            return await self._route(request)
        except Exception as error:
            users, waiting = self.users.limit, self.batches.waiting
            seconds = self.allowed.seconds
            return refused(error, request.path, users=users, waiting=waiting, seconds=seconds)

    async def _route(self, request: Request) -> Reply:
        if self.hosts is not None:
            host = request.headers.get("host", "")
            if _name(host) not in self.hosts:
                raise Bad(403, f"`Host` is {host!r}; it must be one of {', '.join(self.hosts)}.")
            origin = request.headers.get("origin", f"http://{host}")
            if origin != f"http://{host}":
                raise Bad(403, f"`Origin` is {origin!r}; it must be this server's own page.")
        methods = self.routes.get(request.path)
        if methods is None:
            raise Bad(
                404, f"there is no {request.path[:80]!r}; there are {', '.join(self.routes)}."
            )
        if request.method not in methods:
            allowed = ", ".join(methods)
            sentence = f"{request.path} takes no {request.method[:20]}; it takes {allowed}."
            return refusal(405, sentence, ("allow", allowed))
        return await methods[request.method](request)

    async def _page(self, request: Request) -> Reply:
        return self.page

    async def _model(self, request: Request) -> Reply:
        levels = [{"name": level.name, "period": level.period} for level in self.reader.levels]
        limits = dataclasses.asdict(self.allowed)
        about = {"model": self.called, "bytes_per_user": self.reader.bytes, "levels": levels}
        return told(200, about | {"capacity": self.reader.capacity, "limits": limits})

    async def _create(self, request: Request) -> Reply:
        fields(request, {})
        made = self.batches.do(NOBODY, self.users.create)
        return told(201, {"token": await self._within(made, time.monotonic())})

    async def _memory(self, request: Request) -> Reply:
        name = self._who(request)
        position = lambda: int(self.users.get(name).position)
        return told(200, self._held(name, await self._act(name, position)))

    async def _prefill(self, request: Request) -> Reply:
        return await self._read(request, save=False)

    async def _remember(self, request: Request) -> Reply:
        return await self._read(request, save=True)

    async def _read(self, request: Request, save: bool) -> Reply:
        name, given = self._who(request), fields(request, READING)
        if not given.get("text"):
            raise Bad(400, "`text` is missing or empty; it must be what is to be read.")
        job = Job(name, NOTHING, every=self._every(given), save=save)
        done = await self._done(job, "text", given["text"])
        return told(200, self._read_to(done, job.text) | self._held(name, done.position))

    async def _generate(self, request: Request) -> Reply:
        name, given = self._who(request), fields(request, DRAWING)
        length = number(given, "length", None, 1, self.allowed.tokens)
        keep, blank = given.get("keep", False), given.get("blank", False)
        if keep and blank:
            raise Bad(400, "`keep` and `blank` are both true; a blank memory can't be kept.")
        job = Job(
            name,
            NOTHING,
            length,
            float(number(given, "temperature", 0.8, 0, 100)),
            number(given, "seed", 0, 0, 2**31 - 1),
            every=self._every(given),
            keep=keep,
            blank=blank,
        )
        done = await self._done(job, "prompt", given.get("prompt", ""))
        text = b"".join(shown(token, self.tokenizer) for token in done.drawn)
        made = {"text": text.decode(errors="replace"), "drawn": done.drawn}
        read = self._read_to(done, job.text)
        return told(200, made | read | self._held(name, done.position))

    async def _save(self, request: Request) -> Reply:
        name, _ = self._who(request), fields(request, {})

        def save() -> int:
            memory = self.users.get(name)
            self.users.save(name, memory)
            return int(memory.position)

        return told(200, self._held(name, await self._act(name, save)))

    async def _load(self, request: Request) -> Reply:
        name, _ = self._who(request), fields(request, {})
        position = await self._act(name, lambda: int(self.users.load(name).position))
        return told(200, self._held(name, position))

    async def _forget(self, request: Request) -> Reply:
        name, _ = self._who(request), fields(request, {})
        await self._act(name, lambda: self.users.forget(name))
        return told(200, self._held(name, 0))

    async def _remove(self, request: Request) -> Reply:
        name = self._who(request)
        await self._act(name, lambda: self.users.remove(name))
        return told(200, {"removed": True})

    def _who(self, request: Request) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        name = self.users.named(token.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise Bad(401, "the token is missing or unknown; `POST /v1/users {}` gives one.")
        return name

    async def _tokens(self, field: str, text: str) -> np.ndarray:
        """A text as tokens, as many as are allowed."""
        if not text:
            return NOTHING
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise Bad(400, f"`{field}` holds half a surrogate pair; it must be text.") from None
        limit, least = self.allowed.tokens, -(-size // max(map(len, self.tokenizer.pieces)))
        if least > limit:  # which needs no encoding
            sentence = f"is of {least:,} tokens or more; it must be of at most {limit:,}."
            raise Bad(413, f"`{field}` {sentence}")
        tokens = np.asarray(await asyncio.to_thread(self.tokenizer.encode, text))
        if tokens.size > limit:
            sentence = f"is of {tokens.size:,} tokens; it must be of at most {limit:,}."
            raise Bad(413, f"`{field}` {sentence}")
        return tokens

    def _every(self, given: Mapping[str, Any]) -> int | None:
        every = number(given, "every", 0, 1, self.reader.piece) if "every" in given else None
        return every

    async def _done(self, job: Job, field: str, text: str) -> Done:
        """Waits for a job that reads a text."""
        begun = time.monotonic()
        job.deadline = begun + self.allowed.seconds
        with self._alone(job.name):
            try:
                async with asyncio.timeout(self.allowed.seconds):
                    job.text = await self._tokens(field, text)
            except TimeoutError:
                raise Late from None
            return await self._within(self.batches.submit(job), begun)

    async def _act(self, name: str, action: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        with self._alone(name):
            return await self._within(self.batches.do(name, action), begun)

    async def _within(self, work: Future, begun: float) -> Any:
        """What the work gives. Raises Late: nothing of it happens; Slow."""
        waited = asyncio.wrap_future(work)
        waited.add_done_callback(lambda each: each.cancelled() or each.exception())
        left = begun + self.allowed.seconds - time.monotonic()
        done, _ = await asyncio.wait([waited], timeout=max(0.0, left))
        if not done and self.batches.cancel(work):
            raise Late
        if not done and not (await asyncio.wait([waited], timeout=GRACE))[0]:
            raise Slow
        return waited.result()

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """For a request of a user who has not too many under way."""
        if self.at_once[name] >= self.allowed.at_once:
            sentence = f"{self.allowed.at_once} requests of yours are under way, as many as may."
            raise Bad(429, sentence)
        self.at_once[name] += 1
        try:
            yield
        finally:
            self.at_once[name] -= 1
            if not self.at_once[name]:
                del self.at_once[name]

    def _read_to(self, done: Done, tokens: np.ndarray) -> dict[str, Any]:
        """What was read, and what it cost."""
        lengths = [len(self.tokenizer.pieces[token]) for token in tokens.tolist()]
        mean = sum(done.bits) / max(1, sum(lengths))
        return {
            "bits": finite(np.array(done.bits)),
            "lengths": lengths,
            "bits_per_byte": round(mean, 4) if tokens.size and math.isfinite(mean) else None,
            "levels": done.levels,
        }

    def _held(self, name: str, position: int) -> dict[str, Any]:
        """What the user has in memory."""
        return {"position": int(position), "unsaved": self.users.unsaved(name)}


def _name(host: str) -> str:
    """A `Host` without its port."""
    return host.rpartition(":")[0] if re.search(r":\d*$", host) else host
