# SPDX-License-Identifier: Apache-2.0
"""Streams of tasks of classes: queries by what they want, digits by what they show.

A row is bytes: of a text, or of an image, pixel by pixel, as 1 + gray.
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from nlx_experiments.console import say
from nlx_experiments.errors import Refused

Kind = Literal["classes", "text", "translation"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples: bytes filled up with 0, and what is asked of them."""

    tokens: Int[np.ndarray, "n t"]
    labels: Int[np.ndarray, " n"]  # of classes; 0 elsewhere
    scored: Float[np.ndarray, "n t"]  # 1 where a byte must be foretold from those before it

    def __len__(self) -> int:
        """How many."""
        return len(self.tokens)

    def take(self, places: Int[np.ndarray, " m"]) -> "Rows":
        """Those at these places."""
        return Rows(self.tokens[places], self.labels[places], self.scored[places])


@dataclasses.dataclass(frozen=True)
class Stage:
    """One task of a stream."""

    name: str
    train: Rows
    validation: Rows
    test: Rows
    classes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A stream of tasks; texts: of the labels, by number."""

    kind: Kind
    stages: tuple[Stage, ...]
    texts: tuple[str, ...] = ()


class Absent(Exception):
    """Data that is not there; says what was looked for and where."""


# The ten domains of CLINC150: Larson et al. (2019), An Evaluation Dataset for Intent Classification
# and Out-of-Scope Prediction, appendix.
DOMAINS: Mapping[str, str] = {
    "banking": "freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate "
    "min_payment bill_balance transfer order_checks balance spending_history transactions "
    "report_fraud",
    "credit cards": "replacement_card_duration expiration_date damaged_card improve_credit_score "
    "report_lost_card card_declined credit_limit_change apr redeem_rewards credit_limit "
    "rewards_balance application_status credit_score new_card international_fees",
    "kitchen": "food_last confirm_reservation how_busy ingredients_list calories nutrition_info "
    "recipe restaurant_reviews restaurant_reservation meal_suggestion restaurant_suggestion "
    "cancel_reservation ingredient_substitution cook_time accept_reservations",
    "home": "what_song play_music todo_list_update reminder reminder_update calendar_update "
    "order_status update_playlist shopping_list calendar next_song order todo_list "
    "shopping_list_update smart_home",
    "auto": "current_location oil_change_when oil_change_how uber traffic tire_pressure "
    "schedule_maintenance gas mpg distance directions last_maintenance gas_type tire_change "
    "jump_start",
    "travel": "plug_type travel_notification translate flight_status international_visa timezone "
    "exchange_rate travel_suggestion travel_alert vaccines lost_luggage book_flight book_hotel "
    "carry_on car_rental",
    "utility": "weather alarm date find_phone share_location timer make_call calculator definition "
    "measurement_conversion flip_coin spelling time roll_dice text",
    "work": "pto_request_status next_holiday insurance_change insurance meeting_schedule payday "
    "taxes income rollover_401k pto_balance pto_request w2 schedule_meeting direct_deposit "
    "pto_used",
    "small talk": "who_made_you meaning_of_life who_do_you_work_for do_you_have_pets "
    "what_are_your_hobbies fun_fact what_is_your_name where_are_you_from goodbye thank_you "
    "greeting tell_joke are_you_a_bot how_old_are_you what_can_i_ask_you",
    "meta": "change_speed user_name whisper_mode yes change_volume no change_language repeat "
    "change_accent cancel sync_device change_user_name change_ai_name reset_settings maybe",
}


def found(name: str, given: pathlib.Path | None = None) -> pathlib.Path:
    """A file or folder that was given, or `name` under the folder NLX_DATA.

    Raises Refused where what was given is not there, Absent where nothing was given.
    """
    if given is not None:
        if not given.exists():
            raise Refused(f"{given} does not exist; it must be the file or folder of {name}.")
        return given
    root = os.environ.get("NLX_DATA")
    if root is None:
        raise Absent(f"{name} needs NLX_DATA, a folder that holds it, and that is not set")
    if not (path := pathlib.Path(root, name)).exists():
        raise Absent(f"there is no {name} under NLX_DATA")
    return path


def encoded(texts: Sequence[str | bytes], length: int) -> Int[np.ndarray, "n t"]:
    """Bytes in UTF-8, cut at `length` and filled up with 0."""
    out = np.zeros((len(texts), length), np.int32)
    for row, text in zip(out, texts, strict=True):
        given = (text.encode() if isinstance(text, str) else text)[:length]
        row[: len(given)] = np.frombuffer(given, np.uint8)
    return out


def labelled(tokens: Int[np.ndarray, "n t"], labels: Sequence[int] | np.ndarray) -> Rows:
    """Rows of classes."""
    return Rows(tokens, np.asarray(labels, np.int32), np.zeros(tokens.shape, np.float32))


Splits = Mapping[
    str, Mapping[str, Sequence[str]]
]  # "train", "validation", "test" -> label -> texts


def by_class(
    splits: Splits,
    tasks: Mapping[str, Sequence[str]],
    counts: Mapping[str, int],
    length: int,
    generator: np.random.Generator,
) -> Scenario:
    """A class-incremental stream: each task brings classes that no other has.

    Args:
      splits: texts by split and label.
      tasks: name -> labels; the stream meets them in an order that is drawn.
      counts: split -> texts of each class, drawn; fewer where there are not as many.
      length: bytes kept of each text.
      generator: draws.

    Raises Refused for a label without a text in some split.
    """
    names = list(tasks)
    order = [names[n] for n in generator.permutation(len(names))]
    texts = [label for name in order for label in tasks[name]]
    number = {label: n for n, label in enumerate(texts)}

    def rows(split: str, labels: Sequence[str]) -> Rows:
        chosen, of = [], []
        for label in labels:
            held = splits[split].get(label, ())
            if not held:
                raise Refused(f"the class {label!r} has no text in the split `{split}`.")
            kept = generator.permutation(len(held))[: counts[split]]
            chosen += [held[n] for n in kept]
            of += [number[label]] * len(kept)
        return labelled(encoded(chosen, length), of)

    stages = [
        Stage(
            name,
            *(rows(split, tasks[name]) for split in ("train", "validation", "test")),
            classes=tuple(number[label] for label in tasks[name]),
        )
        for name in order
    ]
    return Scenario("classes", tuple(stages), tuple(t.replace("_", " ") for t in texts))


def clinc(
    path: pathlib.Path, counts: Mapping[str, int], length: int, generator: np.random.Generator
) -> Scenario:
    """CLINC150: 10 domains of 15 intents; data_full.json as its authors publish it.

    path: the file, or the folder that holds it. Others: as of `by_class`.
    Raises Refused for a file of another form.
    """
    path = path / "data_full.json" if path.is_dir() else path
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}, "test": {}}
    try:
        held = json.loads(path.read_text())
        for name, key in (("train", "train"), ("validation", "val"), ("test", "test")):
            for text, label in held[key]:
                splits[name].setdefault(label, []).append(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{path} must be CLINC150's data_full.json: an object whose `train`, `val` and `test` "
            f"are lists of [text, intent] ({type(error).__name__}: {error})."
        ) from error
    tasks = {name: intents.split() for name, intents in DOMAINS.items()}
    return by_class(splits, tasks, counts, length, generator)


def _lines(path: pathlib.Path) -> dict[str, list[str]]:
    """label -> its texts, each once, by their hashes."""
    found: dict[str, set[str]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            for line in csv.DictReader(stream):
                label = line["label" if "label" in line else "category"].strip()
                found.setdefault(label, set()).add(line["text"])
        order = lambda text: hashlib.sha256(text.encode()).digest()
        return {label: sorted(texts, key=order) for label, texts in found.items()}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError) as error:
        raise Refused(
            f"{path} must be a CSV file in UTF-8 with the columns text and label (or category) "
            f"({type(error).__name__}: {error})."
        ) from error


def labelled_file(
    path: pathlib.Path,
    classes: int,
    counts: Mapping[str, int],
    length: int,
    generator: np.random.Generator,
) -> Scenario:
    """A CSV file with the columns text and label (Banking77: text, category), cut into tasks.

    Of each class a tenth of the texts is validated on, two tenths are tested on, at least one each;
    which ones, their hashes decide; a class of fewer than three is left out, with a line that says
    so. Of Banking77's folder those of test.csv are tested on, and of
    train.csv the others. Labels are shuffled, then dealt to tasks.

    path: the file, or the folder of Banking77's train.csv and test.csv. classes: of each task,
    >= 1; the last has what is left over. Others: as of `by_class`. Raises Refused for a file of
    another form.
    """
    if classes < 1:
        raise ValueError(f"`classes` is {classes}; it must be an integer >= 1.")
    tested = path / "test.csv"
    told = _lines(tested) if path.is_dir() and tested.exists() else {}
    path = path / "train.csv" if path.is_dir() else path
    asked = {text for texts in told.values() for text in texts}
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}, "test": {}}
    for label, texts in _lines(path).items():
        texts = [text for text in texts if text not in asked]
        first = 0 if told else max(1, len(texts) * 2 // 10)
        second = first + max(1, len(texts) // 10)
        splits["test"][label] = texts[:first] or told.get(label, [])
        splits["validation"][label] = texts[first:second]
        splits["train"][label] = texts[second:]
    labels = sorted(label for label in splits["train"] if all(s[label] for s in splits.values()))
    if few := sorted(splits["train"].keys() - set(labels)):
        named = ", ".join(few[:5]) + (" ..." if len(few) > 5 else "")
        say(f"{path}: {len(few)} classes of fewer than three texts are left out: {named}.")
    if not labels:
        raise Refused(f"{path} must hold three texts or more of some label.")
    labels = [labels[n] for n in generator.permutation(len(labels))]
    parts = [labels[n : n + classes] for n in range(0, len(labels), classes)]
    tasks = {f"task {n + 1}": part for n, part in enumerate(parts)}
    return by_class(splits, tasks, counts, length, generator)


def shuffled(scenario: Scenario, generator: np.random.Generator) -> Scenario:
    """The control: in every task the labels trained on change places among its rows."""
    control = lambda rows: dataclasses.replace(rows, labels=generator.permutation(rows.labels))
    stages = [dataclasses.replace(s, train=control(s.train)) for s in scenario.stages]
    return dataclasses.replace(scenario, stages=tuple(stages))


def chance(scenario: Scenario) -> tuple[float, float]:
    """What a guess gets right: among the classes of a task, and among all after the last."""
    within = float(np.mean([1 / max(1, len(set(s.classes))) for s in scenario.stages]))
    return within, 1 / max(1, len({c for s in scenario.stages for c in s.classes}))
