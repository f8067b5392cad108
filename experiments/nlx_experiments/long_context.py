# SPDX-License-Identifier: Apache-2.0
"""What the experiments on long context share: who competes, on what text, and what was found."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nlx import nn
from nlx_experiments import data, sequence_table
from nlx_experiments.data import Bytes
from nlx_experiments.paired import Difference
from nlx_experiments.reasoning import config, rivals
from nlx_experiments.recall import state_bytes
from nlx_experiments.sequence_experiment import Row

LINEAR = "deltanet", "gated deltanet"


def contestants(base: Mapping[str, Any], parameters: int) -> dict[str, dict[str, nn.ModelConfig]]:
    """Hope and four rivals of as many parameters; base: see `reasoning.config`."""
    hope = config("self_modifying", base, parameters, feed_forward="cms")
    others = rivals(base, parameters)
    names = ("titans", "deltanet", "gated deltanet", "transformer")
    return {"hope": {"": hope}, **{name: others[name] for name in names}}


def base(vocabulary: int, width: int, layers: int) -> dict[str, Any]:
    """Sizes of all models of an experiment, as `contestants` takes them."""
    half = dict(memory_hidden=width // 2, chunk_size=16)
    return dict(vocabulary=vocabulary, width=width, heads=2, layers=layers, **half)


def texts(paths: Sequence[pathlib.Path]) -> tuple[Bytes, Bytes, Bytes]:
    """Text to train on, and two halves of what is held out: to choose by, and to report on."""
    corpus = data.load(paths)
    half = corpus.heldout.size // 2
    return corpus.train, corpus.heldout[:half], corpus.heldout[half:]


def found(variants: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the exam of the best variant found."""
    return variants[sequence_table.best(variants)[0]]["exam"]


def states(row: Row, symbols: int) -> dict[str, dict[str, int]]:
    """Model -> variant -> bytes of the state that a row of so many symbols leaves behind."""
    sizes = lambda variants: {v: state_bytes(c, symbols) for v, c in variants.items()}
    return {model: sizes(variants) for model, variants in row.models.items()}


def state(sizes: Mapping[str, Mapping[str, int]], model: str, variants: Mapping[str, Any]) -> str:
    """The bytes of the state of a model's best variant, as tables show them; sizes: of `states`."""
    return f"{sizes[model][sequence_table.best(variants)[0]]:,}"


def aim(apart: Mapping[str, Difference], less: bool = False) -> str:
    """Whether Hope is at least level with Titans in the mean, and above the linear rivals for sure.

    apart: rival -> how much more Hope has. less: whether less is better.
    """
    words = {rival: found.verdict(less) for rival, found in apart.items()}
    yes = lambda true: "yes" if true else "no"
    told = [f"above {name}: {yes(words[name] == 'ahead')}" for name in LINEAR if name in words]
    if "titans" in words:
        level = apart["titans"].mean <= 0 if less else apart["titans"].mean >= 0
        told = [f"at least level with Titans in the mean: {yes(level)}", *told]
    return f"The aim: {'; '.join(told)}."
