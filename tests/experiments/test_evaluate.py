# SPDX-License-Identifier: Apache-2.0
"""Every model is scored on the same held-out bytes."""

import numpy as np
import pytest
from nlx_experiments import evaluate, markov
from nlx_experiments.data import Corpus


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    streams = [rng.integers(97, 101, n).astype(np.uint8) for n in (3000, 1000)]
    return Corpus("letters", *streams, ())


def test_positions_are_windows_without_their_first_byte(corpus):
    positions = evaluate.scored_positions(corpus, 10, 200)
    assert positions.shape == (20, 10)
    assert (np.diff(positions) == 1).all()
    every = evaluate.scored_positions(corpus, 10, 10**6)
    assert every.ravel().tolist() == list(range(1, 991))


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_model_and_its_bytes_are_paired(corpus, batch):
    positions = evaluate.scored_positions(corpus, 10, 70)
    shown = []

    def bits(tokens):
        shown.append(tokens)
        return tokens[:, 1:].astype(float) * 2 + tokens[:, :-1] / 1000

    scored = evaluate.model_bits(bits, corpus, positions, batch)
    held = corpus.heldout.astype(float)
    np.testing.assert_array_equal(scored, held[positions] * 2 + held[positions - 1] / 1000)
    assert {len(tokens) for tokens in shown} == {batch}


def test_ngrams_are_scored_there_too(corpus):
    positions = evaluate.scored_positions(corpus, 10, 200)
    stretches = [(0, 100), (200, 900)]
    model = markov.fit(corpus.train, 2, stretches)
    expected = markov.code_lengths(model, corpus.heldout)[positions].mean()
    assert evaluate.ngram_bits(corpus, 2, positions, stretches) == pytest.approx(expected)
    assert evaluate.ngram_bits(corpus, 2, positions) != pytest.approx(expected)
    # Four letters at random: two bits, and nothing to gain from more context.
    assert 1.95 < evaluate.ngram_bits(corpus, 0, positions) < 2.2


def test_xz(corpus):
    positions = evaluate.scored_positions(corpus, 10, 500)
    found = evaluate.xz_bits(corpus, positions)
    assert found["alone"] > found["after training"] > 1.5
