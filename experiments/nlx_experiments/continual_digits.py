# SPDX-License-Identifier: Apache-2.0
"""Streams of tasks of digits: two at a time, or all in another order of their pixels."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from nlx_experiments.continual_tasks import Rows, Scenario, Stage, labelled


def _digits() -> tuple[Int[np.ndarray, "n 64"], Int[np.ndarray, " n"]]:
    """Scikit-learn's 1,797 images of 8 x 8 pixels, as bytes 1 + gray in [1, 17], and digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return 1 + np.asarray(images, np.int32), np.asarray(labels, np.int32)


def _parts(generator: np.random.Generator, count: int) -> dict[str, Int[np.ndarray, " m"]]:
    """Seven tenths, one and two of the places of `count` things."""
    order = generator.permutation(count)
    ends = [0, count * 7 // 10, count * 8 // 10, count]
    names = ("train", "validation", "test")
    return {n: order[a:b] for n, a, b in zip(names, ends[:-1], ends[1:], strict=True)}


def digits(counts: Mapping[str, int], generator: np.random.Generator) -> Scenario:
    """Digits, two at a time: five tasks, in an order that is drawn.

    counts: split -> images of each digit at most. generator: draws.
    Source: Zenke et al. (2017), Continual Learning Through Synaptic Intelligence (split MNIST), on
    scikit-learn's smaller images.
    """
    images, labels = _digits()
    order = generator.permutation(10)
    parts = {
        d: {s: p[: counts[s]] for s, p in _parts(generator, int((labels == d).sum())).items()}
        for d in range(10)
    }

    def rows(split: str, pair: Int[np.ndarray, " p"]) -> Rows:
        places = np.concatenate([np.flatnonzero(labels == d)[parts[d][split]] for d in pair])
        return labelled(images[places], labels[places])

    stages = [
        Stage(
            f"{pair[0]} and {pair[1]}",
            *(rows(split, pair) for split in ("train", "validation", "test")),
            classes=tuple(map(int, pair)),
        )
        for pair in order.reshape(5, 2)
    ]
    return Scenario("classes", tuple(stages), tuple(map(str, range(10))))


def permuted_digits(
    tasks: int, counts: Mapping[str, int], generator: np.random.Generator
) -> Scenario:
    """All ten digits in every task, the pixels in an order of its own; the first as they are.

    tasks: how many, >= 1. counts: split -> images in all at most. generator: draws.
    Source: Kirkpatrick et al. (2017), section 2.1; Dohare et al. (2024), online permuted MNIST.
    """
    if tasks < 1:
        raise ValueError(f"`tasks` is {tasks}; it must be an integer >= 1.")
    images, labels = _digits()
    parts = {s: places[: counts[s]] for s, places in _parts(generator, len(labels)).items()}
    stages = []
    for n in range(tasks):
        order = generator.permutation(64) if n else np.arange(64)
        rows = [labelled(images[places][:, order], labels[places]) for places in parts.values()]
        stages.append(Stage(f"order {n + 1}", *rows, classes=tuple(range(10))))
    return Scenario("classes", tuple(stages), tuple(map(str, range(10))))
