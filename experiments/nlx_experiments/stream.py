# SPDX-License-Identifier: Apache-2.0
"""`nlx run stream`: a million tokens through Hope, in the memory that a thousand take.

command    nlx run stream [--weights RUN] [--folder DIR]      (stream-tiny: in seconds)
shows      tokens per second, resident memory at its peak after 1,000 tokens and after all, and bits
           per byte along the way, of hope-tiny reading text without end; written to
           experiments/results/stream.json and into experiments/README.md
expects    a peak that stands within a few per cent from 1,000 bytes to the last (what moves are
           the allocator's arenas, one a thread: with MALLOC_ARENA_MAX=2 it stood still), and finite
           bits, with trained weights about those of windows of their training's length
takes      about 3 minutes on two cores; stopped at any moment, the same command goes on
"""

import copy
import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from nlx import nn
from nlx.nn.model import ModelState
from nlx_experiments import config, data, learner, report, resident, runs
from nlx_experiments.checkpoints import Checkpoints
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Refused, Stopped, as_sentence

PLACE = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Reads text without end, writing memories at every token."""

    preset: str = "hope-tiny"
    """The model, with weights as drawn, if no `weights` are given."""
    weights: pathlib.Path | None = None
    """Folder of a finished run, whose model reads in place of the preset's."""
    tokens: int = 1_000_000
    """How many bytes to read."""
    piece: int = 500
    """Bytes read in one call."""
    save_every: int = 100_000
    """Bytes between two saves of the state."""
    marks: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """After how many bytes to note the resident memory and the bits since the mark before."""
    seed: int = 0
    """Of weights as drawn."""
    folder: pathlib.Path = pathlib.Path("runs/stream")
    """Where the state is saved."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for a number out of range."""
        for name in ("tokens", "piece", "save_every", *(["marks"] * len(self.marks))):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value < 1 or value % self.piece:
                    raise ValueError(
                        f"`{name}` is {value}; it must be a positive multiple of `piece`, "
                        f"{self.piece}."
                    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Stream):
    """A stream of seconds, which leaves experiments/README.md alone."""

    tokens: int = 600
    piece: int = 100
    save_every: int = 300
    marks: tuple[int, ...] = (100, 300, 600)
    folder: pathlib.Path = pathlib.Path("runs/stream-tiny")
    place: pathlib.Path = pathlib.Path("runs/stream-tiny")


class Reading:
    """A text without end, a model, and how far it has come: everything that is saved."""

    def __init__(self, model: nn.LanguageModel, text: data.Bytes, piece: int):
        """Before the first byte."""
        graph, self.weights = nnx.split(model)
        self.text, self.piece = text, piece
        self.state = model.init_state(1)
        self.position: dict[str, Any] = {
            "tokens": 0, "bits": 0.0, "timed": 0, "seconds": 0.0, "peak": 0.0, "marks": [],
        }  # fmt: skip
        self.compiled = False

        def read(
            weights: PyTree[Array], tokens: Int[Array, "1 t+1"], state: ModelState
        ) -> tuple[Float[Array, ""], ModelState]:
            logits, state = nnx.merge(graph, weights)(tokens[:, :-1], state)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
            return -jnp.sum(chosen) / math.log(2), state

        self.read = jax.jit(read)

    def advance(self) -> None:
        """Reads a piece: predicts each of its bytes from all before."""
        position = self.position
        places = position["tokens"] + np.arange(self.piece + 1)
        tokens = self.text[places % self.text.size].astype(np.int32)[None]
        begun = time.monotonic()
        bits, self.state = self.read(self.weights, tokens, self.state)
        position["bits"] += float(bits)
        if self.compiled:
            position["seconds"] += time.monotonic() - begun
            position["timed"] += self.piece
        self.compiled = True
        position["tokens"] += self.piece
        position["peak"] = max(position["peak"], resident.peak())

    def saved(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """What a save holds: the state apart from the weights, and the position as it is now."""
        return {"state": self.state}, copy.deepcopy(self.position)

    def mark(self) -> dict[str, Any]:
        """Notes memory, and bits per byte since the mark before."""
        position, marks = self.position, self.position["marks"]
        since = position["tokens"] - (marks[-1]["tokens"] if marks else 0)
        bits = position["bits"] / since
        noted = {
            "tokens": position["tokens"],
            "peak_mib": round(position["peak"], 1),
            "bits_per_byte": bits if math.isfinite(bits) else None,
        }
        marks.append(noted)
        position["bits"] = 0.0
        return noted


def main(options: Stream) -> dict[str, Any]:
    """Reads to the end, or goes on; writes what was found.

    Raises:
      Refused: bad input. Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    tiny = isinstance(options, Tiny)
    if not tiny and not (options.place / "README.md").exists():
        raise Refused(f"`place` is {options.place}, which holds no README.md to write to.")
    trained = None if options.weights is None else config.of_run(options.weights)
    corpus = data.load(() if trained is None else trained.data)
    with as_sentence():
        sizes = nn.preset(options.preset) if trained is None else trained.model
    _refuse_growth(options, sizes)
    with runs.Run(options.folder) as run:
        fields = dataclasses.asdict(options) | {"weights": str(options.weights)}
        for name in ("folder", "place", "save_every"):
            del fields[name]
        run.agree("stream", {**fields, "text": corpus.sha256})
        result = run.read("result")
        if result is None:
            if trained is None:
                model = nn.LanguageModel(sizes, rngs=nnx.Rngs(options.seed))
            else:
                model = learner.load(trained)
            reading = Reading(model, corpus.heldout, options.piece)
            _read(options, run, reading)
            name = options.preset if trained is None else trained.preset
            result = _result(reading, name, trained is not None)
            run.write("result", result)
        (options.place / "results").mkdir(parents=True, exist_ok=True)
        runs.write_json(options.place / "results" / "stream.json", result)
        if not tiny:
            shown = f"{table(result).markdown()}\n\n{sentence(result)}"
            report.place(options.place / "README.md", "stream", shown)
        say(f"{table(result).text()}\n{sentence(result)}")
        return result


def _refuse_growth(options: Stream, sizes: nn.ModelConfig) -> None:
    """Raises Refused for a model whose state grows with the text."""

    def of(capacity: int):
        model = lambda: nn.LanguageModel(sizes, rngs=nnx.Rngs(0)).init_state(1, capacity)
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(model))]

    if of(sizes.context) != of(2 * sizes.context):
        raise Refused(
            f"`preset` is {options.preset!r}, or that of `weights`, whose attention sees all "
            "before; it must be one whose state is of one size, such as 'hope-tiny'."
        )


def _read(options: Stream, run: runs.Run, reading: Reading) -> None:
    """Reads on from the last save until the end or a signal, and saves there."""
    with Checkpoints(run.folder / "state", keep=2, say=say) as saves, StopRequest() as stop:
        saved = saves.restore({"state": reading.state})
        if saved is not None:
            reading.state, reading.position = saved.trees["state"], saved.position
            if saved.step:
                say(f"Going on after {saved.step:,} bytes.")
        while reading.position["tokens"] < options.tokens and stop.received is None:
            if reading.position["tokens"] == 0:  # what saving takes is part of every peak
                saves.save(0, *reading.saved())
                saves.wait()
            reading.advance()
            done = reading.position["tokens"]
            if done in (*options.marks, options.tokens):
                noted = reading.mark()
                say(f"{done:,} bytes: at most {noted['peak_mib']:,.0f} MiB resident")
            if done % options.save_every == 0:
                saves.save(done, *reading.saved())
        saves.save(reading.position["tokens"], *reading.saved())
    if stop.received is not None and reading.position["tokens"] < options.tokens:
        raise Stopped(
            f"{stop.received.name}: {reading.position['tokens']:,} of {options.tokens:,} bytes are "
            f"read, the state is saved in {run.folder}; the same command goes on from there.",
            stop.received,
        )


def _result(reading: Reading, preset: str, trained: bool) -> dict[str, Any]:
    """What results/stream.json holds."""
    position = reading.position
    return {
        "preset": preset,
        "trained": trained,
        "tokens": position["tokens"],
        "tokens_per_s": round(position["timed"] / max(position["seconds"], 1e-9), 1),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(reading.state)),
        "text_bytes": int(reading.text.size),
        "marks": position["marks"],
        "environment": runs.environment(),
    }


def table(result: dict[str, Any]) -> report.Table:
    """A row a mark."""
    bits = lambda mark: "not finite" if mark["bits_per_byte"] is None else mark["bits_per_byte"]
    rows = [(m["tokens"], f"{m['peak_mib']:,.0f}", bits(m)) for m in result["marks"]]
    columns = ("bytes read", "resident at the peak [MiB]", "bits per byte since the row above")
    return report.Table(f"A stream through {result['preset']}", columns, rows)


def sentence(result: dict[str, Any]) -> str:
    """Speed, and what was read by what."""
    passes = result["tokens"] / result["text_bytes"]
    weights = "trained weights" if result["trained"] else "weights as drawn, which know no text"
    return (
        f"{result['preset']}, {weights}: {result['tokens']:,} bytes at "
        f"{result['tokens_per_s']:,.0f} a second, a state of {result['state_bytes'] / 2**20:.2f} "
        f"MiB. The text is the held-out split, {passes:.1f} times."
    )
