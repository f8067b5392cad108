"""Stories scattered among text: where sentences stand, what they answer, how they are read."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nlx_experiments import babilong, facts_tasks
from nlx_experiments.errors import Refused
from nlx_experiments.scattered_tasks import pieces, scattered, stories
from nlx_experiments.sequence_reading import Piece

from nlx import nn

TEXT = np.frombuffer(b"It was a dark and stormy night; the rain fell in torrents. ", np.uint8)
PEOPLE, THINGS, PLACES = 4, 4, 6


def answered(sentences):
    """What the last sentence asks, by a reader of one or two facts."""
    person = lambda symbol: symbol - PLACES
    at, held, lies = {}, {}, {}
    moves, takes, drops = (PLACES + PEOPLE + THINGS + n for n in range(3))
    for a, b, c in sentences[:-1]:
        if b == moves:
            at[a] = c
            for thing in (t for t, who in held.items() if who == a):
                lies[thing] = c
        elif b == takes:
            held[c], lies[c] = a, at[a]
        else:
            assert b == drops
            assert held.pop(c) == a
    asked = sentences[-1][2]
    return at[asked] if 0 <= person(asked) < PEOPLE else lies[asked]


@given(
    supporting=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32),
    length=st.integers(12, 400),
    size=st.integers(1, 90),
)
def test_a_row_is_its_story_in_order_among_text_and_a_reader_can_answer(
    supporting, seed, length, size
):
    story = stories(supporting, np.random.default_rng(seed), 3, length, TEXT)
    parts = [*pieces(story, TEXT, size)]
    assert [p.tokens.shape[1] for p in parts[:-1]] == [size] * (len(parts) - 1)
    whole = [np.concatenate([getattr(p, f) for p in parts], 1) for f in ("tokens", "answers")]
    scored = np.concatenate([p.scored for p in parts], 1)
    assert whole[0].shape == (3, length)
    for row, answers, counts, starts in zip(*whole, scored, story.starts, strict=True):
        told = np.flatnonzero(row >= 256)
        assert told.reshape(-1, 3)[:, 0].tolist() == starts[starts >= 0].tolist()
        assert starts[-1] == length - 3
        sentences = (row[told] - 256).reshape(-1, 3).tolist()
        assert 3 <= len(sentences) <= 13
        assert np.flatnonzero(counts).tolist() == [length - 1]
        assert answers[-1] == answered(sentences)
        assert not answers[:-1].any()
        rest = bytes(row[row < 256].astype(np.uint8))
        assert rest in TEXT.tobytes() * (2 + len(rest) // TEXT.size)


def test_sentences_stand_anywhere():
    story = stories(1, np.random.default_rng(0), 400, 1200, TEXT)
    first = story.starts[:, :-1]
    first = first[first >= 0]
    counts = np.histogram(first, 6, (0, 1200))[0] / first.size
    assert abs(counts - 1 / 6).max() < 0.05
    assert len({*map(tuple, story.starts.tolist())}) == 400


def test_every_row_has_a_number_of_facts_and_stories_are_the_same_at_every_length():
    draw = lambda length: stories(2, np.random.default_rng(7), 600, length, TEXT)
    short, long = draw(64), draw(4096)
    counts = np.bincount((short.starts >= 0).sum(1) - 1, minlength=13)
    assert not counts[:3].any()  # an answer needs two facts and somebody's move
    assert counts[3:].min() > 0.6 * 600 / 10
    for field in ("tokens", "answers", "scored"):
        assert (getattr(short, field) == getattr(long, field)).all()
    some = long.first(8)
    assert some.length == 4096
    assert all((a == b[:8]).all() for a, b in zip(some[:-1], long[:-1], strict=True))


def test_ten_million_symbols_are_made_in_the_memory_of_a_piece():
    story = stories(1, np.random.default_rng(0), 2, 10_000_000, TEXT)
    tracemalloc.start()
    seen = sum(p.tokens.shape[1] for p in itertools.islice(pieces(story, TEXT, 1000), 40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 40_000
    assert peak < 1e6


def test_training_rows_ask_along_the_way_and_others_only_at_the_end():
    task = scattered(2, TEXT, TEXT, TEXT)
    assert task.symbols == 256 + PLACES + PEOPLE + THINGS + 5
    assert task.classes == PLACES
    assert task.validation is not None
    assert task.test is not None
    draw = lambda of: of(np.random.default_rng(1), 60, 90, 100)
    assert draw(task.draw).scored.sum(1).mean() > 4
    for exam in (task.validation, task.test):
        batch = draw(exam)
        assert (batch.scored.sum(1) == 1).all()
        assert batch.tokens.shape == (60, 100)
        ends = {int(np.flatnonzero(row)[-1]) for row in batch.scored}
        assert len(ends) > 6  # each row has its own length
    lengths = [np.flatnonzero(task.draw(np.random.default_rng(n), 1, 50, 100).scored[0])[-1] + 1
               for n in range(20)]  # fmt: skip
    assert min(lengths) < 65 < 85 < max(lengths)


def test_shares_are_of_the_question_alone_and_attention_goes_no_farther(monkeypatch):
    """Models that answer 0 and 1 everywhere; what is read are the rows of the stories."""
    asked = []

    def read(model, weights, given, *, capacity, leave):
        for piece in given:
            leave()
            asked.append((piece.tokens.shape, capacity, len(weights)))
            right = np.stack([piece.answers == n for n in range(len(weights))])
            yield Piece(piece, right, 0.0 * right)

    monkeypatch.setattr(babilong, "read", read)
    monkeypatch.setattr(babilong, "ATTENTION", 64)
    monkeypatch.setattr(babilong, "AT_ONCE", 1280)
    monkeypatch.setattr(babilong, "SEEN", 20 * 64 * 12)
    sizes = dict(feed_forward="swiglu", vocabulary=275, width=8, heads=2, layers=1, hidden=4)
    examine = lambda mixer, streamed=2_000: babilong.examine(
        1, TEXT, (64, 128), 24, streamed, nn.ModelConfig(mixer=mixer, **sizes), np.zeros(2),
        lambda: None,
    )  # fmt: skip
    found = examine("deltanet")
    assert found["rows"] == {"64": 20, "128": 10}
    for length, rows in ((64, 20), (128, 10)):
        answers = stories(1, np.random.default_rng(1), 64, length, TEXT).answers[:rows, -1, -1]
        shares = [round(float((answers == n).mean()), 4) for n in range(2)]
        assert found["right"][str(length)] == shares
        assert max(shares) < 1
    assert asked[:3] == [((20, 24), 64, 2), ((20, 24), 64, 2), ((20, 16), 64, 2)]
    assert asked[-1] == ((1, 8), 2_000, 1)  # the stream, of one model
    assert [mark["symbols"] for mark in found["stream"]] == [1008, 2000]
    assert all(mark["resident_mib"] > 10 for mark in found["stream"])
    assert "stream" not in examine("deltanet", 0)
    asked.clear()
    found = examine("attention")
    assert [*found["right"]] == ["64"]
    assert "stream" not in found
    assert {shape for shape, *_ in asked} == {(20, 12), (20, 4)}  # smaller pieces


def record(shares, stream):
    bins = {"trained": {"rows": [1.0] * 3, "tokens": [1.0] * 3, "loss": [0.0] * 3}}
    found = {"validation": 1.0, "validations": [1.0] * 3, **bins}
    exam = {"right": shares, "rows": dict.fromkeys(shares, 64), **stream}
    return {"": {"rates": {"0.01": found}, "rate": "0.01", "steps": 9, "exam": exam}}


def test_tables_show_lengths_means_and_memory(tmp_path):
    plan = {"bins": {"trained": (1, 2)}, "stages": [[0, 128]], "tested": 9}
    stream = {"stream": [{"symbols": 1024, "resident_mib": 90.2}]}
    models = {
        "hope": record({"128": [1.0] * 3, "256": [0.5, 0.6, 0.7]}, stream),
        "transformer": record({"128": [0.9] * 3}, {}),
    }
    results = {"1 fact": {"plan": plan, "chance": {"trained": 0.25}, "models": models}}
    text = babilong.shown(results)
    assert "| hope | 100 | 60 (50 to 70) | 80.0 |" in text
    assert "| transformer | 90 |  |  |" in text
    assert "| *most frequent answer* | 25.0 | 25.0 | 25.0 |" in text
    assert "| *rows of each seed* | 64 | 64 |  |" in text
    assert "| 1 fact | hope | 90 |" in text
    babilong.plot(tmp_path / "lengths.png", results)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_gets_a_sentence():
    draw = np.random.default_rng(0)
    with pytest.raises(ValueError, match="`length` is 11; it must be at least 12"):
        stories(2, draw, 1, 11, TEXT)
    with pytest.raises(Refused, match="leaves no text"):
        stories(1, draw, 1, 90, TEXT[:0])
    with pytest.raises(ValueError, match="`streamed` is 10; it must be >= 1,024"):
        babilong.Babilong(streamed=10)
    with pytest.raises(ValueError, match="`asked` is 1; it must be from 0 to below 1"):
        stories(1, draw, 1, 90, TEXT, asked=1)
    with pytest.raises(ValueError, match="`asked` is 2; it must be from 0 to 1"):
        facts_tasks.facts(1, asked=2)
