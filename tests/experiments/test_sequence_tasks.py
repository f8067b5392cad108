# SPDX-License-Identifier: Apache-2.0
"""Sequence tasks against plain programs that know nothing of how rows were drawn."""

import itertools

import numpy as np
import pytest
from nlx_experiments import formal_languages as languages
from nlx_experiments import recall_tasks
from nlx_experiments.errors import Refused
from nlx_experiments.sequence_tasks import Batch, chance, padded, shuffled, windows

ROWS = 200


def drawn(task, shortest=1, longest=24, seed=0, rows=ROWS) -> Batch:
    return task.draw(np.random.default_rng(seed), rows, shortest, longest)


def words(batch):
    """(symbols, answers) of every row, without what fills it up."""
    for tokens, answers, scored in zip(batch.tokens, batch.answers, batch.scored, strict=True):
        n = int(scored.sum())
        assert (scored[:n] == 1).all()
        assert (scored[n:] == 0).all()
        assert (tokens[n:] == 0).all()
        yield tokens[:n].tolist(), answers[:n].tolist()


def parity(prefix):
    return prefix.count(1) % 2


def even(prefix):
    return len(prefix) % 2


def abab(prefix):
    return {1: 0, 2: 1, 3: 0, 0: 2}[len(prefix) % 4]  # b; a; b; a or the end


def counted(letters):
    """What may follow: 0 a or the next letter, n the n-th letter after a, or the end."""

    def answer(prefix):
        counts = [prefix.count(letter) for letter in range(letters)]
        if len(prefix) == counts[0]:
            return 0
        last = prefix[-1]
        return last if counts[last] < counts[0] else last + 1

    return answer


def shuffle(prefix):
    """Which kinds of brackets are open, by erasing pairs."""

    def opened(kind):
        text = "".join("()"[s % 2] for s in prefix if s // 2 == kind)
        while "()" in text:
            text = text.replace("()", "")
        assert ")" not in text
        return len(text) > 0

    return opened(0) + 2 * opened(1)


def matrix(permutation):
    return np.eye(5, dtype=int)[:, list(permutation)].T


def product(elements, generators):
    """The running product, as matrices."""

    def answer(prefix):
        state = np.eye(5, dtype=int)
        for symbol in prefix:
            state = state @ matrix(generators[symbol])
        return next(n for n, e in enumerate(elements) if (matrix(e) == state).all())

    return answer


def value(prefix):
    total = 0
    for symbol in prefix:
        total = eval(f"({total}) {'+-*'[symbol // 5]} {symbol % 5}") % 5
    return total


ANSWERS = {
    "parity": parity,
    "(aa)*": even,
    "(abab)*": abab,
    "a^n b^n": counted(2),
    "a^n b^n c^n": counted(3),
    "shuffle-2": shuffle,
    "S5": product(languages.S5, languages.S5),
    "S5 by swaps": product(languages.S5, languages.SWAPS),
    "A5": product(languages.A5, languages.A5),
    "arithmetic mod 5": value,
}
ALL = languages.LANGUAGES | languages.WORD_PROBLEMS


@pytest.mark.parametrize("name", ALL)
def test_every_prefix_has_the_answer_of_a_plain_program(name):
    task = ALL[name]
    few = 20 if name in languages.WORD_PROBLEMS else ROWS
    lengths = set()
    for tokens, answers in words(drawn(task, rows=few)):
        assert answers == [ANSWERS[name](tokens[: n + 1]) for n in range(len(tokens))]
        assert max(tokens) < task.symbols <= task.vocabulary
        assert max(answers) < task.classes <= task.vocabulary
        lengths.add(len(tokens))
    assert len(lengths) >= 6  # not one length alone


@pytest.mark.parametrize(("name", "step"), [("a^n b^n", 2), ("a^n b^n c^n", 3), ("shuffle-2", 2)])
def test_words_are_whole_and_of_every_length(name, step):
    """The end comes after the last symbol, and all lengths that the language has are drawn."""
    batch = drawn(ALL[name], 5, 14)
    found = {len(tokens): answers[-1] for tokens, answers in words(batch)}
    assert set(found) == {n for n in range(5, 15) if n % step == 0}
    end = {"a^n b^n": 2, "a^n b^n c^n": 3, "shuffle-2": 0}[name]
    assert set(found.values()) == {end}


def test_bracket_words_are_drawn_evenly():
    """Of the 14 words of four pairs of one kind each comes as often."""
    batch = drawn(ALL["shuffle-2"], 8, 8, rows=20_000)
    one_kind = batch.tokens[(batch.tokens < 2).all(1)]
    _, counts = np.unique(one_kind, axis=0, return_counts=True)
    assert len(counts) == 14
    assert counts.max() / counts.min() < 1.7  # about 90 each: a fair draw is off by 30 % at most


def test_groups_are_what_they_are_called():
    assert (len(languages.S5), len(languages.A5), len(languages.SWAPS)) == (120, 60, 10)
    composed = {tuple(b[i] for i in a) for a, b in itertools.product(languages.A5, languages.A5)}
    assert composed == set(languages.A5)


def test_no_length_to_draw_is_one_sentence():
    with pytest.raises(ValueError, match="`longest` is 5; there must be a multiple of 2 from 5"):
        drawn(ALL["a^n b^n"], 5, 5)


@pytest.mark.parametrize("name", ["parity", "shuffle-2"])
def test_the_control_keeps_counts_and_breaks_order(name):
    plain, control = drawn(ALL[name]), drawn(shuffled(ALL[name]))
    np.testing.assert_array_equal(plain.tokens, control.tokens)
    assert (plain.answers != control.answers).any()
    counts = [np.bincount(batch.answers[batch.scored > 0]) for batch in (plain, control)]
    np.testing.assert_array_equal(*counts)


def test_chance_is_the_most_frequent_answer():
    answers = np.asarray([[0, 1, 1, 2], [1, 2, 2, 2]])
    scored = np.asarray([[1, 1, 1, 0], [1, 0, 0, 0]], np.float32)
    assert chance(Batch(answers, answers, scored)) == 0.75


def told(batch):
    """(symbols before and at, answer) of every scored position, with its row."""
    for row, t in zip(*np.nonzero(batch.scored), strict=True):
        yield batch.tokens[row], t, batch.answers[row, t]


def test_recall_asks_for_what_a_row_told():
    batch, asked = drawn(recall_tasks.recall(8), longest=31), 0
    for tokens, t, answer in told(batch):
        pairs = dict(zip(tokens[0 : t - 1 : 2], tokens[1:t:2], strict=False))
        assert pairs[tokens[t]] == answer == tokens[t + 1]
        asked += 1
    assert asked > 10 * ROWS  # all keys after their first time: 15 pairs, 4 keys
    first = {
        (r, k): t for r, row in enumerate(batch.tokens) for t, k in list(enumerate(row[:30]))[::-2]
    }
    assert not any(batch.scored[r, t] for (r, _), t in first.items() if t % 2 == 0)


def test_fuzzy_recall_asks_for_what_a_row_told():
    """Keys below 3, values above; a scored answer follows the same key as before."""
    batch, asked = drawn(recall_tasks.fuzzy_recall(6, 3, 2), longest=40, rows=50), 0
    for tokens, t, answer in told(batch):
        row = tokens.tolist()
        start = t
        while row[start] >= 3:  # back to the key's last symbol
            start -= 1
        first = start
        while first > 0 and row[first - 1] < 3:
            first -= 1
        key, value = row[first : start + 1], row[start + 1 : t + 1]
        before, n = [], 0
        while n < first:  # the row's earlier keys with their values
            k = n
            while row[k] < 3:
                k += 1
            v = k
            while row[v] >= 3:
                v += 1
            before.append((row[n:k], row[k:v]))
            n = v
        known = next(v for k, v in before if k == key)
        assert known[: len(value) + 1] == [*value, answer]
        asked += 1
    assert asked > 100


def test_selective_copying_asks_for_all_symbols_in_order():
    batch = drawn(recall_tasks.selective_copying(8, 4), longest=20)
    for tokens, answers, scored in zip(batch.tokens, batch.answers, batch.scored, strict=True):
        assert tokens[16] == 1
        assert scored.sum() == 4
        assert tokens[:16][tokens[:16] > 0].tolist() == answers[16:].tolist()
        assert (tokens[17:] == 0).all()


def test_memorization_has_one_table_for_all_rows():
    task = recall_tasks.memorization(6, 4)
    table = {}
    for tokens, t, answer in told(drawn(task, longest=16)):
        assert tokens[t] == 0
        assert tokens[t - 1] > 0
        assert table.setdefault(tokens[t - 1], answer) == answer
    assert len(table) == 6
    assert len(set(table.values())) > 1


def test_multi_query_asks_for_every_key_once():
    batch = drawn(recall_tasks.multi_query(3, 5, 4), longest=14)
    gaps = []
    for row in range(ROWS):
        tokens, scored = batch.tokens[row], batch.scored[row]
        pairs = dict(zip(tokens[0:6:2], tokens[1:6:2], strict=True))
        assert len(pairs) == 3
        assert all(k < 5 <= v < 9 for k, v in pairs.items())
        places = np.nonzero(scored)[0]
        assert sorted(tokens[places]) == sorted(pairs)
        assert all(batch.answers[row, t] == pairs[tokens[t]] for t in places)
        others = np.delete(tokens[6:], places - 6)
        assert others.min() >= 5
        assert others.max() < 9
        assert len(set(others)) > 1
        gaps += (places - 6).tolist()
    assert np.mean(gaps) < 3.2  # evenly it would be 3.5


def test_text_answers_with_the_next_byte_of_its_own_split():
    splits = [np.arange(n, n + 60, dtype=np.uint8) for n in (0, 60, 120)]
    task = windows(*splits)
    for draw, split in zip((task.draw, task.validation, task.test), splits, strict=True):
        assert draw is not None
        batch = draw(np.random.default_rng(0), 50, 8, 8)
        np.testing.assert_array_equal(batch.answers, batch.tokens + 1)
        assert set(np.unique(batch.tokens)) <= set(split.tolist())
        assert batch.scored.all()
        assert len(np.unique(batch.tokens[:, 0])) > 10


def test_text_shorter_than_a_window_is_one_sentence():
    split = np.arange(8, dtype=np.uint8)
    draw = windows(split, split, split).draw
    assert draw(np.random.default_rng(0), 2, 7, 7).tokens.tolist() == [[*range(7)]] * 2
    with pytest.raises(Refused, match="`--data` leaves 8 bytes to one part of the text; .* than 8"):
        draw(np.random.default_rng(0), 2, 8, 8)


def test_padding_is_not_scored():
    batch = padded(drawn(ALL["parity"], 3, 10), 16)
    assert batch.tokens.shape == batch.answers.shape == batch.scored.shape == (ROWS, 16)
    assert (batch.scored[:, 10:] == 0).all()
