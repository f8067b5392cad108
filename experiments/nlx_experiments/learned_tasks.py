# SPDX-License-Identifier: Apache-2.0
"""What rules are meta-trained on, and what they are examined on."""

import functools
import pathlib
import sysconfig
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nlx import nn
from nlx.learned import tasks
from nlx.learned.tasks import Labelled, Task

HORIZON = 100  # steps that rules are trained for
LONGER = 1_000


class Exam(NamedTuple):
    """What an optimizer is examined on.

    task: of the problems. choosing: how many choose a rate or a theta. count: how many are reported
    on. objective: what curves are of, see `nlx.learned.train`. steps: of a run. longer: of the
    first problems that are reported on, to see how curves go on, >= steps. unit: of costs.
    """

    task: Task
    choosing: int
    count: int
    objective: Literal["training", "held-out"] = "training"
    steps: int = HORIZON
    longer: int = HORIZON
    unit: str = "nats"


@functools.cache
def digits() -> Labelled:
    """Scikit-learn's 1,797 images of digits, pixels in [0, 1]; every fifth is held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(images, np.float32) / 16, np.asarray(labels, np.int32)
    held = np.arange(len(labels)) % 5 == 4
    return Labelled(*map(jnp.asarray, (images[~held], labels[~held], images[held], labels[held])))


@functools.cache
def _text() -> np.ndarray:
    """100,000 bytes of the standard library's source."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    whole = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:20])
    return np.frombuffer(whole[:100_000], np.uint8).astype(np.int32)


def _images() -> Labelled:
    known = digits()
    square = lambda x: x.reshape(-1, 8, 8)
    return known._replace(inputs=square(known.inputs), heldout_inputs=square(known.heldout_inputs))


def _transformer() -> Task:
    model = nn.ModelConfig(
        mixer="attention", feed_forward="swiglu", width=16, layers=1, heads=2, hidden=32
    )
    return tasks.language(jnp.asarray(_text()), model, batch=4, length=32)


DIGITS = "digits"
TRAINED_ON = ("quadratics", DIGITS, "digits, scaled", "bandit")


@functools.cache
def exams(tiny: bool = False) -> Mapping[str, Exam]:
    """All that optimizers are examined on, by name."""
    mlp, relu = tasks.mlp(digits()), tasks.mlp(digits(), activation=jax.nn.relu)
    made = {
        "quadratics": Exam(tasks.quadratics(10), 128, 128, longer=LONGER, unit="|Aw - y|^2"),
        "logistic": Exam(tasks.logistic(), 64, 128),
        DIGITS: Exam(mlp, 32, 128, longer=LONGER),
        "digits, ReLU": Exam(relu, 32, 128, longer=LONGER),
        "digits, held out": Exam(mlp, 32, 128, "held-out"),
        "convolution": Exam(tasks.convolution(_images()), 16, 32),
        "transformer": Exam(_transformer(), 8, 32),
        "bandit": Exam(tasks.bandit(), 128, 128, "held-out", unit="regret"),
    }
    if tiny:
        few = dict(choosing=2, count=2, steps=2, longer=4)
        return {name: made[name]._replace(**few) for name in ("quadratics", "bandit")}
    return made


@functools.cache
def trained_on(name: str) -> Exam:
    """What a rule is meta-trained on, one of TRAINED_ON."""
    known = exams()
    if name == "digits, scaled":
        return known[DIGITS]._replace(task=tasks.augmented(known[DIGITS].task))
    return known[name]
