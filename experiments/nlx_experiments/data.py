# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: the corpus, its split by file, and batches whose position is a number.

Batches are cut from any stream of tokens. By default the tokenizer is the identity on bytes (token
= byte, vocabulary 256; others: `tokenization`). Files are joined by one zero
byte, which no text holds, so a model also learns where files begin and end.
"""

import hashlib
import os
import pathlib
import signal
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int, Integer, UInt8

from nlx_experiments import packing
from nlx_experiments.errors import Refused

VOCABULARY = 256
SEPARATOR = 0
HELD_OUT_SHARE = 0.05
PREPARED = "nlx-data.json"  # stands in a folder that `nlx data` wrote
# Of the standard library: no tests, nothing installed, and neither of its two folders of generated
# text (code pages, rendered help), which are a fifth of its bytes and no source.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FOLDERS |= {"encodings", "pydoc_data"}

Bytes = UInt8[np.ndarray, " n"]
Stream = Integer[np.ndarray, " n"]
T = TypeVar("T", bound=Any)


class TextFile(NamedTuple):
    """One file of the corpus: name relative to its root, bytes, digest, "train" or "held-out"."""

    name: str
    size: int
    sha256: str
    split: str


class Corpus(NamedTuple):
    """Both splits as byte streams, with the exact list of files they were made of."""

    name: str
    train: Bytes
    heldout: Bytes
    files: tuple[TextFile, ...]

    @property
    def sha256(self) -> str:
        """Digest of every file's name, content and split."""
        lines = (f"{f.name} {f.sha256} {f.split}\n" for f in self.files)
        return _digest("".join(lines)).hex()

    @property
    def train_bytes(self) -> int:
        """Bytes of the training split."""
        return int(self.train.size)

    def record(self) -> dict[str, Any]:
        """What stands beside a run: list, sizes and digest."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "train_bytes": self.train_bytes,
            "heldout_bytes": int(self.heldout.size),
            "files": [file._asdict() for file in self.files],
        }


def encode(text: str) -> Bytes:
    """The bytes of `text` in UTF-8, as tokens; what a shell gave that is none, as it was."""
    return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)


def load(paths: Sequence[pathlib.Path] = (), without: pathlib.Path | None = None) -> Corpus:
    """Reads files and folders of text, or, given none, the standard library's own source.

    Args:
      paths: files or folders; in a folder every UTF-8 file without zero bytes counts, but hidden
        ones and those of runs and experiments.
      without: a folder to leave out: of the run to come.

    Raises:
      Refused: a path that does not exist, no text under it, or two files of one name.
    """
    if not paths:
        return _corpus("the Python standard library", _standard_library())
    contents: dict[str, bytes] = {}
    for path in paths:
        if not path.exists():
            raise Refused(f"`--data` holds {path}, which does not exist; pass files or folders.")
        if (path / PREPARED).exists():
            raise Refused(f"`--data` holds {path}, prepared data, which only `nlx train` reads.")
        found = dict(_texts(path, without))
        if not found:
            raise Refused(f"`--data` holds {path}, in which there is no UTF-8 text.")
        if twice := sorted(contents.keys() & found):
            raise Refused(
                f"`--data` holds two files called {twice[0]}; the names of files, with the folder "
                "they are given in, must differ."
            )
        contents |= found
    return _corpus(", ".join(path.name or str(path) for path in paths), contents)


def is_held_out(name: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether the file of this relative name is held out: a hash of the name decides, for ever."""
    return int.from_bytes(_digest(name)[:8], "big") < share * 2**64


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _standard_library() -> dict[str, bytes]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in walk(root):
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            content = path.read_bytes()
            if content and is_text(content):
                texts[path.relative_to(root).as_posix()] = content
    if not texts:
        raise Refused(
            f"this Python ships no sources of its standard library (none under {root}); "
            "pass `--data` with files or folders of text."
        )
    return texts


def _texts(path: pathlib.Path, without: pathlib.Path | None) -> Iterator[tuple[str, bytes]]:
    files = sorted(walk(path, set(), without)) if path.is_dir() else [path]
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise Refused(
                f"`--data` holds {file}, which cannot be read: {error.strerror}."
            ) from error
        if content and is_text(content):
            yield file.relative_to(path.parent).as_posix(), content


def walk(
    root: pathlib.Path,
    skipped: set[str] = SKIPPED_FOLDERS,
    without: pathlib.Path | None = None,
) -> Iterator[pathlib.Path]:
    """The files under a folder: none that are hidden, or of runs, experiments, prepared data."""

    def wanted(path: pathlib.Path) -> bool:
        there = lambda *names: all((path / name).exists() for name in names)
        of_run = there("config.json", "corpus.json") or there(".lock", "environment.json")
        of_run |= there(PREPARED)
        of_this = without is not None and path.resolve() == without.resolve()
        return not (of_run or of_this or path.name in skipped or path.name.startswith("."))

    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if wanted(pathlib.Path(folder, f))]
        for name in names:
            path = pathlib.Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def is_text(content: bytes) -> bool:
    """Whether it is UTF-8 without zero bytes."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return SEPARATOR not in content


def _corpus(name: str, texts: dict[str, bytes]) -> Corpus:
    contents, held_out = split(texts)
    return made_of(name, contents, held_out)


def split(contents: Mapping[str, T]) -> tuple[dict[str, T], set[str]]:
    """The files in the order of their names, one alone cut in two, and which are held out."""
    names = sorted(contents)
    if len(names) == 1:
        return _cut(names[0], contents[names[0]])
    held_out = {n for n in names if is_held_out(n)}
    if not held_out or len(held_out) == len(names):
        held_out = {min(names, key=_digest)}
    return {n: contents[n] for n in names}, held_out


def made_of(name: str, contents: Mapping[str, bytes], held_out: Set[str]) -> Corpus:
    """The corpus of these files, those in `held_out` kept from training."""
    files = tuple(
        TextFile(
            n,
            len(content),
            hashlib.sha256(content).hexdigest(),
            "held-out" if n in held_out else "train",
        )
        for n, content in contents.items()
    )
    streams = [
        _join(contents[f.name] for f in files if f.split == split)
        for split in ("train", "held-out")
    ]
    return Corpus(name, streams[0], streams[1], files)


def _cut(name: str, content: T) -> tuple[dict[str, T], set[str]]:
    """A corpus of one file: its last tenth is held out, under a name that says so."""
    cut = len(content) - len(content) // 10
    tail = f"{name}[{cut}:]"
    return {f"{name}[:{cut}]": content[:cut], tail: content[cut:]}, {tail}


def _join(contents: Iterable[bytes]) -> Bytes:
    return np.frombuffer(b"".join(c + bytes([SEPARATOR]) for c in contents), np.uint8)


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
      weights: the share of rows from each source; none: as it has rows.
    """
    parts = [grain.MapDataset.source(part).seed(seed).shuffle().repeat() for part in made]
    whole = [max(1, round(10_000 * share)) for share in shares(made, weights)]
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
