# SPDX-License-Identifier: Apache-2.0
"""The public files of eight tests of common sense, as items of multiple choice.

    name            file                                    fields
    piqa            JSONL (+ labels)                        goal, sol1, sol2; label 0 or 1
    hellaswag       JSONL                                   activity_label, ctx_a, ctx_b, endings,
                                                            label 0 to 3
    winogrande      JSONL (+ labels)                        sentence with one _, option1, option2,
                                                            answer "1" or "2"
    arc_easy,       JSONL or CSV                            question.stem, question.choices of
    arc_challenge                                           label and text, answerKey; in the CSV
                                                            one column: stem (A) text (B) text ...
    social_iqa      JSONL (+ labels)                        context, question, answerA, answerB,
                                                            answerC; label 1, 2 or 3
    boolq           JSONL                                   question, passage, answer true or false
    lambada         JSONL, or text of one passage a line    text

"+ labels": beside X.jsonl a file X-labels.lst with the label of each line, as published, holds what
the lines lack. Where a data set's copy on the Hugging Face hub names or nests a field differently
(ARC: question a string and choices of lists label, text; label inside the line; BoolQ as in
SuperGLUE: label 0 or 1), that form is read too. What a model is shown, prompts and all, is as
lm-evaluation-harness 0.4 has it (its tasks piqa, hellaswag, winogrande, arc_easy, arc_challenge,
social_iqa, boolq, lambada_openai).

WinoGrande is scored by partial evaluation (Trinh and Le, 2018): contexts are the sentence up to the
blank with either option, the one continuation what follows the blank.

Sources of the files: Bisk et al. (2020), PIQA; Zellers et al. (2019), HellaSwag; Sakaguchi et al.
(2020), WinoGrande; Clark et al. (2018), ARC; Sap et al. (2019), SocialIQA; Clark et al. (2019),
BoolQ; Paperno et al. (2016), LAMBADA; the fields as in their releases and in the loaders of
TensorFlow Datasets and of lm-evaluation-harness 0.4.13.
"""

import csv
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nlx_experiments.errors import Refused
from nlx_experiments.multiple_choice import Item, item

Record = Mapping[str, Any]


def read(name: str, path: pathlib.Path) -> list[Item]:
    """The items of a file.

    Args:
      name: of the format; see above.
      path: the file; a label file beside it is found by its name.

    Raises:
      Refused: an unknown name, no such file, a line that is no item, or nothing in it.
    """
    if name not in FORMATS:
        raise Refused(
            f"`choices` names the format {name!r}; it must be one of {', '.join(FORMATS)}."
        )
    items = []
    for number, record in _records(name, path):
        try:
            items.append(FORMATS[name](record))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise Refused(
                f"line {number} of {path} is no item of {name} ({reason}); the fields must be as "
                "published."
            ) from error
    if not items:
        raise Refused(f"{path} is empty; it must hold items of {name}.")
    return items


def given(words: tuple[str, ...]) -> dict[str, list[Item]]:
    """The items of NAME=FILE, NAME=FILE ..., by name.

    Raises:
      Refused: a word of another form, the same name twice, or a file that is none of its format.
    """
    found: dict[str, list[Item]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise Refused(
                f"`choices` holds {word!r}; it must be NAME=FILE, NAME one of {', '.join(FORMATS)}."
            )
        if name in found:
            raise Refused(f"`choices` names {name} twice; each must stand there once.")
        found[name] = read(name, pathlib.Path(path))
    return found


def _piqa(record: Record) -> Item:
    choices = [record["sol1"], record["sol2"]]
    return item(f"Question: {record['goal']}\nAnswer:", choices, int(record["label"]))


def _hellaswag(record: Record) -> Item:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = [_without_brackets(ending) for ending in record["endings"]]
    return item(_without_brackets(context), endings, int(record["label"]))


def _without_brackets(text: str) -> str:
    """Without what WikiHow's pages left in HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(record: Record) -> Item:
    before, blank, after = record["sentence"].partition("_")
    if not blank:
        raise ValueError("its sentence has no _")
    answer = str(record.get("answer") or record["label"])
    contexts = (before + record["option1"], before + record["option2"])
    return Item(contexts, (after.strip(),) * 2, ("1", "2").index(answer))


def _arc(record: Record) -> Item:
    question, choices = record["question"], record.get("choices") or {}
    if isinstance(question, str) and not choices:  # the CSV
        stem, labels, texts = _in_one_column(question)
        answer = record["AnswerKey"]
    elif isinstance(question, str):  # the hub's form
        stem, labels, texts = question, choices["label"], choices["text"]
        answer = record["answerKey"]
    else:
        stem, answer = question["stem"], record["answerKey"]
        labels, texts = ([c[field] for c in question["choices"]] for field in ("label", "text"))
    return item(f"Question: {stem}\nAnswer:", texts, labels.index(answer))


def _in_one_column(question: str) -> tuple[str, list[str], list[str]]:
    """Stem, labels and texts of "stem (A) text (B) text ...", or with (1), (2), ...

    The last (A) that a (B) follows begins the choices: a stem may hold such letters itself.
    """
    for first, *others in ("ABCDE", "12345"):
        stem, _, rest = question.rpartition(f"({first})")
        labels, texts = [first], []
        for label in others:
            text, found, after = rest.partition(f"({label})")
            if not found:
                break
            labels, texts, rest = [*labels, label], [*texts, text.strip()], after
        if texts:
            return stem.strip(), labels, [*texts, rest.strip()]
    raise ValueError("its question holds no (A) and (B), nor (1) and (2)")


def _social_iqa(record: Record) -> Item:
    context = f"Q: {record['context']} {record['question']}\nA:"
    choices = [record[f"answer{letter}"] for letter in "ABC"]
    return item(context, choices, int(record["label"]) - 1)


def _boolq(record: Record) -> Item:
    answer = record["answer"] if "answer" in record else {0: False, 1: True}[record["label"]]
    if not isinstance(answer, bool):
        raise ValueError(f"its answer is {answer!r}, neither true nor false")
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return item(context, ["no", "yes"], int(answer))


def _lambada(record: Record) -> Item:
    context, space, word = record["text"].rpartition(" ")
    if not (space and word):
        raise ValueError("it has no last word")
    return item(context, [word], 0)


FORMATS: Mapping[str, Callable[[Record], Item]] = {
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "social_iqa": _social_iqa,
    "boolq": _boolq,
    "lambada": _lambada,
}


def _records(name: str, path: pathlib.Path) -> Iterator[tuple[int, Record]]:
    """Each line's number and fields, the label of the label file among them."""
    labels = _labels(path)
    rows = list(_lines(name, path))
    if labels is not None and len(labels) != len(rows):
        raise Refused(
            f"{path} has {len(rows)} items and its label file {len(labels)} labels; they must be "
            "as many."
        )
    for place, (number, record) in enumerate(rows):
        yield number, record if labels is None else {**record, "label": labels[place]}


def _lines(name: str, path: pathlib.Path) -> Iterator[tuple[int, Record]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"`choices` names {path}, which cannot be read as text.") from error
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(content)), 2)
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        if name == "lambada" and path.suffix == ".txt":
            yield number, {"text": line.strip()}
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise Refused(f"line {number} of {path} is no JSON object; each line must be one.")
        yield number, record


def _labels(path: pathlib.Path) -> list[str] | None:
    """The labels of X-labels.lst beside X.jsonl, if it is there."""
    beside = path.with_name(f"{path.stem}-labels.lst")
    return beside.read_text().split() if beside.exists() else None
