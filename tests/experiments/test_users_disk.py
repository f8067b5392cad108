# SPDX-License-Identifier: Apache-2.0
"""Users' memories where the disk fails: what is told is true, nothing is lost in silence."""

import os
import stat

import numpy as np
import pytest
from nlx_experiments import user_files
from nlx_experiments.errors import Refused
from nlx_experiments.user_files import Unsettled
from nlx_experiments.user_memory import Memory
from nlx_experiments.users import Users

START = Memory(np.zeros(3, np.float32), np.int32(0), np.int32(0))
FULL = OSError(28, "No space left on device")


def of(count):
    return START._replace(position=np.int32(count))


@pytest.fixture
def users(tmp_path):
    with Users(tmp_path / "users", START, "m", held=2) as made:
        yield made


def names(users, count):
    return [users.named(users.create()) for _ in range(count)]


def test_who_cannot_be_swapped_out_stays(users, monkeypatch):
    who = names(users, 4)
    for n, name in enumerate(who[:2]):
        users.put(name, of(n))
    kept = user_files.write

    def write(path, *args, **more):
        if path.parent == users.swapped:
            raise FULL
        kept(path, *args, **more)

    monkeypatch.setattr(user_files, "write", write)
    users.put(who[2], of(2))
    users.save(who[3], of(3))
    assert [int(users.get(name).position) for name in who] == [0, 1, 2, 3]
    assert [users.unsaved(name) for name in who] == [True, True, True, False]
    monkeypatch.undo()
    users.put(who[0], of(0))
    assert len(users._near) == 2
    assert [int(users.get(name).position) for name in who] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("what", "kind"), [("forget", "memory"), ("remove", "memory"), ("remove", "user")]
)
def test_what_cannot_be_removed_is_as_it_was(users, monkeypatch, what, kind):
    token = users.create()
    name = users.named(token)
    users.save(name, of(1))
    users.put(name, of(2))
    kept = type(users.folder).unlink

    def unlink(path, **more):
        if path.suffix == f".{kind}":
            raise FULL
        kept(path, **more)

    monkeypatch.setattr(type(users.folder), "unlink", unlink)
    with pytest.raises(OSError, match="No space"):
        getattr(users, what)(name)
    assert users.named(token) == name
    assert (int(users.get(name).position), users.unsaved(name)) == (2, True)
    assert int(user_files.read(users.folder / f"{name}.memory", START, "m").position) == 1
    monkeypatch.undo()
    getattr(users, what)(name)
    assert (users.named(token) is None) == (what == "remove")
    assert not list(users.folder.glob("*.memory"))


def unsettled(monkeypatch):
    """The disk does not say whether the names in a folder last."""
    kept = os.fsync

    def fsync(opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(5, "Input/output error")
        kept(opened)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_that_may_not_last_is_still_the_memory(users, monkeypatch):
    token = users.create()
    name = users.named(token)
    users.save(name, of(1))
    unsettled(monkeypatch)
    with pytest.raises(Unsettled):
        users.save(name, of(2))
    assert (int(users.get(name).position), users.unsaved(name)) == (2, True)
    assert int(users.load(name).position) == 2
    with pytest.raises(Unsettled):
        users.create()
    assert len(list(users.folder.glob("*.user"))) == len(users) == 1
    with pytest.raises(Unsettled):
        users.forget(name)
    assert (int(users.get(name).position), users.unsaved(name)) == (0, False)
    with pytest.raises(Unsettled):
        users.remove(name)
    assert users.named(token) is None


def test_other_accounts_read_nothing(tmp_path):
    umask = os.umask(0o022)
    try:
        with Users(tmp_path / "users", START, "m", held=1) as users:
            one, other = names(users, 2)
            users.save(one, of(1))
            users.put(one, of(2))
            users.put(other, of(3))
            modes = lambda kind: {
                stat.S_IMODE(path.stat().st_mode)
                for path in users.folder.rglob("*")
                if kind(path) and path.name != ".lock"
            }
            assert len(list(users.swapped.iterdir())) == 1
            assert modes(type(tmp_path).is_file) == {0o600}
            assert modes(type(tmp_path).is_dir) == {0o700}
            assert stat.S_IMODE(users.folder.stat().st_mode) == 0o700
    finally:
        os.umask(umask)


def test_what_was_not_saved_is_not_lost_in_silence(users):
    who = names(users, 3)
    users.save(who[0], of(1))
    for n, name in enumerate(who):
        users.put(name, of(n + 2))
    (users.swapped / who[0]).unlink()
    with pytest.raises(Refused, match="what was read and not saved is lost"):
        users.get(who[0])
    assert any("is lost" in sentence for sentence in users.save_all())
    assert int(users.load(who[0]).position) == 1
    assert int(users.get(who[0]).position) == 1


def test_nothing_is_left_of_who_was_removed_when_the_process_was_killed(users, monkeypatch):
    gone, stays = names(users, 2)
    for name in (gone, stays):
        users.save(name, of(1))

    def killed(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(users, "_drop", killed)
    with pytest.raises(KeyboardInterrupt):
        users.remove(gone)
    users.__exit__()
    with Users(users.folder, START, "m") as again:
        assert list(again) == [stays]
        assert [path.stem for path in users.folder.glob("*.memory")] == [stays]
