# SPDX-License-Identifier: Apache-2.0
"""Prepared data: a folder of token shards that `nlx data` wrote, read where they are asked for.

nlx-data.json            what it was made of and how; of each shard its tokens, documents, digest
tokenizer.json           the tokenizer, unless tokens are bytes
train-00000.npy          a shard: its documents in tokens, each closed by the separator; as one row
                         of integers, or as .arrayrecord with a record a document
train-00000.ends.npy     where each of its documents ends
held-out-00000.npy ...   the same of the text that is kept from training

Nothing is loaded but what a window asks for, so data may be larger than memory, on any storage that
looks like files. A shard's digest is of its size and its first and last mebibyte: a shard that is
gone, cut or replaced is noticed when a run begins; a bit that flips in the middle of one is not.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int, Integer

from nlx_experiments import data, runs, tokenization
from nlx_experiments.errors import Refused
from nlx_experiments.tokenization import Tokens

FILE = data.PREPARED
FORMAT = 1
SPLITS = ("train", "held-out")
EDGE = 2**20  # bytes
OPEN = 64  # shards


class Shards:
    """The tokens of a split, in files; slices of it are read when they are asked for."""

    def __init__(self, folder: pathlib.Path, shards: Sequence[Mapping[str, Any]], dtype: str):
        """shards: as nlx-data.json lists them."""
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.names = [shard["file"] for shard in shards]
        self.edges = np.concatenate([[0], np.cumsum([shard["tokens"] for shard in shards])])
        self._opened: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: for another process."""
        return {**self.__dict__, "_opened": {}}

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self.edges[-1])

    @property
    def ends(self) -> Int[np.ndarray, " d"]:
        """Where each document ends, in all shards."""
        parts = [self._ends(n) + self.edges[n] for n in range(len(self.names))]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def __getitem__(self, part: slice) -> Integer[np.ndarray, " n"]:
        """Tokens `start:stop` of all shards put together."""
        start, stop, _ = part.indices(self.size)
        found = [np.zeros(0, self.dtype)]
        n = int(np.searchsorted(self.edges, start, "right")) - 1
        while start < stop:
            end = min(stop, int(self.edges[n + 1]))
            found.append(self._read(n, start - int(self.edges[n]), end - int(self.edges[n])))
            start, n = end, n + 1
        return np.concatenate(found)

    def _read(self, n: int, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        path = self.folder / self.names[n]
        if n not in self._opened:
            if len(self._opened) == OPEN:
                del self._opened[next(iter(self._opened))]
            records = path.suffix == ".arrayrecord"
            self._opened[n] = (
                (grain.sources.ArrayRecordDataSource([str(path)]), self._ends(n))
                if records
                else np.load(path, mmap_mode="r", allow_pickle=False)
            )
        opened = self._opened[n]
        if isinstance(opened, np.ndarray):
            return np.asarray(opened[start:stop])
        source, ends = opened
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left")
        records = source.__getitems__(list(range(first, last + 1)))
        begun = int(ends[first - 1]) if first else 0
        whole = np.concatenate([np.frombuffer(record, self.dtype) for record in records])
        return whole[start - begun : stop - begun]

    def _ends(self, n: int) -> Int[np.ndarray, " d"]:
        return np.load(ends_of(self.folder / self.names[n]), allow_pickle=False)


def ends_of(shard: pathlib.Path) -> pathlib.Path:
    """The file that says where a shard's documents end."""
    return shard.with_name(shard.stem + ".ends.npy")


class Prepared(NamedTuple):
    """Folders of prepared data as a run sees them; like `data.Corpus`, without its text."""

    name: str
    folders: tuple[dict[str, Any], ...]  # of each its nlx-data.json
    heldout: data.Bytes

    @property
    def sha256(self) -> str:
        """Digest of what the folders hold, wherever it was made."""
        told = [{name: part[name] for name in (*SPLITS, "tokenizer")} for part in self.folders]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def train_bytes(self) -> int:
        """Bytes that the training split stands for."""
        return sum(folder["train"]["bytes"] for folder in self.folders)

    @property
    def files(self) -> list[str]:
        """The shards."""
        return [s["file"] for f in self.folders for split in SPLITS for s in f[split]["shards"]]

    def record(self) -> dict[str, Any]:
        """What stands beside a run."""
        return data.noted(self, self.files)


def is_prepared(paths: Sequence[pathlib.Path]) -> bool:
    """Whether these are folders of prepared data.

    Raises Refused where some are and some are not.
    """
    found = [(path / FILE).exists() for path in paths]
    if any(found) and not all(found):
        other = paths[found.index(False)]
        raise Refused(
            f"`data` holds prepared data, and {other}, which is none; it must be one or the other."
        )
    return any(found)


def load(
    paths: Sequence[pathlib.Path], name: str, size: int, called: str = "model.vocabulary"
) -> tuple[Prepared, Tokens]:
    """The prepared data of these folders; `Tokens.train` is a list with the shards of each.

    Args:
      paths: folders that `nlx data` wrote with one tokenizer.
      name: "bytes", "bpe" or a tokenizer's JSON, as the run says; bpe is the folders' own.
      size: tokens of the model; those of the tokenizer at least.
      called: what the size is called where it is refused.

    Raises:
      Refused: shards that are gone or changed, or a tokenizer that is not theirs.
    """
    if twice := [path for n, path in enumerate(paths) if path.resolve() in _resolved(paths[:n])]:
        raise Refused(f"`data` holds {twice[0]} twice; see `weights` for more of it.")
    told = [read(path) for path in paths]
    if len({made["asked"]["held_out_share"] for made in told}) > 1:
        raise Refused(
            "`data` holds prepared data of several `held_out_share`, so that what one keeps from "
            "training the other trains on; it must be one."
        )
    ours = [made["tokenizer"] for made in told]
    if len(set(ours)) > 1:
        raise Refused("`data` holds prepared data of several tokenizers; it must be of one.")
    tokenizer = tokenization.of_run(paths[0], "bytes" if ours[0] is None else "bpe")
    wanted = tokenizer.sha256
    if name == "bytes":
        wanted = None
    elif name == "bpe":
        wanted = wanted or "bpe"
    else:
        wanted = tokenization.read(pathlib.Path(name)).sha256
    if not wanted == ours[0] == tokenizer.sha256:
        own = "bytes" if ours[0] is None else paths[0] / tokenization.FILE
        raise Refused(
            f"`tokenizer` is {name}, but {paths[0]} was made with another; it must be {own}."
        )
    if tokenizer.size > size:
        raise Refused(
            f"`{called}` is {size}, but {paths[0]} has {tokenizer.size} tokens; it must be at "
            "least that."
        )
    of = lambda split: [
        Shards(path, made[split]["shards"], made["dtype"])
        for path, made in zip(paths, told, strict=True)
    ]
    heldout = np.concatenate([shards[:] for shards in of("held-out")])
    if not heldout.size:
        raise Refused(f"{paths[0]} holds no held-out text; prepare more documents.")
    text = heldout if tokenizer.json is None else np.frombuffer(tokenizer.decode(heldout), np.uint8)
    name = ", ".join(made["name"] for made in told)
    return Prepared(name, tuple(told), text), Tokens(tokenizer, of("train"), heldout)


def read(folder: pathlib.Path) -> dict[str, Any]:
    """What data.json says, if every shard is what it says.

    Raises Refused otherwise.
    """
    told = runs.read_json(folder / FILE)
    if told is None or told.get("format") != FORMAT:
        raise Refused(
            f"{folder} holds no {FILE} that this nlx reads; it must be a folder that `nlx data` "
            "wrote."
        )
    for split in SPLITS:
        check(folder, told[split]["shards"])
    return told


def check(folder: pathlib.Path, listed: Sequence[Mapping[str, Any]]) -> None:
    """Raises Refused unless these shards are there as they were written."""
    for shard in listed:
        for path in (folder / shard["file"], ends_of(folder / shard["file"])):
            if not path.exists():
                raise Refused(f"{path} is gone; prepare the data again, in another folder.")
        if digest(folder / shard["file"]) != shard["sha256"]:
            raise Refused(
                f"{folder / shard['file']} was changed; prepare the data again, in another folder."
            )


def _resolved(paths: Sequence[pathlib.Path]) -> set[pathlib.Path]:
    return {path.resolve() for path in paths}


def digest(shard: pathlib.Path) -> str:
    """Of a shard's size, its first and last mebibyte, and where its documents end."""
    found = hashlib.sha256(ends_of(shard).read_bytes())
    size = shard.stat().st_size
    with open(shard, "rb") as stream:
        found.update(str(size).encode() + stream.read(EDGE))
        stream.seek(max(0, size - EDGE))
        found.update(stream.read(EDGE))
    return found.hexdigest()
