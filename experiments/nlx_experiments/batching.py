# SPDX-License-Identifier: Apache-2.0
"""Rows cut from streams of tokens, and batches of them whose position is a number."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from nlx_experiments import packing
from nlx_experiments.data import SEPARATOR, Stream
from nlx_experiments.errors import Refused

SHARES = 1_000_000  # parts that rows are shared out in; every source has one or more


class Windows:
    """Random access to the stream's windows: `length` inputs and, one further, their targets."""

    def __init__(self, stream: Stream, length: int):
        """Cuts `stream` into windows that share one token, so that each token is a target once."""
        if stream.size < length + 1:
            unit = "bytes" if stream.dtype == np.uint8 else "tokens"
            raise Refused(
                f"`length` is {length}, but the text holds only {stream.size} {unit}; "
                f"it must hold at least {length + 1}."
            )
        self.stream, self.length, self.targets = stream, length, float(length)

    def __len__(self) -> int:
        """Number of windows."""
        return (self.stream.size - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Window `index` with its number."""
        start = int(index) * self.length
        return {"tokens": self.stream[start : start + self.length + 1], "window": np.int64(index)}


class Rows:
    """Batches of which only some rows are read: those of this process. The others are zeros."""

    def __init__(self, windows: grain.MapDataset, batch: int, rows: Sequence[int]):
        """windows: without end. batch: rows of it. rows: which of them are read."""
        self.windows, self.batch, self.rows = windows, batch, rows

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.windows) // self.batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Batch `index`."""
        read: list[Any] = [self.windows[int(index) * self.batch + row] for row in self.rows]
        blank = lambda x: np.zeros((self.batch, *np.shape(x)), np.asarray(x).dtype)
        made = {name: blank(value) for name, value in read[0].items()}
        for row, window in zip(self.rows, read, strict=True):
            for name, value in window.items():
                made[name][row] = value
        return made


def training_data(
    stream: Any,
    *,
    length: int,
    batch: int,
    seed: int,
    rows: Sequence[int] | None = None,
    weights: Sequence[float] = (),
    pack: bool = False,
    separator: int = SEPARATOR,
) -> grain.MapDataset:
    """`mixed` rows of `sources`."""
    made = sources(stream, length=length, pack=pack, separator=separator)
    return mixed(made, batch=batch, seed=seed, rows=rows, weights=weights)


def sources(
    stream: Any, *, length: int, pack: bool = False, separator: int = SEPARATOR
) -> list[Windows | packing.Packed]:
    """The rows of a training split; or of each of a list of them.

    Args:
      stream: the training split, or a list of such.
      length: tokens per row; one more are given, of the stream's type.
      pack: rows of whole documents with `segment_ids`, see `packing`, in place of windows that are
        cut from the stream.
      separator: the last token of every document.

    Raises Refused for a stream too short for one row.
    """
    streams = stream if isinstance(stream, list) else [stream]
    if pack:
        return [packing.Packed(s, _ends(s, separator), length) for s in streams]
    return [Windows(s, length) for s in streams]


def mixed(
    made: Sequence[Windows | packing.Packed],
    *,
    batch: int,
    seed: int,
    rows: Sequence[int] | None = None,
    weights: Sequence[float] = (),
) -> grain.MapDataset:
    """Batches of shuffled rows without end, a new order each epoch: batch `i` is a function of the
    arguments and `i`.

    Args:
      made: the sources of rows.
      batch: rows.
      seed: of the orders.
      rows: of every batch, those that are read, see `Rows`; None: all.
      weights: the share of rows from each source, to a millionth; none: as it has rows.
    """
    parts = [grain.MapDataset.source(part).seed(seed).shuffle().repeat() for part in made]
    whole = [max(1, round(SHARES * share)) for share in shares(made, weights)]
    mix = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, whole)
    if rows is None:
        return mix.batch(batch, drop_remainder=True)
    return grain.MapDataset.source(Rows(mix, batch, rows))


def shares(
    made: Sequence[Windows | packing.Packed], weights: Sequence[float] = ()
) -> Float[np.ndarray, " s"]:
    """Of the rows, which come from each source."""
    given = np.asarray(weights or [len(source) for source in made], float)
    return given / given.sum()


def _ends(stream: Any, separator: int) -> Int[np.ndarray, " d"]:
    """Where each document of a stream ends."""
    if not isinstance(stream, np.ndarray):
        return stream.ends
    ends = np.flatnonzero(stream == separator) + 1
    return ends if ends.size and ends[-1] == stream.size else np.append(ends, stream.size)


def _leave_signals(index: int, count: int) -> None:
    """A reader goes on when Ctrl-C or a scheduler signals all: it ends when the run has saved."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """The batches of a dataset from a position on; the position is how many came before."""

    def __init__(self, dataset: grain.MapDataset, position: int, workers: int):
        """workers: processes that read ahead, to the same batches; 0: a thread of this one does."""
        self.position = position
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        ahead = dataset[position:].to_iter_dataset(options)
        if workers:
            flags.FLAGS.mark_as_parsed()  # of absl, which Grain asks and nlx has none of
            several = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
            ahead = ahead.mp_prefetch(several, worker_init_fn=_leave_signals)
        self.iterator = iter(ahead)

    def __iter__(self) -> "Batches":
        """Returns itself."""
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch."""
        batch = next(self.iterator)
        self.position += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """From where `batches` goes on with the very next one."""
        return {"next_index": self.position}

    def close(self) -> None:
        """Ends the processes."""
        self.iterator.close()


def batches(
    dataset: grain.MapDataset, position: Mapping[str, int] | None = None, workers: int = 0
) -> Batches:
    """An iterator with `get_state`; given a saved state it goes on with the very next batch.

    workers: processes that read ahead; as many as one likes, and others later, give the same.
    """
    return Batches(dataset, 0 if position is None else position["next_index"], workers)


def seen(dataset: grain.MapDataset, length: int, steps: int) -> list[tuple[int, int]]:
    """The stretches `[start, stop)` of the stream that the first `steps` batches showed, once
    each and in order, neighbours joined."""
    shown: Any = dataset
    numbers = np.unique(np.concatenate([shown[i]["window"] for i in range(steps)]))
    breaks = np.flatnonzero(np.diff(numbers) > 1) + 1
    return [
        (int(run[0]) * length, (int(run[-1]) + 1) * length + 1) for run in np.split(numbers, breaks)
    ]


def evaluation_windows(stream: Stream, length: int, limit: int) -> Int[np.ndarray, " n"]:
    """Numbers of the held-out windows to score: all, or evenly spaced ones of `limit` tokens."""
    total = len(Windows(stream, length))
    count = min(total, max(1, limit // length))
    return np.arange(count) * total // count
