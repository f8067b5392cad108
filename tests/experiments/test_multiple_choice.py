# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: the right tokens are scored, in any tokens, batch or order; chance is chance."""

import numpy as np
import pytest
from nlx_experiments import multiple_choice as multiple
from nlx_experiments import tokenization
from nlx_experiments.multiple_choice import Item, item
from nlx_experiments.tokenization import BYTES


@pytest.fixture(scope="module")
def bpe():
    return tokenization.train(["the cat and the other cat saw that hat there\n" * 9] * 3, 270)


def pairwise(size, seed=0):
    """A model of two neighbours: log p of any next token after any token, drawn at random."""
    table = np.random.default_rng(seed).normal(size=(size, size))
    table -= np.log(np.exp(table).sum(-1, keepdims=True))
    return table, lambda tokens: table[tokens]


def test_a_continuation_is_scored_from_its_first_token_to_its_last():
    table, model = pairwise(256)
    text = b"\0to be or"
    expected = sum(table[a, b] for a, b in zip(text[5:], text[6:], strict=False))
    for pair in (("to be", " or"), ("to be ", "or")):  # white space goes to the continuation
        ((found, greedy),) = multiple.log_likelihoods(model, BYTES, [pair])
        assert found == pytest.approx(expected)
        assert not greedy
    ((alone, _),) = multiple.log_likelihoods(model, BYTES, [("", "to be or")])
    everything = sum(table[a, b] for a, b in zip(text, text[1:], strict=False))
    assert alone == pytest.approx(everything)


def test_greedy_means_every_token(bpe):
    table, model = pairwise(256)
    text = [*b"to"]
    for _ in range(4):
        text.append(int(np.argmax(table[text[-1]])))
    rest = bytes(text[2:]).decode(errors="surrogateescape")
    assert multiple.log_likelihoods(model, BYTES, [("to", rest)])[0][1]
    assert multiple.log_likelihoods(model, BYTES, [("to", rest[:2])])[0][1]
    wrong = rest[:-1] + chr((ord(rest[-1]) + 1) % 128)
    assert not multiple.log_likelihoods(model, BYTES, [("to", wrong)])[0][1]
    # What lies beyond the tokenizer is no rival.
    wide = np.full((300, 300), -3.0)
    wide[:, 299], wide[:, 65] = -1, -2
    pairs = [(np.array([0]), np.array([65]))]
    assert multiple.of_tokens(lambda t: wide[t], pairs, 256)[0] == (-2.0, True)
    assert multiple.of_tokens(lambda t: wide[t], pairs, 300)[0] == (-2.0, False)


@pytest.mark.parametrize("made", ["bytes", "bpe"])
def test_batches_and_padding_change_nothing(made, bpe):
    tokenizer = bpe if made == "bpe" else BYTES
    _, model = pairwise(tokenizer.size)
    shapes = set()

    def watched(tokens):
        shapes.add(tokens.shape)
        return model(tokens)

    words = "the cat and the other cat saw that hat there".split()
    pairs = [(" ".join(words[:n]), " " + " ".join(words[n:])) for n in range(1, 10)]
    pairs += [("the", " cat" * n) for n in (1, 40)]
    alone = multiple.log_likelihoods(model, tokenizer, pairs, batch=1)
    together = multiple.log_likelihoods(watched, tokenizer, pairs, batch=4)
    assert together == alone
    assert all(rows == 4 and length & (length - 1) == 0 for rows, length in shapes)
    by_hand = multiple.encode(tokenizer, *pairs[3])
    assert tokenizer.decode(np.concatenate(by_hand)) == b"\0" + "".join(pairs[3]).encode()


def test_long_texts_lose_their_beginning():
    _, model = pairwise(256)
    whole = multiple.log_likelihoods(model, BYTES, [("a" * 50 + "xy", "z" * 5)])
    assert multiple.log_likelihoods(model, BYTES, [("xy", "z" * 5)], longest=6) == whole
    ((cut, _),) = multiple.log_likelihoods(model, BYTES, [("xy", "z" * 5)], longest=3)
    table, _ = pairwise(256)
    assert cut == pytest.approx(3 * table[ord("z"), ord("z")])


def test_lengths_are_characters_or_bytes_without_the_space():
    """Every byte costs 1 nat: "ééé" 7 with its space, "abcd" 5."""
    model = lambda tokens: np.full((*tokens.shape, 256), -1.0)
    scores = lambda answer: multiple.score(
        model, BYTES, [item("q", ["\u00e9" * 3, "abcd"], answer)]
    )
    # Per character 7/3 against 5/4, per byte 7/6 against 5/4.
    assert scores(0)[1:4] == (0, 0, 1)
    assert scores(1)[1:4] == (1, 1, 0)


def test_the_same_in_any_tokens(bpe):
    """A token costs what its bytes do: then bytes and BPE give the same scores."""
    cost = np.random.default_rng(1).uniform(0.5, 3, 256)
    of = lambda made: np.array([-sum(cost[b] for b in piece) for piece in made.pieces])
    model = lambda made: lambda tokens: np.broadcast_to(of(made), (*tokens.shape, made.size))
    choices = ["the cat", "saw that", "other hats there", "and"]
    items = [item("the other cat", choices, n % 4) for n in range(5)]
    one, other = (multiple.score(model(made), made, items) for made in (BYTES, bpe))
    assert one == other
    assert 0 < one.acc < 1


def test_shuffled_labels_are_at_chance():
    rng = np.random.default_rng(0)
    _, model = pairwise(256)
    word = lambda: "".join(chr(97 + n) for n in rng.integers(0, 26, rng.integers(2, 7)))
    items = [item(word(), [word() for _ in range(4)], 0) for _ in range(300)]
    picks = [
        int(np.argmax([L for L, _ in multiple.log_likelihoods(
            model, BYTES, [(c, f" {w}") for c, w in zip(one.contexts, one.choices, strict=True)])]))
        for one in items
    ]  # fmt: skip
    right = [one._replace(answer=pick) for one, pick in zip(items, picks, strict=True)]
    assert multiple.score(model, BYTES, right).acc == 1
    order = rng.permutation(len(right))
    shuffled = [one._replace(answer=picks[n]) for one, n in zip(right, order, strict=True)]
    scores = multiple.score(model, BYTES, shuffled)
    error = (0.25 * 0.75 / 300) ** 0.5
    assert abs(scores.acc - 0.25) < 3 * error
    assert abs(scores.acc_norm - 0.25) < 3 * error


def test_no_number_is_never_right():
    table, _ = pairwise(256)
    table[:, ord("x")] = np.nan
    scores = lambda *items: multiple.score(lambda tokens: table[tokens], BYTES, items)
    assert scores(item("q", ["xx", "ab"], 1))[1:4] == (1, 1, 1)
    assert scores(item("q", ["xx", "ab"], 0))[1:4] == (0, 0, 0)
    assert scores(item("q", ["xx", "x"], 0), item("q", ["xx", "ab"], 1)).acc == 0.5
    last = scores(item("q", ["xx"], 0))
    assert (last.acc, last.perplexity) == (0, None)


def test_what_cannot_be_scored_is_refused():
    _, model = pairwise(256)
    one = Item(("a",), ("b",), 0)
    for items in ([], [one, item("a", ["b", "c"], 0)]):
        with pytest.raises(ValueError, match="`items` holds"):
            multiple.score(model, BYTES, items)
    with pytest.raises(ValueError, match="`answer` is 2; it must be in"):
        item("a", ["b", "c"], 2)
