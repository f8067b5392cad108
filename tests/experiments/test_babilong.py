"""Stories scattered among text: where sentences stand, what they answer, how they are read."""

import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from nlx_experiments import babilong, babilong_table, facts_tasks, resident
from nlx_experiments import sequence_learner as learner
from nlx_experiments.errors import Refused
from nlx_experiments.recall import state_bytes
from nlx_experiments.scattered_tasks import pieces, scattered, stories
from nlx_experiments.sequence_reading import Piece, cut, read
from nlx_experiments.sequence_tasks import Batch

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


def test_rows_have_every_number_of_facts():
    story = stories(2, np.random.default_rng(7), 600, 64, TEXT)
    counts = np.bincount((story.starts >= 0).sum(1) - 1, minlength=13)
    assert not counts[:3].any()  # an answer needs two facts and somebody's move
    assert counts[3:].min() > 0.6 * 600 / 10


def test_every_length_has_rows_of_its_own_and_lines_that_need_no_model():
    draw = lambda length: babilong.examined(2, TEXT, length)
    assert [len(draw(n).tokens) for n in (128, 4_096, 16_384, 65_536, 2**20)] == [64, 64, 32, 32, 8]
    assert (draw(16_384).tokens == draw(16_384).tokens).all()
    assert (draw(16_384).tokens != draw(65_536).tokens).any((1, 2)).sum() > 28
    for length in (128, 16_384):
        story = draw(length)
        answers, moves = story.answers[:, -1, -1].tolist(), 256 + PLACES + PEOPLE + THINGS
        last = []
        for sentences, starts in zip(story.tokens, story.starts, strict=True):
            told = sentences[starts >= 0]
            last.append(told[told[:, 1] == moves][-1, 2] - 256)
        found = babilong.lines(2, story)
        most = max(map(answers.count, answers)) / len(answers)
        assert found["most frequent answer"] == round(most, 4)
        assert found["where somebody went last"] == round(np.equal(last, answers).mean(), 4)


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


def small(mixer):
    sizes = dict(vocabulary=275, width=8, heads=2, layers=1, hidden=4)
    kind = "cms" if mixer == "self_modifying" else "swiglu"
    return nn.ModelConfig(mixer=mixer, feed_forward=kind, **sizes)


def test_what_is_right_is_the_question_alone_and_attention_goes_no_farther(monkeypatch):
    """Models that answer 0 and 1 everywhere; what is read are the rows of the stories."""
    asked = []

    def read(model, weights, given, *, capacity, leave):
        for piece in given:
            leave()
            asked.append((piece.tokens.shape, capacity, len(weights)))
            right = np.stack([piece.answers == n for n in range(len(weights))])
            yield Piece(piece, right, 0.0 * right, 7)

    monkeypatch.setattr(babilong, "read", read)
    monkeypatch.setattr(babilong, "ATTENTION", 64)
    monkeypatch.setattr(babilong, "BY_ALL", 128)
    monkeypatch.setattr(babilong, "ROWS", {64: 20, 256: 10})
    monkeypatch.setattr(babilong, "SEEN", 20 * 64 * 12)
    monkeypatch.setattr(babilong, "OTHERS", 1_500)
    examine = lambda mixer, streamed=2_000: babilong.examine(
        1, TEXT, (64, 128, 256), 24, streamed, small(mixer), np.zeros(2), lambda: None
    )
    found = examine("deltanet")
    for length, rows, seeds in ((64, 20, 2), (128, 10, 2), (256, 10, 1)):
        story = stories(1, np.random.default_rng((1, length)), rows, length, TEXT)
        answers = story.answers[:, -1, -1]
        of = ["".join("1" if a == n else "0" for a in answers) for n in range(seeds)]
        assert found["right"][str(length)] == of
        assert "0" in of[0]
        assert found["lines"][str(length)] == babilong.lines(1, story)
    assert asked[:3] == [((20, 24), 64, 2), ((20, 24), 64, 2), ((20, 16), 64, 2)]
    assert asked[-1] == ((1, 12), 24, 1)  # the stream: one model, room for a piece
    assert [mark["symbols"] for mark in found["stream"]] == [1032, 1500]
    assert examine("self_modifying")["stream"][-1]["symbols"] == 2_000
    assert "stream" not in examine("deltanet", 0)
    asked.clear()
    found = examine("attention")
    assert [*found["right"]] == ["64"]
    assert "stream" not in found
    assert {shape for shape, *_ in asked} == {(20, 12), (20, 4)}  # smaller pieces


def test_a_stream_is_carried_in_the_state_of_a_piece():
    config = small("deltanet")
    weights = learner.make(config, steps=1).init(jnp.arange(1)).params
    marks = babilong.stream(1, TEXT, 64, 3_000, config, weights, lambda: None)
    assert [mark["symbols"] for mark in marks] == [1024, 3000]
    shapes = jax.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)).init_state(1, 64))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert [mark["state"] for mark in marks] == [size, size]
    assert all(mark["finite"] and mark["of"] == "process" for mark in marks)


def test_a_state_that_grows_is_seen():
    """The control: attention keeps every symbol, and with room for a piece it goes astray."""
    config = small("attention")
    grows = np.diff([state_bytes(config, n) for n in (100, 200, 300)])
    assert grows.tolist() == [100 * 2 * 4 * config.width] * 2  # keys and values in float32
    batch = Batch(*(np.zeros((1, 48), int) for _ in range(3)))
    weights = learner.make(config, steps=1).init(jnp.arange(1)).params
    of = lambda capacity: [*read(config, weights, cut(batch, 24), capacity=capacity)]
    assert of(48)[-1].carried - of(24)[-1].carried == 24 * 2 * 4 * config.width
    assert np.isfinite(of(48)[-1].loss).all()
    assert not np.isfinite(of(24)[-1].loss).all()


def test_memory_that_grows_is_seen(monkeypatch):
    """A reader that keeps 4 MiB a piece, is carried farther each time, and goes astray."""
    kept = []

    def read(model, weights, given, *, capacity, leave):
        for n, piece in enumerate(given):
            kept.append(np.ones(2**19))
            lost = np.full(piece.tokens.shape, np.nan if n > 20 else 0.0)[None]
            yield Piece(piece, lost > 0, lost, n)

    monkeypatch.setattr(babilong, "read", read)
    first, last = babilong.stream(1, TEXT, 64, 2_048, small("deltanet"), {}, lambda: None)
    assert last["mib"] - first["mib"] > 0.8 * 16 * 4
    assert (first["state"], last["state"]) == (15, 31)
    assert first["finite"]
    assert not last["finite"]
    monkeypatch.setattr(resident, "on_device", lambda: 3.25)
    (*_, last) = babilong.stream(1, TEXT, 64, 2_048, small("deltanet"), {}, lambda: None)
    assert (last["mib"], last["of"]) == (3.2, "device")


def record(right, stream=()):
    bins = {"trained": {"rows": [1.0] * 3, "tokens": [1.0] * 3, "loss": [0.0] * 3}}
    found = {"validation": 1.0, "validations": [1.0] * 3, **bins}
    lines = {n: {"most frequent answer": int(n) / 1024, "last": 0.25} for n in right}
    exam = {"right": right, "lines": lines, **({"stream": stream} if stream else {})}
    return {"": {"rates": {"0.01": found}, "rate": "0.01", "steps": 9, "exam": exam}}


def test_tables_show_lengths_means_memory_and_who_is_ahead(tmp_path):
    plan = {"bins": {"trained": (1, 2)}, "stages": [[0, 128]], "tested": 9}
    mark = lambda n, mib, finite=True: dict(
        symbols=n, mib=mib, of="process", state=8 * n, finite=finite
    )
    whole, half, none = "11111111", "11110000", "00000000"
    models = {
        "hope": record(
            {"128": [whole] * 3, "256": [whole] * 3, "512": [whole]},
            [mark(1024, 90.2), mark(5000, 91.2, False)],
        ),
        "titans": record(
            {"128": [half] * 3, "256": [whole, half, none], "512": [none]}, [mark(1024, 77.2)]
        ),
        "deltanet": record({"128": [none] * 3, "256": [none] * 3, "512": [half]}),
        "gated deltanet": record({"128": [whole] * 3, "256": [whole, whole, half]}),
        "transformer": record({"128": [whole] * 3}),
    }
    results = {"1 fact": {"plan": plan, "chance": {"trained": 0.25}, "models": models}}
    sizes = {"1 fact": {name: {"": 12_345} for name in models}}
    text = babilong_table.shown(results, sizes)
    assert "| model | state | 128 | 256 | 512 | mean to 256 |" in text
    assert "| hope | 12,345 | 100 | 100 | 100 | 100.0 |" in text
    assert "| titans | 12,345 | 50 | 50 (0 to 100) | 0 | 50.0 |" in text
    assert "| transformer | 12,345 | 100 |  |  |  |" in text
    assert "| *most frequent answer* |  | 12.5 | 25.0 | 50.0 | 18.8 |" in text
    assert "| *rows* |  | 8 | 8 | 8 |  |" in text
    assert "| *seeds that read them* |  | 3 | 3 | 1 |  |" in text
    assert "| 1 fact | hope | 90 | 91 | 8,192 | 40,000 | no |" in text
    assert "| 1 fact | titans | 77 |  | 8,192 | 8,192 | yes |" in text
    assert "Hope against titans, 1 fact: +50.0 ± 17.5 points, ahead; at 512" in text
    assert "at 512 symbols alone +100.0 ± 0.0 points, ahead." in text
    assert "Hope against deltanet, 1 fact: +100.0 ± 0.0 points, ahead; at 512" in text
    assert "alone +50.0 ± 18.9 points, ahead." in text
    assert "Hope against gated deltanet, 1 fact: +8.3 ± 8.9 points, level; at 256" in text
    assert "The aim: at least level with Titans in the mean: yes; above deltanet: yes; " in text
    assert "; above gated deltanet: no." in text
    babilong_table.plot(tmp_path / "lengths.png", results)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_gets_a_sentence():
    draw = np.random.default_rng(0)
    with pytest.raises(ValueError, match="`length` is 11; it must be at least 12"):
        stories(2, draw, 1, 11, TEXT)
    with pytest.raises(Refused, match="leaves no text"):
        stories(1, draw, 1, 90, TEXT[:0])
    with pytest.raises(ValueError, match="`streamed` is 10; it must be >= 1,024"):
        babilong.Babilong(streamed=10)
    for longest in (10, 2**20 + 1):
        said = f"`longest` is {longest}; it must be from 1,024 to 1,048,576"
        with pytest.raises(ValueError, match=said):
            babilong.Babilong(longest=longest)
    with pytest.raises(ValueError, match="`asked` is 1; it must be from 0 to below 1"):
        stories(1, draw, 1, 90, TEXT, asked=1)
    with pytest.raises(ValueError, match="`asked` is 2; it must be from 0 to 1"):
        facts_tasks.facts(1, asked=2)
