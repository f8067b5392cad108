# SPDX-License-Identifier: Apache-2.0
"""Five items of every format, and the scores that a hand computes for a model of three costs."""

import csv
import json

import numpy as np
import pytest
from nlx_experiments import choice_formats, multiple_choice
from nlx_experiments.errors import Refused
from nlx_experiments.multiple_choice import Item
from nlx_experiments.tokenization import BYTES

VOWELS = [*b"aeiou"]

# What a space and a word cost after a colon, in nats, below; and that per letter:
#   on, ox 6 (3)   tea 7 (2.33)   area, idea 8 (2)   sky 9 (3)   audio 9 (1.8)   crypt 13 (2.6)
#   no 6 (3)   yes 8 (2.67)   sky sky 18 (2.57)
FOUR = ["on", "sky", "area", "audio"]  # acc takes 0, acc_norm 3
ALIKE = ["sky", "tea", "sky sky", "crypt"]  # both take 1
PAIRS = [
    ("ox", "area", 0),
    ("sky", "tea", 1),
    ("audio", "on", 0),
    ("tea", "sky", 1),
    ("idea", "ox", 1),
]


def costs(tokens):
    """A vowel costs 1 nat, a space after no vowel 3, anything else 2."""
    table = np.full((256, 256), -2.0)
    table[:, VOWELS] = -1
    table[:, ord(" ")] = -3
    table[VOWELS, ord(" ")] = -2
    return table[tokens]


def arc(stem, texts, answer, labels="ABCD"):
    choices = [{"text": t, "label": l} for t, l in zip(texts, labels, strict=True)]
    return {"id": stem, "question": {"stem": stem, "choices": choices}, "answerKey": answer}


def swag(endings, label, a="A man climbs.", b="he"):
    return {
        "ind": 4, "activity_label": "Climbing", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}",
        "split": "val", "split_type": "indomain", "label": label, "endings": endings,
        "source_id": "own~1",
    }  # fmt: skip


def social(texts, label):
    answers = dict(zip(("answerA", "answerB", "answerC"), texts, strict=True))
    return {"context": "Ann fed the dog.", "question": "Why?", **answers, "label": label}


def wino(first, second, answer, sentence="The key did not fit because the _ was old."):
    return {"qID": "1", "sentence": sentence, "option1": first, "option2": second, "answer": answer}


def bool_q(answer):
    return {"question": "is ice cold", "title": "Ice", "answer": answer, "passage": "Ice is cold."}


# Format -> five records, acc, acc_norm.
FIVE = {
    "piqa": (
        [{"goal": "Reach a shelf.", "sol1": a, "sol2": b, "label": n} for a, b, n in PAIRS],
        3 / 5,  # 0 1 . . 1
        2 / 5,  # . 1 0 . .
    ),
    "hellaswag": (
        [swag(FOUR, 0), swag(FOUR, 3), swag(FOUR, "0"), swag(ALIKE, 1), swag(ALIKE, 0)],
        3 / 5,
        2 / 5,
    ),
    # The option that ends in a vowel makes the space after it cheaper; else the first is taken.
    "winogrande": (
        [
            wino("lock", "idea", "2"),
            wino("lock", "idea", "1"),
            wino("area", "box", "1"),
            wino("box", "lock", "2"),
            wino("box", "lock", "1"),
        ],
        3 / 5,
        3 / 5,
    ),
    "arc_easy": (
        [
            arc("What is wet?", FOUR, "A"),
            arc("What is up?", FOUR, "D"),
            arc("What is far?", FOUR, "1", "1234"),
            arc("What is hot?", ALIKE, "B"),
            arc("What is old?", ALIKE, "D"),
        ],
        3 / 5,
        2 / 5,
    ),
    "arc_challenge": ([arc("What?", FOUR[:3], letter, "ABC") for letter in "AABCC"], 2 / 5, 2 / 5),
    "social_iqa": (
        [
            social(["ox", "area", "sky"], 1),
            social(["ox", "area", "sky"], "2"),
            social(["sky", "audio", "tea"], 3),
            social(["sky", "audio", "tea"], 2),
            social(["ox", "area", "sky"], 1),
        ],
        3 / 5,
        2 / 5,
    ),
    "boolq": ([bool_q(a) for a in (True, False, False, True, False)], 3 / 5, 2 / 5),
}


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("name", FIVE)
def test_scores_are_those_a_hand_computes(name, tmp_path):
    records, acc, norm = FIVE[name]
    items = choice_formats.read(name, lines(tmp_path / "five.jsonl", records))
    scores = multiple_choice.score(costs, BYTES, items)
    assert scores == (5, acc, norm, norm, None)


def test_last_words_are_right_letter_by_letter(tmp_path):
    """After " " comes "a", after a letter the next one, for half a nat; all else costs 4."""
    table = np.full((256, 256), -4.0)
    table[np.arange(255), np.arange(1, 256)] = -0.5
    table[[ord("."), ord(" ")]] = -4
    table[ord("."), ord(" ")] = table[ord(" "), ord("a")] = -0.5
    words = ["abc", "ab", "acb", "b", "a"]
    records = [{"text": f"He said it was so. {word}"} for word in words]
    for name, path in (
        ("a", lines(tmp_path / "five.jsonl", records)),
        ("b", tmp_path / "five.txt"),
    ):
        if name == "b":
            path.write_text("\n".join(r["text"] for r in records) + "\n")
        items = choice_formats.read("lambada", path)
        assert items[2] == Item(("He said it was so.",), ("acb",), 0)
        scores = multiple_choice.score(lambda tokens: table[tokens], BYTES, items)
        # abc 2, ab 1.5, acb 9 (c after a, b after c), b 4.5, a 1: 18 nats for five words
        assert scores.acc == 3 / 5
        assert scores.perplexity == pytest.approx(np.exp(18 / 5))
        assert scores.acc_norm is None


def test_what_a_model_is_shown(tmp_path):
    read = lambda name, record: choice_formats.read(name, lines(tmp_path / "a.jsonl", [record]))[0]
    piqa = {"goal": "Cool tea.", "sol1": "Wait.", "sol2": "Run.", "label": 1}
    assert read("piqa", piqa) == Item(("Question: Cool tea.\nAnswer:",) * 2, ("Wait.", "Run."), 1)
    ended = swag(["[substeps] tea", "a  b"], 1, "Go [title] up", "UP [step] there")
    assert read("hellaswag", ended) == Item(("Climbing: Go. up Up there",) * 2, (" tea", "a b"), 1)
    blank = wino("cat", "hat", "2", "Ann wore the _ to town.")
    assert read("winogrande", blank) == Item(
        ("Ann wore the cat", "Ann wore the hat"), ("to town.",) * 2, 1
    )
    assert read("arc_easy", arc("Why?", FOUR, "C")) == Item(
        ("Question: Why?\nAnswer:",) * 4, tuple(FOUR), 2
    )
    assert read("social_iqa", social(["a", "b", "c"], 3)) == Item(
        ("Q: Ann fed the dog. Why?\nA:",) * 3, ("a", "b", "c"), 2
    )
    assert read("boolq", bool_q(True)) == Item(
        ("Ice is cold.\nQuestion: is ice cold?\nAnswer:",) * 2, ("no", "yes"), 1
    )


def test_labels_may_lie_beside(tmp_path):
    records = [{k: v for k, v in r.items() if k != "label"} for r in FIVE["piqa"][0]]
    path = lines(tmp_path / "valid.jsonl", records)
    with pytest.raises(Refused, match="line 1 of .* is no item of piqa .it lacks 'label'"):
        choice_formats.read("piqa", path)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n0\n1\n1\n")
    assert [item.answer for item in choice_formats.read("piqa", path)] == [0, 1, 0, 1, 1]
    blanks = [{**r, "answer": ""} for r in FIVE["winogrande"][0]]
    lines(tmp_path / "dev.jsonl", blanks)
    (tmp_path / "dev-labels.lst").write_text("2\n1\n1\n2\n1\n")
    items = choice_formats.read("winogrande", tmp_path / "dev.jsonl")
    assert [item.answer for item in items] == [1, 0, 0, 1, 0]
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(Refused, match="has 5 items and its label file 2 labels"):
        choice_formats.read("piqa", path)


def test_forms_of_the_hub_are_the_same_items(tmp_path):
    read = lambda name, record: choice_formats.read(name, lines(tmp_path / "a.jsonl", [record]))
    lists = {"text": FOUR, "label": [*"ABCD"]}
    of_hub = {"id": "1", "question": "Why?", "choices": lists, "answerKey": "C"}
    assert read("arc_easy", of_hub) == read("arc_easy", arc("Why?", FOUR, "C"))
    glue = {"question": "is ice cold", "passage": "Ice is cold.", "idx": 0, "label": 1}
    assert read("boolq", glue) == read("boolq", bool_q(True))
    with open(tmp_path / "arc.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["questionID", "AnswerKey", "question", "subject"])
        table.writerow(["1", "C", "Why? (A) on (B) sky (C) area (D) audio", ""])
        table.writerow(["2", "2", "Is (A) or carbon (C) old? (1) on (2) sky\u2028blue", ""])
        table.writerow(["3", "B", "Is (A) carbon (C) old? (A) on (B) sky", ""])
    first, second, third = choice_formats.read("arc_easy", tmp_path / "arc.csv")
    assert [first] == read("arc_easy", arc("Why?", FOUR, "C"))
    texts = ["on", "sky\u2028blue"]
    assert [second] == read("arc_easy", arc("Is (A) or carbon (C) old?", texts, "2", "12"))
    assert [third] == read("arc_easy", arc("Is (A) carbon (C) old?", FOUR[:2], "B", "AB"))
    (tmp_path / "arc.csv").write_text("AnswerKey,question\nA,Why? (A) on\n")
    with pytest.raises(Refused, match="line 2 of .* holds no .A. and .B., nor .1. and .2."):
        choice_formats.read("arc_easy", tmp_path / "arc.csv")


BAD = [
    ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}, "`answer` is 2; it must be in"),
    ("hellaswag", swag(["a"], -1), "`answer` is -1; it must be in"),
    ("winogrande", wino("a", "b", "1", "no blank"), "its sentence has no _"),
    ("winogrande", wino("a", "b", "3"), "no item of winogrande"),
    ("arc_easy", arc("Why?", FOUR, "E"), "no item of arc_easy"),
    ("arc_easy", {"question": {"stem": "Why?"}, "answerKey": "A"}, "it lacks 'choices'"),
    ("social_iqa", social(["a", "b", "c"], 0), "`answer` is -1"),
    ("boolq", bool_q("yes"), "its answer is 'yes', neither true nor false"),
    ("lambada", {"text": "word"}, "it has no last word"),
    ("lambada", {}, "it lacks 'text'"),
    ("piqa", ["a"], "line 1 of .* is no JSON object"),
    ("quiz", {}, "the format 'quiz'; it must be one of piqa"),
]


@pytest.mark.parametrize(("name", "record", "sentence"), BAD)
def test_what_is_no_item_gets_a_sentence(name, record, sentence, tmp_path):
    with pytest.raises(Refused, match=sentence):
        choice_formats.read(name, lines(tmp_path / "a.jsonl", [record]))


def test_words_of_the_command(tmp_path):
    path = lines(tmp_path / "a.jsonl", FIVE["boolq"][0])
    assert list(choice_formats.given((f"boolq={path}",))) == ["boolq"]
    (tmp_path / "empty.jsonl").write_text("\n")
    for words, sentence in (
        (("boolq",), "holds 'boolq'; it must be NAME=FILE"),
        ((f"boolq={path}",) * 2, "names boolq twice"),
        (("boolq=/nowhere",), "names /nowhere, which cannot be read"),
        ((f"boolq={tmp_path}/empty.jsonl",), "is empty"),
    ):
        with pytest.raises(Refused, match=sentence):
            choice_formats.given(words)
