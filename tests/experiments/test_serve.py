# SPDX-License-Identifier: Apache-2.0
"""`nlx serve`: every request gets its answer or its sentence, and no user reaches another."""

import concurrent.futures
import json
import select
import signal
import socket
import time

import pytest
from nlx_experiments import run as command
from nlx_experiments import save_kills, soak
from nlx_experiments.serve_process import Server, small_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("serve"))


LIMITS = (
    "--arrive",
    "1",
    "--body",
    "20000",
    "--tokens",
    "3000",
    "--connections",
    "20",
    "--held",
    "2",
)


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder, *LIMITS) as made:
        yield made


def raw(server, *parts, wait=0.0):
    """What is answered to these bytes, sent with pauses; up to the connection's end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as talk:
        for part in parts:
            talk.sendall(part)
            time.sleep(wait)
        answer = b""
        while data := talk.recv(65_536):
            answer += data
    return answer.decode()


def test_reads_remembers_draws_and_forgets(server):
    token = server.user()
    assert server.ask("GET", "/v1/memory", token=token) == (200, {"position": 0, "unsaved": False})
    status, read = server.ask("POST", "/v1/prefill", {"text": "é and ", "every": 2}, token)
    assert status == 200
    assert len(read["bits"]) == 7
    assert read["position"] == 7
    assert read["unsaved"]
    assert read["lengths"] == [1] * 7
    assert read["bits_per_byte"] == pytest.approx(sum(read["bits"]) / 7, abs=1e-3)
    assert [entry["read"] for entry in read["levels"]] == [2, 4, 6, 7]
    status, kept = server.ask("POST", "/v1/remember", {"text": "1 and 2"}, token)
    assert (status, kept["position"], kept["unsaved"], kept["levels"]) == (200, 14, False, [])
    asked = {"length": 5, "prompt": "3", "seed": 3, "temperature": 1.0}
    first, again = (server.ask("POST", "/v1/generate", asked, token) for _ in "ab")
    assert first == again
    assert (first[1]["position"], len(first[1]["drawn"])) == (14, 5)
    assert server.ask("POST", "/v1/generate", asked | {"seed": 4}, token)[1] != first[1]
    blank = server.ask("POST", "/v1/generate", asked | {"blank": True}, token)[1]
    other = server.ask("POST", "/v1/generate", asked | {"blank": True}, server.user())[1]
    assert (blank["bits"], blank["drawn"]) == (other["bits"], other["drawn"])
    assert blank["bits"] != first[1]["bits"]
    status, longer = server.ask("POST", "/v1/generate", asked | {"keep": True}, token)
    assert (longer["drawn"], longer["position"], longer["unsaved"]) == (first[1]["drawn"], 20, True)
    assert server.ask("POST", "/v1/load", {}, token)[1] == {"position": 14, "unsaved": False}
    assert server.ask("POST", "/v1/generate", asked, token) == first
    assert server.ask("POST", "/v1/forget", {}, token)[1] == {"position": 0, "unsaved": False}
    status, told = server.ask("POST", "/v1/load", {}, token)
    assert (status, told) == (409, {"error": "no memory was saved."})
    assert server.ask("POST", "/v1/generate", asked, token)[1]["drawn"] == blank["drawn"]
    assert server.ask("POST", "/v1/save", {}, token)[0] == 200
    assert server.ask("DELETE", "/v1/user", token=token) == (200, {"removed": True})
    assert server.ask("GET", "/v1/memory", token=token)[0] == 401


def test_no_user_reaches_another(server):
    mine, other = server.user(), server.user()
    server.ask("POST", "/v1/remember", {"text": "a secret of mine"}, mine)
    assert server.ask("GET", "/v1/memory", token=other)[1]["position"] == 0
    names = [mine[:-1], mine[:-1] + "x", mine + "x", "", "../" + mine, "x" * 43, mine.swapcase()]
    told = [server.ask("GET", "/v1/memory", token=name) for name in names]
    told.append(server.ask("GET", "/v1/memory"))
    told.append(server.ask("GET", "/v1/memory", Authorization=f"Basic {mine}"))
    assert {status for status, _ in told} == {401}
    assert len({json.dumps(value) for _, value in told}) == 1
    server.ask("POST", "/v1/forget", {}, other)
    assert server.ask("GET", "/v1/memory", token=mine)[1]["position"] == 16
    listed = server.ask("GET", "/v1/model")[1]
    assert mine not in json.dumps(listed)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "the body is not JSON"),
        (b"[" * 9000, "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b'{"length": NaN}', "NaN is no number"),
        (b'{"length": ' + b"9" * 9000 + b"}", "the body is not JSON"),
        ([1], "the body is JSON's list; it must be an object"),
        ({"lenght": 3}, "`lenght` is unknown; /v1/generate takes `length`"),
        ({}, "`length` is missing; it must be in [1, 3000]"),
        ({"length": 0}, "`length` is 0; it must be in [1, 3000]"),
        ({"length": True}, "`length` is true; it must be an integer"),
        ({"length": 2.5}, "`length` is 2.5; it must be an integer"),
        ({"length": 1, "prompt": 3}, "`prompt` is 3; it must be a text"),
        ({"length": 1, "prompt": "\ud800"}, "`prompt` holds half a surrogate pair"),
        ({"length": 1, "temperature": -1}, "`temperature` is -1; it must be in [0, 100]"),
        ({"length": 1, "temperature": 1e999}, "no number"),
        ({"length": 1, "seed": 2**31}, "`seed` is 2147483648"),
        ({"length": 1, "every": 99}, "`every` is 99; it must be in [1, 32]"),
        ({"length": 1, "keep": True, "blank": True}, "`keep` and `blank` are both true"),
    ],
)
def test_bad_bodies_get_a_sentence(server, body, sentence):
    if isinstance(body, bytes):
        token = server.user()
        status, told = server.ask(
            "POST", "/v1/generate", body, token, Content_Type="application/json"
        )
    else:
        status, told = server.ask("POST", "/v1/generate", body, server.user())
    assert (status, sentence in told["error"]) == (400, True), told


def test_bad_requests_get_a_sentence(server):
    token = server.user()
    status, told = server.ask("GET", "/../../etc/passwd")
    assert (status, told["error"].startswith("there is no '/../../etc/passwd'")) == (404, True)
    assert server.ask("GET", "/v1/save", token=token)[0] == 405
    assert server.ask("POST", "/v1/prefill", {"text": ""}, token)[0] == 400
    assert server.ask("POST", "/v1/prefill", b"{}", token)[0] == 400
    for name in ("evil.example", "evil.example:80", f"127.0.0.1.evil.example:{server.port}"):
        assert server.ask("GET", "/v1/model", Host=name)[0] == 403
    assert server.ask("GET", "/v1/model", Origin="http://evil.example")[0] == 403
    assert server.ask("GET", "/v1/model", Origin=f"http://127.0.0.1:{server.port}")[0] == 200
    assert server.ask("GET", "/v1/model", Host=f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"x" * 70_000, 431),
        (b"POST /v1/users HTTP/1.1\r\nHost: a\r\nContent-Length: 20001\r\n\r\n", 413),
    ],
)
def test_what_is_no_request_gets_an_answer_and_no_more(server, sent, status):
    answer = raw(server, sent)
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert "error" in json.loads(answer.partition("\r\n\r\n")[2])
    assert "connection: close" in answer.lower()


def test_too_big_is_told_while_it_comes(server):
    head = b"POST /v1/users HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(server, head, *[b"2000\r\n" + b"x" * 8192 + b"\r\n"] * 5)
    assert answer.startswith("HTTP/1.1 413 ")
    status, told = server.ask("POST", "/v1/prefill", {"text": "x" * 3001}, server.user())
    assert (status, "3,001 tokens" in told["error"]) == (413, True)


def test_slow_clients_are_cut_off(server):
    answer = raw(server, b"GET / HT")
    assert answer.startswith("HTTP/1.1 408 ")
    assert "longer than 1 s" in answer
    with socket.create_connection(("127.0.0.1", server.port)) as talk:
        talk.sendall(b"GET /v1/model HTTP/1.1\r\n")
        for _ in range(20):
            if select.select([talk], [], [], 0.2)[0]:
                break
            talk.sendall(b"x: y\r\n")
        else:
            pytest.fail("a client that sends a little now and then was never cut off")
        assert talk.recv(12) == b"HTTP/1.1 408"
    assert server.ask("GET", "/v1/model")[0] == 200


def test_several_requests_on_one_connection(server):
    get = f"GET /v1/model HTTP/1.1\r\nHost: localhost:{server.port}\r\n".encode()
    answer = raw(server, (get + b"\r\n") * 2 + get + b"Connection: close\r\n\r\n")
    assert answer.count("HTTP/1.1 200 ") == 3


def test_users_at_once_are_as_if_alone(server):
    def one(n):
        token = server.user()
        parts = [f"{n} and {i} are {n * i}. " for i in range(6)]
        bits = [server.ask("POST", "/v1/prefill", {"text": p}, token)[1]["bits"] for p in parts]
        asked = {"length": 8, "seed": n, "temperature": 1.0}
        return bits, server.ask("POST", "/v1/generate", asked, token)[1]["drawn"]

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        together = list(pool.map(one, range(10)))
    assert together == [one(n) for n in range(10)]


def test_too_many_at_once_get_a_sentence(server):
    token = server.user()
    ask = lambda _: server.ask("POST", "/v1/generate", {"length": 400}, token)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        told = list(pool.map(ask, range(12)))
    statuses = {status for status, _ in told}
    assert statuses == {200, 429}
    assert all("are under way" in value["error"] for status, value in told if status == 429)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    time.sleep(0.3)
    answer = raw(server, b"")
    for each in held:
        each.close()
    assert answer.startswith("HTTP/1.1 503 ")
    assert "too many connections" in answer


def test_the_page_runs_nothing_but_itself(server):
    answer = raw(server, f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\n".encode()
                 + b"Connection: close\r\n\r\n")  # fmt: skip
    head, _, page = answer.partition("\r\n\r\n")
    assert "script-src 'sha256-" in head
    assert "default-src 'none'" in head
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_gives_answers_that_are_due(folder, tmp_path, number):
    flags = ("--memories", tmp_path / "m", "--seconds", "30")
    with Server(folder, *flags) as server:
        token = server.user()
        server.ask("POST", "/v1/prefill", {"text": "a secret of mine"}, token)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            due = pool.submit(server.ask, "POST", "/v1/generate", {"length": 2000}, token)
            time.sleep(0.3)
            code, printed = server.end(number)
            assert due.result()[0] == 200
    assert code == 128 + number
    assert "Every memory is saved." in printed
    with Server(folder, *flags) as server:
        held = server.ask("GET", "/v1/memory", token=token)
        assert held == (200, {"position": 16, "unsaved": False})
        name = next((tmp_path / "m").glob("*.memory"))
        content = bytearray(name.read_bytes())
        content[-5] ^= 1
        name.write_bytes(content)
        status, told = server.ask("POST", "/v1/load", {}, token)
        assert (status, "damaged" in told["error"]) == (409, True)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--host", "0.0.0.0"], "`host` is '0.0.0.0', which other machines may reach"),
        (["--host", "example.org"], "`host` is 'example.org', which other machines may reach"),
        (["--port", "70000"], "`port` is 70000; it must be in [0, 65535]"),
        (["--slots", "0"], "`slots` is 0; it must be at least 1"),
        (["--seconds", "0"], "`seconds` is 0.0; it must be above 0"),
    ],
)
def test_bad_flags_get_a_sentence(folder, capsys, flags, sentence):
    assert command.main(["serve", str(folder), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_port_in_use_gets_a_sentence(folder, server, tmp_path, capsys):
    flags = ["--port", str(server.port), "--memories", str(tmp_path)]
    assert command.main(["serve", str(folder), *flags]) == 2
    assert "nothing can listen at 127.0.0.1" in capsys.readouterr().err
    assert command.main(["serve", str(folder), "--port", "0"]) == 2
    assert "where another process serves" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_server_loses_nothing_that_was_remembered(tmp_path):
    wrong, answered = save_kills.kill_servers(tmp_path, 2, seed=0)
    assert wrong == []
    assert answered >= 2


@pytest.mark.slow
def test_a_short_soak_finds_all_as_it_must_be(folder, tmp_path):
    options = soak.Soak(
        run=folder, minutes=0.3, rate=40.0, users=24, held=4, every=1.0, place=tmp_path
    )
    found = soak.main(options)
    assert found["wrong"] == []
    assert (found["exit"], found["saved at the end"]) == (143, True)
    assert found["statuses"]["200"] > 50
    assert "resident MiB" in soak.shown(found)
