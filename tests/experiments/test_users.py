# SPDX-License-Identifier: Apache-2.0
"""Many users of one model: each as if alone, to the bit; what is saved lasts."""

import dataclasses
import os
import random
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import user_files, user_memory
from nlx_experiments.errors import Refused
from nlx_experiments.user_batches import Batches
from nlx_experiments.user_jobs import Busy, Closing, Job, Late, TooLong
from nlx_experiments.user_memory import Memory, Reader
from nlx_experiments.users import Full, Users

from nlx import nn
from nlx.inspect import surprise


def small(preset="hope-tiny", **more):
    sizes = dict(width=16, heads=2, layers=1, hidden=16, memory_hidden=4, chunk_size=8, context=256)
    if preset.startswith("hope"):
        sizes |= dict(projection_chunk_size=16, cms_periods=(1,))
    config = dataclasses.replace(nn.preset(preset), **sizes | more)
    return nn.LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def reader(model):
    return Reader(model, slots=4, piece=16)


@pytest.fixture
def users(reader, tmp_path):
    with Users(tmp_path / "users", reader.start, reader.identity, held=3) as made:
        yield made


def text(n, length):
    return np.random.default_rng(n).integers(1, 256, length)


def jobs_of(n, name):
    """What user n asks for, in order."""
    rng = random.Random(n)
    draw = lambda: Job(
        name, text(n, 0), rng.randint(1, 5), rng.choice([0.0, 1.0]), rng.randint(0, 9)
    )
    read = lambda: Job(name, text(rng.randint(0, 99), rng.randint(1, 40)))
    return [read(), draw(), dataclasses.replace(draw(), keep=False), read()]


def outputs(futures):
    return [(np.array(d.bits).tobytes(), d.drawn) for d in (f.result(300) for f in futures)]


def bits_of(memory):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(memory)]


def together(reader, users, count):
    """Outputs and last memories of so many users, whose jobs are mixed."""
    names = [users.named(users.create()) for _ in range(count)]
    with Batches(reader, users, waiting=10_000) as batches:
        asked = [jobs_of(n, name) for n, name in enumerate(names)]
        order = [n for n, jobs in enumerate(asked) for _ in jobs]
        random.Random(0).shuffle(order)
        futures = [[] for _ in names]
        for n in order:
            futures[n].append(batches.submit(asked[n][len(futures[n])]))
        made = [outputs(own) for own in futures]
    return made, [bits_of(users.get(name)) for name in names]


def alone(reader, folder, n):
    """The same of one of them, with nobody else there."""
    with Users(folder, reader.start, reader.identity) as users, Batches(reader, users) as batches:
        name = users.named(users.create())
        made = [outputs([batches.submit(job)])[0] for job in jobs_of(n, name)]
        return made, bits_of(users.get(name))


def test_every_user_is_as_if_alone_to_the_bit(reader, users, tmp_path):
    made, memories = together(reader, users, 20)
    assert len(list(users.swapped.iterdir())) >= 17
    for n in range(20):
        assert alone(reader, tmp_path / str(n), n) == (made[n], memories[n])
    assert len({repr(m) for m in memories}) == 20


def test_a_row_among_others_is_the_model_s_own_row_to_the_bit(model, reader, users):
    names, tokens = [users.named(users.create()) for _ in range(4)], text(0, 16)
    with Batches(reader, users) as batches:
        futures = [batches.submit(Job(n, text(i, 16))) for i, n in enumerate(names)]
        found = futures[0].result(300).memory.state
    read = np.array([[0, *tokens[:-1]]])
    _, state = nnx.jit(lambda model, read: model(read, model.init_state(1)))(model, read)
    assert bits_of(found) == bits_of(state)


@pytest.mark.slow
def test_a_thousand_users_are_as_if_alone_to_the_bit(reader, tmp_path):
    with Users(tmp_path / "users", reader.start, reader.identity, held=100) as users:
        made, memories = together(reader, users, 1000)
    for n in range(1000):
        assert alone(reader, tmp_path / str(n), n) == (made[n], memories[n])


@pytest.mark.parametrize("preset", ["hope-tiny", "titans-mag-tiny", "deltanet-tiny", "samba-tiny"])
def test_a_user_is_read_to_as_the_model_reads(preset, tmp_path):
    model = small(preset, layers=2) if preset == "samba-tiny" else small(preset)
    reader = Reader(model, slots=2, piece=8)
    tokens = text(0, 37)
    with Users(tmp_path, reader.start, reader.identity) as users, Batches(reader, users) as batches:
        name = users.named(users.create())
        done = [batches.submit(Job(name, part)).result(300) for part in np.split(tokens, [5, 29])]
        last = batches.submit(Job(name, text(0, 0), 6, temperature=0.0)).result(300)
    whole = np.array([[0, *tokens, *last.drawn]])
    scores, _ = nnx.jit(lambda model: model(whole[:, :-1], model.init_state(1)))(model)
    expected = np.asarray(surprise(scores, whole[:, 1:]))[0, : tokens.size]
    np.testing.assert_allclose([b for d in done for b in d.bits], expected, rtol=2e-4, atol=2e-4)
    assert last.drawn == scores[0, tokens.size :].argmax(-1).tolist()
    assert int(last.memory.position) == 37 + 6


def test_all_is_compiled_before_the_first_user(model):
    made = Reader(model, slots=2, piece=4)
    made.weights = jax.device_put(made.weights, jax.devices()[0])  # as a checkpoint's are
    made.read(made.nothing())
    for count in (4, 2, 0):
        made.put(1, made.take(0))
        asked = made.nothing()
        asked.count[:], asked.watched[0] = count, count == 2
        made.read(asked)
    made.clear()
    made.read(asked)
    assert made._advance._cache_size() == 1


def test_levels_are_measured(reader, users):
    assert [level.name for level in reader.levels][0] == "blocks.0.key"
    assert {level.name: level.period for level in reader.levels} == {
        f"blocks.0.{box}": 8 if box == "memory" else 16
        for box in ("key", "value", "rate", "retain", "memory")
    }
    name = users.named(users.create())
    with Batches(reader, users) as batches:
        first = batches.submit(Job(name, text(1, 10), every=4)).result(300)
        second = batches.submit(Job(name, text(2, 7), every=1)).result(300)
        unseen = batches.submit(Job(name, text(3, 3))).result(300)
    assert [entry["read"] for entry in first.levels] == [4, 8, 10]
    assert len(second.levels) == 7
    assert unseen.levels == []
    n = [level.name for level in reader.levels].index("blocks.0.memory")
    assert [entry["fired"][n] for entry in first.levels] == [0, 1, 0]
    assert sum(entry["fired"][n] for entry in second.levels) == 1
    held = user_memory.written(second.memory.state), user_memory.written(reader.start.state)
    was = user_memory.written(first.memory.state)
    for n, level in enumerate(reader.levels):
        apart = lambda a, b, level=level: np.sqrt(
            sum(np.sum((x - y) ** 2) for x, y in zip(a[level.name], b[level.name], strict=True))
        )
        assert second.levels[-1]["moved"][n] == pytest.approx(apart(*held), rel=1e-4)
        steps = [entry["update"][n] for entry in second.levels]
        assert apart(held[0], was) <= sum(steps) * 1.001
        assert min(steps) > 0


def test_a_job_happens_wholly_or_not_at_all(reader, users):
    name = users.named(users.create())
    with Batches(reader, users, waiting=2) as batches:
        before = bits_of(batches.submit(Job(name, text(0, 20))).result(300).memory)
        late = batches.submit(Job(name, text(0, 5000), deadline=time.monotonic() + 0.05))
        with pytest.raises(Late):
            late.result(300)
        assert bits_of(users.get(name)) == before
        kept = batches.submit(Job(name, text(0, 9), 3, keep=False)).result(300)
        assert bits_of(users.get(name)) == before != bits_of(kept.memory)
        blank = [batches.submit(Job(name, text(0, 9), 3, blank=True)).result(300) for _ in "ab"]
        assert bits_of(users.get(name)) == before
        assert blank[0].bits == blank[1].bits != kept.bits


def test_a_job_that_cannot_be_saved_leaves_the_memory_as_it_was(reader, users, monkeypatch):
    name = users.named(users.create())

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    with Batches(reader, users) as batches:
        before = bits_of(batches.submit(Job(name, text(0, 20), save=True)).result(300).memory)
        monkeypatch.setattr(user_files, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            batches.submit(Job(name, text(1, 20), save=True)).result(300)
    assert bits_of(users.get(name)) == before == bits_of(users.load(name))


def test_too_many_jobs_are_refused_and_the_others_done_in_order(reader, users):
    name, begun, go = users.named(users.create()), threading.Event(), threading.Event()
    seen = []

    def hold():
        begun.set()
        go.wait(60)

    with Batches(reader, users, waiting=3) as batches:
        held = batches.do(name, hold)
        begun.wait(60)
        first = [batches.do(name, lambda n=n: seen.append(n)) for n in range(2)]
        last = batches.submit(Job(name, text(0, 3)))
        with pytest.raises(Busy):
            batches.submit(Job(name, text(0, 3)))
        time.sleep(0.2)
        assert seen == []
        go.set()
        assert len(last.result(300).bits) == 3
    assert held.done()
    assert [f.done() for f in first] == [True, True]
    assert seen == [0, 1]
    with pytest.raises(Closing):
        batches.submit(Job(name, text(0, 3)))


def test_attention_says_when_it_is_full(tmp_path):
    reader = Reader(small("transformer++-tiny", context=16), slots=1, piece=8)
    with Users(tmp_path, reader.start, reader.identity) as users, Batches(reader, users) as batches:
        name = users.named(users.create())
        batches.submit(Job(name, text(0, 10))).result(300)
        with pytest.raises(TooLong) as told:
            batches.submit(Job(name, text(0, 5), 2)).result(300)
        assert told.value.args == (6,)
        batches.submit(Job(name, text(0, 5), 1)).result(300)


def test_who_has_no_token_is_nobody(users):
    token = users.create()
    name = users.named(token)
    assert name is not None
    assert users.named(token[:-1]) is None
    assert users.named("") is None
    assert users.named(name) is None
    assert users.named("../" + token) is None
    assert token not in "".join(p.name + p.read_text() for p in users.folder.glob("*.user"))
    other = users.create()
    assert users.named(other) not in (None, name)


def test_a_name_that_matches_is_not_enough(users, monkeypatch):
    token = users.create()
    name = users.named(token)
    users._proofs[name] = "1" * 64
    assert users.named(token) is None


def test_memories_outlive_the_process_that_saved_them(reader, users, tmp_path):
    token = users.create()
    name = users.named(token)
    memory = users.start._replace(last=np.int32(7), position=np.int32(3))
    users.save(name, memory)
    users.put(name, memory._replace(position=np.int32(9)))
    assert users.unsaved(name)
    users.__exit__()
    (users.folder / f"x{user_files.HALF}").write_text("left by a kill")
    with Users(users.folder, reader.start, reader.identity) as again:
        assert again.named(token) == name
        assert bits_of(again.get(name)) == bits_of(memory)
        assert not list(users.folder.glob("*.half"))
        again.forget(name)
        assert bits_of(again.get(name)) == bits_of(again.start)
        assert not list(users.folder.glob("*.memory"))
        with pytest.raises(Refused, match="no memory was saved"):
            again.load(name)
        again.remove(name)
        assert again.named(token) is None
        assert not list(users.folder.glob("*.user"))


def test_forgotten_is_forgotten_where_it_was_swapped(users):
    names = [users.named(users.create()) for _ in range(5)]
    moved = users.start._replace(position=np.int32(3))
    for name in names:
        users.put(name, moved)
    assert (users.swapped / names[0]).exists()
    assert int(users.get(names[0]).position) == 3
    users.forget(names[1])
    assert not (users.swapped / names[1]).exists()
    assert int(users.get(names[1]).position) == 0


def test_nothing_is_kept_of_who_has_left(reader, users):
    name = users.named(users.create())
    with Batches(reader, users) as batches:
        left = batches.do(name, lambda: users.remove(name))
        late = batches.submit(Job(name, text(0, 3), save=True))
        left.result(60)
        with pytest.raises(Refused, match="the user is no more"):
            late.result(60)
    with pytest.raises(Refused, match="the user is no more"):
        users.save(name, users.start)
    assert not list(users.folder.glob("*.memory"))


def test_all_are_saved_at_the_end(users):
    names = [users.named(users.create()) for _ in range(5)]
    for n, name in enumerate(names):
        users.put(name, users.start._replace(position=np.int32(n + 1)))
    assert users.save_all() == []
    assert [int(users.load(name).position) for name in names] == [1, 2, 3, 4, 5]


def test_there_are_so_many_users_and_no_more(reader, tmp_path):
    with Users(tmp_path, reader.start, reader.identity, limit=2) as users:
        users.create(), users.create()
        with pytest.raises(Full):
            users.create()
        with pytest.raises(Refused, match="another process"):
            Users(tmp_path, reader.start, reader.identity)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.6, 0.999])
def test_a_damaged_file_gets_a_sentence(reader, tmp_path, place):
    path = tmp_path / "a.memory"
    user_files.write(path, reader.start, reader.identity)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(Refused, match="^the saved memory is") as told:
        user_files.read(path, reader.start, reader.identity)
    assert str(told.value).count("\n") == 0
    path.write_bytes(bytes(content[: len(content) // 2]))
    with pytest.raises(Refused, match="damaged"):
        user_files.read(path, reader.start, reader.identity)


def test_a_memory_of_another_model_is_refused(reader, tmp_path):
    path = tmp_path / "a.memory"
    user_files.write(path, reader.start, reader.identity)
    read = user_files.read(path, reader.start, reader.identity)
    assert bits_of(read) == bits_of(reader.start)
    with pytest.raises(Refused, match="another model"):
        user_files.read(path, reader.start, "another")
    assert user_memory.identity(small()) == reader.identity
    assert user_memory.identity(small(hidden=8)) != reader.identity
    other = Memory(reader.start.state[:0], *reader.start[1:])
    with pytest.raises(Refused, match="its arrays are others"):
        user_files.read(path, other, reader.identity)


def test_a_file_is_on_disk_before_it_takes_the_name(reader, tmp_path, monkeypatch):
    done = []
    kept = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append("fsync"), kept[0](f))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), kept[1](a, b))[1])
    user_files.write(tmp_path / "a", reader.start, reader.identity)
    assert done == ["fsync", "rename", "fsync"]
