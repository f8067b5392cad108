# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: bytes, and byte-level BPE, trained on the text at hand or read from its JSON.

Either is lossless: each token stands for a fixed string of bytes, and joined, what `encode` gave
is the text in UTF-8 (Python's "surrogateescape" being undone). So costs in nats can be summed over
tokens and shared out over bytes or words.

BPE merges the most frequent pair of neighbours until there are as many tokens as asked for; it
starts from the 256 bytes and never merges across the edges that GPT-2's pattern draws between
words. The zero byte, which no text holds, is merged with nothing: it stands between files.

References: Sennrich, Haddow and Birch (2016), Neural machine translation of rare words with subword
units; Radford et al. (2019), GPT-2, section 2.2 and its `bytes_to_unicode`.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from nlx_experiments import data
from nlx_experiments.data import Corpus
from nlx_experiments.errors import Refused

FILE = "tokenizer.json"
Stream = Integer[np.ndarray, " n"]
PROBE = "a  b\n\tit's \u65e5\u672c\u00e9, 12 \n "


class Tokenizer(NamedTuple):
    """A text as numbers and back.

    pieces: the bytes that each token stands for; separator: the token between files, piece zero
    byte; encode: text -> tokens; json: what is saved of it, None for bytes.
    """

    pieces: tuple[bytes, ...]
    separator: int
    encode: Callable[[str], Stream]
    json: str | None

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.pieces)

    @property
    def sha256(self) -> str | None:
        """Digest of what is saved of it; None for bytes."""
        return None if self.json is None else hashlib.sha256(self.json.encode()).hexdigest()

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes that the tokens stand for."""
        return b"".join(self.pieces[int(token)] for token in tokens)

    def starts(self, tokens: Stream) -> Int[np.ndarray, " n+1"]:
        """Where each token begins among the bytes of all of them, and where the last one ends."""
        lengths = np.array([len(piece) for piece in self.pieces])
        return np.concatenate([[0], np.cumsum(lengths[tokens])])


BYTES = Tokenizer(
    tuple(bytes([b]) for b in range(data.VOCABULARY)), data.SEPARATOR, data.encode, None
)


class Tokens(NamedTuple):
    """A corpus as tokens: both splits, and the tokenizer that made them."""

    tokenizer: Tokenizer
    train: Any  # one stream, or a list of them, which are mixed
    heldout: Stream

    @property
    def train_size(self) -> int:
        """Tokens of the training split."""
        streams = self.train if isinstance(self.train, list) else [self.train]
        return sum(stream.size for stream in streams)


def train(texts: Iterable[str], size: int, called: str = "model.vocabulary") -> Tokenizer:
    """Byte-level BPE of `size` tokens, the 256 bytes among them; the same for the same texts.

    called: what the size is called where it is refused.

    Raises:
      Refused: `size` is below 256, or more than the texts give.
    """
    if size < data.VOCABULARY:
        raise Refused(f"`{called}` is {size}; it must be at least 256, the bytes.")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole = (text.encode(errors="surrogateescape").decode(errors="ignore") for text in texts)
    made.train_from_iterator(whole, trainer)
    if (given := made.get_vocab_size()) < size:
        raise Refused(
            f"`{called}` is {size}, but the text gives no more than {given} tokens; it must be at "
            "most that."
        )
    return parse(made.to_str(), "what was trained")


def read(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a JSON file as the library `tokenizers` writes it.

    Raises:
      Refused: there is none, or it is no byte-level BPE.
    """
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"`tokenizer` is {path}, which cannot be read; it must be bytes, bpe, or a "
            "tokenizer.json."
        ) from error
    return parse(content, f"`tokenizer` is {path}")


def parse(content: str, what: str) -> Tokenizer:
    """The tokenizer of a JSON text; `what` begins the sentence of a refusal."""
    must = "it must be a byte-level BPE without normalizer, as the library `tokenizers` writes it"
    try:
        fields = json.loads(content)
        kinds = [fields["model"]["type"], *map(_kind, (fields["decoder"], fields["normalizer"]))]
        made = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare ones
        raise Refused(f"{what}, which is no tokenizer; {must}.") from error
    if kinds != ["BPE", "ByteLevel", "none"]:
        raise Refused(f"{what}, which is of another kind ({', '.join(kinds)}); {must}.")
    made.encode_special_tokens = True  # a text that spells one is text
    made.no_truncation()
    made.no_padding()
    special = {n for n, token in made.get_added_tokens_decoder().items() if token.special}
    byte_of = _bytes_of_alphabet()
    pieces = [b""] * made.get_vocab_size()
    added = made.get_added_tokens_decoder()
    try:
        for token, number in made.get_vocab().items():
            if number in added:
                pieces[number] = b"" if number in special else token.encode()
            else:
                pieces[number] = bytes(byte_of[letter] for letter in token)
        separator = pieces.index(bytes([data.SEPARATOR]))
    except (IndexError, KeyError, ValueError) as error:
        raise Refused(f"{what}, which lacks some byte or number; {must}.") from error

    alone = [pieces.index(bytes([b])) for b in range(256)]

    def encode(text: str) -> Stream:
        numbers: list[int] = []
        for n, part in enumerate(re.split("([\udc80-\udcff])", text)):
            if n % 2:  # a byte that is no UTF-8
                numbers.append(alone[ord(part) - 0xDC00])
            elif part:
                numbers += made.encode(part, add_special_tokens=False).ids
        return np.array(numbers, kind(len(pieces)))

    known = Tokenizer(tuple(pieces), separator, encode, content)
    if (back := known.decode(encode(PROBE)).decode(errors="replace")) != PROBE:
        raise Refused(f"{what}, which makes {back!r} of {PROBE!r}; it must keep every byte.")
    return known


def kind(size: int) -> type[np.integer[Any]]:
    """The smallest type of number that holds `size` tokens."""
    return np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32


def of_run(folder: pathlib.Path, name: str) -> Tokenizer:
    """The tokenizer that stands beside a run; `name` is its configuration's `tokenizer`."""
    return BYTES if name == "bytes" else read(folder / FILE)


def load(
    name: str,
    size: int,
    paths: Sequence[pathlib.Path],
    folder: pathlib.Path,
    called: str = "model.vocabulary",
) -> tuple[Any, Tokens]:
    """The corpus of a run and its tokens.

    Args:
      name: "bytes"; "bpe", which is trained on the training split unless `folder` holds one of
        that size; or the path of a tokenizer's JSON.
      size: tokens of the model; those of the file at least.
      paths: as `data.load`; or token files, .npy with one row of integers, that the file made; or
        folders of prepared data, see `shards`.
      folder: of the run.
      called: what the size is called where it is refused.

    Raises:
      Refused: bad input.
    """
    from nlx_experiments import shards  # which reads tokenizers

    if shards.is_prepared(paths):
        return shards.load(paths, name, size, called)
    files = [path for path in paths if path.suffix == ".npy"]
    if name in ("bytes", "bpe"):
        if files:
            raise Refused(
                f"`data` holds {files[0]}, a token file, and `tokenizer` is {name}; it must be the "
                "tokenizer.json that made the tokens."
            )
        corpus = data.load(paths, without=folder)
        if name == "bytes":
            return corpus, Tokens(BYTES, corpus.train, corpus.heldout)
        saved = read(folder / FILE) if (folder / FILE).exists() else None
        made = saved if saved is not None and saved.size == size else None
        return corpus, of_corpus(corpus, made or train(texts(corpus.train), size, called))
    tokenizer = read(pathlib.Path(name))
    if tokenizer.size > size:
        raise Refused(
            f"`{called}` is {size}, but {name} has {tokenizer.size} tokens; it must be at "
            "least that."
        )
    if not files:
        corpus = data.load(paths, without=folder)
        return corpus, of_corpus(corpus, tokenizer)
    if len(files) < len(paths):
        raise Refused("`data` holds token files beside texts; it must be one or the other.")
    return of_token_files(files, tokenizer)


def texts(stream: data.Bytes) -> list[str]:
    """The files of a split; bytes that are no UTF-8, where one was cut, as surrogates."""
    undo = "surrogateescape"
    return [
        text.decode(errors=undo) for text in stream.tobytes().split(bytes([data.SEPARATOR]))[:-1]
    ]


def of_corpus(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """Both splits in tokens, every file closed by a separator."""
    known = (corpus.sha256, tokenizer.sha256)
    if known not in _last:
        end = np.array([tokenizer.separator], kind(tokenizer.size))
        split = lambda stream: np.concatenate(
            [part for text in texts(stream) for part in (tokenizer.encode(text), end)]
        )
        _last.clear()
        _last[known] = Tokens(tokenizer, split(corpus.train), split(corpus.heldout))
    return _last[known]


_last: dict[tuple[str, str | None], Tokens] = {}  # the trainings of an experiment read the same


def of_token_files(paths: Sequence[pathlib.Path], tokenizer: Tokenizer) -> tuple[Corpus, Tokens]:
    """Files of numbers, .npy, that the tokenizer made: as text and as they are."""
    arrays: dict[str, Any] = {}
    for path in paths:
        try:
            numbers = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise Refused(f"`data` holds {path}, which is no .npy file of numbers.") from error
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not numbers.size:
            raise Refused(
                f"`data` holds {path} of {numbers.dtype}{list(numbers.shape)}; it must hold one "
                "row of integers."
            )
        if numbers.min() < 0 or numbers.max() >= tokenizer.size:
            raise Refused(
                f"`data` holds {path} with tokens from {numbers.min()} to {numbers.max()}; they "
                f"must be in [0, {tokenizer.size}), those of `tokenizer`."
            )
        if path.name in arrays:
            raise Refused(f"`data` holds two files called {path.name}; their names must differ.")
        arrays[path.name] = numbers.astype(kind(tokenizer.size))
    arrays, held_out = data.split(arrays)
    contents = {name: tokenizer.decode(numbers) for name, numbers in arrays.items()}
    corpus = data.made_of(", ".join(p.name for p in paths), contents, held_out)
    end = np.array([tokenizer.separator], kind(tokenizer.size))
    stream = lambda split: np.concatenate(
        [part for f in corpus.files if f.split == split for part in (arrays[f.name], end)]
    )
    return corpus, Tokens(tokenizer, stream("train"), stream("held-out"))


def _kind(part: dict[str, Any] | None) -> str:
    """What a part of a tokenizer is called."""
    return "none" if part is None else part["type"]


def _bytes_of_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies, backwards."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    letters = {chr(b): b for b in own}
    return letters | {chr(256 + n): b for n, b in enumerate(others)}
