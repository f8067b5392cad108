# SPDX-License-Identifier: Apache-2.0
"""Prepared data: no document is lost, a stop is gone on from, harm is noticed, shares are kept."""

import dataclasses
import gzip
import itertools
import json
import sys
import types

import numpy as np
import pytest
from nlx_experiments import config, data, loop, prepare, runs, shards, tokenization
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
    assert sorted(found["train"] + found["held-out"]) == sorted(documents())
    assert all(data.is_held_out(text) for text in found["held-out"])
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
    assert not (tmp_path / "out" / "data.json").exists()
    begun = runs.read_json(tmp_path / "out" / "progress.json")
    assert 0 < begun["documents"] < 90
    monkeypatch.setattr(prepare, "documents", given)
    again = made(tmp_path / "out", lines)
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")
    assert again["train"]["tokens"] == whole["train"]["tokens"]
    assert made(tmp_path / "out", lines) == again
    with pytest.raises(Refused, match="`out` is .* holds other data"):
        made(tmp_path / "out", lines, form="arrayrecord")


def test_a_source_that_changed_meanwhile_is_noticed(tmp_path, lines, monkeypatch):
    given = prepare.documents
    monkeypatch.setattr(prepare, "documents", lambda o: itertools.islice(given(o), 100))
    monkeypatch.setattr(shards, "FILE", "data.json")
    made(tmp_path / "out", lines)
    told = runs.read_json(tmp_path / "out" / "data.json")
    (tmp_path / "out" / "data.json").unlink()
    halfway = {"asked": told["asked"], "documents": 50, "seen": "another", "train": []}
    runs.write_json(tmp_path / "out" / "progress.json", halfway | {"held-out": []})
    with pytest.raises(Refused, match="the first 50 documents are no longer those"):
        made(tmp_path / "out", lines)


def test_copies_are_on_one_side(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents() * 2))
    made(tmp_path / "out", path, held_out_tokens=100_000)
    found = read_back(tmp_path / "out")
    assert not set(found["train"]) & set(found["held-out"])
    assert len(found["held-out"]) == 2 * len(set(found["held-out"])) > 0


def test_text_files_gzip_and_other_fields(tmp_path):
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(documents()):
        (tmp_path / "texts" / f"{n:03}.txt").write_text(text)
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"content": "one more"}) + "\n\n".strip("\n"))
    made(tmp_path / "out", tmp_path / "texts", tmp_path / "more.jsonl.gz", field="content")
    found = read_back(tmp_path / "out")
    assert sorted(found["train"] + found["held-out"]) == sorted([*documents(), "one more"])


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
        ("", "0 documents are too few: none is left for training"),
    ],
)
def test_bad_lines_are_told(tmp_path, content, sentence):
    path = tmp_path / "pages.jsonl"
    path.write_text(content)
    with pytest.raises(Refused, match=sentence):
        made(tmp_path / "out", path)


def test_bad_options_are_told(tmp_path):
    with pytest.raises(ValueError, match="`source` or `huggingface` must be given"):
        Prepare(out=tmp_path)
    with pytest.raises(ValueError, match="`shard_tokens` is 0"):
        made(tmp_path, tmp_path, shard_tokens=0)
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
    with pytest.raises(Refused, match=f"{path.name} (is gone|was changed); prepare the data again"):
        shards.load((tmp_path / "out",), "bytes", 256)


def test_tokenizers_must_be_those_of_the_data(tmp_path, lines):
    made(tmp_path / "bpe", lines, tokenizer="bpe", vocabulary=300)
    made(tmp_path / "bytes", lines)
    with pytest.raises(Refused, match="`tokenizer` is bytes, but .* must be .*tokenizer.json"):
        shards.load((tmp_path / "bpe",), "bytes", 300)
    with pytest.raises(Refused, match="`data` holds prepared data of several tokenizers"):
        shards.load((tmp_path / "bpe", tmp_path / "bytes"), "bytes", 300)
    with pytest.raises(Refused, match="`model.vocabulary` is 256, but .* has 300 tokens"):
        shards.load((tmp_path / "bpe",), "bpe", 256)
    with pytest.raises(Refused, match="`data` holds prepared data, and .*pages.jsonl, which is no"):
        shards.is_prepared((tmp_path / "bpe", lines))
    _, tokens = shards.load((tmp_path / "bpe",), str(tmp_path / "bpe" / "tokenizer.json"), 300)
    assert tokens.tokenizer.size == 300


def test_mixtures_have_the_shares_that_are_asked_for():
    streams = [np.full(900, 1, np.uint8), np.full(300, 2, np.uint8)]

    def shares(**fields):
        rows = data.training_data(streams, length=9, batch=8, seed=0, **fields)
        first = np.concatenate([rows[n]["tokens"][:, 0] for n in range(40)])
        return np.mean(first == 1)

    assert shares(weights=(1, 3)) == pytest.approx(0.25, abs=0.01)
    assert shares() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("pack", [False, True])
def test_workers_give_the_same_batches(tmp_path, lines, pack):
    told = made(tmp_path / "out", lines)
    stream = shards.Shards(tmp_path / "out", told["train"]["shards"], told["dtype"])
    rows = data.training_data([stream], length=16, batch=3, seed=1, pack=pack)
    alone = data.batches(rows)
    wanted = [next(alone) for _ in range(9)]
    several = data.batches(rows, {"next_index": 2}, workers=2)
    for batch in wanted[2:]:
        found = next(several)
        assert found.keys() == batch.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(found[name], value)
    assert several.get_state() == alone.get_state() == {"next_index": 9}
    several.close()


def test_training_on_packed_mixtures_resumes_to_the_bit(tmp_path, lines):
    made(tmp_path / "one", lines)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(150, seed=7)))
    made(tmp_path / "two", other, form="arrayrecord")
    small = dict(width=16, layers=1, heads=2, hidden=8)
    model = dataclasses.replace(nn.preset("deltanet-tiny"), **small)

    def trained(name, steps):
        chosen = config.make(
            "deltanet-tiny", model=model, run=tmp_path / name, steps=steps, batch=2, length=12,
            data=(tmp_path / "one", tmp_path / "two"), weights=(1, 2), pack=True, eval_bytes=200,
            warmup=0.0,
        )  # fmt: skip
        result = loop.train(chosen)
        return result, runs.read_lines(tmp_path / name / "metrics.jsonl")

    result, whole = trained("whole", 6)
    assert result["ngram_bits_per_byte"] == {}
    assert 0 < result["bits_per_byte"] < 20
    chosen = config.of_run(tmp_path / "whole")
    assert chosen.weights == (1, 2)
    assert chosen.pack
    rows = data.training_data(
        shards.load(chosen.data, "bytes", 256)[1].train, length=12, batch=2, seed=0,
        weights=(1, 2), pack=True,
    )  # fmt: skip
    assert "segment_ids" in rows[0]
    again, lines_of_it = trained("whole", 6)
    assert again == result
    assert lines_of_it == whole
    with pytest.raises(Refused, match="`weights` is .* begun with"):
        loop.train(dataclasses.replace(chosen, weights=(2, 1)))
    with pytest.raises(Refused, match="`weights` is given; `data` must then be folders"):
        loop.train(dataclasses.replace(chosen, data=(lines,), weights=(1,), run=tmp_path / "n"))
