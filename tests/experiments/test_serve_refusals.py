# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while users are served: each refusal is told, is true, and stops nobody else."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest
from nlx_experiments import serve, user_files
from nlx_experiments.serve_api import Allowed, Api
from nlx_experiments.serve_http import Request
from nlx_experiments.tokenization import BYTES
from nlx_experiments.user_batches import Batches
from nlx_experiments.user_jobs import Job
from nlx_experiments.user_memory import Answer, Asked, Memory
from nlx_experiments.users import Users

START = Memory(np.zeros(3, np.float32), np.int32(0), np.int32(0))


class Adding:
    """Reads as a `Reader` does, without a model: a memory is the sum of what was read."""

    slots, piece, capacity, start, levels, bytes = 2, 8, None, START, (), 20
    slowly = 0.0  # seconds that a call takes

    def __init__(self):
        self.state = np.zeros((self.slots, 3), np.float32)

    def clear(self):
        self.state[:] = 0

    def put(self, slot, state):
        self.state[slot] = state

    def take(self, slot):
        return self.state[slot].copy()

    def nothing(self):
        of = lambda kind, *more: np.zeros((self.slots, *more), kind)
        tokens = of(np.int32, self.piece), of(np.int32, self.piece)
        return Asked(*tokens, *map(of, (np.int32, bool, np.int32, np.int32, np.float32)))

    def read(self, asked):
        time.sleep(self.slowly)
        self.state += asked.tokens.sum(1)[:, None]
        bits, no = np.ones(asked.tokens.shape), np.zeros((self.slots, 1))
        return Answer(bits, (asked.seed + asked.index) % 256, no, no)


class Served:
    """An `Api` in this process."""

    def __init__(self, folder, limit=10, waiting=64, hosts=None, **allowed):
        self.reader = Adding()
        self.users = Users(folder, START, "adding", held=2, limit=limit)
        self.batches = Batches(self.reader, self.users, waiting=waiting)
        limits = Allowed(**{"seconds": 20.0} | allowed)
        self.api = Api("adding", self.reader, self.users, self.batches, BYTES, limits, hosts)

    def __enter__(self):
        self.users.__enter__()
        self.batches.__enter__()
        return self

    def __exit__(self, *error):
        self.batches.__exit__()
        self.users.__exit__()

    async def asked(self, method, path, body=None, token=None, **headers):
        headers |= {"content-type": "application/json", "authorization": f"Bearer {token}"}
        request = Request(method, path, headers, json.dumps(body or {}).encode())
        reply = await self.api(request)
        return reply.status, json.loads(reply.body)

    def ask(self, *what, **headers):
        return asyncio.run(self.asked(*what, **headers))

    def user(self):
        return self.ask("POST", "/v1/users")[1]["token"]


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path / "users") as made:
        yield made


def breaks(monkeypatch, owner, name, error):
    """The next call of a method raises, those after it do not."""
    kept = getattr(owner, name)

    def once(*args, **more):
        monkeypatch.setattr(owner, name, kept)
        raise error

    monkeypatch.setattr(owner, name, once)


@pytest.mark.parametrize("broken", ["put", "take", "read", "nothing"])
def test_one_failure_does_not_stop_those_who_come_later(served, monkeypatch, broken):
    token = served.user()
    name = served.users.named(token)
    served.ask("POST", "/v1/prefill", {"text": "before"}, token)
    breaks(monkeypatch, served.reader, broken, RuntimeError("the device is lost"))
    with pytest.raises(RuntimeError, match="the device is lost"):
        served.batches.submit(Job(name, np.arange(20))).result(20)
    assert int(served.users.get(name).position) == 6
    status, told = served.ask("POST", "/v1/prefill", {"text": "after"}, token)
    assert (status, told["position"]) == (200, 11)
    assert served.users.get(name).state[0] == sum(b"before" + b"afte")


def test_a_failure_loses_none_of_those_who_wait(served, monkeypatch):
    names = [served.users.named(served.user()) for _ in range(6)]
    breaks(monkeypatch, served.reader, "put", RuntimeError("the device is lost"))
    futures = [served.batches.submit(Job(name, np.arange(20))) for name in names]
    failed = [future.exception(20) is not None for future in futures]
    assert 1 <= sum(failed) <= 2
    assert not any(failed[2:])


def test_an_answer_that_cannot_be_used_fails_its_jobs_alone(served, monkeypatch):
    token = served.user()
    monkeypatch.setattr(served.reader, "read", lambda asked: None)
    status, told = served.ask("POST", "/v1/prefill", {"text": "before"}, token)
    assert (status, "its log says how" in told["error"]) == (500, True)
    monkeypatch.undo()
    assert served.ask("POST", "/v1/prefill", {"text": "after"}, token)[1]["position"] == 5


@pytest.fixture
def stalled(tmp_path):
    """A server whose disk does not answer until it is told."""
    go, begun = threading.Event(), threading.Event()
    with Served(tmp_path / "users", waiting=2, seconds=0.2) as made:

        def stall(*args):
            begun.set()
            go.wait(10)
            return START

        made.stall, made.begun, made.go = stall, begun, go
        yield made
        go.set()


def test_a_disk_that_stalls_holds_nobody_for_ever(stalled, monkeypatch):
    monkeypatch.setattr("nlx_experiments.serve_api.GRACE", 0.1)
    token, other = stalled.user(), stalled.user()
    monkeypatch.setattr(stalled.users, "load", stalled.stall)
    status, told = stalled.ask("POST", "/v1/load", {}, token)
    assert (status, told["error"]) == (503, "it was not done within 0.2 s, and may still be done.")
    late = "it was not done within 0.2 s; the memory is as it was before."
    for _ in range(5):  # more than may wait: those that were told are gone
        assert stalled.ask("POST", "/v1/forget", {}, token) == (503, {"error": late})
        assert stalled.ask("POST", "/v1/prefill", {"text": "a"}, token) == (503, {"error": late})
    assert stalled.ask("POST", "/v1/prefill", {"text": "b"}, other)[0] == 200
    monkeypatch.undo()
    stalled.go.set()
    assert stalled.ask("GET", "/v1/memory", None, token)[1]["position"] == 0


def test_what_was_drawn_and_kept_is_never_refused(served, monkeypatch):
    token = served.user()
    monkeypatch.setattr(served.batches, "do", None)  # one job does it
    for asked, position in (
        ({"keep": True}, 3),
        ({}, 3),
        ({"blank": True, "prompt": "abc"}, 3),
        ({"keep": True, "prompt": "ab"}, 8),
    ):
        status, told = served.ask("POST", "/v1/generate", {"length": 3} | asked, token)
        assert (status, told["position"]) == (200, position)


@pytest.mark.parametrize(
    ("host", "called"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("127.0.0.2", "127.0.0.2:80"),
        ("127.0.0.2", "localhost"),
        ("::1", "[::1]:80"),
        ("0:0:0:0:0:0:0:1", "[0:0:0:0:0:0:0:1]"),
    ],
)
def test_a_server_answers_to_the_address_it_was_given(tmp_path, host, called):
    hosts = serve.names(serve.Serve(tmp_path, host=host))
    with Served(tmp_path / "users", hosts=hosts) as served:
        assert served.ask("GET", "/v1/model", host=called)[0] == 200
        assert served.ask("GET", "/v1/model", host="127.0.0.3:80")[0] == 403
    assert serve.names(serve.Serve(tmp_path, host="0.0.0.0", beyond_loopback=True)) is None


def test_a_text_far_too_long_is_refused_before_it_is_encoded(tmp_path):
    with Served(tmp_path / "users", tokens=10) as served:
        token = served.user()
        served.api.tokenizer = BYTES._replace(pieces=(b"abc",), encode=None)
        status, told = served.ask("POST", "/v1/prefill", {"text": "x" * 31}, token)
        sentence = "`text` is of 11 tokens or more; it must be of at most 10."
        assert (status, told["error"]) == (413, sentence)


def test_encoding_counts_and_has_its_time(tmp_path):
    go, told_to = threading.Event(), []

    def encode(text):
        told_to.append(go.wait(10))
        return BYTES.encode(text)

    with Served(tmp_path / "users", seconds=0.3, at_once=2) as served:
        token = served.user()
        served.api.tokenizer = BYTES._replace(encode=encode)

        async def three():
            asked = [served.asked("POST", "/v1/prefill", {"text": "a"}, token) for _ in range(3)]
            told = await asyncio.gather(*asked)
            go.set()
            return told

        assert [status for status, _ in asyncio.run(three())] == [503, 503, 429]
        assert told_to == [True, True]  # the answers came before the encoding was done
        assert served.ask("GET", "/v1/memory", None, token)[1]["position"] == 0


def refused(served, status, sentence, *what):
    """Whether a request gets this sentence."""
    got, told = served.ask(*what)
    assert (got, sentence in told["error"]) == (status, True), told


def test_every_reason_to_come_again_has_its_sentence(tmp_path, monkeypatch):
    with Served(tmp_path / "users", limit=2, waiting=1, seconds=0.3) as served:
        token = served.user()
        served.user()
        read = "POST", "/v1/prefill", {"text": "a"}, token
        refused(served, 503, "there are 2 users, as many as", "POST", "/v1/users")
        with monkeypatch.context() as patch:
            patch.setattr(served.batches, "waiting", 0)
            refused(served, 503, "0 requests are waiting, as many as may; try again.", *read)
        with monkeypatch.context() as patch:
            patch.setattr(served.reader, "piece", 1)
            patch.setattr(served.reader, "slowly", 0.1)
            long = "POST", "/v1/prefill", {"text": "a" * 99}, token
            refused(served, 503, "not done within 0.3 s; the memory is as it was before", *long)
        full = OSError(28, "No space left on device")
        sentence = "the disk refused (No space left on device); the memory is as it was before."
        for broken in ("write", "write_bytes"):
            with monkeypatch.context() as patch:
                breaks(patch, user_files, broken, full)
                refused(served, 503, sentence, "POST", "/v1/remember", *read[2:])
        with monkeypatch.context() as patch:
            breaks(patch, user_files, "settle", user_files.Unsettled(5, "Input/output error"))
            sentence = "it is done, but the disk does not say that it lasts (Input/output error)."
            refused(served, 503, sentence, "POST", "/v1/save", {}, token)
        assert served.ask("GET", "/v1/memory", None, token)[1]["position"] == 0
    refused(served, 503, "the server is shutting down.", *read)
