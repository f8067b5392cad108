# SPDX-License-Identifier: Apache-2.0
"""Streams of tasks of language: domains of text, and languages to translate from.

A domain is scored by the share of bytes that are foretold right, a language by chrF (Popovic,
2015) of what is written for held-out sentences, as sacrebleu computes it, over 100.
"""

import csv
import hashlib
import json
import pathlib
import sysconfig
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from nlx_experiments import data
from nlx_experiments.continual_tasks import Absent, Rows, Scenario, Stage, encoded, found
from nlx_experiments.errors import Refused

ARROW, END = " = ", "\n"
SPLITS = "train", "validation", "test"
Pair = tuple[str, str]


def domains(
    paths: Sequence[pathlib.Path],
    counts: Mapping[str, int],
    length: int,
    generator: np.random.Generator,
) -> Scenario:
    """A stream of domains of text, in an order that is drawn.

    Given no paths, four that every machine has and the model was not trained on: Python's help
    topics in English, its tables of code pages, names of Unicode's characters, sums; and, where
    NLX_DATA holds them, CLINC150's queries and sentences in Kalamang. Each is cut into
    windows; of these 7 tenths are trained on, one is validated on and 2 are tested on, which is
    drawn.

    Args:
      paths: files of text, or folders; each a domain.
      counts: split -> windows, drawn; at most as many as the text holds.
      length: bytes of a window.
      generator: draws.

    Raises:
      Refused: a path without text, two of one name, or a text of less than ten windows.
    """
    if len({path.name for path in paths}) < len(paths):
        raise Refused(
            f"`domains` holds {', '.join(p.name for p in paths)}; no two may have the same name."
        )
    texts = {p.name: _joined(p) for p in paths} if paths else _own_domains(generator)
    names = list(texts)

    def rows(name: str) -> list[Rows]:
        text = texts[name]
        if len(text) < 10 * length:
            raise Refused(
                f"the domain {name} has {len(text)} bytes; it must have {10 * length} or more, ten "
                "windows'."
            )
        starts = generator.permutation(np.arange(0, len(text) - length + 1, length))
        parts = np.split(starts, [len(starts) * 7 // 10, len(starts) * 8 // 10])
        kept = [part[: counts[split]] for part, split in zip(parts, SPLITS, strict=True)]
        return [foretold([text[s : s + length] for s in part], length) for part in kept]

    stages = []
    for n in generator.permutation(len(names)):
        train, validation, test = rows(names[n])
        stages.append(Stage(names[n], train, validation, test))
    return Scenario("text", tuple(stages))


def foretold(texts: Sequence[bytes], length: int, told: Sequence[int] = ()) -> Rows:
    """Rows all of whose bytes are scored, or those from `told` on; never the first."""
    tokens = encoded(texts, length)
    places = np.arange(length)
    begins = np.asarray(told if len(told) else [1] * len(texts))[:, None]
    scored = ((tokens > 0) & (places >= begins)).astype(np.float32)
    return Rows(tokens, np.zeros(len(texts), np.int32), scored)


def _joined(path: pathlib.Path) -> bytes:
    corpus = data.load((path,))
    return (corpus.train.tobytes() + corpus.heldout.tobytes()).replace(bytes([data.SEPARATOR]), b"")


def _own_domains(generator: np.random.Generator) -> dict[str, bytes]:
    """What every machine has; and what NLX_DATA holds."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    pages = sorted((library / "encodings").glob("cp*.py"))
    named = (unicodedata.name(chr(n), "") for n in range(0x20, 0x3000))
    sums = [f"{a}+{b}={a + b}\n" for a, b in generator.integers(0, 1000, (6000, 2)).tolist()]
    texts = {
        "help": topics.read_bytes() if topics.exists() else b"",
        "code pages": b"".join(page.read_bytes() for page in pages),
        "names": "\n".join(name for name in named if name).encode(),
        "sums": "".join(sums).encode(),
    }
    try:
        held = json.loads((found("clinc150") / "data_full.json").read_text())
        texts["queries"] = "".join(f"{query}\n" for query, _ in held["train"]).encode()
    except Absent:
        pass
    try:
        texts["kalamang"] = "".join(f"{a}\n" for a, _ in sentences(found("kalamang"))).encode()
    except Absent:
        pass
    return {name: text.replace(b"\0", b"") for name, text in texts.items() if text}


def sentences(folder: pathlib.Path) -> list[Pair]:
    """(Kalamang, English) of the dictionary's example sentences, in the file's order.

    Some are translated to Indonesian where English should stand; they are kept.
    Source: Visser (2020), Kalamang dictionary, in the form of Cross-Linguistic Data Formats.
    """
    lines = _table(folder / "examples.csv", ("Primary_Text", "Translated_Text"))
    return [(a, b) for a, b in lines if a and b]


def dictionary(folder: pathlib.Path) -> list[Pair]:
    """(Kalamang word, meaning in English), one for each sense."""
    words = dict(_table(folder / "entries.csv", ("ID", "Headword")))
    senses = _table(folder / "senses.csv", ("Entry_ID", "Description"))
    return [(words[e], meaning) for e, meaning in senses if words.get(e) and meaning]


def _table(path: pathlib.Path, columns: tuple[str, str]) -> list[Pair]:
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            return [(line[columns[0]], line[columns[1]]) for line in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise Refused(
            f"{path} must be a CSV file in UTF-8 with the columns {' and '.join(columns)} "
            f"({type(error).__name__}: {error})."
        ) from error


SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def made_up(english: str) -> str:
    """The sentence in a language that nobody speaks: words of two syllables, in reverse order.

    A word's syllables are drawn by its hash, so it is the same in every sentence.
    """

    def word(of: str) -> str:
        drawn = hashlib.sha256(of.encode()).digest()
        return "".join(SYLLABLES[byte % len(SYLLABLES)] for byte in drawn[:2])

    return " ".join(word(w) for w in reversed(english.lower().strip(".!?").split()))


def translation(
    folder: pathlib.Path,
    after_another: bool,
    counts: Mapping[str, int],
    length: int,
    generator: np.random.Generator,
) -> Scenario:
    """Kalamang to English from dictionary and sentences; alone, or after a made-up language.

    A sentence's hash decides whether it is trained on (8 of 10), validated or tested on. The second
    language is `made_up`, from the English of the sentences trained on and its own words for those
    of the dictionary; it is learned first. Sentences longer than a row are left out.

    Args:
      folder: of entries.csv, senses.csv and examples.csv.
      after_another: whether the made-up language comes first.
      counts: split -> rows, drawn; of those trained on a third is from the dictionary.
      length: bytes of a row: sentence, " = ", translation and the end of the line.
      generator: draws.

    Raises Refused for a folder of another form.
    """
    parts: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    fits = lambda pair: len((ARROW.join(pair) + END).encode()) <= length
    for pair in filter(fits, sentences(folder)):
        share = hashlib.sha256(pair[0].encode()).digest()[0] / 25.6
        parts["train" if share < 8 else "validation" if share < 9 else "test"].append(pair)
    words = list(filter(fits, dictionary(folder)))
    if not all(parts.values()) or not words:
        raise Refused(f"{folder} holds no sentence or word that fits into {length} bytes.")

    def stage(name: str, told: Mapping[str, Sequence[Pair]], words: Sequence[Pair]) -> Stage:
        def rows(split: str) -> Rows:
            given = list(told[split])
            kept = [given[n] for n in generator.permutation(len(given))]
            some = [words[n] for n in generator.permutation(len(words))[: counts["train"] // 3]]
            if split != "train":
                return translated(kept[: counts[split]], length)
            return translated(kept[: counts["train"] - len(some)] + some, length)

        return Stage(name, rows("train"), rows("validation"), rows("test"))

    stages = [stage("kalamang", parts, words)]
    if after_another:
        other = lambda pairs: [p for _, e in pairs if fits(p := (made_up(e), e))]
        own = {split: other(pairs) for split, pairs in parts.items()}
        known = set(own["train"])  # two sentences may have one translation
        own |= {s: [p for p in own[s] if p not in known] for s in ("validation", "test")}
        stages.insert(0, stage("made-up", own, other(words)))
    return Scenario("translation", tuple(stages))


def translated(pairs: Sequence[Pair], length: int) -> Rows:
    """Rows whose translations are scored."""
    whole = [(ARROW.join(pair) + END).encode() for pair in pairs]
    return foretold(whole, length, [len((a + ARROW).encode()) for a, _ in pairs])


def chrf(written: Sequence[bytes], rows: Rows) -> float:
    """chrF of what was written against the rows' translations, over 100: in [0, 1].

    chrF2: F of character 1- to 6-grams, recall counted twice. Source: Popovic (2015), chrF.
    """
    from sacrebleu.metrics.chrf import CHRF

    text = lambda content: content.split(b"\n")[0].decode(errors="replace").strip()
    meant = [text(bytes(r[s > 0].tolist())) for r, s in zip(rows.tokens, rows.scored, strict=True)]
    return CHRF().corpus_score([text(w) for w in written], [meant]).score / 100


def asked(rows: Rows) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, " n"]]:
    """The rows without their translations, and where those begin."""
    begins = rows.scored.argmax(1)
    hidden = np.arange(rows.tokens.shape[1]) >= begins[:, None]
    return np.where(hidden, 0, rows.tokens), begins.astype(np.int32)
