# SPDX-License-Identifier: Apache-2.0
"""HTTP clients that take their time: each has its limit, and then nothing is left of it."""

import asyncio
import contextlib
import socket

import pytest
from nlx_experiments import serve_http
from nlx_experiments.serve_http import Http, Limits, Reply

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
BIG = 16 << 20


@contextlib.asynccontextmanager
async def serving(size, **limits):
    """(port, the server): every answer is of so many bytes."""

    async def handle(request):
        return Reply(200, b"x" * size)

    http = Http(handle, Limits(**limits))
    server = await http.listen("127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], http
    await http.close(server, 5)


async def soon(true):
    """Whether something comes to be within some seconds."""
    for _ in range(200):
        if true():
            return True
        await asyncio.sleep(0.02)
    return False


async def taken(reader):
    """Bytes that come until the connection ends, however it ends."""
    count = 0
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 20):
            count += len(data)
    return count


@pytest.mark.parametrize(("size", "requests"), [(BIG, 1), (8192, 2000)])
def test_who_does_not_read_is_let_go(size, requests):
    async def main():
        async with serving(size, connections=1, leave=0.2) as (port, http):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            for _ in range(requests):
                writer.write(GET)
            writer.transport.pause_reading()
            assert await soon(lambda: http._idle)
            other, others = await asyncio.open_connection("127.0.0.1", port)
            others.write(GET)
            assert (await other.read(12)).endswith(b"503")  # the first one counts while it is there
            assert await soon(lambda: not http._idle)
            writer.transport.resume_reading()
            assert await taken(reader) < size * requests
            again, more = await asyncio.open_connection("127.0.0.1", port)
            more.write(GET)
            assert (await again.read(12)).endswith(b"200")
            for each in (writer, others, more):
                each.close()

    asyncio.run(main())


def test_what_little_is_left_unread_is_thrown_away():
    async def main():
        sides = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=sides[0])
        talk = serve_http._Talk(reader, writer, Limits(leave=0.1))
        while not writer.transport.get_write_buffer_size():
            await talk._send(b"x" * 4096)
        await asyncio.wait_for(talk.part(), 5)
        assert writer.transport.get_write_buffer_size() == 0
        sides[1].close()

    asyncio.run(main())


def test_who_is_quiet_is_let_go():
    async def main():
        async with serving(3, idle=0.2) as (port, http):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            answer = await reader.readuntil(b"xxx")
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert await asyncio.wait_for(reader.read(), 5) == b""
            assert await soon(lambda: not http._idle)
            writer.close()

    asyncio.run(main())
