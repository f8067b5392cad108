# SPDX-License-Identifier: Apache-2.0
"""What a training run is made of, as one frozen dataclass: the flags of `nlx train`."""

import dataclasses
import difflib
import math
import pathlib
from typing import Any, Literal, TypeVar, get_args

import tyro

from nlx import nn
from nlx_experiments import loggers, runs
from nlx_experiments.errors import Refused, as_sentence
from nlx_experiments.hosts import HostsConfig

Optimizer = Literal["adamw", "dmgd"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
DEFAULT_OPTIMIZER: Optimizer = "dmgd"
VOCABULARY = 256  # of bytes
TOKENIZERS = ("bytes", "bpe")  # and any tokenizer.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices share the work; see `nlx.parallel`. The same numbers are learned."""

    data: int = -1
    """Devices with other rows each; -1: all that the other axes leave."""
    fsdp: int = 1
    """Devices with other rows each that also share out the parameters."""
    tensor: int = 1
    """Devices that share heads and hidden units."""
    sequence: int = 1
    """Devices that share the tokens of a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a language model on text. The same command again goes on where it was stopped."""

    preset: tyro.conf.Suppress[str]
    model: nn.ModelConfig
    """The preset's fields, each of which can be replaced."""
    data: tuple[pathlib.Path, ...] = ()
    """Files or folders of text, token files (.npy) of a tokenizer.json, or folders that `nlx data`
    wrote; the Python standard library's own source by default."""
    weights: tuple[float, ...] = ()
    """The share of rows from each folder that `nlx data` wrote, up to a factor; by default as many
    as it has."""
    pack: bool = False
    """Rows of whole documents, at each of which memories begin anew, in place of windows that are
    cut from all of them joined."""
    workers: int = 0
    """Processes that read ahead, where reading is slow; the batches are the same."""
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
    spike: float | None = None
    """A step is skipped whose gradient is so many times longer than the median of the last 64."""
    init_from: pathlib.Path | None = None
    """Weights to begin with: a .safetensors file that `nlx export` wrote."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, in less memory."""
    mesh: MeshConfig = MeshConfig()
    """The devices."""
    hosts: HostsConfig = HostsConfig()
    """The processes, where there are several."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 3
    """How many checkpoints are kept: the newest."""
    keep_every: int | None = None
    """Checkpoints of steps that are a multiple of it are kept for ever besides."""
    time_limit: float | None = None
    """Minutes after which everything is saved and the run leaves, with exit code 75."""
    log_every: int = 10
    """Steps between two lines of progress."""
    log: tuple[loggers.Name, ...] = ()
    """Who is told what is measured, besides the files in the run's folder: extras of nlx."""
    probe_every: int | None = None
    """Steps between two looks at what the memories do with a held-out text; None: none."""
    profile_at: int | None = None
    """The first of the steps that jax's profiler watches; None: none."""
    profile_steps: int = 3
    """How many."""
    eval_bytes: int = 131_072
    """Held-out bytes to score at the end, evenly spread over the held-out files."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for a number out of range."""
        at_least_one = ("steps", "batch", "length", "save_every", "keep", "log_every", "eval_bytes")
        at_least_one += ("accumulate", "profile_steps")
        for name in at_least_one:
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("keep_every", "probe_every", "profile_at"):
            often = getattr(self, name)
            _require(name, often, often is None or often >= 1, "at least 1")
        minutes = self.time_limit
        _require("time_limit", minutes, minutes is None or minutes > 0, "above 0 minutes")
        _require("workers", self.workers, self.workers >= 0, "at least 0")
        shares = not self.weights or len(self.weights) == len(self.data)
        must = "numbers above 0, one for each of `data`"
        positive = all(0 < w < math.inf for w in self.weights)
        _require("weights", self.weights, shares and positive, must)
        _require("learning_rate", self.learning_rate, 0 < self.learning_rate < 10, "in (0, 10)")
        _require("warmup", self.warmup, 0 <= self.warmup < 1, "in [0, 1)")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < 10, "in [0, 10)")
        _require("clip", self.clip, self.clip > 0, "above 0")
        _require("spike", self.spike, self.spike is None or self.spike > 1, "above 1")
        _require("seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2**31)")
        divides = self.batch % self.accumulate == 0
        must = f"a divisor of batch = {self.batch}"
        _require("accumulate", self.accumulate, divides, must)
        vocabulary = self.model.vocabulary
        if self.tokenizer == "bytes":
            must = f"{VOCABULARY}, the number of bytes"
            _require("model.vocabulary", vocabulary, vocabulary == VOCABULARY, must)
        elif self.tokenizer == "bpe":
            must = f"at least {VOCABULARY}, the bytes"
            _require("model.vocabulary", vocabulary, vocabulary >= VOCABULARY, must)
        one_of = f"one of {', '.join(OPTIMIZERS)}"
        _require("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, one_of)

    @property
    def folder(self) -> pathlib.Path:
        """Where the run lives."""
        return self.run or pathlib.Path("runs") / self.preset


T = TypeVar("T", bound=TrainConfig)


def make(preset: str, kind: type[T] = TrainConfig, **fields: Any) -> T:
    """The configuration of a preset with some fields replaced.

    A preset with another vocabulary than the bytes' has the tokenizer bpe.
    """
    with as_sentence():
        model = fields.pop("model", None) or nn.preset(preset)
        if model.vocabulary != VOCABULARY:
            fields.setdefault("tokenizer", "bpe")
        return kind(preset=preset, model=model, **fields)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    fields = dataclasses.asdict(config)
    fields["data"] = [str(path.resolve()) for path in config.data]
    fields["run"] = str(config.folder)
    fields["init_from"] = config.init_from and str(config.init_from.resolve())
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
    for name in ("mesh", "hosts", "time_limit"):  # of the machines it was on
        fields.pop(name, None)
    fields["run"] = folder
    for name in ("log", "weights"):
        fields[name] = tuple(fields.get(name, ()))
    if fields.get("init_from") is not None:
        fields["init_from"] = pathlib.Path(fields["init_from"])
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
