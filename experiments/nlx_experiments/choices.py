# SPDX-License-Identifier: Apache-2.0
"""`nlx eval RUN NAME=FILE ...`: what a trained run makes of multiple choice.

Each NAME is a format of `choice_formats`, each FILE one of its published files. Prints a table and
writes it to the run's folder as choices.json.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx

from nlx_experiments import choice_formats, config, learner, report, runs, tokenization
from nlx_experiments import multiple_choice as multiple
from nlx_experiments.console import say
from nlx_experiments.multiple_choice import Item, LogProbabilities, Scores
from nlx_experiments.tokenization import Tokenizer


@dataclasses.dataclass(frozen=True)
class Eval:
    """Scores a trained run on files of multiple choice and of last words."""

    run: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, finished or not."""
    choices: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME=FILE ...")
    ]
    """NAME=FILE: a format (piqa, hellaswag, winogrande, arc_easy, arc_challenge, social_iqa, boolq,
    lambada) and a file as it is published."""
    batch: int = multiple.BATCH
    """Texts read at a time."""
    longest: int = multiple.LONGEST
    """Tokens of a text that are read, the last ones."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for nothing to score or a number out of range."""
        if not self.choices:
            raise ValueError("`choices` is empty; it must be one or more NAME=FILE.")
        for name in ("batch", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")


def main(options: Eval) -> dict[str, Scores]:
    """Scores, prints and writes choices.json."""
    given = choice_formats.given(options.choices)
    model, tokenizer = scorer(options.run)
    found = {
        name: multiple.score(model, tokenizer, items, batch=options.batch, longest=options.longest)
        for name, items in given.items()
    }
    runs.write_json(options.run / "choices.json", {n: s._asdict() for n, s in found.items()})
    say(table(found, given).text())
    return found


def scorer(folder: pathlib.Path) -> tuple[LogProbabilities, Tokenizer]:
    """The model of a run as a function of tokens to log-probabilities, and its tokenizer.

    Raises:
      Refused: no run, or none with a checkpoint.
    """
    chosen = config.of_run(folder)
    tokenizer = tokenization.of_run(folder, chosen.tokenizer)
    graph, weights = nnx.split(learner.load(chosen))

    @jax.jit
    def read(weights: Any, tokens: Any) -> Any:
        scores, _ = nnx.merge(graph, weights)(tokens)
        return jax.nn.log_softmax(scores)

    return lambda tokens: read(weights, tokens), tokenizer


def chance(items: Sequence[Item]) -> float:
    """The share that is right by guessing; of last words 0."""
    counts = [len(one.choices) for one in items]
    return float(np.mean([1 / count if count > 1 else 0.0 for count in counts]))


def table(found: Mapping[str, Scores], given: Mapping[str, Sequence[Item]]) -> report.Table:
    """Formats down, scores across, in percent."""
    percent = lambda share: "" if share is None else f"{100 * share:.1f}"
    rows = [
        (
            name,
            s.items,
            *map(percent, (s.acc, s.acc_norm, s.acc_bytes, chance(given[name]))),
            "" if s.perplexity is None else f"{s.perplexity:.2f}",
        )
        for name, s in found.items()
    ]
    columns = ("test", "items", "acc", "acc_norm", "acc_bytes", "chance", "perplexity")
    return report.Table("Multiple choice, in percent", columns, rows)
