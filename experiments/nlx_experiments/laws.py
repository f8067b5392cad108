# SPDX-License-Identifier: Apache-2.0
"""`nlx run laws`: every architecture against the laws that a memory must obey, one table.

command    nlx run laws [--only NAME ...]
shows      for each architecture the worst deviation from each law: float64 and narrow models, whose
           chunks and windows are shorter than the text; bfloat16 on 16,384 tokens, random ones and
           one token for ever; and whether it passes its per-token NumPy references in tests/.
           "In context": every row's CMS blocks learn from its own tokens, one at a time, and the
           finite differences go through those writes
takes      about 15 minutes on two cores
expects    yes in the last column of every row
"""

import dataclasses
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nlx import nn, writes
from nlx.nn.model import by_level
from nlx_experiments import report, runs
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

PLACE = pathlib.Path(__file__).parents[1]
LENGTH, LONG, PIECE, CHUNK = 12, 16_384, 1024, 16
RATE = 0.3  # of the writes in context
NARROW: dict[str, Any] = dict(
    vocabulary=32,
    width=16,
    heads=2,
    hidden=8,
    memory_hidden=8,
    chunk_size=3,
    projection_chunk_size=6,
    persistent=2,
    tied=False,
)
EXACT, SLOPES, BOUND = 1e-9, 1e-5, 1e3  # float64; finite differences; bfloat16's largest score
# The tests that compare an architecture with NumPy, or Hope with its levels, token by token.
PAPER, TITANS = "test_laws.py::test_mixer_is_the_paper", "test_titans.py::test_mixer_is_the_paper"
ATTENTION = "test_mixers.py::test_attention_is_its_equation"
CHAIN = "test_mixers.py::test_cms_is_a_chain_of_residual_blocks"
CONTEXT = "test_continuum.py::test_in_context_is_the_paper_token_by_token"
HOPE = (
    "../../kernels/test_self_modifying_memory.py::test_reference_is_hope_by_hand",
    "test_mixers.py::test_hope_is_its_nest",
)
REFERENCES: dict[str, tuple[str, ...]] = {
    "transformer++": (ATTENTION,),
    "retnet": (f"{PAPER}[retnet]",),
    "deltanet": (f"{PAPER}[deltanet]",),
    "gated-deltanet": (f"{PAPER}[gated_deltanet]",),
    "ttt-linear": (f"{PAPER}[ttt_linear]",),
    "ttt-mlp": (f"{PAPER}[ttt_mlp]",),
    "titans-lmm": (f"{TITANS}[lmm]",),
    "titans-mac": (f"{TITANS}[mac]",),
    "titans-mag": (f"{TITANS}[mag]",),
    "titans-mal": (f"{TITANS}[mal]",),
    "samba": (f"{PAPER}[mamba2]", f"{PAPER}[window]"),
    "hope": (*HOPE, CHAIN),
    "hope-attention": (ATTENTION, CHAIN),
    "hope-nested": (*HOPE, CHAIN, CONTEXT),
    "hope-independent": (*HOPE, CONTEXT),
    **{
        f"{name}, in context": (*HOPE, f"{CONTEXT}[{kind}-periods{number}]")
        for name, kind, number in (
            ("hope", "sequential", 0),
            ("hope-nested", "nested", 1),
            ("hope-independent", "independent", 2),
        )
    },
}


class Measured(NamedTuple):
    """Worst deviations of one architecture; `grounds` says whether each is small enough."""

    tokens: float  # whole against token by token
    split: float  # whole against pieces of 5, 1, 4 and 2 tokens
    causal: float  # what a later token changes before it
    rows: float  # what a row changes in another
    slopes: float  # relative, of the largest entry of each parameter's gradient
    reached: float  # the smallest of those entries
    long: float  # the largest score in bfloat16

    def holds(self) -> bool:
        """Whether all laws do."""
        exact = max(self.tokens, self.split, self.causal, self.rows) <= EXACT
        return exact and self.slopes <= SLOPES and self.reached > 1e-12 and self.long < BOUND


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laws:
    """Measures how exactly every architecture obeys the laws."""

    only: tuple[str, ...] = ()
    """Architectures; all by default."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""


def main(options: Laws) -> None:
    """Measures, prints a line for each, and writes the table."""
    known = architectures()
    if unknown := [name for name in options.only if name not in known]:
        raise Refused(f"`only` holds {unknown[0]!r}; it must be one of {', '.join(known)}.")
    if not (options.place / "README.md").exists():
        raise Refused(f"`place` is {options.place}, which holds no README.md to write to.")
    path = options.place / "results" / "laws.json"
    found: dict[str, Any] = (runs.read_json(path) or {}).get("architectures", {})
    for name in options.only or known:
        measured = measure(known[name], in_context="in context" in name)
        numpy = references(REFERENCES[name])
        found[name] = {**measured._asdict(), "numpy": numpy, "holds": measured.holds() and numpy}
        found = {n: found[n] for n in known if n in found}
        path.parent.mkdir(exist_ok=True)
        runs.write_json(path, {"environment": runs.environment(), "architectures": found})
        report.place(options.place / "README.md", "laws", table(found).markdown())
        say(f"{name}: {'every law holds' if found[name]['holds'] else found[name]}")
    say(table(found).text())


def architectures() -> dict[str, nn.ModelConfig]:
    """Every architecture of the presets, narrow, and Hope's once more with CMS in context."""
    given = {
        name.removesuffix("-tiny"): config
        for name, config in nn.PRESETS.items()
        if name.endswith("-tiny")
    }
    narrow = {
        name: dataclasses.replace(
            config,
            layers=2 if config.then else 1,
            window=config.window and 7,
            cms_periods=(1, 3) if config.feed_forward == "cms" else config.cms_periods,
            **NARROW,
        )
        for name, config in given.items()
    }
    in_context = {f"{n}, in context": narrow[n] for n in narrow if f"{n}, in context" in REFERENCES}
    return narrow | in_context


class Reader(NamedTuple):
    """A model that reads: as it stands, or with a CMS that learns in context.

    Attributes:
      params: all that has a gradient.
      start: (params, rows, capacity) -> the state before the first token.
      read: (params, tokens [b, t+1], state) -> scores of the last t tokens, the state after t.
    """

    params: Any
    start: Callable[[Any, int, int], Any]
    read: Callable[[Any, Any, Any], tuple[Any, Any]]


def reader(config: nn.ModelConfig, *, in_context: bool, chunk_size: int = 1) -> Reader:
    """The reader of one architecture."""
    model = nn.LanguageModel(config, rngs=nnx.Rngs(1))
    if not in_context:
        graph, params = nnx.split(model)
        whole = lambda params: nnx.merge(graph, params)
        read = lambda params, tokens, state: whole(params)(tokens[:, :-1], state)
        return Reader(params, lambda params, rows, n: whole(params).init_state(rows, n), read)
    nest = nn.in_context(model, writes.fast(RATE))
    graph, _, join = by_level(model)

    def start(params, rows, n):
        mixers = nnx.merge(graph, join(params)).init_state(rows, n)
        return nn.begin(nest, params, mixers)

    def stream(params, tokens, state):
        del params  # they are in the state
        length = tokens.shape[1] - 1
        return nn.stream(nest, state, tokens, chunk_size=chunk_size, window=length // chunk_size)

    return Reader(nest.init(jax.random.key(0)), start, stream)


def measure(config: nn.ModelConfig, *, in_context: bool = False) -> Measured:
    """All deviations of one architecture."""
    with jax.enable_x64(True):
        system = reader(config, in_context=in_context)
        drawn = jax.random.permutation(jax.random.key(2), 32)[: 2 * LENGTH + 2]
        tokens = drawn.reshape(2, LENGTH + 1)
        begin = lambda: system.start(system.params, 2, LENGTH)
        apply = jax.jit(lambda tokens, state: system.read(system.params, tokens, state))
        whole, _ = apply(tokens, begin())

        def read(cuts: list[int]) -> float:
            state, parts, at = begin(), [], 0
            for length in cuts:
                part, state = apply(tokens[:, at : at + length + 1], state)
                parts.append(part)
                at += length
            return _furthest(jnp.concatenate(parts, 1), whole)

        other = tokens.at[:, LENGTH // 2 :].set(tokens[::-1, LENGTH // 2 :])
        later, _ = apply(other, begin())
        changed, _ = apply(tokens.at[1].set(tokens[1, ::-1]), begin())
        slopes, reached = _slopes(system, tokens)
        return Measured(
            tokens=read([1] * LENGTH),
            split=read([5, 1, 4, 2]),
            causal=_furthest(later[:, : LENGTH // 2], whole[:, : LENGTH // 2]),
            rows=_furthest(changed[0], whole[0]),
            slopes=slopes,
            reached=reached,
            long=_long(config, in_context=in_context),
        )


def _furthest(x: Any, y: Any) -> float:
    """The largest difference; infinite where one is no number."""
    worst = float(jnp.max(jnp.abs(x - y)))
    return worst if np.isfinite(worst) else np.inf


def _slopes(system: Reader, tokens: Any) -> tuple[float, float]:
    """Of one entry per parameter: distance from central differences, and the smallest gradient."""

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = system.read(params, tokens, system.start(params, 2, LENGTH))
        labels = 31 - tokens[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    leaves, tree = jax.tree.flatten(system.params)
    worst, least = 0.0, np.inf
    for n, gradient in enumerate(jax.tree.leaves(loss(system.params)[1])):
        entry = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)

        def moved(step, n=n, entry=entry):
            changed = [*leaves[:n], leaves[n].at[entry].add(step), *leaves[n + 1 :]]
            return float(loss(jax.tree.unflatten(tree, changed))[0])

        wide, narrow = ((moved(h) - moved(-h)) / (2 * h) for h in (2e-4, 1e-4))
        slope = float(gradient[entry])
        worst = max(worst, abs((4 * narrow - wide) / 3 - slope) / max(abs(slope), 1e-12))
        least = min(least, abs(slope))
    return worst if np.isfinite(worst) else np.inf, least


def _long(config: nn.ModelConfig, *, in_context: bool) -> float:
    """The largest score in bfloat16 on 16,384 tokens: random ones, and one token for ever."""
    with jax.enable_x64(False):
        narrow = dataclasses.replace(config, bfloat16=True)
        system = reader(narrow, in_context=in_context, chunk_size=CHUNK)
        tokens = jnp.stack(
            [jax.random.randint(jax.random.key(3), (LONG + 1,), 0, 32), jnp.full(LONG + 1, 7)]
        )

        @jax.jit
        def read(state, piece):
            logits, state = system.read(system.params, piece, state)
            return state, jnp.max(jnp.abs(logits))

        state, largest = system.start(system.params, 2, LONG), 0.0
        for at in range(0, LONG, PIECE):
            state, score = read(state, tokens[:, at : at + PIECE + 1])
            largest = max(largest, float(score)) if np.isfinite(score) else np.inf
        return largest


def references(tests: tuple[str, ...]) -> bool:
    """Whether these tests pass, of which there is at least one."""
    root = PLACE.parent
    cases = [f"tests/nlx/nn/{name}" for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode == 0 and re.search(r"\d+ passed", done.stdout) is not None


def table(found: Mapping[str, Any]) -> report.Table:
    """A row for each architecture."""
    shown: dict[str, Callable[[Any], str]] = {
        "token by token": lambda m: f"{m['tokens']:.0e}",
        "split anywhere": lambda m: f"{m['split']:.0e}",
        "from later tokens": lambda m: f"{m['causal']:.0e}",
        "from other rows": lambda m: f"{m['rows']:.0e}",
        "finite differences": lambda m: f"{m['slopes']:.0e}",
        "smallest gradient": lambda m: f"{m['reached']:.0e}",
        "bfloat16, 16k tokens": lambda m: f"{m['long']:.2g}",
        "NumPy": lambda m: "yes" if m["numpy"] else "no",
        "all hold": lambda m: "yes" if m["holds"] else "**no**",
    }
    rows = [(name, *(show(m) for show in shown.values())) for name, m in found.items()]
    return report.Table("Deviations from the laws", ("architecture", *shown), rows)
