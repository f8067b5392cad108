# SPDX-License-Identifier: Apache-2.0
"""Models without learning by gradient: interpolated n-gram models of bytes, and `xz`.

An order-n Witten-Bell model predicts a byte from the n before it. With c(h b) the number of times
byte b followed the context h in the fitted text, C(h) = sum_b c(h b), T(h) the number of distinct
bytes that followed h, and h' the context without its oldest byte,

    P(b | h) = (c(h b) + T(h) P(b | h')) / (C(h) + T(h)),    P(b | h) = P(b | h') if C(h) = 0,

down to the empty context, whose P(b | h') is 1/256. A byte with fewer than n bytes before it is
predicted from those there are.

Reference: Witten and Bell (1991), The zero-frequency problem, method C, in the interpolated form
of Chen and Goodman (1998).
"""

import lzma
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt, UInt8

BYTE = 8


class Counts(NamedTuple):
    """What one order saw, sorted: (n+1)-grams, their contexts, totals and distinct followers."""

    grams: np.ndarray  # uint[g]
    counts: np.ndarray  # int[g]
    contexts: np.ndarray  # uint[c]
    totals: np.ndarray  # int[c]
    followers: np.ndarray  # int[c], 1 to 256


class ByteModel(NamedTuple):
    """The counts of orders 0 to n."""

    orders: tuple[Counts, ...]


def fit(text: UInt8[np.ndarray, " n"], order: int, stretches=None) -> ByteModel:
    """Counts every order up to `order`.

    Args:
      text: the bytes.
      order: bytes of context, 0 to 7.
      stretches: the parts `(start, stop)` of `text` to fit; no n-gram crosses their ends. All of
        it by default.

    Raises:
      ValueError: another order.
    """
    if not 0 <= order <= 7:
        raise ValueError(f"`order` must be 0 to 7 bytes of context, got {order}.")
    parts = [text[a:b] for a, b in stretches] if stretches is not None else [text]
    return ByteModel(tuple(_count(parts, k) for k in range(order + 1)))


def code_lengths(model: ByteModel, text: UInt8[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The bits, -log2 P, that each byte of `text` costs given the bytes before it."""
    probability = np.full(text.size, 1 / 2**BYTE)
    for k, seen in enumerate(model.orders):
        grams = _grams(text, k)
        count = _look_up(seen.grams, seen.counts, grams)
        total = _look_up(seen.contexts, seen.totals, grams >> BYTE)
        follow = _look_up(seen.contexts, seen.followers, grams >> BYTE)
        lower = probability[k:]
        mixed = (count + follow * lower) / np.maximum(total + follow, 1)
        probability[k:] = np.where(total > 0, mixed, lower)
    return -np.log2(probability)


def xz_bits(text: UInt8[np.ndarray, " n"], given: UInt8[np.ndarray, " k"] | None = None) -> float:
    """Bits per byte of `text` under `xz -9`: |xz(given + text)| - |xz(given)|, 8 bits each, over
    the bytes of `text`; with nothing given, |xz(text)|."""
    size = lambda content: len(lzma.compress(content, preset=9))
    before = b"" if given is None else given.tobytes()
    extra = size(before + text.tobytes()) - (size(before) if before else 0)
    return BYTE * extra / text.size


def _grams(text: UInt8[np.ndarray, " n"], order: int) -> UInt[np.ndarray, " n"]:
    """Every run of `order + 1` bytes as one number, oldest byte first."""
    count = max(text.size - order, 0)
    grams = np.zeros(count, np.uint32 if order <= 3 else np.uint64)
    for i in range(order + 1):
        grams = (grams << BYTE) | text[i : i + count]
    return grams


def _count(parts: Sequence[UInt8[np.ndarray, " n"]], order: int) -> Counts:
    grams = np.concatenate([_grams(part, order) for part in parts])
    grams, counts = np.unique(grams, return_counts=True)
    contexts, first, followers = np.unique(grams >> BYTE, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first) if grams.size else counts
    return Counts(grams, counts, contexts, totals, followers)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at `wanted`, 0 where `keys` lacks it."""
    if not keys.size:
        return np.zeros(wanted.size, np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, values[at], 0)
