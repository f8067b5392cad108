# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: the corpus, and its split by file.

By default the tokenizer is the identity on bytes (token
= byte, vocabulary 256; others: `tokenization`). Files are joined by one zero
byte, which no text holds, so a model also learns where files begin and end.
"""

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Integer, UInt8

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
        return noted(self, [file._asdict() for file in self.files])


def noted(corpus: Any, files: list[Any]) -> dict[str, Any]:
    """What stands beside a run of a `Corpus` or `Prepared`, and its files."""
    return {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "train_bytes": corpus.train_bytes,
        "heldout_bytes": int(corpus.heldout.size),
        "files": files,
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
