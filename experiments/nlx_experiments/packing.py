# SPDX-License-Identifier: Apache-2.0
"""Rows of whole documents: none is cut that fits into one, and little room is left over.

A document is read from the separator before it on, so its first token is a target too; every token
of the stream but the first is a target once, as in windows. One longer than a row is cut into
pieces that share one token; what is left of it, and every shorter document, goes into the row with
the least room that still holds it, longest first. `segment_ids` tell documents apart, so that
memories begin anew at each; the room left at the end of a row is segments of one token, which have
no target. The plan of all rows is held in memory, about 100 bytes a document.

Reference: Ding et al. (2024), Fewer truncations improve language modeling, section 3 (best-fit
packing).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from nlx_experiments.errors import Refused


class Plan(NamedTuple):
    """Pieces of a stream of tokens in the order of their rows; row n has those from first[n] on."""

    starts: Int[np.ndarray, " p"]
    lengths: Int[np.ndarray, " p"]
    first: Int[np.ndarray, " n+1"]


def plan(ends: Int[np.ndarray, " d"], room: int) -> Plan:
    """Which pieces lie in which row.

    Args:
      ends: where each document of the stream ends, increasing; its last token is a separator.
      room: tokens of a row, >= 2.
    """
    begins = np.maximum(np.concatenate([[0], ends[:-1]]) - 1, 0)
    lengths = ends - begins
    begins, lengths = begins[lengths > 1], lengths[lengths > 1]
    many = -(-(lengths - 1) // (room - 1))
    number = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    starts = np.repeat(begins, many) + number * (room - 1)
    lengths = np.minimum(room, np.repeat(begins + lengths, many) - starts)
    order = np.argsort(-lengths, kind="stable")
    rows = _best_fit(lengths[order].tolist(), room)
    by_row = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=rows.max(initial=-1) + 1)
    chosen = order[by_row]
    return Plan(starts[chosen], lengths[chosen], np.concatenate([[0], np.cumsum(counts)]))


def _best_fit(lengths: list[int], room: int) -> Int[np.ndarray, " p"]:
    """The row of each piece, longest first: the fullest one that has room, else a new one."""
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room they have left
    some = 0  # bit n: there is a row with room n
    rows, made = [], 0
    for length in lengths:
        enough = some >> length
        if enough:
            left = length + (enough & -enough).bit_length() - 1
            row = with_room[left].pop()
            if not with_room[left]:
                some &= ~(1 << left)
        else:
            left, row, made = room, made, made + 1
        rows.append(row)
        with_room[left - length].append(row)
        some |= 1 << (left - length)
    return np.array(rows, np.int64)


class Packed:
    """Random access to rows of whole documents: tokens and `segment_ids`, one more than is read."""

    def __init__(self, stream: Any, ends: Int[np.ndarray, " d"], length: int):
        """stream: of tokens. ends: of its documents. length: tokens that are read of a row.

        Raises Refused for a stream that is shorter than a row.
        """
        if stream.size < length + 1:
            raise Refused(
                f"`length` is {length}, but the text holds only {stream.size} tokens; it must hold "
                f"at least {length + 1}."
            )
        self.stream, self.room = stream, length + 1
        self.plan = plan(ends, self.room)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.plan.first) - 1

    @property
    def targets(self) -> float:
        """Of a row, in the mean."""
        return float((self.plan.lengths - 1).sum()) / len(self)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` with its number."""
        tokens = np.zeros(self.room, self.stream.dtype)
        segments = -1 - np.arange(self.room, dtype=np.int32)
        at = 0
        for n, piece in enumerate(range(*self.plan.first[index : index + 2].tolist())):
            start, length = int(self.plan.starts[piece]), int(self.plan.lengths[piece])
            tokens[at : at + length] = self.stream[start : start + length]
            segments[at : at + length] = n
            at += length
        return {"tokens": tokens, "segment_ids": segments, "window": np.int64(index)}
