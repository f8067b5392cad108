# SPDX-License-Identifier: Apache-2.0
"""What a training run is made of, as one frozen dataclass: the flags of `nlx train`."""

import dataclasses
import difflib
import pathlib
from typing import Any, Literal, get_args

import tyro

from nlx import nn
from nlx_experiments import runs
from nlx_experiments.errors import Refused, as_sentence

Optimizer = Literal["adamw", "dmgd"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
DEFAULT_OPTIMIZER: Optimizer = "dmgd"
TOKENIZERS = ("bytes", "bpe")  # and any tokenizer.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a language model on text. The same command again goes on where it was stopped."""

    preset: tyro.conf.Suppress[str]
    model: nn.ModelConfig
    """The preset's fields, each of which can be replaced."""
    data: tuple[pathlib.Path, ...] = ()
    """Files or folders of text, or token files (.npy) of a tokenizer.json; the Python standard
    library's own source by default."""
    tokenizer: str = "bytes"
    """bytes; bpe, trained on the text, of model.vocabulary tokens; or a tokenizer.json."""
    run: pathlib.Path | None = None
    """Folder of the run; runs/PRESET by default."""
    steps: int = 1000
    """Updates of the whole training."""
    batch: int = 16
    """Rows of a batch."""
    length: int = 256
    """Tokens of a row."""
    optimizer: Optimizer = DEFAULT_OPTIMIZER
    """Deep momentum gradient descent (its memory of gradients learns while it runs), or AdamW."""
    learning_rate: float = 3e-3
    """At its peak."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls along a cosine."""
    weight_decay: float = 0.1
    """Decoupled, of matrices only."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 3
    """How many checkpoints are kept."""
    log_every: int = 10
    """Steps between two lines of progress."""
    eval_bytes: int = 131_072
    """Held-out bytes to score at the end, evenly spread over the held-out files."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for a number out of range."""
        at_least_one = ("steps", "batch", "length", "save_every", "keep", "log_every", "eval_bytes")
        for name in at_least_one:
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("learning_rate", self.learning_rate, 0 < self.learning_rate < 10, "in (0, 10)")
        _require("warmup", self.warmup, 0 <= self.warmup < 1, "in [0, 1)")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < 10, "in [0, 10)")
        _require("clip", self.clip, self.clip > 0, "above 0")
        _require("seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2**31)")
        vocabulary = self.model.vocabulary
        if self.tokenizer == "bytes":
            _require("model.vocabulary", vocabulary, vocabulary == 256, "256, the number of bytes")
        elif self.tokenizer == "bpe":
            _require("model.vocabulary", vocabulary, vocabulary >= 256, "at least 256, the bytes")
        one_of = f"one of {', '.join(OPTIMIZERS)}"
        _require("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, one_of)

    @property
    def folder(self) -> pathlib.Path:
        """Where the run lives."""
        return self.run or pathlib.Path("runs") / self.preset


def make(preset: str, **fields: Any) -> TrainConfig:
    """The configuration of a preset with some fields replaced."""
    with as_sentence():
        return TrainConfig(preset=preset, model=nn.preset(preset), **fields)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    fields = dataclasses.asdict(config)
    fields["data"] = [str(path.resolve()) for path in config.data]
    fields["run"] = str(config.folder)
    if config.tokenizer not in TOKENIZERS:
        fields["tokenizer"] = str(pathlib.Path(config.tokenizer).resolve())
    return fields


def of_run(folder: pathlib.Path) -> TrainConfig:
    """The configuration that stands beside a run.

    Raises:
      Refused: `folder` is no run.
    """
    fields = runs.read_json(folder / "config.json")
    if fields is None:
        near = _near(folder)
        hint = f" Did you mean {near}?" if near else ""
        raise Refused(f"{folder} is no run: it holds no config.json.{hint}")
    if missing := {"preset", "model", "data"} - set(fields):
        raise Refused(f"{folder}/config.json says nothing of {', '.join(sorted(missing))}.")
    with as_sentence():
        model = _like(nn.preset(fields["preset"]), fields.pop("model"))
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in fields.items() if name in known}
    fields["data"] = tuple(pathlib.Path(path) for path in fields["data"])
    fields["run"] = folder
    return TrainConfig(model=model, **fields)


def _require(name: str, value: Any, holds: bool, must: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` is {value!r}; it must be {must}.")


def _near(folder: pathlib.Path) -> str | None:
    if not folder.parent.is_dir():
        return None
    names = [p.name for p in folder.parent.iterdir() if (p / "config.json").exists()]
    near = difflib.get_close_matches(folder.name, names, 1, cutoff=0.4)
    return str(folder.parent / near[0]) if near else None


def _like(value: Any, new: Any) -> Any:
    """JSON's lists and objects as the tuples and dataclasses that `value` has in their place."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {k: _like(getattr(value, k), v) for k, v in new.items()}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        first = value[0] if value else None
        return tuple(_like(first, v) for v in new)
    return tuple(new) if isinstance(new, list) else new
