# SPDX-License-Identifier: Apache-2.0
"""Tokenizers are lossless, scores are the same whatever the tokens, and a run keeps its own."""

import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
from nlx_experiments import (
    batching,
    config,
    data,
    evaluate,
    generate,
    learner,
    loop,
    runs,
    whitebox,
)
from nlx_experiments import tokenization as tokens
from nlx_experiments.errors import Refused
from nlx_experiments.run import main as nlx

from nlx import nn

compiled = functools.cache(learner.make)
ODD = (
    "na\u00efve  caf\u00e9\n\t\u65e5\u672c\u8a9e \U0001f600 x=1; <|endoftext|> \0 'tis\udcff\udc80."
)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    anywhere = lambda config: compiled(dataclasses.replace(config, run=None))
    monkeypatch.setattr(learner, "make", anywhere)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Nine files of sentences with words in common."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(9):
        lines = [f"the cat {i} saw the other cat {j * j} and the hat\n" for j in range(20)]
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def bpe(texts):
    return tokens.train(tokens.texts(data.load([texts]).train), 300)


def test_the_first_merges_are_the_most_frequent_pairs():
    """ "ab" stands 9 times, "abc" then 5 times, "de" 3 times."""
    made = tokens.train(["abc abc abc abc abc", "ab ab ab ab de de de"], 260)
    new = [piece for piece in made.pieces if len(piece) > 1]
    assert new[:2] == [b"ab", b" ab"]
    assert made.decode(made.encode("abcab")) == b"abcab"
    assert len(made.encode("ab")) == 1


def test_a_vocabulary_of_256_is_the_bytes(texts):
    made = tokens.train(tokens.texts(data.load([texts]).train), 256)
    assert sorted(made.pieces) == sorted(tokens.BYTES.pieces)


@pytest.mark.parametrize(
    "text", ["", "the cat", "\n\n  indented", ODD], ids=["empty", "words", "spaces", "odd"]
)
def test_nothing_is_lost(bpe, text):
    raw = text.encode(errors="surrogateescape")
    for made in (bpe, tokens.BYTES, tokens.parse(bpe.json, "again")):
        numbers = made.encode(text)
        assert made.decode(numbers) == raw
        assert made.starts(numbers)[-1] == len(raw)
        assert made.pieces[made.separator] == b"\0"
    starts = bpe.starts(bpe.encode(text))
    assert all(
        raw[a:b] == bpe.pieces[t]
        for a, b, t in zip(starts, starts[1:], bpe.encode(text), strict=False)
    )


def test_a_text_that_spells_a_special_token_is_text(bpe):
    """Read from a file as others publish it: such a token stands for no bytes, and is not drawn
    from text."""
    fields = json.loads(bpe.json)
    end = {"id": 300, "content": "<|endoftext|>", "special": True}
    rest = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    made = tokens.parse(json.dumps(fields | {"added_tokens": [end | rest]}), "published")
    assert made.size == 301
    assert made.pieces[300] == b""
    numbers = made.encode("a<|endoftext|>b")
    assert 300 not in numbers
    assert made.decode(numbers) == b"a<|endoftext|>b"


def test_training_is_a_function_of_the_text(texts, bpe):
    assert tokens.train(tokens.texts(data.load([texts]).train), 300).json == bpe.json


def test_a_corpus_in_tokens_is_the_corpus(texts, bpe):
    corpus = data.load([texts])
    made = tokens.of_corpus(corpus, bpe)
    assert bpe.decode(made.train) == corpus.train.tobytes()
    assert bpe.decode(made.heldout) == corpus.heldout.tobytes()
    assert made.train.size < 0.6 * corpus.train.size
    assert (made.train == bpe.separator).sum() == len(tokens.texts(corpus.train))


def test_a_file_cut_inside_a_letter_loses_nothing(tmp_path, bpe):
    (tmp_path / "a.txt").write_bytes("é".encode() * 55)  # its last tenth is an odd number
    corpus = data.load([tmp_path / "a.txt"])
    assert corpus.train.size % 2 == 0  # 99 bytes and the separator: a half letter
    made = tokens.of_corpus(corpus, bpe)
    assert bpe.decode(made.train) + bpe.decode(made.heldout) == (
        corpus.train.tobytes() + corpus.heldout.tobytes()
    )


def test_words_and_bytes_by_hand():
    text = np.frombuffer(b"one two\n\nthree\0four  five", np.uint8)
    assert evaluate.words(text, np.arange(text.size)) == 5
    assert evaluate.words(text, np.arange(1, text.size)) == 4  # "one" begins at 0
    halves = np.arange(11), np.arange(11, text.size)  # cut inside "three"
    assert [evaluate.words(text, half) for half in halves] == [3, 2]
    bits = np.array([3.0, 5.0, 2.0, 6.0])
    assert evaluate.bits_per_byte(bits, 8) == 2
    assert evaluate.word_perplexity(bits, 4) == pytest.approx(16)  # 16 bits over 4 words
    assert evaluate.word_perplexity(bits, 0) is None
    assert evaluate.word_perplexity(bits * 1e5, 4) is None


def test_scores_are_of_the_bytes_and_words_that_the_scored_tokens_stand_for(texts, bpe):
    """A model that spends 2 bits on every byte scores 2, in any tokens."""
    corpus = data.load([texts])
    found = []
    for made in (tokens.BYTES, bpe):
        stream = tokens.Tokens(made, corpus.train, corpus.heldout)
        stream = stream if made is tokens.BYTES else tokens.of_corpus(corpus, made)
        lengths = np.array([len(piece) for piece in made.pieces])
        positions = evaluate.scored_positions(stream, 4, 10**6)
        two = lambda t, lengths=lengths: 2.0 * lengths[t[:, 1:]]
        bits = evaluate.model_bits(two, stream, positions, 3)
        scored = evaluate.byte_positions(stream, positions)
        text = corpus.heldout[scored].tobytes()
        assert text == made.decode(stream.heldout[positions.ravel()])
        assert evaluate.bits_per_byte(bits, scored.size) == 2
        words = evaluate.words(corpus.heldout, scored)
        assert abs(words - len(text.replace(b"\0", b" ").split())) <= 1  # a cut first one
        found.append(evaluate.word_perplexity(bits, words))
        assert math.log2(found[-1]) == pytest.approx(2 * scored.size / words)
    assert found[0] == pytest.approx(found[1], rel=0.1)
    some = evaluate.scored_positions(tokens.of_corpus(corpus, bpe), 4, 400)
    assert 340 <= evaluate.byte_positions(tokens.of_corpus(corpus, bpe), some).size <= 460


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """A finished run on BPE tokens."""
    folder = tmp_path_factory.mktemp("runs") / "bpe"
    chosen = _config(texts, folder, "bpe")
    with pytest.MonkeyPatch.context() as patch:
        compiled_once.__wrapped__(patch)
        return chosen, loop.train(chosen)


def _config(texts, folder, tokenizer, vocabulary=300):
    small = dict(width=16, layers=1, heads=2, hidden=16)
    model = dataclasses.replace(nn.preset("transformer++-tiny"), vocabulary=vocabulary, **small)
    return config.TrainConfig(
        preset="transformer++-tiny", model=model, data=(texts,), run=folder, tokenizer=tokenizer,
        steps=2, batch=2, length=8, save_every=1, log_every=1, eval_bytes=400, optimizer="adamw",
    )  # fmt: skip


def test_a_run_on_tokens_scores_bytes_and_words(run, texts, bpe):
    chosen, result = run
    assert (chosen.folder / "tokenizer.json").read_text() == bpe.json
    corpus = data.load([texts])
    made = tokens.of_corpus(corpus, bpe)
    positions = evaluate.scored_positions(made, 8, 400)
    model = learner.load(chosen)
    nats = 0.0
    for row in positions:
        window = made.heldout[row[0] - 1 : row[-1] + 1].astype(np.int32)
        scores = np.asarray(model(window[None, :-1])[0][0], np.float64)
        likely = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        nats -= likely[np.arange(8), window[1:]].sum()
    scored = bpe.decode(made.heldout[positions.ravel()])
    assert result["bytes_scored"] == len(scored)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(scored), rel=1e-5)
    logged = math.log(result["word_perplexity"]) * result["words_scored"]
    assert logged == pytest.approx(nats, rel=1e-5)
    # Training: the loss of a token over the mean bytes of one; bytes by the same mean.
    per_token = corpus.train.size / made.train.size
    first = runs.read_lines(chosen.folder / "metrics.jsonl")[0]
    assert first["bytes"] == round(16 * per_token)
    dataset = batching.training_data(made.train, length=8, batch=2, seed=0)
    window = next(batching.batches(dataset))["tokens"].astype(np.int32)
    scores = np.asarray(learner.build(chosen)(window[:, :-1])[0], np.float64)
    chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    loss = -np.log2(np.take_along_axis(chances, window[:, 1:, None], -1)).mean()
    assert first["bits_per_byte"] == pytest.approx(loss / per_token, rel=1e-5)
    starts = bpe.starts(made.train)
    seen = [(starts[a], starts[b]) for a, b in batching.seen(dataset, 8, 2)]
    assert result["distinct_bytes_seen"] == sum(b - a for a, b in seen)
    held = evaluate.byte_positions(made, positions)
    assert result["ngram_bits_per_byte"]["2"] == evaluate.ngram_bits(corpus, 2, held, seen)


def test_a_run_goes_on_with_its_own_tokenizer(run, texts, tmp_path, capsys):
    chosen, result = run
    shutil.copytree(chosen.folder, tmp_path / "run")
    here = dataclasses.replace(chosen, run=tmp_path / "run")
    (here.folder / "result.json").unlink()
    shutil.rmtree(here.folder / "checkpoints" / "2")
    assert loop.train(here) == result
    assert "Going on from step 1 of 2" in capsys.readouterr().out
    assert loop.train(here) == result  # finished
    with pytest.raises(Refused, match="`model.vocabulary` is 290, but .* was begun with 300"):
        loop.train(_config(texts, here.folder, "bpe", 290))
    with pytest.raises(Refused, match="`model.vocabulary` is 256|`tokenizer` is 'bytes', but"):
        loop.train(_config(texts, here.folder, "bytes", 256))
    other = [f"{n}{n + 1} " * 3 for n in range(99)]
    (here.folder / "tokenizer.json").write_text(tokens.train(other, 300).json)
    with pytest.raises(Refused, match="tokenizer is no longer the one that .* was begun with"):
        loop.train(here)


def test_a_run_on_bytes_refuses_bpe_also_from_before_there_was_one(texts, bpe, tmp_path):
    chosen = _config(texts, tmp_path / "run", "bytes", 256)
    corpus, _ = tokens.load("bytes", 256, (texts,), tmp_path)

    def claim(name, made):
        with runs.Run(chosen.folder) as folder:
            loop._claim(folder, dataclasses.replace(chosen, tokenizer=name), corpus, made)

    claim("bytes", tokens.BYTES)
    assert "tokenizer" not in runs.read_json(chosen.folder / "corpus.json")
    with pytest.raises(Refused, match="`tokenizer` is 'bpe', but .* was begun with 'bytes'"):
        claim("bpe", bpe)
    fields = json.loads((chosen.folder / "config.json").read_text())
    del fields["tokenizer"]
    (chosen.folder / "config.json").write_text(json.dumps(fields))
    claim("bytes", tokens.BYTES)
    assert config.of_run(chosen.folder) == chosen
    with pytest.raises(Refused, match="`tokenizer` is 'bpe', but .* was begun with 'bytes'"):
        claim("bpe", bpe)
    assert not (chosen.folder / "tokenizer.json").exists()


def test_generation_continues_in_tokens(run, bpe, capfdbinary):
    chosen, _ = run
    settings = dict(length=6, temperature=0.0, seed=0)
    drawn = list(generate.stream(learner.load(chosen), "the cat", bpe, **settings))
    read = np.concatenate([bpe.encode("the cat"), drawn]).astype(np.int32)
    scores, _ = learner.load(chosen)(read[None])
    before = len(read) - len(drawn)
    assert drawn == np.argmax(scores[0, before - 1 : -1], axis=-1).tolist()
    words = f"generate {chosen.folder} --length 6 --temperature 0".split()
    assert nlx([*words, "--prompt", "the cat"]) == 0
    shown = b"".join(generate.shown(token, bpe) for token in drawn)
    assert capfdbinary.readouterr().out == b"the cat" + shown + b"\n"


def test_tokens_above_the_tokenizer_are_never_drawn(run, bpe):
    few = bpe._replace(pieces=bpe.pieces[:200])
    warm = dict(length=64, temperature=99.0, seed=0)
    assert max(generate.stream(learner.load(run[0]), "", few, **warm)) < 200


def test_a_token_costs_its_bytes_alike_where_a_run_is_looked_into(run, bpe):
    source, after, content, lengths = whitebox._read(run[0], None)
    assert content.tobytes() == data.load(run[0].data).heldout[: whitebox.LIMIT].tobytes()
    assert after[0] == bpe.separator
    assert bpe.decode(after[1:]) == content.tobytes()
    assert lengths.sum() == len(content)


def test_token_files_are_read_as_they_are(texts, bpe, tmp_path):
    made = tokens.of_corpus(data.load([texts]), bpe)
    (tmp_path / "tokenizer.json").write_text(bpe.json)
    np.save(tmp_path / "a.npy", made.train)
    load = lambda *names, name="tokenizer.json", size=300: tokens.load(
        str(tmp_path / name) if "." in name else name,
        size,
        [tmp_path / n for n in names],
        tmp_path / "run",
    )
    corpus, stream = load("a.npy", size=512)  # a model may know more
    cut = made.train.size - made.train.size // 10
    np.testing.assert_array_equal(stream.train[:-1], made.train[:cut])
    np.testing.assert_array_equal(stream.heldout[:-1], made.train[cut:])
    assert bpe.decode(stream.train) == corpus.train.tobytes()
    np.save(tmp_path / "b.npy", made.heldout.astype(np.int64))
    corpus, stream = load("a.npy", "b.npy")
    assert {f.name: f.split for f in corpus.files}.keys() == {"a.npy", "b.npy"}
    assert stream.heldout.size in (made.train.size + 1, made.heldout.size + 1)
    np.save(tmp_path / "c.npy", np.array([1.5]))
    np.save(tmp_path / "d.npy", np.array([3, 300]))
    (tmp_path / "e.npy").write_text("none")
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "other.json").write_text(bpe.json.replace('"ByteLevel"', '"Metaspace"'))
    (tmp_path / "none.json").write_text("{}")
    fields = json.loads(bpe.json)
    fields["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "space.json").write_text(json.dumps(fields))
    for words, sentence in (
        (dict(name="bytes"), "`data` holds .*a.npy, a token file, and `tokenizer` is bytes"),
        (dict(size=299), "`model.vocabulary` is 299, but .* has 300 tokens"),
        (dict(name="none.json"), "none.json, which is no tokenizer"),
        (dict(name="other.json"), "other.json, which is"),
        (
            dict(name="space.json"),
            "space.json, which makes .* a  b.* of .*; it must keep every byte",
        ),
        (dict(name="nowhere.json"), "nowhere.json, which cannot be read"),
    ):
        with pytest.raises(Refused, match=sentence):
            load("a.npy", **words)
    for names, sentence in (
        (("c.npy",), r"of float64\[1\]; it must hold one row of integers"),
        (("d.npy",), r"tokens from 3 to 300; they must be in \[0, 300\)"),
        (("e.npy",), "which is no .npy file of numbers"),
        (("a.npy", "t.txt"), "token files beside texts"),
        (("a.npy", "a.npy"), "two files called a.npy"),
    ):
        with pytest.raises(Refused, match=sentence):
            load(*names)


def test_what_cannot_be_trained_is_refused(texts):
    with pytest.raises(Refused, match="`model.vocabulary` is 99999, but the text gives no more"):
        tokens.train(tokens.texts(data.load([texts]).train), 99_999)
    with pytest.raises(ValueError, match="`model.vocabulary` is 255; it must be at least 256"):
        _config(texts, texts / "run", "bpe", 255)
