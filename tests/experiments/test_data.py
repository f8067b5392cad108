# SPDX-License-Identifier: Apache-2.0
"""The corpus, its split by file, and batches that continue exactly where they were left."""

import json

import numpy as np
import pytest
from nlx_experiments import batching, data
from nlx_experiments.errors import Refused


@pytest.fixture
def folder(tmp_path):
    """Thirty small texts, one binary file, one hidden file, one empty file."""
    for i in range(30):
        path = tmp_path / "texts" / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text number {i}: " + "tick tock " * (i + 5))
    (tmp_path / "texts" / "binary").write_bytes(b"\0\1\2\xff" * 50)
    (tmp_path / "texts" / "latin").write_bytes("é".encode("latin1") * 50)
    (tmp_path / "texts" / ".hidden").write_text("not to be read")
    (tmp_path / "texts" / "empty.txt").write_text("")
    return tmp_path / "texts"


def test_a_folder_is_read_whole_and_only_its_text(folder):
    corpus = data.load([folder])
    assert len(corpus.files) == 30
    assert [f.name for f in corpus.files] == sorted(f.name for f in corpus.files)
    assert all(f.name.startswith("texts/") for f in corpus.files)
    assert corpus.train.size + corpus.heldout.size == sum(f.size + 1 for f in corpus.files)
    assert json.loads(json.dumps(corpus.record()))["sha256"] == corpus.sha256


def test_the_split_is_disjoint_and_stable(folder):
    corpus = data.load([folder])
    split = {f.name: f.split for f in corpus.files}
    parts = {s: [n for n in split if split[n] == s] for s in ("train", "held-out")}
    assert all(parts.values())
    for name, stream in (("train", corpus.train), ("held-out", corpus.heldout)):
        texts = stream.tobytes().split(b"\0")[:-1]
        assert texts == [(folder.parent / n).read_bytes() for n in parts[name]]
    # By name alone: new files and changed contents move no other file.
    (folder / "0" / "new.txt").write_text("new")
    (folder / "0" / "0.txt").write_text("changed")
    again = data.load([folder])
    assert all(f.split == split.get(f.name, f.split) for f in again.files)
    assert again.sha256 != corpus.sha256
    assert data.load([folder]).sha256 == again.sha256


def test_the_hash_holds_out_its_share():
    held_out = sum(data.is_held_out(f"folder/{i}.py") for i in range(4000)) / 4000
    assert 0.04 < held_out < 0.06
    assert not data.is_held_out("argparse.py")
    assert all(map(data.is_held_out, ("traceback.py", "opcode.py", "venv/__init__.py")))


def test_two_files_give_one_each(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 20)
    corpus = data.load([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert sorted(f.split for f in corpus.files) == ["held-out", "train"]


def test_one_file_holds_out_its_end(tmp_path):
    content = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "one.txt").write_text(content)
    corpus = data.load([tmp_path / "one.txt"])
    assert corpus.train.tobytes().decode() == content[:900] + "\0"
    assert corpus.heldout.tobytes().decode() == content[900:] + "\0"
    assert [f.name for f in corpus.files] == ["one.txt[:900]", "one.txt[900:]"]


def test_the_standard_library():
    corpus = data.load()
    names = [f.name for f in corpus.files]
    assert "argparse.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
    assert corpus.train.size > 10 * corpus.heldout.size > 0
    assert data.load().sha256 == corpus.sha256


def test_no_text_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "binary").write_bytes(b"\0\1")
    with pytest.raises(Refused, match="in which there is no UTF-8 text"):
        data.load([tmp_path])
    with pytest.raises(Refused, match="missing, which does not exist"):
        data.load([tmp_path / "missing"])
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(Refused, match="ships no sources .* pass `--data`"):
        data.load()
    with pytest.raises(Refused, match="holds only 5 bytes; it must hold at least 9"):
        batching.Windows(np.zeros(5, np.uint8), 8)


def test_windows_make_every_byte_a_target_once():
    stream = np.arange(50, dtype=np.uint8)
    windows = batching.Windows(stream, 7)
    targets = np.concatenate([windows[i]["tokens"][1:] for i in range(len(windows))])
    np.testing.assert_array_equal(targets, np.arange(1, 50))
    for i in range(len(windows) - 1):
        assert windows[i]["tokens"][-1] == windows[i + 1]["tokens"][0]


def dataset(seed=3):
    return batching.training_data(np.arange(250, dtype=np.uint8), length=8, batch=4, seed=seed)


@pytest.mark.parametrize("stop", [1, 5, 9, 20])  # an epoch is 31 windows, 7.75 batches
def test_resume_mid_epoch_is_exact(stop):
    whole = [next(i) for i in [batching.batches(dataset())] for _ in range(25)]
    first = batching.batches(dataset())
    for _ in range(stop):
        next(first)
    position = json.loads(json.dumps(first.get_state()))
    rest = batching.batches(dataset(), position)
    for expected in whole[stop:]:
        np.testing.assert_array_equal(next(rest)["tokens"], expected["tokens"])


def test_epochs_are_whole_and_differ():
    windows = np.concatenate([dataset()[i]["window"] for i in range(31)])
    epochs = windows.reshape(4, 31)
    assert all(sorted(e) == list(range(31)) for e in epochs)
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[0] == dataset(seed=4)[0]["window"][0]).all()


def test_seen_is_what_was_shown():
    source, shown = np.arange(250, dtype=np.uint8), dataset()
    stretches = batching.seen(shown, 8, 4)
    bytes_seen = set()
    for i in range(4):
        for row in shown[i]["tokens"]:
            bytes_seen |= set(row.tolist())
    got = [b for start, stop in stretches for b in source[start:stop].tolist()]
    assert sorted(got) == sorted(bytes_seen)
    assert len(got) == len(set(got))
    assert all(a[1] < b[0] for a, b in zip(stretches, stretches[1:], strict=False))


def test_evaluation_windows_are_spread():
    stream = np.zeros(10_001, np.uint8)
    assert batching.evaluation_windows(stream, 100, 10**9).tolist() == list(range(100))
    assert batching.evaluation_windows(stream, 100, 1000).tolist() == list(range(0, 100, 10))


def test_text_and_bytes():
    assert data.encode("aé").tolist() == [97, 0xC3, 0xA9]


def test_two_files_of_one_name_are_refused(tmp_path):
    for side in ("a", "b"):
        (tmp_path / side / "src").mkdir(parents=True)
        (tmp_path / side / "src" / "f.txt").write_text(side)
    with pytest.raises(Refused, match="two files called src/f.txt"):
        data.load((tmp_path / "a" / "src", tmp_path / "b" / "src"))
    with pytest.raises(Refused, match="two files called src/f.txt"):
        data.load((tmp_path / "a" / "src", tmp_path / "a" / "src"))


def test_runs_are_no_text(tmp_path):
    (tmp_path / "f.txt").write_text("text")
    (tmp_path / "g.txt").write_text("more")
    for name, files in (("run", ("metrics.jsonl",)), ("old", ("config.json", "corpus.json"))):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    files = data.load((tmp_path,), without=tmp_path / "run").files
    assert [f.name.split("/")[-1] for f in files] == ["f.txt", "g.txt"]


def test_names_that_are_no_utf8(tmp_path):
    for n in range(2):
        (tmp_path / f"{n}\udcff.txt").write_text("text")
    corpus = data.load((tmp_path,))
    assert len(corpus.files) == 2
    assert json.loads(json.dumps(corpus.record()))["sha256"] == corpus.sha256
