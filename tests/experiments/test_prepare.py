# SPDX-License-Identifier: Apache-2.0
"""Prepared data: no document is lost, a stop is gone on from, harm is noticed, shares are kept."""

import dataclasses
import gzip
import itertools
import json
import signal
import sys
import types

import numpy as np
import pytest
from nlx_experiments import batching, config, data, loop, prepare, runs, shards, tokenization
from nlx_experiments.errors import Refused
from nlx_experiments.prepare import Prepare

from nlx import nn


def documents(count=120, seed=0):
    generator = np.random.default_rng(seed)
    words = "memory level clock learns slowly é 日本 from its context".split()
    return [" ".join(generator.choice(words, n % 17 + 1)) + f" {n}" for n in range(count)]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    return path


def made(out, *source, **fields):
    fields = {"shard_tokens": 1500, "held_out_tokens": 300} | fields
    return prepare.main(Prepare(out=out, source=source, **fields))


def read_back(folder):
    """Its documents by split."""
    told = shards.read(folder)
    tokenizer = tokenization.of_run(folder, "bpe" if told["tokenizer"] else "bytes")
    found = {}
    for split in shards.SPLITS:
        stream = shards.Shards(folder, told[split]["shards"], told["dtype"])
        ends = stream.ends
        begins = np.concatenate([[0], ends[:-1]])
        parts = [stream[b:e] for b, e in zip(begins, ends, strict=True)]
        assert all(part[-1] == tokenizer.separator for part in parts)
        found[split] = [tokenizer.decode(part[:-1]).decode() for part in parts]
    return found


@pytest.mark.parametrize("form", ["npy", "arrayrecord"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_there_once(tmp_path, lines, form, tokenizer):
    told = made(tmp_path / "out", lines, form=form, tokenizer=tokenizer, vocabulary=300)
    found = read_back(tmp_path / "out")
    assert len(told["train"]["shards"]) > 1
    assert found["train"]
    held = [text for text in documents() if data.is_held_out(text)]
    assert found["train"] == [text for text in documents() if not data.is_held_out(text)]
    assert found["held-out"] == held[: len(found["held-out"])]
    assert len(held) == len(found["held-out"]) + told["dropped"]
    sizes = [len(text.encode()) + 1 for text in found["train"]]
    assert told["train"]["bytes"] == sum(sizes)
    assert told["train"]["documents"] == len(sizes)
    assert 0 < told["held-out"]["tokens"] <= 300


@pytest.mark.parametrize("form", ["npy", "arrayrecord"])
def test_any_slice_is_that_of_the_whole(tmp_path, lines, form):
    told = made(tmp_path / "out", lines, form=form)
    stream = shards.Shards(tmp_path / "out", told["train"]["shards"], told["dtype"])
    whole = np.concatenate([stream[a : a + 1] for a in range(stream.size)])
    np.testing.assert_array_equal(stream[:], whole)
    edge = int(stream.edges[1])
    places = [0, 1, edge - 3, edge, edge + 1, int(stream.edges[2]) + 2, stream.size]
    for start, stop in itertools.combinations(places, 2):
        np.testing.assert_array_equal(stream[start:stop], whole[start:stop])
    assert stream[5:5].size == 0


def test_a_preparation_that_was_stopped_goes_on_to_the_same_shards(tmp_path, lines, monkeypatch):
    whole = made(tmp_path / "whole", lines)
    given = prepare.documents

    def broken(options):
        for n, text in enumerate(given(options)):
            if n == 90:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(prepare, "documents", broken)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", lines)
    assert not (tmp_path / "out" / shards.FILE).exists()
    begun = runs.read_json(tmp_path / "out" / "progress.json")
    assert 0 < begun["documents"] < 90
    monkeypatch.setattr(prepare, "documents", given)
    again = made(tmp_path / "out", lines)
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")
    assert again == whole
    assert made(tmp_path / "out", lines) == again
    with pytest.raises(Refused, match="`out` is .* holds other data"):
        made(tmp_path / "out", lines, form="arrayrecord")


def stopped(out, source, monkeypatch, at=90, **fields):
    """A preparation that ends at a document, as a killed process would."""
    given = prepare.documents

    def broken(options):
        for n, text in enumerate(given(options)):
            if n == at:
                raise KeyboardInterrupt
            yield text

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "documents", broken)
        with pytest.raises(KeyboardInterrupt):
            made(out, source, **fields)


@pytest.mark.parametrize("harm", ["another first line", "fewer lines", "a shard"])
def test_what_changed_meanwhile_is_noticed(tmp_path, lines, monkeypatch, harm):
    out = tmp_path / "out"
    stopped(out, lines, monkeypatch)
    begun = runs.read_json(out / "progress.json")
    told = lines.read_text().splitlines(keepends=True)
    if harm == "another first line":
        lines.write_text("".join([told[1], *told[1:]]))
        sentence = f"the first {begun['documents']} documents are no longer those"
    elif harm == "fewer lines":
        lines.write_text("".join(told[:20]))
        sentence = f"there are 20 documents, fewer than the {begun['documents']} whose"
    else:
        (out / "train-00000.npy").unlink()
        sentence = "train-00000.npy is gone"
    for _ in range(2):
        with pytest.raises(Refused, match=sentence):
            made(out, lines)


def test_a_tokenizer_that_changed_meanwhile_is_noticed(tmp_path, lines, monkeypatch):
    file = tmp_path / "tokenizer.json"
    train = lambda size: tokenization.train(documents(), size).json
    file.write_text(train(300))
    stopped(tmp_path / "out", lines, monkeypatch, tokenizer=str(file), shard_tokens=300)
    file.write_text(train(290))
    with pytest.raises(Refused, match="`tokenizer` is .*, which was changed since .* was begun"):
        made(tmp_path / "out", lines, tokenizer=str(file), shard_tokens=300)


def test_a_preparation_is_bound_to_what_was_asked_before_its_first_shard(
    tmp_path, lines, monkeypatch
):
    stopped(tmp_path / "out", lines, monkeypatch, at=2, tokenizer="bpe", vocabulary=270)
    with pytest.raises(Refused, match="where other data is being prepared"):
        made(tmp_path / "out", lines, tokenizer="bpe", vocabulary=280)


def test_other_folders_are_left_alone(tmp_path, lines):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / ".lock").write_text("")  # as a run's folder has one
    with pytest.raises(Refused, match="`out` is .*, which holds config.json; choose another"):
        made(tmp_path / "run", lines)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "data.json").write_text("{}")
    assert not shards.is_prepared((tmp_path / "site",))
    (tmp_path / "site" / shards.FILE).write_text("{}")
    with pytest.raises(Refused, match="holds no nlx-data.json that this nlx reads"):
        shards.load((tmp_path / "site",), "bytes", 256)


def test_prepared_data_is_no_text(tmp_path, lines):
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(documents(3)):
        (tmp_path / "texts" / f"{n}.txt").write_text(text)
    made(tmp_path / "texts" / "shards", lines)
    assert {file.name for file in data.load((tmp_path / "texts",)).files} == {
        f"texts/{n}.txt" for n in range(3)
    }
    with pytest.raises(Refused, match="prepared data, which only `nlx train` reads"):
        data.load((tmp_path / "texts" / "shards",))


@pytest.mark.parametrize("limit", [1, 100_000])
def test_what_is_held_out_is_never_trained_on(tmp_path, lines, limit):
    twice = tmp_path / "twice.jsonl"
    twice.write_text(lines.read_text() * 2)
    made(tmp_path / "out", twice, held_out_tokens=limit)
    found = read_back(tmp_path / "out")
    assert not any(data.is_held_out(text) for text in found["train"])
    held = sum(map(data.is_held_out, documents()))
    assert len(found["held-out"]) == (1 if limit == 1 else 2 * held)
    made(tmp_path / "other", lines, held_out_share=0.2)
    with pytest.raises(Refused, match="prepared data of several `held_out_share`"):
        shards.load((tmp_path / "out", tmp_path / "other"), "bytes", 256)


def test_text_files_gzip_and_other_fields(tmp_path):
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(documents()):
        (tmp_path / "texts" / f"{n:03}.txt").write_text(text)
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"content": "one more"}))
    (tmp_path / "texts" / "b").mkdir()
    (tmp_path / "texts" / "b" / "c.jsonl").write_text('{"content": "half \\ud83d a letter"}')
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG\xff")
    fields = dict(field="content", held_out_tokens=10_000)
    made(tmp_path / "out", tmp_path / "texts", tmp_path / "more.jsonl.gz", **fields)
    found = read_back(tmp_path / "out")
    wanted = [*documents(), "one more", "half \ufffd a letter"]
    assert sorted(found["train"] + found["held-out"]) == sorted(wanted)


def test_a_dataset_is_streamed(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names, **fields):
        asked.append((names, fields))
        return [{"text": text} for text in documents()]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    options = Prepare(out=tmp_path / "out", huggingface="some/texts", configuration="en")
    prepare.main(options)
    assert asked[0] == (("some/texts", "en"), {"split": "train", "streaming": True})
    found = read_back(tmp_path / "out")
    assert sorted(found["train"] + found["held-out"]) == sorted(documents())
    (tmp_path / "e").mkdir()

    def fails(*names, **fields):
        raise RuntimeError("no such\n dataset")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fails))
    with pytest.raises(Refused, match="`huggingface` is 'some/texts', .* read .no such dataset."):
        prepare.main(dataclasses.replace(options, out=tmp_path / "e"))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    wrong = Prepare(out=tmp_path / "no", huggingface="some/texts", field="body")
    with pytest.raises(Refused, match="`field` is 'body'; row 0 of some/texts has texts in text"):
        prepare.main(wrong)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a"}\nno json\n', "line 2 of .* is no JSON object with a field 'text'"),
        ('{"body": "a"}\n', "line 1 of .* is no JSON object with a field 'text'"),
        ('{"text": 3}\n', "line 1 of .* has a 'text' that is no text"),
        ('{"text": "alone"}\n', "1 documents are too few"),
        (b'{"text": "\xff"}', "`source` holds .*pages.jsonl, which cannot be read"),
        ("", "0 documents are too few: none is left for training"),
    ],
)
def test_bad_lines_are_told(tmp_path, content, sentence):
    path = tmp_path / "pages.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Refused, match=sentence):
        made(tmp_path / "out", path)


def test_bad_options_are_told(tmp_path):
    with pytest.raises(ValueError, match="`source` or `huggingface` must be given"):
        Prepare(out=tmp_path)
    with pytest.raises(ValueError, match="`shard_tokens` is 0"):
        made(tmp_path, tmp_path, shard_tokens=0)
    with pytest.raises(ValueError, match="`held_out_share` is 1"):
        made(tmp_path, tmp_path, held_out_share=1)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(Refused, match="cut.jsonl.gz, which cannot be read"):
        made(tmp_path / "gz", tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(Refused, match="latin.txt, which cannot be read"):
        made(tmp_path / "latin", tmp_path / "latin.txt")
    with pytest.raises(Refused, match="`source` holds .*, which does not exist"):
        made(tmp_path / "out", tmp_path / "none")


@pytest.mark.parametrize("harm", ["gone", "cut", "flipped", "ends"])
def test_harmed_shards_are_noticed(tmp_path, lines, harm):
    told = made(tmp_path / "out", lines)
    path = tmp_path / "out" / told["train"]["shards"][1]["file"]
    if harm == "gone":
        path.unlink()
    elif harm == "ends":
        ends = shards.ends_of(path)
        np.save(ends, np.load(ends)[:-1])
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content[:-1] if harm == "cut" else content)
    with pytest.raises(
        Refused, match=f"{path.name} (is gone|was changed); prepare the data again, in"
    ):
        shards.load((tmp_path / "out",), "bytes", 256)


def test_tokenizers_must_be_those_of_the_data(tmp_path, lines):
    made(tmp_path / "bpe", lines, tokenizer="bpe", vocabulary=300)
    made(tmp_path / "bytes", lines)
    with pytest.raises(Refused, match="`tokenizer` is bytes, but .* must be .*tokenizer.json"):
        shards.load((tmp_path / "bpe",), "bytes", 300)
    with pytest.raises(Refused, match="`data` holds prepared data of several tokenizers"):
        shards.load((tmp_path / "bpe", tmp_path / "bytes"), "bytes", 300)
    with pytest.raises(Refused, match="`tokenizer` is bpe, but .*; it must be bytes"):
        shards.load((tmp_path / "bytes",), "bpe", 300)
    with pytest.raises(Refused, match="`data` holds .*bytes twice; see `weights`"):
        shards.load((tmp_path / "bytes", tmp_path / "bytes"), "bytes", 256)
    with pytest.raises(Refused, match="`model.vocabulary` is 256, but .* has 300 tokens"):
        shards.load((tmp_path / "bpe",), "bpe", 256)
    with pytest.raises(Refused, match="`data` holds prepared data, and .*pages.jsonl, which is no"):
        shards.is_prepared((tmp_path / "bpe", lines))
    _, tokens = shards.load((tmp_path / "bpe",), str(tmp_path / "bpe" / "tokenizer.json"), 300)
    assert tokens.tokenizer.size == 300


def test_small_shares_are_not_raised(monkeypatch):
    streams, seen = [np.full(900, n, np.uint8) for n in (1, 2)], []
    mix = batching.grain.MapDataset.mix
    keep = lambda parts, weights: (seen.extend(weights), mix(parts, weights))[1]
    monkeypatch.setattr(batching.grain.MapDataset, "mix", keep)
    batching.training_data(streams, length=9, batch=8, seed=0, weights=(1, 99_999))
    assert seen[0] / sum(seen) == pytest.approx(1e-5)


def test_mixtures_have_the_shares_that_are_asked_for():
    streams = [np.full(900, 1, np.uint8), np.full(300, 2, np.uint8)]

    def shares(**fields):
        rows = batching.training_data(streams, length=9, batch=8, seed=0, **fields)
        first = np.concatenate([rows[n]["tokens"][:, 0] for n in range(40)])
        return np.mean(first == 1)

    assert shares(weights=(1, 3)) == pytest.approx(0.25, abs=0.01)
    assert shares() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("pack", [False, True])
def test_workers_give_the_same_batches(tmp_path, lines, pack):
    told = made(tmp_path / "out", lines)
    stream = shards.Shards(tmp_path / "out", told["train"]["shards"], told["dtype"])
    rows = batching.training_data([stream], length=16, batch=3, seed=1, pack=pack)
    alone = batching.batches(rows)
    wanted = [next(alone) for _ in range(9)]
    several = batching.batches(rows, {"next_index": 2}, workers=2)
    for batch in wanted[2:]:
        found = next(several)
        assert found.keys() == batch.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(found[name], value)
    assert several.get_state() == alone.get_state() == {"next_index": 9}
    several.close()


@pytest.mark.slow
def test_training_on_packed_mixtures_resumes_to_the_bit(tmp_path, lines, monkeypatch):
    made(tmp_path / "one", lines)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(150, seed=7)))
    made(tmp_path / "two", other, form="arrayrecord")
    model = dataclasses.replace(nn.preset("deltanet-tiny"), width=16, layers=1, heads=2, hidden=8)
    chosen = config.make(
        "deltanet-tiny", model=model, run=tmp_path / "whole", steps=6, batch=2, length=12,
        data=(tmp_path / "one", tmp_path / "two"), weights=(1, 2), pack=True, eval_bytes=200,
        warmup=0.0, save_every=2,
    )  # fmt: skip
    result = loop.train(chosen)
    assert result["ngram_bits_per_byte"] == {}
    assert 0 < result["bits_per_byte"] < 20
    assert 0 < result["bytes_trained_on"] < 6 * 2 * 12
    assert config.of_run(chosen.folder).weights == (1, 2)
    halves = dataclasses.replace(chosen, run=tmp_path / "halves", workers=1)
    add = loop.Log.add

    def killed(self, step, measured):
        if step > 4:
            raise KeyboardInterrupt
        add(self, step, measured)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Log, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(halves)
    assert loop.train(halves) == result
    metrics = [(run.folder / "metrics.jsonl").read_bytes() for run in (chosen, halves)]
    assert metrics[0] == metrics[1]
    with pytest.raises(Refused, match="`weights` is .* begun with"):
        loop.train(dataclasses.replace(chosen, weights=(2, 1)))
    text = dataclasses.replace(chosen, data=(lines,), weights=(1,), run=tmp_path / "n")
    with pytest.raises(Refused, match="`weights` is given; `data` must then be folders"):
        loop.train(text)
    with pytest.raises(ValueError, match="`weights` is .*inf"):
        dataclasses.replace(chosen, weights=(float("inf"), 1.0))


def test_bytes_of_a_mixture_are_those_of_its_parts():
    parts = [{"train": {"bytes": 300, "tokens": 100}}, {"train": {"bytes": 450, "tokens": 100}}]
    prepared = shards.Prepared("", tuple(parts), np.zeros(0, np.uint8))
    rows = [
        batching.Windows(np.zeros(101, np.uint8), 10),
        batching.Windows(np.zeros(301, np.uint8), 10),
    ]
    told = lambda weights: loop._bytes(
        types.SimpleNamespace(weights=weights, batch=2), prepared, None, rows
    )
    assert told((1, 3)) == told(()) == pytest.approx((4.125, 2 * 10 * 4.125))
    assert told((1, 1)) == pytest.approx((3.75, 75))


def test_readers_leave_signals_to_the_run(monkeypatch):
    left = {}
    monkeypatch.setattr(batching.signal, "signal", lambda number, what: left.update({number: what}))
    batching._leave_signals(0, 1)
    assert left == dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)


def test_held_out_documents_begin_anew_where_training_rows_are_packed():
    rows = np.array([[5, 0, 6, 0, 0, 7]])
    tokens = tokenization.Tokens(tokenization.BYTES, rows[0], rows[0])
    found = loop._segments(types.SimpleNamespace(pack=True), tokens, rows)
    assert found.tolist() == [[0, 1, 1, 2, 3, 3]]
    assert loop._segments(types.SimpleNamespace(pack=False), tokens, rows) is None
