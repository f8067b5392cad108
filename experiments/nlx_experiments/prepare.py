# SPDX-License-Identifier: Apache-2.0
"""`nlx data`: text, JSON lines or a Hugging Face dataset as token shards, once and for all.

    nlx data shards --source texts/ pages.jsonl.gz --tokenizer bpe
    nlx data shards --huggingface allenai/c4 --configuration en --tokenizer bpe
    nlx train hope-340m --data shards --pack --workers 4

Documents are read one after the other, so they may be more than memory holds: files of text, the
lines of .jsonl and .jsonl.gz files, or a dataset's rows (extra `huggingface`). A document is held
out if a hash of its content says so, so that its copies are too, also in other data: it is never
trained on, and left out once `held_out_tokens` are there to be scored. Stopped at any moment, the
same command goes on after the last whole shard. See `shards` for what is written.
"""

import dataclasses
import gzip
import hashlib
import importlib
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import tyro

# An extension module, which pyright cannot see into.
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nlx_experiments import data, runs, shards, tokenization
from nlx_experiments.console import say
from nlx_experiments.errors import Refused
from nlx_experiments.tokenization import Tokenizer

PROGRESS = "progress.json"
TOKENIZERS = ("bytes", "bpe")  # and any tokenizer.json
LINES = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Writes token shards that `nlx train --data` reads."""

    out: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write."""
    source: tuple[pathlib.Path, ...] = ()
    """Files and folders of text, and .jsonl or .jsonl.gz files."""
    huggingface: str | None = None
    """Name of a Hugging Face dataset, in place of a source; it is streamed."""
    configuration: str | None = None
    """Its configuration."""
    split: str = "train"
    """Its split."""
    field: str = "text"
    """Where a line of JSON, or a dataset's row, has its text."""
    tokenizer: str = "bytes"
    """bytes; bpe, trained on the first documents; or a tokenizer.json."""
    vocabulary: int = 32_000
    """Tokens of bpe."""
    trained_on: int = 100_000_000
    """Bytes of training documents that bpe is trained on, at most."""
    shard_tokens: int = 100_000_000
    """About how many tokens a shard holds."""
    held_out_share: float = 0.05
    """Of documents, that are kept from training; the same for all data of one training."""
    held_out_tokens: int = 2_000_000
    """Tokens of those that are kept to be scored, at most, but for the first of them."""
    form: Literal["npy", "arrayrecord"] = "npy"
    """Rows of integers, which are mapped into memory, or ArrayRecord, a record a document."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence."""
        if (not self.source) == (self.huggingface is None):
            raise ValueError("`source` or `huggingface` must be given, and not both.")
        for name in ("vocabulary", "trained_on", "shard_tokens", "held_out_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.held_out_share <= 0.5:
            raise ValueError(f"`held_out_share` is {self.held_out_share}; it must be in (0, 0.5].")


def main(options: Prepare) -> dict[str, Any]:
    """Writes the shards, or goes on; returns what nlx-data.json holds.

    Raises Refused: no documents, bad input, or a folder that holds something else.
    """
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name != "out"}
    asked["source"] = [str(path.resolve()) for path in options.source]
    if options.tokenizer not in TOKENIZERS:
        asked["tokenizer"] = str(pathlib.Path(options.tokenizer).resolve())
    there = {path.name for path in options.out.iterdir()} if options.out.is_dir() else set()
    if not there & {shards.FILE, PROGRESS} and (other := min(there - {".lock"}, default=None)):
        raise Refused(f"`out` is {options.out}, which holds {other}; choose another.")
    with runs.Run(options.out) as folder:
        if (options.out / shards.FILE).exists():
            done = shards.read(options.out)
            if done["asked"] != asked:
                raise Refused(f"`out` is {options.out}, which holds other data; choose another.")
            say(_sentence(options.out, done))
            return done
        progress = folder.read("progress")
        if progress is None:
            progress = {"asked": asked, "documents": 0, "seen": ""}
            folder.write("progress", progress)  # before anything that depends on what is asked
        if progress["asked"] != asked:
            raise Refused(
                f"`out` is {options.out}, where other data is being prepared; choose another."
            )
        told = _write(options, folder, _tokenizer(options, options.out), progress)
        runs.write_json(options.out / shards.FILE, told)
        (options.out / PROGRESS).unlink()
        say(_sentence(options.out, told))
        return told


def documents(options: Prepare) -> Iterator[str]:
    """The documents that are asked for, in order; empty ones, and ones with zero bytes, are none.

    Raises Refused for a source that cannot be read, or holds no such text.
    """
    found = itertools.chain.from_iterable(map(_of_path, options.source, itertools.repeat(options)))
    if options.huggingface is not None:
        found = _of_huggingface(options)
    return (_whole(text) for text in found if text and "\0" not in text)


def _whole(text: str) -> str:
    """The text, half a character of JSON's (a lone surrogate) being U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _of_path(path: pathlib.Path, options: Prepare) -> Iterator[str]:
    if not path.exists():
        raise Refused(f"`source` holds {path}, which does not exist; pass files or folders.")
    if not path.is_dir():
        yield from _of_file(path, options)
        return
    for file in sorted(data.walk(path, set(), options.out)):
        if file.name.endswith(LINES) or data.is_text(file.read_bytes()):
            yield from _of_file(file, options)


def _of_file(path: pathlib.Path, options: Prepare) -> Iterator[str]:
    """The lines of JSON, or the whole text."""
    try:
        if path.name.endswith(LINES):
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    yield _text(line, f"line {number} of {path}", options.field)
        else:
            yield path.read_bytes().decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise Refused(
            f"`source` holds {path}, which cannot be read ({error}); it must be UTF-8 text, .jsonl "
            "or .jsonl.gz."
        ) from error


def _text(line: str, where: str, field: str) -> str:
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{where} is no JSON object with a field {field!r}; see `field`.") from error
    if not isinstance(text, str):
        raise Refused(f"{where} has a {field!r} that is no text; see `field`.")
    return text


def _of_huggingface(options: Prepare) -> Iterator[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise Refused('`huggingface` needs a package: pip install "nlx[huggingface]".') from error
    try:
        rows = datasets.load_dataset(
            options.huggingface, options.configuration, split=options.split, streaming=True
        )
    except Exception as error:  # whatever the library and the network raise
        reason = " ".join(str(error).split())[:300]
        raise Refused(
            f"`huggingface` is {options.huggingface!r}, which cannot be read ({reason})."
        ) from error
    for number, row in enumerate(rows):
        if not isinstance(row.get(options.field), str):
            raise Refused(
                f"`field` is {options.field!r}; row {number} of {options.huggingface} has texts in "
                f"{', '.join(name for name, value in row.items() if isinstance(value, str))}."
            )
        yield row[options.field]


def _tokenizer(options: Prepare, folder: pathlib.Path) -> Tokenizer:
    """The one that is asked for; once there, the folder's own holds."""
    path = folder / tokenization.FILE
    if options.tokenizer == "bytes":
        return tokenization.BYTES
    kept = tokenization.read(path) if path.exists() else None
    if options.tokenizer != "bpe":
        made = tokenization.read(pathlib.Path(options.tokenizer))
        if kept is not None and kept.sha256 != made.sha256:
            raise Refused(
                f"`tokenizer` is {options.tokenizer}, which was changed since {folder} was begun; "
                "choose another `out`."
            )
    elif kept is not None:
        return kept
    else:
        say(f"Training a tokenizer of {options.vocabulary:,} tokens.")
        share = options.held_out_share
        trained = (text for text in documents(options) if not data.is_held_out(text, share))
        first = _first(trained, options.trained_on)
        made = tokenization.train(first, options.vocabulary, "vocabulary")
    assert made.json is not None
    runs.write_whole(path, made.json)
    return made


def _first(texts: Iterator[str], limit: int) -> Iterator[str]:
    """As many as hold `limit` bytes."""
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text


class _Shard:
    """Documents of a split that are not written yet."""

    def __init__(self, split: str, tokenizer: Tokenizer):
        self.split, self.tokenizer = split, tokenizer
        self.kept: list[np.ndarray] = []
        self.tokens = self.bytes = 0

    def add(self, tokens: np.ndarray, size: int) -> None:
        end = np.array([self.tokenizer.separator], tokens.dtype)
        self.kept.append(np.concatenate([tokens, end]))
        self.tokens += self.kept[-1].size
        self.bytes += size + 1

    def write(self, folder: pathlib.Path, number: int, form: str) -> dict[str, Any]:
        path = folder / f"{self.split}-{number:05d}.{form}"
        ends = np.cumsum([part.size for part in self.kept])
        np.save(shards.ends_of(path), ends)
        if form == "npy":
            np.save(path, np.concatenate(self.kept))
        else:
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for part in self.kept:
                writer.write(part.tobytes())
            writer.close()
        return {
            "file": path.name,
            "tokens": self.tokens,
            "documents": len(self.kept),
            "bytes": self.bytes,
            "sha256": shards.digest(path),
        }


def _write(
    options: Prepare, folder: runs.Run, tokenizer: Tokenizer, progress: dict[str, Any]
) -> dict[str, Any]:
    """All shards after those that are there; what nlx-data.json then holds."""
    done: dict[str, list[dict[str, Any]]] = {
        split: progress.get(split, []) for split in shards.SPLITS
    }
    for listed in done.values():
        shards.check(folder.folder, listed)
    seen, number, dropped = hashlib.sha256(), 0, progress.get("dropped", 0)
    open_shards = {split: _Shard(split, tokenizer) for split in shards.SPLITS}
    heldout = sum(shard["tokens"] for shard in done["held-out"])

    def flush() -> None:
        for split, shard in open_shards.items():
            if shard.kept:
                done[split].append(shard.write(folder.folder, len(done[split]), options.form))
                open_shards[split] = _Shard(split, tokenizer)
        told = {"asked": progress["asked"], "documents": number, "seen": seen.hexdigest()}
        told |= {"dropped": dropped, **done}
        folder.write("progress", told)

    with _shown() as shown:
        task = shown.add_task("", total=None)
        for text in documents(options):
            seen.update(hashlib.sha256(text.encode()).digest())
            number += 1
            if number <= progress["documents"]:
                if number == progress["documents"] and seen.hexdigest() != progress["seen"]:
                    raise Refused(
                        f"the first {number} documents are no longer those whose shards are in "
                        f"{options.out}; choose another `out`."
                    )
                continue
            tokens, split = tokenizer.encode(text), "train"
            if data.is_held_out(text, options.held_out_share):
                if heldout and heldout + tokens.size >= options.held_out_tokens:
                    dropped += 1  # it, or a copy, may be held out of other data
                    continue
                split, heldout = "held-out", heldout + tokens.size + 1
            open_shards[split].add(tokens, len(text.encode()))
            if number % 100 == 0:
                written = sum(s["tokens"] for s in done["train"]) + open_shards["train"].tokens
                shown.update(task, description=f"{number:,} documents, {written:,} tokens")
            if open_shards["train"].tokens >= options.shard_tokens:
                flush()
        if number < progress["documents"]:
            raise Refused(
                f"there are {number} documents, fewer than the {progress['documents']} whose "
                f"shards are in {options.out}; choose another `out`."
            )
        flush()
    if not done["train"] or not done["held-out"]:
        lacks = "the held-out split" if done["train"] else "training"
        raise Refused(
            f"{number} documents are too few: none is left for {lacks}; `nlx train --data` takes a "
            "text as it is."
        )
    total = lambda split: {
        **{
            what: sum(shard[what] for shard in done[split])
            for what in ("tokens", "documents", "bytes")
        },
        "shards": done[split],
    }
    return {
        "format": shards.FORMAT,
        "name": options.huggingface or ", ".join(path.name for path in options.source),
        "asked": progress["asked"],
        "dropped": dropped,
        "tokenizer": tokenizer.sha256,
        "vocabulary": tokenizer.size,
        "dtype": np.dtype(tokenization.kind(tokenizer.size)).name,
        **{split: total(split) for split in shards.SPLITS},
    }


def _shown() -> Progress:
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())


def _sentence(folder: pathlib.Path, told: dict[str, Any]) -> str:
    train, heldout = told["train"], told["held-out"]
    return (
        f"{folder}: {train['tokens']:,} tokens of {train['documents']:,} documents in "
        f"{len(train['shards'])} shards, {train['bytes'] / train['tokens']:.2f} bytes a token; "
        f"{heldout['tokens']:,} tokens are held out to be scored, {told['dropped']:,} more "
        "documents left out."
    )
