# SPDX-License-Identifier: Apache-2.0
"""`nlx inspect`: the levels of a preset, an optimizer or a run, and what a run does with a text.

A preset or an optimizer gets a table and a picture. A run also reads a text, and gets pictures of
what every byte costs, of what its memories do meanwhile, and one page with it all.
"""

import dataclasses
import difflib
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import nlx.inspect
from nlx import nn, optim
from nlx.inspect import Trace, Watched
from nlx_experiments import config, diagram, heatmap, learner, report, runs, tokenization
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

LIMIT = 900  # bytes of a text that are read
AS_MEMORY = {"adamw": "adam_memory"}  # optax's optimizers of `nlx train`: the same rule as levels
MOST, AROUND = 10, 8  # bytes that are listed; bytes shown on each side of one
KERNEL = (64, 32)  # an optimizer is shown for one kernel of this shape


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Shows the levels of a preset, an optimizer or a run; of a run, also what it does."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET|OPTIMIZER|RUN")]
    """A preset, an optimizer of nlx.optim, or the folder of a run."""
    text: pathlib.Path | None = None
    """What the run reads: a file, of which the first bytes count; else its held-out text. Before it
    stands a zero byte, which begins a file, so that the first byte has a cost too."""


def main(options: Inspect) -> None:
    """Prints the table, draws the pictures, says where they are."""
    name, folder = options.name, pathlib.Path(options.name)
    if (folder / "config.json").exists():
        of_run(config.of_run(folder), options.text)
        return
    if options.text is not None:
        raise Refused(f"`--text` is for a run to read, and {name} is none: it has no config.json.")
    if folder.is_dir() or "/" in name:
        config.of_run(folder)  # refuses, with the nearest run
    if name in (rules := optimizers()):
        of_optimizer(name, rules[name])
        return
    if name not in nn.PRESETS:
        near = difflib.get_close_matches(name, [*rules, *nn.PRESETS], 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise Refused(
            f"there is no preset, optimizer or run {name!r}; {meant}Optimizers are "
            f"{', '.join(rules)}; presets are called as in `nlx train`."
        )
    of_preset(config.make(name))


def optimizers() -> dict[str, Callable[..., Any]]:
    """The optimizers of `nlx.optim` by name: what takes a learning rate first."""
    first = lambda function: next(iter(inspect.signature(function).parameters), None)
    return {
        name: function
        for name, function in vars(optim).items()
        if inspect.isfunction(function) and first(function) == "learning_rate"
    }


def of_preset(chosen: TrainConfig) -> None:
    """The table and the picture of a preset."""
    shapes = learner.abstract(chosen)
    rows = nlx.inspect.levels(shapes)
    say(nlx.inspect.table(rows))
    path = _folder(pathlib.Path("runs/inspect")) / f"{chosen.preset}.png"
    diagram.draw(path, chosen.preset, rows, nlx.inspect.wiring(shapes))
    say(f"\nThe picture: {path}")


def of_optimizer(name: str, make: Callable[..., Any]) -> None:
    """The table and the picture of an optimizer, for one kernel."""
    rule, params = _rule(make)
    say(f"{_summary(make)}\n\n{_optimizer_table(name, rule, params).text()}")
    path = _folder(pathlib.Path("runs/inspect")) / f"{name}.png"
    _draw_optimizer(path, name, rule, params)
    say(f"\nThe picture: {path}")


def of_run(chosen: TrainConfig, text: pathlib.Path | None) -> None:
    """Table, pictures and page of a run and a text."""
    source, tokens, content, lengths = _read(chosen, text)
    model = learner.load(chosen)
    folder = _folder(chosen.folder / "inspect")
    rows = nlx.inspect.levels(model)
    say(nlx.inspect.table(rows))
    pictures = {"Its levels, slow ones at the bottom": folder / "levels.png"}
    diagram.draw(folder / "levels.png", chosen.preset, rows, nlx.inspect.wiring(model))
    tables = []
    title = AS_MEMORY.get(chosen.optimizer, chosen.optimizer)
    rule, params = _rule(optimizers()[title])
    title = title if title == chosen.optimizer else f"{chosen.optimizer}, as {title}"
    tables.append(_optimizer_table(title, rule, params))
    pictures["The optimizer's levels"] = folder / "optimizer.png"
    _draw_optimizer(folder / "optimizer.png", title, rule, params)
    watched: Watched = jax.tree.map(np.asarray, nnx.jit(nlx.inspect.watch)(model, tokens[None]))
    # A token's cost is shared out over its bytes.
    bits = np.repeat(np.asarray(watched.bits)[0] / lengths, lengths)
    title = f"What every byte costs: -log2 p, {bits.mean():.2f} bits on average"
    heatmap.draw(folder / "surprise.png", title, content, bits, "bits", (0.0, 8.0))
    pictures["Surprise"] = folder / "surprise.png"
    notes, inner = _memories(folder, content, lengths, watched, pictures)
    if inner is not None:
        tables.insert(0, _trace_table(watched.levels))
    tables.insert(0, _standing_out(content, bits, inner))
    records = runs.read_lines(chosen.folder / "metrics.jsonl")
    if records:
        heatmap.draw_updates(folder / "training.png", records)
        pictures["Training: size of each level's updates"] = folder / "training.png"
    summary = f"{chosen.preset} reads {len(content)} bytes of {source}. {notes}"
    page = report.Page(
        f"Inside {chosen.folder.name}",
        summary,
        tables,
        pictures,
        blocks={"Levels": nlx.inspect.table(rows)},
    )
    report.write(folder / "index.html", page)
    say(f"\n{notes}\n" if notes else "")
    for table in tables:
        say(f"{table.text()}\n")
    say(f"{bits.mean():.3f} bits per byte of {source}. The page: {folder / 'index.html'}")


def _memories(
    folder, content, lengths, watched: Watched, pictures: dict[str, pathlib.Path]
) -> tuple[str, np.ndarray | None]:
    """Draws what memories did; returns a note where there are none, else every byte's surprise."""
    if not watched.levels:
        return (
            "Its mixers are attention, which keeps tokens as they are: there is no inner surprise, "
            "update, retention, age or transition to show.",
            None,
        )
    read = [t for name, t in watched.levels.items() if name.endswith("memory")]
    sizes = [np.asarray(t.surprise)[0, 1:].mean(-1) for t in read]
    relative = [size / (size.mean() + 1e-30) for size in sizes]
    title = "What surprises the memories: |gradient|, 1 on average"
    inner = np.repeat(np.mean(np.stack(relative), axis=0), lengths)
    heatmap.draw(folder / "inner.png", title, content, inner, "|gradient|, relative")
    pictures["Inner surprise"] = folder / "inner.png"
    heatmap.draw_traces(folder / "memories.png", watched.levels)
    pictures["Memories, token by token"] = folder / "memories.png"
    return "", inner


def _standing_out(content: np.ndarray, bits: np.ndarray, inner: np.ndarray | None) -> report.Table:
    """The bytes that cost most and, where there are memories, those that surprise them most."""

    def found(values: np.ndarray) -> list[tuple[str, str]]:
        places = np.argsort(-values, kind="stable")[:MOST]
        return [(_shown(content, place), f"{values[place]:.2f}") for place in places]

    columns, parts = ["costs most", "bits"], [found(bits)]
    if inner is not None:
        columns += ["surprises the memories most", "|gradient|, 1 on average"]
        parts.append(found(inner))
    rows = [tuple(cell for pair in row for cell in pair) for row in zip(*parts, strict=True)]
    return report.Table("Bytes that stand out, in brackets, each with its place", columns, rows)


def _shown(content: np.ndarray, place: int) -> str:
    """A byte between those around it."""
    said = lambda part: repr(part.tobytes().decode(errors="replace"))[1:-1]
    before, after = content[max(0, place - AROUND) : place], content[place + 1 :][:AROUND]
    return f"{place}: {said(before)}[{said(content[place : place + 1])}]{said(after)}"


def _trace_table(levels: Mapping[str, Trace]) -> report.Table:
    """Each memory's averages over tokens and heads."""
    rows = [
        (
            name,
            *(float(array.mean()) for array in (t.surprise, t.update, t.retain)),
            float(t.age[:, -1].mean()),
            float(t.eigenvalues.low.min()),
            float(t.eigenvalues.high.max()),
        )
        for name, t in levels.items()
    ]
    columns = ("memory", "surprise", "update", "retention", "age at the end", "eigenvalues from")
    return report.Table("Memories over the text", (*columns, "to"), rows)


def _read(
    chosen: TrainConfig, text: pathlib.Path | None
) -> tuple[str, jax.Array, np.ndarray, np.ndarray]:
    """Name of the text, its tokens after a separator, their bytes, and the number of each."""
    tokenizer = tokenization.of_run(chosen.folder, chosen.tokenizer)
    source, content = _text(chosen, text)
    tokens = tokenizer.encode(content.tobytes().decode(errors="surrogateescape"))
    lengths = np.array([len(tokenizer.pieces[token]) for token in tokens])
    content = np.frombuffer(tokenizer.decode(tokens), np.uint8)
    after = jnp.concatenate([jnp.array([tokenizer.separator]), jnp.asarray(tokens, jnp.int32)])
    return source, after, content, lengths


def _text(chosen: TrainConfig, text: pathlib.Path | None) -> tuple[str, np.ndarray]:
    """Name and bytes of the text."""
    if text is None:
        corpus, _ = tokenization.load(
            chosen.tokenizer, chosen.model.vocabulary, chosen.data, chosen.folder
        )
        return f"held-out text of {corpus.name}", corpus.heldout[:LIMIT]
    try:
        content = np.frombuffer(text.read_bytes()[:LIMIT], np.uint8)
    except OSError as error:
        raise Refused(f"`--text` is {text}, which cannot be read: {error.strerror}.") from error
    if not len(content):
        raise Refused(f"`--text` is {text}, which is empty; it must hold at least one byte.")
    return str(text), content


def _rule(make: Callable[..., Any]) -> tuple[optax.GradientTransformation, dict[str, Any]]:
    """The optimizer, and the parameters it is shown for; what has no default is tanh."""
    parameters = list(inspect.signature(make).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty]
    return make(1e-3, **dict.fromkeys(needed, jnp.tanh)), {"kernel": jnp.zeros(KERNEL)}


def _summary(make: Callable[..., Any]) -> str:
    """What an optimizer's docstring says first, and its equation."""
    return "\n\n".join((inspect.getdoc(make) or "").split("\n\n")[:2])


def _optimizer_table(name: str, rule: optax.GradientTransformation, params) -> report.Table:
    """The optimizer's levels, and what their memories store."""
    stored = {s.level: (s.key, s.value) for s in nlx.inspect.stored(rule, params)}
    rows = [
        (
            row.name,
            row.parameters,
            row.objective,
            *stored.get(row.name, ("-", "-")),
            row.write,
            row.clock,
        )
        for row in nlx.inspect.levels(rule, params)
    ]
    columns = ("level", "numbers", "objective", "key", "value", "write", "clock")
    return report.Table(f"{name}: its levels, for one kernel {list(KERNEL)}", columns, rows)


def _draw_optimizer(path: pathlib.Path, name: str, rule, params) -> None:
    rows = nlx.inspect.levels(rule, params)
    diagram.draw(path, f"{name}, for one kernel", rows, nlx.inspect.wiring(rule, params))


def _folder(path: pathlib.Path) -> pathlib.Path:
    """A folder that is there now."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}.") from error
    return path
