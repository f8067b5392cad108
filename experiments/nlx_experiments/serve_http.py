# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 over asyncio: who is slow, too big, too many or no HTTP gets an answer and no more time.

Parsing is h11's, which is strict and knows nothing of sockets. The servers in common use (uvicorn,
aiohttp) have no time limit within which a request must have come, and the standard library's has
one for each read alone, so a client that sends a byte now and then holds a thread for ever: here
one deadline holds for the whole request.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NamedTuple

import h11

CHUNK = 65_536
LINGER = 1.0  # seconds for which what still comes is read and thrown away after an early answer


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may take."""

    head: int = 16_384
    """Bytes of the request's line and headers."""
    body: int = 1 << 20
    """Bytes of its body."""
    arrive: float = 10.0
    """Seconds within which a request has come, from its first byte to its last."""
    idle: float = 15.0
    """Seconds a connection may be quiet between two requests."""
    leave: float = 10.0
    """Seconds within which an answer is taken."""
    connections: int = 256
    """How many there may be at once."""


class Request(NamedTuple):
    """A request that has wholly come."""

    method: str
    path: str
    headers: dict[str, str]  # lower case -> value; several of one name: the last
    body: bytes


class Reply(NamedTuple):
    """What is answered."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def told(status: int, value: Any, *headers: tuple[str, str]) -> Reply:
    """An answer in JSON."""
    return Reply(status, json.dumps(value).encode() + b"\n", headers=headers)


def refusal(status: int, sentence: str, *headers: tuple[str, str]) -> Reply:
    """What bad input gets."""
    return told(status, {"error": sentence}, *headers)


class Unfit(Exception):
    """A request that is answered before it is handled, and then its connection is closed."""

    def __init__(self, status: int, sentence: str):
        """What is answered."""
        super().__init__(sentence)
        self.reply = refusal(status, sentence)


class Http:
    """Answers requests with what `handle` says of them."""

    def __init__(self, handle: Callable[[Request], Awaitable[Reply]], limits: Limits):
        """handle: may raise nothing. limits: see `Limits`."""
        self.handle, self.limits = handle, limits
        self._idle: dict[asyncio.Task, bool] = {}  # connection -> whether it waits for a request
        self._closing = False

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Begins to listen. Raises OSError."""
        return await asyncio.start_server(self._connected, host, port, backlog=128)

    async def close(self, server: asyncio.Server, seconds: float) -> None:
        """Takes no more requests; waits so long for answers that are due."""
        self._closing = True
        server.close()
        for task, idle in list(self._idle.items()):
            if idle:
                task.cancel()
        if self._idle:
            await asyncio.wait(list(self._idle), timeout=seconds)
        for task in list(self._idle):
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talk = _Talk(reader, writer, self.limits)
        try:
            if self._closing or len(self._idle) >= self.limits.connections:
                await talk.refuse(refusal(503, "too many connections at once; try again later."))
                return
            self._idle[task] = True
            while not self._closing and await self._exchange(task, talk):
                pass
        except (OSError, asyncio.CancelledError, TimeoutError):
            pass  # who left, or was too slow to take an answer, gets no other
        finally:
            if task in self._idle:
                self._idle[task] = False  # it counts until it is gone
            await talk.part()
            self._idle.pop(task, None)

    async def _exchange(self, task: asyncio.Task, talk: "_Talk") -> bool:
        """One request and its answer; whether another may follow."""
        self._idle[task] = True
        if not await talk.begun():
            return False
        self._idle[task] = False
        try:
            async with asyncio.timeout(self.limits.arrive):
                request = await talk.request()
        except TimeoutError:
            late = f"the request took longer than {self.limits.arrive:g} s to arrive."
            await talk.refuse(refusal(408, late))
            return False
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            sentence = f"the request is not HTTP/1.1 as it must be: {error}."
            await talk.refuse(refusal(status, sentence))
            return False
        except Unfit as unfit:
            await talk.refuse(unfit.reply)
            return False
        if request is None:
            return False
        reply = await self.handle(request)
        return await talk.answer(reply, request.method != "HEAD", last=self._closing)


class _Talk:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits):
        self.reader, self.writer, self.limits = reader, writer, limits
        self.wire = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head)

    async def begun(self) -> bool:
        """Waits for a request's first byte; False: it was quiet for too long, or is gone."""
        if self.wire.trailing_data[0]:
            return True
        try:
            async with asyncio.timeout(self.limits.idle):
                data = await self.reader.read(CHUNK)
        except TimeoutError:
            return False
        if data:
            self.wire.receive_data(data)
        return bool(data)

    async def request(self) -> Request | None:
        """The whole request; None: the client left. Raises Unfit, h11.RemoteProtocolError."""
        head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        limit = self.limits.body
        if int(headers.get("content-length", 0)) > limit:
            size = headers["content-length"]
            raise Unfit(413, f"the body is of {size} bytes; it must be of at most {limit:,}.")
        if self.wire.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            await self._send(self.wire.send(go_on))
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > limit:
                raise Unfit(413, f"the body is of more than {limit:,} bytes, which are allowed.")
        if not isinstance(event, h11.EndOfMessage):
            return None
        path = head.target.decode("latin-1").partition("?")[0]
        return Request(head.method.decode("latin-1"), path, headers, bytes(body))

    async def answer(self, reply: Reply, with_body: bool, *, last: bool) -> bool:
        """Sends an answer; whether another request may follow."""
        headers = [
            ("content-type", f"{reply.kind}; charset=utf-8"),
            ("content-length", str(len(reply.body))),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            *reply.headers,
            *([("connection", "close")] if last else []),
        ]
        phrase = HTTPStatus(reply.status).phrase.encode()
        head = h11.Response(status_code=reply.status, headers=headers, reason=phrase)
        parts = [self.wire.send(head)]
        if with_body:
            parts.append(self.wire.send(h11.Data(data=reply.body)))
        parts.append(self.wire.send(h11.EndOfMessage()))
        await self._send(b"".join(part or b"" for part in parts))
        if last or self.wire.our_state is not h11.DONE or self.wire.their_state is not h11.DONE:
            return False
        self.wire.start_next_cycle()
        return True

    async def refuse(self, reply: Reply) -> None:
        """Answers a request that has not wholly come, and lets the client read the answer."""
        with contextlib.suppress(h11.LocalProtocolError):
            if self.wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self.answer(reply, True, last=True)
        self.writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while await self.reader.read(CHUNK):
                    pass

    async def part(self) -> None:
        """Closes; what the client does not take in time is thrown away."""
        self.writer.close()
        try:
            async with asyncio.timeout(self.limits.leave):
                await self.writer.wait_closed()
        except (OSError, asyncio.CancelledError, TimeoutError):
            pass
        finally:
            self.writer.transport.abort()

    async def _event(self) -> Any:
        while (event := self.wire.next_event()) is h11.NEED_DATA:
            self.wire.receive_data(await self.reader.read(CHUNK))
        return event

    async def _send(self, data: bytes | None) -> None:
        self.writer.write(data or b"")
        async with asyncio.timeout(self.limits.leave):
            await self.writer.drain()
