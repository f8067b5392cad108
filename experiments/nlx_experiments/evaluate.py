# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of held-out text: of a model, of n-gram models, and of `xz`, on the same bytes.

The scored bytes are evenly spaced windows of the held-out files. A trained model starts each
window with an empty state; an n-gram model sees the bytes before it, also across a window's edge.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from nlx_experiments import data, markov
from nlx_experiments.data import Corpus

ORDERS = (2, 3)


def scored_positions(corpus: Corpus, length: int, limit: int) -> Int[np.ndarray, "n t"]:
    """Where in the held-out stream the scored bytes lie, one row a window.

    Args:
      corpus: its held-out split is used.
      length: bytes of a window.
      limit: about how many bytes to score.
    """
    windows = data.evaluation_windows(corpus.heldout, length, limit)
    return windows[:, None] * length + 1 + np.arange(length)


def model_bits(
    bits: Callable[[UInt8[np.ndarray, "b t"]], Any],
    corpus: Corpus,
    positions: Int[np.ndarray, "n t"],
    batch: int,
) -> Float[np.ndarray, "n t"]:
    """What each scored byte costs a model.

    Args:
      bits: tokens `[b, t + 1]` -> bits of all but the first of each row, `[b, t]`.
      corpus: its held-out split is used.
      positions: of the scored bytes, consecutive in each row.
      batch: rows at a time.
    """
    rows = np.concatenate([positions[:, :1] - 1, positions], axis=1)
    padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch, axis=0)])
    parts = [bits(corpus.heldout[part]) for part in np.split(padded, len(padded) // batch)]
    return np.concatenate([np.asarray(p) for p in parts])[: len(rows)]


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
