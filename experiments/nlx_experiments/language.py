# SPDX-License-Identifier: Apache-2.0
"""`nlx run language`: Hope and its rivals on text, and on multiple choice where files are given.

command    nlx run language [--data PATH ...] [--models MODEL ...] [--choices NAME=FILE ...]
           nlx run language-tiny: two small models, in seconds; language-gpu: presets `small` on
           8 MB of text, for a GPU
           nlx run language-340m: three presets `340m`, one seed, for a GPU
shows      bits per byte and word perplexity of held-out text after 1 MB of text, eight models of
           equal parameters (`tiny`), three seeds; with --choices also accuracies, as
           lm-evaluation-harness defines them. Where the text is shorter it is seen once
takes      about 110 minutes of one busy core: a training a minute (Transformer++, Hope-Attention)
           to four (Hope), 56 of them. A training that is stopped goes on from its last checkpoint,
           finished ones are kept
expects    Hope 1.975 bits per byte, Gated DeltaNet 1.980, TTT and Titans 2.008, DeltaNet 2.018,
           Hope-Attention 2.048, Transformer++ 2.055, RetNet 2.093: Hope ahead of Transformer++
           (-0.080, standard error 0.003), level with Titans (-0.033, 0.011). Five of the eight
           take the highest rate of the grid

The models are those rows of the paper's Table 2 that nlx has and that mix tokens in one way
throughout (Transformer++, RetNet, DeltaNet, TTT, Titans, Hope), Gated DeltaNet as the strongest of
the linear rivals, and Hope-Attention, which tells what Hope's feed-forward brings alone; others by
--models, such as samba or titans-mac. All learn with AdamW (as in the paper, 9.3), a warm-up over a
tenth of the steps and a cosine.

Tokens are those of a BPE trained on the training split, 2.7 bytes each in Python's sources: so the
paper does it, and so 1 MB is read in time. Which bytes and words bits per byte and word perplexity
are of, and after how much context, depends on the tokenizer (`evaluate`); all models of a table
share it, those of two tables need not.

A model's learning rate is chosen by a pilot of one seed that counts for nothing else, by its
training loss over the last fifth of the steps. As every window is seen once, that is the loss of
text not seen before, and the held-out text decides nothing.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from nlx import nn
from nlx_experiments import (
    batching,
    choice_formats,
    language_table,
    loop,
    report,
    runs,
    tokenization,
)
from nlx_experiments import choices as choosing
from nlx_experiments import multiple_choice as multiple
from nlx_experiments.cells import Store
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import say
from nlx_experiments.errors import Diverged, Refused, as_sentence
from nlx_experiments.multiple_choice import Item
from nlx_experiments.sequence_experiment import PLACE, check, compiled

MODELS = (
    "transformer++",
    "retnet",
    "deltanet",
    "gated-deltanet",
    "ttt-linear",
    "titans-lmm",
    "hope-attention",
    "hope",
)
SEEDS, PILOT = (0, 1, 2), 1000
LATE = 0.2  # share of the steps by which a pilot is judged


class Size(NamedTuple):
    """Of an experiment: presets, bytes of text, tokens, rows and their length, rates, the rest."""

    presets: str
    text: int
    vocabulary: int
    batch: int
    length: int
    rates: tuple[float, ...]
    eval_bytes: int = 131_072
    seeds: tuple[int, ...] = SEEDS
    fields: Mapping[str, Any] = {}  # of the model, replaced


FULL = Size("tiny", 1_000_000, 1024, 4, 128, (1.25e-3, 2.5e-3, 5e-3, 1e-2))
OF_GPU = Size("small", 8_000_000, 4096, 8, 512, (5e-4, 1e-3, 2e-3, 4e-3), 400_000)
OF_340M = Size("340m", 8_000_000, 4096, 8, 512, (1.5e-3,), 400_000, (0,))
TINY = Size(
    "tiny", 2_000, 300, 2, 16, (1e-2,), 500, (0, 1), dict(width=16, layers=1, heads=2, hidden=16)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """Eight models on 1 MB of text, and on multiple choice."""

    runs: pathlib.Path = pathlib.Path("runs/language")
    """Where trainings and finished cells are kept."""
    data: tuple[pathlib.Path, ...] = ()
    """Files or folders of text, or token files (.npy) of a tokenizer.json; the Python standard
    library's own source by default."""
    models: tuple[str, ...] = MODELS
    """Architectures."""
    tokenizer: str = "bpe"
    """bpe, bytes, or a tokenizer.json."""
    vocabulary: int | None = None
    """Tokens of the BPE; 1,024 by default, 4,096 on a GPU."""
    choices: tuple[str, ...] = ()
    """Multiple choice: NAME=FILE, a format as of `nlx eval` and a file."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""
    size: ClassVar[Size] = FULL
    name: ClassVar[str] = "language"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Language):
    """Presets `small` on 8 MB of text: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/language-gpu")
    size = OF_GPU
    name = "language-gpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu340m(Language):
    """Presets `340m` on 8 MB of text, one seed, meant for ten minutes each on a GPU, at the rate
    of Behrouz et al. (2025), It's all connected, Table 5."""

    runs: pathlib.Path = pathlib.Path("runs/language-340m")
    models: tuple[str, ...] = ("transformer++", "titans-lmm", "hope")
    size = OF_340M
    name = "language-340m"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Language):
    """Two models, a few steps on one file: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/language-tiny")
    data: tuple[pathlib.Path, ...] = (pathlib.Path(argparse.__file__),)
    models: tuple[str, ...] = ("transformer++", "deltanet")
    place: pathlib.Path = pathlib.Path("runs/language-tiny")
    size = TINY


def main(options: Language) -> dict[str, Any]:
    """Runs what is not known yet; writes table, picture and numbers.

    Tables keep models that are not asked for, if they were trained on the same text by the same
    plan and no multiple choice is given.

    Raises:
      Refused: bad input, before anything is trained. Stopped: a signal came; what is done is kept.
    """
    size = options.size
    known = sorted({name.rpartition("-")[0] for name in nn.PRESETS})
    check(options, models=known)
    given = choice_formats.given(options.choices)
    with runs.Run(options.runs) as folder, compiled(options.runs, hastily=size is TINY):
        runs.note_environment(folder, say)
        plan = planned(options, folder)
        store, text = Store(folder), ""
        told = runs.read_json(options.place / "results" / f"{options.name}.json") or {}
        same = told.get("text") == plan.text and told.get("plan") == _plan(options, plan)
        results = told["models"] if same and not given else {}
        for model in options.models:
            results[model] = of_model(options, model, plan, store, given)
            text = write(options, results, plan, given)
    say(f"\n{text}")
    return results


class Plan(NamedTuple):
    """What all trainings share: tokenizer (name, size, digest), steps, digest of the text."""

    tokenizer: str
    vocabulary: int
    pieces: str | None
    steps: int
    text: str


def planned(options: Language, folder: runs.Run) -> Plan:
    """Reads the text, trains the tokenizer unless it is there, and counts the steps: at most
    those that see the text once, two at least."""
    size, name = options.size, options.tokenizer
    if name != "bpe" and options.vocabulary is not None:
        raise Refused(f"`vocabulary` is {options.vocabulary}; it must be left out with {name}.")
    vocabulary = (options.vocabulary or size.vocabulary) if name == "bpe" else None
    path, limit = folder.folder / tokenization.FILE, vocabulary or sys.maxsize
    corpus, tokens = tokenization.load(name, limit, options.data, folder.folder, "vocabulary")
    if isinstance(tokens.train, list):
        raise Refused("`data` holds prepared data, which only `nlx train` reads; pass texts.")
    made, per_token = tokens.tokenizer, corpus.train_bytes / tokens.train_size
    of_tokens = {"tokenizer": name, "vocabulary": vocabulary, "pieces": made.sha256}
    folder.agree("text", {"text": corpus.sha256, **of_tokens})
    if made.json is not None:
        runs.write_whole(path, made.json)
        name = str(path)
    once = len(batching.Windows(tokens.train, size.length)) // size.batch
    steps = max(2, min(once, round(size.text / per_token / (size.batch * size.length))))
    return Plan(name, made.size, made.sha256, steps, corpus.sha256)


def training(options: Language, plan: Plan, model: str, rate: float, seed: int) -> TrainConfig:
    """The configuration of one training."""
    size = options.size
    preset = f"{model}-{size.presets}"
    with as_sentence():
        made = dataclasses.replace(nn.preset(preset), vocabulary=plan.vocabulary, **size.fields)
        return TrainConfig(
            preset=preset,
            model=made,
            data=options.data,
            tokenizer=plan.tokenizer,
            run=options.runs / f"{model}-{rate:g}-{seed}",
            steps=plan.steps,
            batch=size.batch,
            length=size.length,
            optimizer="adamw",
            learning_rate=rate,
            seed=seed,
            save_every=200,
            keep=1,
            log_every=50,
            eval_bytes=size.eval_bytes,
        )


def of_model(
    options: Language,
    model: str,
    plan: Plan,
    store: Store,
    given: Mapping[str, Sequence[Item]],
) -> dict[str, Any]:
    """Pilot, seeds and multiple choice of a model: {"rate", "pilot", "seeds": records}."""
    run = lambda rate, seed: trained(training(options, plan, model, rate, seed), plan, store)
    rates = options.size.rates
    tried = rates if len(rates) > 1 else ()
    pilot = {rate: run(rate, PILOT)["late_bits_per_byte"] for rate in tried}
    numbers = {rate: math.inf if bits is None else bits for rate, bits in pilot.items()}
    rate = min(rates, key=lambda r: numbers.get(r, math.inf))
    seeds = [run(rate, seed) for seed in options.size.seeds]
    if given:
        for seed, record in zip(options.size.seeds, seeds, strict=True):
            chosen = training(options, plan, model, rate, seed)
            record["choices"] = chosen_by(chosen.folder, given, record["what"], store)
    return {"rate": rate, "pilot": {f"{r:g}": b for r, b in pilot.items()}, "seeds": seeds}


def trained(chosen: TrainConfig, plan: Plan, store: Store) -> dict[str, Any]:
    """The result of a training, which runs, or goes on, if it isn't known; a pilot that diverges
    has no "late_bits_per_byte"."""
    fields = _told(dataclasses.replace(chosen, run=None, data=(), tokenizer=""))
    what = f"{chosen.folder.name}; {_digest(f'{fields} {plan[1:]}')}"
    if what not in store.known:
        try:
            result = loop.train(chosen)
        except Diverged as error:
            if chosen.seed != PILOT:
                raise
            store.add({"what": what, "late_bits_per_byte": None, "diverged": str(error)})
            return dict(store.known[what])
        records = runs.read_lines(chosen.folder / "metrics.jsonl")
        late = [r["bits_per_byte"] for r in records[-math.ceil(LATE * len(records)) :]]
        mean = statistics.fmean(late) if None not in late else None
        store.add({"what": what, "late_bits_per_byte": mean, **result})
    return dict(store.known[what])


def chosen_by(
    folder: pathlib.Path, given: Mapping[str, Sequence[Item]], what: str, store: Store
) -> dict[str, Any]:
    """A trained model's scores of multiple choice, by name of the format."""
    found: dict[str, Any] = {}
    scorer = None
    for name, items in given.items():
        cell = f"{name} of {what}; {_digest(repr(items))}"
        if cell not in store.known:
            scorer = scorer or choosing.scorer(folder)
            scores = multiple.score(*scorer, items)
            store.add({"what": cell, **scores._asdict()})
        found[name] = store.known[cell]
    return found


def _plan(options: Language, plan: Plan) -> dict[str, Any]:
    """What results say of their plan, in JSON's types."""
    told = {**options.size._asdict(), "vocabulary": plan.vocabulary, "steps": plan.steps}
    return json.loads(json.dumps(told))


def _told(config: Any) -> dict[str, Any]:
    """The fields that are not their class's defaults, so that a field that is new voids no cell."""
    fields = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
    told = {name: value for name, (value, default) in fields.items() if value != default}
    return {n: _told(v) if dataclasses.is_dataclass(v) else v for n, v in sorted(told.items())}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def write(
    options: Language,
    results: Mapping[str, Any],
    plan: Plan,
    given: Mapping[str, Sequence[Item]],
) -> str:
    """Numbers, picture and text of what is finished; returns the text."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": runs.environment(),
        "plan": _plan(options, plan),
        "text": plan.text,
        "models": results,
    }
    runs.write_json(folder / f"{options.name}.json", content)
    language_table.plot(folder / f"{options.name}.png", results)
    text = language_table.shown(results, given)
    runs.write_whole(folder / f"{options.name}.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", options.name, text)
    return text
