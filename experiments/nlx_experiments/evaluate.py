# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of held-out text: of a model, of n-gram models, and of `xz`, on the same bytes.

With nats the sum of -log p over the scored tokens, whatever the tokenizer,

    bits per byte = nats / (log 2 * bytes),    word perplexity = exp(nats / words),

bytes and words those that the scored tokens stand for. A word is a longest run of bytes that are no
white space (ASCII's; the byte between files counts as such), and counted where it begins.

The scored bytes are evenly spaced windows of the held-out files. A trained model starts each
window with an empty state; an n-gram model sees the bytes before it, also across a window's edge.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from nlx_experiments import batching, data, markov
from nlx_experiments.data import Corpus
from nlx_experiments.tokenization import Tokens

ORDERS = (2, 3)
SPACE = np.isin(np.arange(256), [*b" \t\n\r\x0b\x0c", data.SEPARATOR])


def scored_positions(corpus: Corpus | Tokens, length: int, limit: int) -> Int[np.ndarray, "n t"]:
    """Where in the held-out stream the scored tokens lie, one row a window.

    Args:
      corpus: its held-out split is used.
      length: tokens of a window.
      limit: about how many bytes to score.
    """
    stream = corpus.heldout
    if isinstance(corpus, Tokens) and corpus.tokenizer.json is not None:
        limit = round(limit * stream.size / corpus.tokenizer.starts(stream)[-1])
    windows = batching.evaluation_windows(stream, length, limit)
    return windows[:, None] * length + 1 + np.arange(length)


def model_bits(
    bits: Callable[[Integer[np.ndarray, "b t"]], Any],
    corpus: Corpus | Tokens,
    positions: Int[np.ndarray, "n t"],
    batch: int,
) -> Float[np.ndarray, "n t"]:
    """What each scored token costs a model.

    Args:
      bits: tokens `[b, t + 1]` -> bits of all but the first of each row, `[b, t]`.
      corpus: its held-out split is used.
      positions: of the scored tokens, consecutive in each row.
      batch: rows at a time.
    """
    rows = np.concatenate([positions[:, :1] - 1, positions], axis=1)
    padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch, axis=0)])
    parts = [bits(corpus.heldout[part]) for part in np.split(padded, len(padded) // batch)]
    return np.concatenate([np.asarray(p) for p in parts])[: len(rows)]


def byte_positions(tokens: Tokens, positions: Int[np.ndarray, "n t"]) -> Int[np.ndarray, " m"]:
    """Where in the held-out bytes those lie that the scored tokens stand for."""
    if tokens.tokenizer.json is None:
        return positions.ravel()
    starts = tokens.tokenizer.starts(tokens.heldout)
    return np.concatenate([np.arange(*starts[[row[0], row[-1] + 1]].tolist()) for row in positions])


def bits_per_byte(bits: Float[np.ndarray, "..."], scored: int) -> float:
    """The bits of all scored tokens over the number of bytes they stand for."""
    return float(np.sum(bits, dtype=np.float64)) / scored


def word_perplexity(bits: Float[np.ndarray, "..."], words: int) -> float | None:
    """exp(nats / words); None where there are no words or it is beyond all numbers."""
    nats = float(np.sum(bits, dtype=np.float64)) * math.log(2)
    return math.exp(nats / words) if words and nats / words < 700 else None


def words(text: UInt8[np.ndarray, " n"], positions: Int[np.ndarray, "..."]) -> int:
    """How many words of `text` begin at one of `positions`: of all of them, how many there are."""
    space = SPACE[text]
    begins = ~space & np.concatenate([[True], space[:-1]])
    return int(begins[positions].sum())


def ngram_bits(
    corpus: Corpus,
    order: int,
    positions: Int[np.ndarray, "n t"],
    stretches: Sequence[tuple[int, int]] | None = None,
) -> float:
    """Bits per scored byte of an order-n Witten-Bell model.

    Args:
      corpus: fitted on its training split, scored on its held-out split.
      order: bytes of context.
      positions: of the scored bytes.
      stretches: the parts of the training split to fit, all of it by default.
    """
    model = markov.fit(corpus.train, order, stretches)
    return float(np.mean(markov.code_lengths(model, corpus.heldout)[positions]))


def xz_bits(corpus: Corpus, positions: Int[np.ndarray, "n t"]) -> dict[str, float]:
    """Bits per scored byte of `xz -9`, alone and after the whole training split."""
    text = corpus.heldout[positions.ravel()]
    return {"alone": markov.xz_bits(text), "after training": markov.xz_bits(text, corpus.train)}
