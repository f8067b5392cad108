# SPDX-License-Identifier: Apache-2.0
"""The streams of `nlx run continual`, their sizes, and where their data is."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nlx_experiments import continual_digits as pictures
from nlx_experiments import continual_language as language
from nlx_experiments import continual_tasks as tasks
from nlx_experiments.continual_methods import Plan
from nlx_experiments.continual_tasks import Absent, Scenario
from nlx_experiments.sequence_experiment import Options


class Row(NamedTuple):
    """One stream: made(generator) draws it; seeds at most; control: whether labels are shuffled."""

    made: Callable[[np.random.Generator], Scenario]
    plan: Plan
    seeds: int = 1
    control: bool = False
    told: str = ""  # what else decides it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continual(Options):
    """Streams of tasks, fourteen ways to learn them."""

    runs: pathlib.Path = pathlib.Path("runs/continual")
    seeds: int = 3
    """Of each stream, at most."""
    clinc: pathlib.Path | None = None
    """CLINC150's data_full.json; under NLX_DATA by default."""
    banking: pathlib.Path | None = None
    """Folder of Banking77's train.csv and test.csv; under NLX_DATA by default."""
    kalamang: pathlib.Path | None = None
    """Folder of the dictionary's tables; under NLX_DATA by default."""
    file: pathlib.Path | None = None
    """A CSV file with the columns text and label."""
    classes: int = 10
    """Of each task that `file` is cut into."""
    domains: tuple[pathlib.Path, ...] = ()
    """Files or folders of text, each a domain; what every machine has by default."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers below 1."""
        for name in ("seeds", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be an integer >= 1.")


def full(options: Continual, large: bool = False) -> dict[str, Row]:
    """All streams; large: all rows and the same seeds everywhere."""
    few, some = (100, 1000) if large else (40, 320)
    of_class = dict(train=few, validation=20 if large else 10, test=30 if large else 15)
    plan = Plan(batch=32, epochs=3, kept=2)
    # of each class; in permuted digits of all: the last part of 1,797
    each = dict(train=120, validation=15, test=30)
    all_ten = dict(train=1000 if large else 512, validation=60, test=300 if large else 60)
    windows = dict(train=some, validation=32, test=64)
    pairs = dict(train=1200 if large else 600, validation=16, test=100 if large else 32)

    def clinc(generator: np.random.Generator) -> Scenario:
        path = tasks.found("clinc150", options.clinc)
        return tasks.clinc(path, of_class, 64, generator)

    def banking(generator: np.random.Generator) -> Scenario:
        path = tasks.found("banking77", options.banking)
        return tasks.labelled_file(path, 11, of_class, 96, generator)

    def file(generator: np.random.Generator) -> Scenario:
        if options.file is None:
            raise Absent("no `--file` was given")
        path = tasks.found("texts and labels", options.file)
        return tasks.labelled_file(path, options.classes, of_class, 96, generator)

    def kalamang(generator: np.random.Generator, after: bool) -> Scenario:
        path = tasks.found("kalamang", options.kalamang)
        return language.translation(path, after, pairs, 96, generator)

    many = lambda least: 5 if large else least
    told, text = f"{of_class}", Plan(batch=16, epochs=4 if large else 2, kept=32)
    orders = 150 if large else 50
    return {
        "clinc150": Row(clinc, plan, many(3), True, told),
        "banking77": Row(banking, plan, many(1), False, told),
        "file": Row(file, plan, many(1), False, f"{told} {options.classes}"),
        "digits": Row(functools.partial(pictures.digits, each), plan, many(3), True, f"{each}"),
        "permuted digits": Row(
            functools.partial(pictures.permuted_digits, orders, all_ten),
            plan._replace(epochs=2), many(1), False, f"{all_ten} {orders}",
        ),
        "domains": Row(
            functools.partial(language.domains, options.domains, windows, 128),
            text, many(1), False, f"{windows}",
        ),
        "kalamang": Row(
            functools.partial(kalamang, after=False), text._replace(epochs=4), many(1), False,
            f"{pairs}",
        ),
        "kalamang after another": Row(
            functools.partial(kalamang, after=True), text._replace(epochs=4), many(1), False,
            f"{pairs}",
        ),
    }  # fmt: skip


def tiny() -> dict[str, Row]:
    """Digits two at a time, a few of each."""
    counts = dict(train=4, validation=2, test=2)
    made = functools.partial(pictures.digits, counts)
    return {"digits": Row(made, Plan(batch=4, epochs=1, kept=1), 1, False, "tiny")}
