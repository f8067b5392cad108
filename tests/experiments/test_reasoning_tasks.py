"""Stories and functions: every answer against a slow reader written from the rules."""

import itertools

import numpy as np
import pytest
from nlx_experiments import function_tasks, sequence_tasks
from nlx_experiments.facts_tasks import facts
from nlx_experiments.function_tasks import CLASSES, functions

PEOPLE, THINGS, PLACES = 4, 4, 6


def read(symbols, supporting):
    """Sentence by sentence: (place of the question, answer); refuses what can't happen."""
    names = [
        *[("place", n) for n in range(PLACES)],
        *[("person", n) for n in range(PEOPLE)],
        *[("thing", n) for n in range(THINGS)],
        *["moves", "takes", "drops", "asks", "now"],
    ]
    at, holder, journey, found = {}, {}, {}, []
    for n in range(0, len(symbols), 3):
        a, b, c = (names[s] for s in symbols[n : n + 3])
        if b == "moves":
            assert a[0] == "person"
            assert c[0] == "place"
            assert at.get(a) != c
            at[a] = c
            for thing, someone in holder.items():
                if someone == a:
                    journey[thing].append(c)
        elif b == "takes":
            assert a[0] == "person"
            assert c[0] == "thing"
            assert c not in holder
            assert journey.setdefault(c, [at[a]])[-1] == at[a]
            holder[c] = a
        elif b == "drops":
            assert holder.pop(c) == a
        else:
            assert a == "asks"
            if supporting == 1:
                assert b == "now"
                answer = at[c]
            elif supporting == 2:
                assert b == "now"
                answer = journey[c][-1]
            else:
                visits = [i for i, place in enumerate(journey[c]) if place == b and i > 0]
                answer = journey[c][visits[-1] - 1]
            found.append((n + 2, answer[1]))
    return found


@pytest.mark.parametrize("supporting", [1, 2, 3])
@pytest.mark.parametrize(("shortest", "longest"), [(12, 60), (90, 98)])
def test_facts_are_answered_as_a_reader_would(supporting, shortest, longest):
    task = facts(supporting)
    batch = task.draw(np.random.default_rng(0), 60, shortest, longest)
    assert batch.tokens.shape == (60, longest)
    assert batch.tokens.max() < task.symbols
    assert batch.answers.max() < task.classes == PLACES
    lengths = []
    for tokens, answers, scored in zip(batch.tokens, batch.answers, batch.scored, strict=True):
        places = np.flatnonzero(scored)
        length = places[-1] + 1  # a row ends with a question
        lengths.append(length)
        assert shortest <= length <= longest
        assert not tokens[length:].any()
        assert read(tokens[:length], supporting) == [(p, answers[p]) for p in places]
        assert not answers[scored == 0].any()
    assert len(set(lengths)) > 10 or longest - shortest < 10
    inside = batch.scored.sum() - len(lengths)
    assert 0.03 < inside / (sum(lengths) / 3 - len(lengths)) < 0.25  # questions stand anywhere


def test_facts_hold_all_that_can_happen():
    batch = facts(3).draw(np.random.default_rng(1), 200, 60, 60)
    words = batch.tokens.reshape(200, -1, 3)
    verbs = np.bincount(words[:, :, 1].ravel(), minlength=19)[14:17]
    assert (verbs > 300).all()
    # Every place is an answer, and none is likelier than it should be.
    counts = np.bincount(batch.answers[batch.scored > 0], minlength=PLACES)
    assert counts.min() > 0.1 * counts.sum()
    assert sequence_tasks.chance(batch) < 0.25


def by_hand(name, table, s):
    """Whether a table of values is of a class, by trying all its functions."""
    n = s.shape[1]
    y = 2 * table.astype(int) - 1
    if name == "conjunction":
        tried = (
            np.where((s[:, i] == a) & (s[:, j] == b), 1, -1)
            for i, j in itertools.combinations(range(n), 2)
            for a, b in itertools.product((-1, 1), repeat=2)
        )
        return any((t == y).all() or (t == -y).all() for t in tried)
    if name == "xor":
        tried = (s[:, list(c)].prod(1) for k in (2, 3) for c in itertools.combinations(range(n), k))
        return any((t == y).all() or (t == -y).all() for t in tried)
    if name == "decision list":  # greedily: a rule whose inputs all have one value
        left = np.ones(len(s), bool)
        while len(set(y[left])) > 1:
            rules = (left & (s[:, i] == a) for i in range(n) for a in (-1, 1))
            good = next((r for r in rules if r.any() and len(set(y[r])) == 1), None)
            if good is None:
                return False
            left &= ~good
        return True
    if name == "linear":  # the perceptron finds a separating plane if there is one
        x, w = np.column_stack([s, np.ones(len(s))]), np.zeros(n + 1)
        for _ in range(2000):
            wrong = np.flatnonzero(y * (x @ w) <= 0)
            if not len(wrong):
                return True
            w += y[wrong[0]] * x[wrong[0]]
        return False
    return True  # a network may be anything


@pytest.mark.parametrize("name", CLASSES)
def test_functions_are_of_their_class_and_balanced(name):
    s = function_tasks.inputs(4)
    assert s.tolist() == [[2 * (x >> i & 1) - 1 for i in range(4)] for x in range(16)]
    found = function_tasks.tables(np.random.default_rng(0), name, 80, 4)
    assert all(by_hand(name, table, s) for table in found)
    assert found.mean(1).min() >= 0.25
    assert found.mean(1).max() <= 0.75
    distinct = {tuple(table) for table in found}
    assert len(distinct) > (15 if name in ("xor", "conjunction") else 40)
    if name == "network":  # they do what no other class does
        others = [n for n in CLASSES if n != "network"]
        assert not all(any(by_hand(n, table, s) for n in others) for table in found)


def test_rows_tell_each_value_after_it_was_asked_and_nothing_twice():
    task = functions(("linear", "xor"), 4, ("network",))
    assert list(task.examined) == ["linear", "xor", "network"]
    assert task.symbols == 18
    for draw in (task.draw, *task.examined.values()):
        batch = draw(np.random.default_rng(0), 30, 20, 20)
        assert (batch.scored == ([1, 0] * 10)).all()
        x, y = batch.tokens[:, ::2] - 2, batch.tokens[:, 1::2]
        assert all(len(set(row)) == 10 for row in x)
        assert x.min() >= 0
        assert x.max() < 16
        assert (batch.answers[:, ::2] == y).all()
        assert set(y.ravel()) == {0, 1}
        assert not batch.answers[:, 1::2].any()
    s = function_tasks.inputs(4)
    assert all(by_hand("xor", table, s) for table in values_of(task.examined["xor"], 30))
    share = np.mean([by_hand("xor", table, s) for table in values_of(task.draw, 200)])
    assert 0.35 < share < 0.65


def values_of(draw, rows):
    """The whole functions of some rows."""
    batch = draw(np.random.default_rng(0), rows, 32, 32)
    order = np.argsort(batch.tokens[:, ::2], 1)
    return np.take_along_axis(batch.tokens[:, 1::2], order, 1) > 0


def test_examined_functions_of_trained_classes_are_never_trained_on():
    task = functions(("linear", "conjunction"), 4, ("network",))
    trained = {tuple(table) for table in values_of(task.draw, 2000)}
    for name in ("linear", "conjunction"):
        examined = {tuple(table) for table in values_of(task.examined[name], 200)}
        assert len(examined) > 4
        assert not trained & examined
    every = function_tasks.tables(np.random.default_rng(0), "conjunction", 2000, 4)
    assert len({tuple(t) for t in every} - trained) < 20  # of 48; all others are trained on


def test_examined_functions_of_held_out_classes_are_in_no_class_trained_on():
    task = functions(("linear", "conjunction"), 4, ("network",))
    trained = {tuple(table) for table in values_of(task.draw, 4000)}
    examined = [tuple(table) for table in values_of(task.examined["network"], 300)]
    assert len({*examined}) > 100
    assert not trained & {*examined}
    s = function_tasks.inputs(4)  # a few linear ones are too rare for 20,000 draws
    members = [
        any(by_hand(n, np.asarray(f), s) for n in ("linear", "conjunction")) for f in examined
    ]
    assert np.mean(members) < 0.1


def test_all_xors_of_two_and_three_bits_are_examined():
    task = functions(("linear", "conjunction", "decision list"), 4, ("xor",))
    examined = {tuple(table) for table in values_of(task.examined["xor"], 300)}
    s = function_tasks.inputs(4)
    xors = [s[:, list(c)].prod(1) for n in (2, 3) for c in itertools.combinations(range(4), n)]
    assert examined == {tuple(sign * x > 0) for x in xors for sign in (1, -1)}


def test_bayes_believes_in_no_function_that_is_not_examined():
    """Of networks in no class trained on it is right more often when it knows that they are."""
    names = ("linear", "conjunction", "decision list")
    task = functions(names, 4, ("network",))
    batch = task.examined["network"](np.random.default_rng(0), 200, 32, 32)
    knowing, guessing = (
        function_tasks.bayes(batch, ("network",), 4, outside=outside).mean()
        for outside in (names, ())
    )
    assert knowing > guessing + 0.01


def test_rivals_are_what_they_say():
    """Nearest examples by a loop; Bayes knows all of xor after its few functions are told apart."""
    batch = functions(("xor",), 4).draw(np.random.default_rng(2), 40, 32, 32)
    x, y = batch.tokens[:, ::2] - 2, batch.tokens[:, 1::2]
    expected = np.zeros(16)
    for row, values in zip(x, y, strict=True):
        for t in range(16):
            apart = [bin(row[t] ^ row[i]).count("1") for i in range(t)]
            near = [values[i] for i in range(t) if apart[i] == min(apart)]
            vote = 2 * sum(near) - len(near)
            expected[t] += 0.5 if vote == 0 else (vote > 0) == values[t]
    np.testing.assert_allclose(function_tasks.nearest(batch, 4), expected / 40)
    knows = function_tasks.bayes(batch, ["xor"], 4, samples=2_000)
    assert knows.shape == (16,)
    assert (knows[8:] == 1).all()
    assert knows[0] < 0.8
    wrong = function_tasks.bayes(batch, ["conjunction"], 4, samples=2_000)
    assert wrong[8:].mean() < 0.8


@pytest.mark.parametrize("task", [facts(2), functions(("linear",), 4, ("xor",))])
def test_the_control_holds_the_same_answers_and_no_information(task):
    control = sequence_tasks.shuffled(task)
    assert control.examined.keys() == task.examined.keys()
    draws = [(task.draw, control.draw)]
    draws += [(task.examined[n], control.examined[n]) for n in task.examined]
    for true, moved in draws:
        a, b = (draw(np.random.default_rng(0), 400, 12, 24) for draw in (true, moved))
        assert (a.tokens == b.tokens).all()
        assert (a.scored == b.scored).all()
        scored = a.scored > 0
        count = lambda x, scored=scored: np.bincount(x.answers[scored], minlength=task.classes)
        assert (count(a) == count(b)).all()
        assert not b.answers[~scored].any()
        shares = count(a) / scored.sum()
        agree = (a.answers == b.answers)[scored].mean()
        assert abs(agree - (shares**2).sum()) < 0.05  # as of two that know nothing of each other


def test_bad_input_gets_a_sentence():
    draw = np.random.default_rng(0)
    with pytest.raises(ValueError, match="`supporting` is 4; it must be 1, 2 or 3"):
        facts(4)
    with pytest.raises(ValueError, match="`people` is 1; it must be an integer >= 2"):
        facts(2, people=1)
    with pytest.raises(ValueError, match="`longest` is 11; it must be at least 12 symbols"):
        facts(3).draw(draw, 2, 1, 11)
    with pytest.raises(ValueError, match="`names` holds 'nets'; it must be of linear, conj"):
        functions(("nets",))
    with pytest.raises(ValueError, match="`held_out` holds 'nets'"):
        functions(("linear",), 4, ("nets",))
    with pytest.raises(ValueError, match="none of them twice"):
        functions(("linear",), 4, ("linear",))
    with pytest.raises(ValueError, match="`bits` is 3; it must be an integer from 4 to 10"):
        functions(("linear",), 3)
    with pytest.raises(ValueError, match="`longest` is 34; it must be from 2 to 32"):
        functions(("linear",), 4).draw(draw, 2, 34, 34)
