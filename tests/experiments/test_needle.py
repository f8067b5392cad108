"""Needles: every row against a regular expression or a slow reader; the grid that is examined."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nlx_experiments import (
    needle,
    needle_mixture,
    needle_table,
    needle_tasks,
    needle_writing,
    sequence_reading,
)
from nlx_experiments import sequence_learner as learner
from nlx_experiments.needle_tasks import KINDS, compose
from nlx_experiments.sequence_tasks import Batch, shuffled

from nlx import nn

SOURCE = np.frombuffer(pathlib.Path(needle_tasks.__file__).read_bytes() * 3, np.uint8)
BYTES, SYMBOLS = needle_writing.in_bytes(SOURCE), needle_writing.in_symbols()
TOLD = re.compile(r"One of the special magic values for ([\w-]+) is: ([\w-]+)\.\n")
ASKED = re.compile(
    r"\nWhat are all the special magic values for ([\w, -]+) mentioned in .*They are: "
)
HEX = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
FORMS = {"word": r"([bdfgklmnprstvz][aeiou]){4}", "number": r"\d{7}", "uuid": HEX}

cases = given(
    seed=st.integers(0, 2**32),
    length=st.integers(0, 900),
    depth=st.one_of(st.none(), st.floats(0, 1)),
)


def told_in_symbols(row, kind):
    """Needles by a plain loop over the row up to the question: (start, key, value)."""
    mark, asks = SYMBOLS.needle[0][0], SYMBOLS.question[0][0]
    key, value = (len(SYMBOLS.alphabets[name]) for name in (kind.key, kind.value))
    end = list(row).index(asks)
    found = []
    for start in range(end):
        if row[start] == mark:
            inside = tuple(row[start + 1 : start + 1 + key + value])
            found.append((start, inside[:key], inside[key:]))
    asked = row[end + 1 : end + 1 + key * kind.asked]
    return found, [tuple(asked[n : n + key]) for n in range(0, len(asked), key)]


def told_in_bytes(row, kind):
    """The same by regular expressions."""
    text = bytes(row.astype(np.uint8)).decode("latin-1")
    question = ASKED.search(text)
    assert question is not None
    found = [(m.start(), m[1], m[2]) for m in TOLD.finditer(text)]
    for _, key, value in found:
        assert re.fullmatch(FORMS[kind.key], key)
        assert re.fullmatch(FORMS[kind.value], value)
    return found, question[1].split(", ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["symbols", "bytes"])
@cases
def test_rows_hold_what_they_say_where_they_say_and_a_reader_can_answer(
    form, kind, seed, length, depth
):
    writing, plain = (SYMBOLS, told_in_symbols) if form == "symbols" else (BYTES, told_in_bytes)
    kind = KINDS[kind]
    length += 1200 if form == "bytes" else 60
    rows = compose(kind, writing, np.random.default_rng(seed), 2, length, depth)
    batch = rows.batch
    assert batch.tokens.shape == batch.answers.shape == batch.scored.shape == (2, length)
    assert batch.tokens.max() < writing.symbols
    free = needle_tasks.room(kind, writing, length)
    for n, row in enumerate(batch.tokens):
        found, asked = plain(row, kind)
        code = (lambda x: bytes(x.astype(np.uint8)).decode()) if form == "bytes" else tuple
        own = {
            (start, code(key), code(value))
            for start, key, value in zip(rows.starts[n], rows.keys[n], rows.values[n], strict=True)
        }
        assert own <= set(found)
        if form == "bytes":
            assert all(row[start - 1] == ord("\n") for start, _, _ in found)
        assert asked == [code(key) for key in rows.asked[n]]
        assert len({key for _, key, _ in own}) == kind.keys
        assert len({value for _, _, value in own}) == kind.keys * kind.values
        others = set(found) - own
        assert bool(others) == (kind.haystack == "needles")
        assert not {key for _, key, _ in others} & {key for _, key, _ in own}
        answer = [value for key in asked for _, k, value in found if k == key]
        assert len(answer) == kind.asked * kind.values
        scored = np.flatnonzero(batch.scored[n])
        assert (batch.answers[n, scored] == row[scored + 1]).all()
        said = code(batch.answers[n, scored])
        assert said == (sum(answer, ()) if form == "symbols" else "".join(answer))
        assert scored[-1] == length - 2
        assert not batch.answers[n, batch.scored[n] == 0].any()
        first = min(start for start, key, _ in found if key == asked[0])
        if depth is not None:  # the last place before it at which a needle may stand
            begin = writing.instruction.size
            width = needle_tasks.needle_size(kind, writing)
            before = first - begin - width * sum(s < first for s, _, _ in own)
            most = {"noise": writing.noise.size, "needles": width}.get(kind.haystack, 400)
            assert depth * free - most - 1 <= before <= depth * free + 0.5


@pytest.mark.parametrize("kind", ["S-NIAH-1", "S-NIAH-2"])
def test_without_its_needle_a_row_is_its_haystack(kind):
    rows = compose(KINDS[kind], BYTES, np.random.default_rng(3), 20, 1500)
    width = needle_tasks.needle_size(KINDS[kind], BYTES)
    places = set()
    for row, (start,) in zip(rows.batch.tokens, rows.starts, strict=True):
        text = bytes(np.delete(row, np.arange(start, start + width)).astype(np.uint8))
        begin, end = BYTES.instruction.size, text.index(b"\nWhat are all")
        hay = text[begin:end]
        if kind == "S-NIAH-1":
            assert hay == np.resize(BYTES.noise, len(hay)).astype(np.uint8).tobytes()
            assert (start - begin) % BYTES.noise.size == 0
        else:
            assert hay in SOURCE.tobytes()
        places.add(start)
    assert len(places) > 6


def test_the_depth_is_the_share_of_the_haystack_before_the_needle():
    ends = {}
    for depth in (0.0, 0.5, 1.0):
        rows = compose(KINDS["S-NIAH-2"], SYMBOLS, np.random.default_rng(0), 4, 200, depth)
        assert len({*rows.starts[:, 0]}) == 1
        ends[depth] = rows.starts[0, 0]
    free = needle_tasks.room(KINDS["S-NIAH-2"], SYMBOLS, 200)
    assert ends == {0.0: 0, 0.5: round(free / 2), 1.0: free}


@pytest.mark.parametrize("length", [40, 64, 128])
@pytest.mark.parametrize("name", KINDS)
def test_drills_ask_again_and_again_and_a_reader_can_answer(name, length):
    kind, questions = needle_mixture.drill(KINDS[name], SYMBOLS, length)
    assert kind._replace(keys=KINDS[name].keys) == KINDS[name]
    batch = compose(kind, SYMBOLS, np.random.default_rng(1), 6, length, questions=questions).batch
    size = kind.asked * len(SYMBOLS.alphabets[kind.key])
    keys = set()
    for row, answers, scored in zip(batch.tokens, batch.answers, batch.scored, strict=True):
        asks = np.flatnonzero(row == SYMBOLS.question[0][0])
        assert len(asks) == questions
        told, graded = told_in_symbols(row, kind)[0], []
        for ask, end in zip(asks, [*asks[1:], length], strict=True):
            of = [tuple(key) for key in row[ask + 1 : ask + 1 + size].reshape(kind.asked, -1)]
            values = [value for key in of for _, k, value in told if k == key]
            assert tuple(row[ask + 1 + size : end]) == sum(values, ())
            graded += range(ask + size, end - 1)
            keys |= {(row.tobytes(), key) for key in of}
        assert np.flatnonzero(scored).tolist() == graded
        assert (answers[graded] == row[1:][graded]).all()
    if length == 128:
        assert kind.keys == (3 if kind.values > 1 else 4)  # needles take half of a row at most
        assert len(keys) > 4 * kind.keys  # of six rows
        assert batch.scored.sum() > 6 * 24


def test_rows_that_choose_and_report_have_lengths_of_their_own():
    task = needle_mixture.mixture(
        needle.SIX, dict.fromkeys(("train", "validation", "test"), SYMBOLS)
    )
    for draw in (task.validation, task.test):
        assert draw is not None
        batch = draw(np.random.default_rng(0), 48, 40, 128)
        ends = [np.flatnonzero(row)[-1] + 2 for row in batch.scored]
        assert len({*ends}) > 20
        assert {*batch.scored.sum(1)} == {2, 4, 8}  # none is a drill


def test_the_longest_rows_are_drawn_before_anything_is_trained():
    grid = needle.Grid(("S-NIAH-2",), (1024, 65_536), (0.5,), 4, 256, 9)
    with pytest.raises(needle_writing.Refused, match="there must be more than 65"):
        needle.exam(grid, {"test": BYTES})


def test_a_mixture_examines_every_kind_and_trains_on_one_a_batch(monkeypatch):
    monkeypatch.setattr(needle_mixture, "DRILLS", 0.0)
    names = ("S-NIAH-3", "MQ-NIAH")
    task = needle_mixture.mixture(names, dict.fromkeys(("train", "validation", "test"), SYMBOLS))
    counts = lambda batch: {*batch.scored.sum(1).astype(int)}
    whole = {4, 8}  # one uuid of four; four numbers of two
    assert task.validation is not None
    assert counts(task.validation(np.random.default_rng(0), 6, 70, 70)) == whole
    seen = [counts(task.draw(np.random.default_rng(n), 4, 60, 90)) for n in range(20)]
    assert all(len(kinds) == 1 for kinds in seen)
    assert set.union(*seen) == whole
    lengths = {int(np.flatnonzero(task.draw(np.random.default_rng(n), 2, 60, 90).scored[0])[-1]) + 2
               for n in range(20)}  # fmt: skip
    assert min(lengths) < 70 < 80 < max(lengths) <= 90
    control = shuffled(task).draw(np.random.default_rng(5), 400, 60, 60)
    true = task.draw(np.random.default_rng(5), 400, 60, 60)
    agree = (control.answers == true.answers)[true.scored > 0].mean()
    assert agree < 0.2


def test_a_value_counts_where_all_of_it_is_right():
    kind = KINDS["MQ-NIAH"]
    right = np.ones((1, 2, 8), bool)
    right[0, 0, 3] = right[0, 1, 6] = right[0, 1, 7] = False
    values = needle_tasks.right_values(right, kind, SYMBOLS)
    assert values.tolist() == [[[True, False, True, True], [True, True, True, False]]]
    assert needle_tasks.chance(kind, SYMBOLS) == pytest.approx(0.01)
    assert needle_tasks.chance(kind, BYTES) == pytest.approx(1e-7)


def test_guesses_of_who_knows_the_values_but_not_which_is_due():
    draw = np.random.default_rng(0)
    for name, kind in KINDS.items():
        found = needle_tasks.guesses(kind)
        if name not in ("MK-NIAH-1", "MQ-NIAH", "MV-NIAH"):
            assert not found
            continue
        rows = compose(kind, SYMBOLS, draw, 400, 64)
        of = lambda row: {tuple(value) for value in row}
        any_of, left = [], []
        for answers, scored, values in zip(
            rows.batch.answers, rows.batch.scored, rows.values, strict=True
        ):
            said = [tuple(pair) for pair in answers[scored > 0].reshape(-1, 2)]
            for n, value in enumerate(said):
                rest = sorted(of(values) - set(said[:n]))
                any_of.append(sorted(of(values))[draw.integers(4)] == value)
                left.append(rest[draw.integers(len(rest))] == value)
        assert found["any needle's value"] == 0.25
        assert abs(np.mean(any_of) - 0.25) < 0.07
        if name == "MK-NIAH-1":
            assert len(found) == 1
        else:
            assert found["any not said yet"] == pytest.approx(25 / 48)
            assert abs(np.mean(left) - 25 / 48) < 0.05


SMALL = dict(
    feed_forward="swiglu", vocabulary=SYMBOLS.symbols, width=8, heads=2, layers=1, hidden=4
)


SLOW = [pytest.param(mixer, marks=pytest.mark.slow)
        for mixer in ("attention", "titans_lmm", "self_modifying")]  # fmt: skip


@pytest.fixture(scope="module", params=["deltanet", *SLOW])
def trained(request):
    kind = "cms" if request.param == "self_modifying" else "swiglu"
    rest = dict(feed_forward=kind, chunk_size=8, projection_chunk_size=8, memory_hidden=4)
    config = nn.ModelConfig(mixer=request.param, **{**SMALL, **rest}, cms_periods=(1, 1, 1))
    return config, learner.make(config, steps=1).init(jnp.arange(2)).params


def test_reading_in_pieces_is_reading_whole_rows(trained):
    config, weights = trained
    batch = compose(KINDS["MV-NIAH"], SYMBOLS, np.random.default_rng(0), 5, 100).batch
    cuts = lambda size: sequence_reading.cut(batch, size)
    with jax.enable_x64(True):  # in float32 they differ by what either differs from this
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), weights)
        (whole,) = sequence_reading.read(config, wide, cuts(100), capacity=100)
        parts = [*sequence_reading.read(config, wide, cuts(32), capacity=100)]
    assert whole.loss.dtype == np.float64
    assert [p.right.shape for p in parts] == [(2, 5, 32)] * 3 + [(2, 5, 4)]
    np.testing.assert_allclose(np.concatenate([p.loss for p in parts], 2), whole.loss, atol=1e-9)
    assert (np.concatenate([p.right for p in parts], 2) == whole.right).all()
    scores = learner.make(config, steps=1).score(weights, batch)
    lost = (whole.loss * batch.scored).sum((1, 2)) / batch.scored.sum()
    np.testing.assert_allclose(lost, scores.loss, atol=1e-5)


def test_scores_that_are_not_finite_are_never_right(trained):
    config, weights = trained
    batch = compose(KINDS["S-NIAH-1"], SYMBOLS, np.random.default_rng(0), 5, 100).batch
    none = Batch(batch.tokens, np.zeros_like(batch.answers), batch.scored)  # the first symbol
    lost = jax.tree.map(lambda leaf: jnp.nan * leaf, weights)
    (whole,) = sequence_reading.read(config, lost, [none], capacity=100)
    assert not whole.right.any()


def test_a_piece_may_be_left(trained):
    config, weights = trained
    batch = compose(KINDS["S-NIAH-1"], SYMBOLS, np.random.default_rng(0), 5, 100).batch

    def leave():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        next(sequence_reading.read(
            config, weights, sequence_reading.cut(batch, 32), capacity=100, leave=leave
        ))  # fmt: skip


def test_the_grid_is_examined_cell_by_cell(monkeypatch):
    """A model that knows the values but at the start of a row; groups of rows as of one."""
    grid = needle.Grid(("S-NIAH-2", "MQ-NIAH"), (64, 96), (0.0, 1.0), 3, 16, 64)
    seen = []

    def read(model, weights, pieces, *, capacity, leave):
        pieces = [*pieces]
        tokens = np.concatenate([p.tokens for p in pieces], 1)
        seen.append(tokens.shape)
        late = np.array([SYMBOLS.needle[0][0] not in row[:1] for row in tokens])
        right = np.broadcast_to(late[None, :, None], (2, *tokens.shape)).copy()
        right[1] = True
        return [sequence_reading.Piece(Batch(tokens, tokens, tokens), right, right)]

    monkeypatch.setattr(needle, "read", read)
    monkeypatch.setattr(needle, "AT_ONCE", 4 * 64)
    of = lambda mixer: nn.ModelConfig(mixer=mixer, **SMALL)
    found = needle.examine(grid, SYMBOLS, of("deltanet"), None, lambda: None)
    assert found["right"]["S-NIAH-2"] == {n: [[0.0, 1.0], [1.0, 1.0]] for n in ("64", "96")}
    assert [*found["right"]] == [*found["chance"]] == list(grid.kinds)
    assert {*seen} == {(4, 64), (2, 96)}  # six rows of a cell; 256 symbols at once
    attends = needle.examine(grid, SYMBOLS, of("attention"), None, lambda: None)["right"]
    assert attends["MQ-NIAH"] == {"64": found["right"]["MQ-NIAH"]["64"]}


def record(share, *others):
    one = lambda x: [x, 1.0, 1.0, 1.0, 1.0]
    shares = [share, *others] if others else [share] * 3
    right = {"MQ-NIAH": {"128": [[1.0] * 5] * 3, "4096": [one(x) for x in shares]}}
    if share is None:  # short rows alone
        del right["MQ-NIAH"]["4096"]
    exam = {"right": right, "chance": {"MQ-NIAH": 0.01}}
    bins = {"trained": {"rows": [1.0] * 3, "tokens": [1.0] * 3, "loss": [0.0] * 3}}
    found = {"validation": 1.0, "validations": [1.0] * 3, **bins}
    return {"": {"rates": {"0.01": found}, "rate": "0.01", "steps": 9, "exam": exam}}


def test_tables_and_maps_show_lengths_depths_the_paper_and_who_is_ahead(tmp_path):
    plan = {"bins": {"trained": (1, 2)}, "stages": [[0, 128]], "tested": 9}
    models = {
        "hope": record(0.5),
        "transformer": record(None),
        "titans": record(0.0, 0.5, 1.0),
        "deltanet": record(0.0),
        "gated deltanet": record(1.0),
    }
    sizes = {name: {"": 1_234} for name in models}
    results = {needle_table.TASK: {"plan": plan, "chance": {"trained": 0.1}, "models": models}}
    text = needle_table.shown(results, sizes, 4_096)
    assert "after 4,096 symbols. This is far from RULER" in text
    assert "| hope | 1,234 | 100 | 90 [31.7] |" in text
    assert "| titans | 1,234 | 100 | 90 (80 to 100) [22.8] |" in text
    assert "| transformer | 1,234 | 100 |  |" in text
    assert "| *each symbol drawn* |  | 1 | 1 |" in text
    assert "| *any needle's value* |  | 25 | 25 |" in text
    assert "| *any not said yet* |  | 52 | 52 |" in text
    assert "trained on: hope 90.0, titans 90.0, deltanet 80.0, gated deltanet 100.0." in text
    assert "* Hope against titans: +0.0 ± 5.8 points, level." in text
    assert "* Hope against deltanet: +10.0 ± 0.0 points, ahead." in text
    assert "* Hope against gated deltanet: -10.0 ± 0.0 points, behind." in text
    assert "The aim: at least level with Titans in the mean: yes; above deltanet: yes; " in text
    assert "; above gated deltanet: no." in text
    needle_table.draw(tmp_path / "map.png", results[needle_table.TASK])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_titans_also_competes_with_a_larger_memory(monkeypatch):
    made = []
    monkeypatch.setattr(needle, "config", lambda *args, **fields: made.append((args, fields)))
    monkeypatch.setattr(needle, "exam", lambda grid, writings: None)
    monkeypatch.setattr(
        needle, "contestants", lambda sizes, n: {m: {"": m} for m in ("hope", "titans", "deltanet")}
    )
    (row,) = needle.full(needle.FULL, 1024, needle._in_symbols()).values()
    assert {m: len(v) for m, v in row.models.items()} == {"hope": 2, "titans": 2, "deltanet": 1}
    (_, sizes, parameters), _ = made[1]
    usual = needle.base(sizes["vocabulary"], needle.FULL.width, needle.FULL.layers)
    assert sizes == {**usual, "memory_hidden": 4 * usual["memory_hidden"]}
    assert parameters == needle.FULL.parameters


def test_bad_input_gets_a_sentence():
    draw = np.random.default_rng(0)
    with pytest.raises(ValueError, match="`names` holds 'NIAH'; it must be one of S-NIAH-1"):
        needle_mixture.mixture(("NIAH",), {"train": SYMBOLS})
    with pytest.raises(ValueError, match="`depth` is 2; it must be from 0 to 1"):
        compose(KINDS["S-NIAH-1"], SYMBOLS, draw, 1, 90, 2)
    with pytest.raises(ValueError, match="`length` is 8; it must be more than 8"):
        compose(KINDS["S-NIAH-1"], SYMBOLS, draw, 1, 8)
    with pytest.raises(ValueError, match="`letters` is 1; it must be an integer >= 2"):
        needle_writing.in_symbols(letters=1)
    with pytest.raises(ValueError, match="too few keys for 4 different ones"):
        compose(KINDS["MK-NIAH-1"], needle_writing.in_symbols(letters=3), draw, 1, 90)
    for options, longest, most in (
        (needle.Needle, 10, "16,384"),
        (needle.Needle, 16_385, "16,384"),
        (needle.Gpu, 65_537, "65,536"),
    ):
        said = f"`longest` is {longest}; it must be from 1,024 to {most}."
        with pytest.raises(ValueError, match=said):
            options(longest=longest)
    with pytest.raises(needle_writing.Refused, match="`--data` leaves 9 bytes to one part"):
        compose(KINDS["S-NIAH-2"], needle_writing.in_bytes(SOURCE[:9]), draw, 1, 900)
