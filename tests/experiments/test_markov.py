# SPDX-License-Identifier: Apache-2.0
"""Witten-Bell against its definition, counted with dictionaries, and against hand numbers."""

import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from nlx_experiments import markov


def naive_code_lengths(parts, text, order):
    """The definition of `markov`'s docstring, byte by byte."""
    seen = defaultdict(Counter)
    for part in parts:
        for i in range(len(part)):
            for k in range(min(i, order) + 1):
                seen[k, part[i - k : i]][part[i]] += 1

    def probability(context, byte):
        lower = probability(context[1:], byte) if context else 1 / 256
        followers = seen[len(context), context]
        if not followers:
            return lower
        distinct, total = len(followers), sum(followers.values())
        return (followers[byte] + distinct * lower) / (total + distinct)

    return [-math.log2(probability(text[max(i - order, 0) : i], text[i])) for i in range(len(text))]


TEXT = b"def ham(spam):\n    return spam + ham\n\0class Ham:\n    spam = ham\n"


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5, 7])
def test_equals_the_definition(order):
    fitted, scored = np.frombuffer(TEXT, np.uint8), b"spam = ham(ham)\nxyz\xff"
    model = markov.fit(fitted, order)
    bits = markov.code_lengths(model, np.frombuffer(scored, np.uint8))
    np.testing.assert_allclose(bits, naive_code_lengths([TEXT], scored, order), rtol=1e-12)


def test_no_gram_crosses_a_stretch():
    fitted, scored = np.frombuffer(TEXT, np.uint8), b"spam ham return"
    stretches = [(0, 10), (17, 20), (30, 52)]
    model = markov.fit(fitted, 3, stretches)
    bits = markov.code_lengths(model, np.frombuffer(scored, np.uint8))
    parts = [TEXT[a:b] for a, b in stretches]
    np.testing.assert_allclose(bits, naive_code_lengths(parts, scored, 3), rtol=1e-12)
    assert markov.fit(fitted, 3).orders[3].grams.size > model.orders[3].grams.size


@pytest.mark.parametrize("context", [b"spa", b"am)", b"zzz"])
def test_probabilities_sum_to_one(context):
    model = markov.fit(np.frombuffer(TEXT, np.uint8), 3)
    texts = [np.frombuffer(context + bytes([b]), np.uint8) for b in range(256)]
    assert sum(2.0 ** -markov.code_lengths(model, t)[-1] for t in texts) == pytest.approx(1)


def test_a_case_by_hand():
    # "aab": C() = 3, T() = 2; C(a) = 2, T(a) = 2, c(ab) = 1.
    model = markov.fit(np.frombuffer(b"aab", np.uint8), 1)
    bits = markov.code_lengths(model, np.frombuffer(b"ab", np.uint8))
    lower = lambda count: (count + 2 / 256) / 5
    expected = [-math.log2(lower(2)), -math.log2((1 + 2 * lower(1)) / 4)]
    np.testing.assert_allclose(bits, expected, rtol=1e-12)


def test_unfitted_contexts_fall_back():
    model = markov.fit(np.frombuffer(b"ab", np.uint8), 4)
    assert markov.code_lengths(model, np.frombuffer(b"q", np.uint8)) == pytest.approx(
        -math.log2((2 / 256) / 4)
    )


def test_order_is_checked():
    with pytest.raises(ValueError, match=r"`order` must be 0 to 7 .* got 8"):
        markov.fit(np.frombuffer(b"ab", np.uint8), 8)


def test_xz_counts_the_extra_bytes():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 4000, dtype=np.uint8)
    alone = markov.xz_bits(noise)
    assert alone == 8 * len(lzma.compress(noise.tobytes(), preset=9)) / noise.size
    assert markov.xz_bits(noise, given=noise) < 0.1 * alone
