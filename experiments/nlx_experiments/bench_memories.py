# SPDX-License-Identifier: Apache-2.0
"""How fast memories are on the CPU: chunks against token loops, Hope's block against a peer's.

command    python -m nlx_experiments.bench_memories [linear] [mlp] [hope] [decode]
           (all four if none is named)
shows      linear, mlp: the gradient of the op in all its arguments, by chunks over token by token
           (the op's reference, compiled); hope: tokens per second of Hope's block over those of
           nested-learning's at its default widths; decode: time per token and memory after 1,000
           and after 100,000 tokens, for every recurrent mixer at size tiny, 256 calls of one token
           in a compiled loop: what the host adds to a call is left out; results/memories.json, and
           the table in README.md
measures   ratios in one run, interleaved, medians
expects    linear 5 times or more, mlp 10, hope 20, decode within 10 % and a state of one size
takes      about 5 minutes on two cores: linear and mlp half each, hope 2, decode 2
needs      hope: `pip install torch==2.13.0; pip install --no-deps nested-learning==0.2.0` (torch's
           build for the CPU is of Python 3.11); without them the ratio is left out
"""

import functools
import gc
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import nlx
from nlx import nn, ops
from nlx.nn.mixer import make_mixer
from nlx_experiments import peers, report, resident, runs
from nlx_experiments.console import say
from nlx_experiments.errors import Refused

Run = Callable[[], Any]
RECURRENT = (
    "retnet", "deltanet", "gated-deltanet", "ttt-linear", "ttt-mlp", "titans-lmm", "titans-mac",
    "titans-mag", "titans-mal", "samba", "hope",
)  # fmt: skip
PERIODS = 1, 4, 32, 128
PLACE = pathlib.Path(__file__).parents[1]
SHORT, LONG, DECODED, PREFILL = 1_000, 100_000, 256, 1_000


def medians(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each call, called in turn `rounds` times after one call that compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken) for name, taken in times.items()}


# 1. chunks against the token loop


def linear(rows: int = 8, tokens: int = 2048, width: int = 64) -> dict[str, Run]:
    """The gradient of a gated delta rule of one head, in every argument."""
    draw = _drawer()
    q, k, v = (draw(rows, tokens, 1, width) for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    retain, beta = (jax.nn.sigmoid(bias + draw(rows, tokens, 1)) for bias in (3.0, 0.0))

    def loss(arguments, implementation):
        q, k, v, retain, beta = arguments
        y, state = ops.linear_memory(
            q, k, v, retain=retain, erase=retain * beta, rate=beta, implementation=implementation
        )
        return jnp.mean(y**2) + jnp.mean(state**2)

    return _both(loss, (q, k, v, retain, beta))


def mlp(
    rows: int = 2, tokens: int = 1024, width: int = 64, chunk_size: int = 64, hidden: int = 64
) -> dict[str, Run]:
    """The gradient of Titans' memory of one head and two layers, in every argument."""
    draw = _drawer()
    q, k, v = (draw(rows, tokens, 1, width) for _ in range(3))
    q, k = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (q, k))
    weights = draw(1, width, hidden) / width**0.5, 0.5 * draw(1, hidden, width) / hidden**0.5
    rate, retain, momentum = (
        jax.nn.sigmoid(bias + draw(rows, tokens, 1)) for bias in (-3.0, 3.0, 0.0)
    )

    def loss(arguments, implementation):
        q, k, v, weights, rate, retain, momentum = arguments
        y, _ = ops.mlp_memory(
            q, k, v, weights=weights, rate=rate, retain=retain, momentum=momentum,
            chunk_size=chunk_size, implementation=implementation,
        )  # fmt: skip
        return jnp.mean(y**2)

    return _both(loss, (q, k, v, weights, rate, retain, momentum))


def _drawer():
    keys = iter(jax.random.split(jax.random.key(0), 16))
    return lambda *shape: jax.random.normal(next(keys), shape)


def _both(loss, arguments) -> dict[str, Run]:
    forms = {"token loop": "reference", "chunks": "xla"}
    gradient = lambda form: jax.jit(jax.grad(functools.partial(loss, implementation=form)))
    call = lambda compiled: jax.block_until_ready(compiled(arguments))
    return {name: functools.partial(call, gradient(form)) for name, form in forms.items()}


# 2. Hope's block


def hope(tokens: int = 128, width: int = 512) -> dict[str, Run]:
    """A row through Hope's block: ours forward, and with the gradient of everything."""
    mixer = nn.SelfModifying(
        width, heads=1, hidden=width, chunk_size=64, projection_chunk_size=8, rngs=nnx.Rngs(0)
    )
    cms = nn.CMS(width, 4 * width, [nlx.Clock(period) for period in PERIODS], rngs=nnx.Rngs(1))
    graph, weights = nnx.split(nn.Block(width, mixer, cms))
    x = _drawer()(1, tokens, width)
    forward = lambda weights, x: nnx.merge(graph, weights)(x)[0]
    backward = jax.grad(lambda weights, x: jnp.mean(forward(weights, x) ** 2), argnums=(0, 1))
    call = lambda compiled: jax.block_until_ready(compiled(weights, x))
    forms = {"forward": forward, "forward and backward": backward}
    return {name: functools.partial(call, jax.jit(form)) for name, form in forms.items()}


def their_hope(tokens: int = 128, width: int = 512) -> Run:
    """The same of nested-learning, forward: its writes carry no gradient. Its read-out is simpler.

    As its configuration `pilot_selfmod` has it: width 512, chunks of 64 and 8 tokens, four CMS
    levels of 2,048 hidden units, whose own updates in context are left out, as they are in ours.
    """
    torch = peers.torch()
    block = peers.load("nested_learning.hope.block")
    level = peers.load("nested_learning.levels").LevelSpec
    config = block.HOPESelfModBlockConfig(
        dim=width,
        cms_levels=[level(name=f"cms_{period}", update_period=period) for period in PERIODS],
        selfmod_chunk_size=8,
        selfmod_chunk_size_memory=64,
    )
    module = block.HOPESelfModBlock(config).eval()
    x = torch.randn(1, tokens, width)

    def run():
        with torch.no_grad():
            memory = module.selfmod
            return module.cms(memory.forward_with_updates(x, memory.init_fast_state())[0])

    return run


# 3. decoding


class Decoded(NamedTuple):
    """One mixer after few tokens and after many."""

    seconds: tuple[float, float]  # a token
    state: tuple[int, int]  # bytes
    grown: float  # MiB by which the process grew while it read from few to many


def decode(
    name: str, short: int = SHORT, long: int = LONG, decoded: int = DECODED, budget: float = 3.0
) -> Decoded:
    """Reads `long` tokens in pieces; times single tokens after `short` of them and after all.

    name: of an architecture, whose mixers are taken at size tiny. budget: seconds of timing, about.
    """
    config = nn.preset(f"{name}-tiny")
    mixers = [make_mixer(config, mixer, rngs=nnx.Rngs(0)) for mixer in config.mixers]
    graph, weights = nnx.split(mixers)
    piece = jax.random.normal(jax.random.key(1), (1, min(PREFILL, short), config.width))

    def mix(weights, x, states):
        after = []
        for mixer, state in zip(nnx.merge(graph, weights), states, strict=True):
            x, state = mixer(x, state)
            after.append(state)
        return x, after

    @functools.partial(jax.jit, donate_argnums=2)
    def read(weights, n, states):
        return mix(weights, jnp.roll(piece, n // 7, axis=1), states)[1]

    @jax.jit
    def answer(weights, states):
        """`decoded` calls of one token, in a compiled loop."""

        def one(states, x):
            y, states = mix(weights, x[None, None], states)
            return states, y

        return jax.lax.scan(one, states, jnp.resize(piece[0], (decoded, config.width)))[1]

    def advance(states, first: int, last: int):
        for n in range(first, last, piece.shape[1]):
            states = jax.block_until_ready(read(weights, n, states))
        return states

    early = advance(_own([m.init_state(1, config.context, piece.dtype) for m in mixers]), 0, short)
    jax.block_until_ready(answer(weights, early))
    advance(_own(early), 0, 5 * short)  # what calls take the first few times is not the stream's
    gc.collect()
    before = resident.now()
    late = advance(_own(early), short, long)
    grown = resident.now() - before
    runs = {
        where: lambda states=states: jax.block_until_ready(answer(weights, states))
        for where, states in (("early", early), ("late", late))
    }
    once = medians(runs, 3)["early"]
    times = medians(runs, max(5, int(budget / 2 / once)))
    size = lambda states: sum(leaf.nbytes for leaf in jax.tree.leaves(states))
    seconds = times["early"] / decoded, times["late"] / decoded
    return Decoded(seconds, (size(early), size(late)), grown)


def _own(states):
    """Copies that nothing else uses, which may be donated."""
    return jax.tree.map(jnp.copy, states)


# 4. the command


Row = tuple[str, str, str]  # what, measured, asked


def show_chunks(runs: dict[str, Run], what: str, asked: float) -> Iterator[Row]:
    """How many times faster chunks are."""
    taken = medians(runs, 7)
    ratio = taken["token loop"] / taken["chunks"]
    each = ", ".join(f"{form} {1e3 * seconds:,.0f} ms" for form, seconds in taken.items())
    yield f"gradient of {what}", f"{each}; {ratio:.1f} times", f"{asked:g} times"


def show_hope(tokens: int = 128) -> Iterator[Row]:
    """Tokens per second of both blocks."""
    runs = hope(tokens)
    try:
        runs["theirs, forward"] = their_hope(tokens)
    except Refused as missing:
        say(f"hope: without a peer: {missing}")
    speed = {name: tokens / taken for name, taken in medians(runs, 3).items()}
    theirs = speed.get("theirs, forward")
    for name, rate in speed.items():
        ratio = f"; {rate / theirs:.1f} times" if theirs else ""
        yield f"Hope's block, {name}", f"{rate:,.0f} tokens/s{ratio}", "20 times theirs, forward"


def show_decode() -> Iterator[Row]:
    """A row a mixer."""
    for name in RECURRENT:
        early, late = (found := decode(name)).seconds
        small, large = (size / 2**20 for size in found.state)
        took = (
            f"{1e6 * early:.0f} us a token after {SHORT:,} tokens, {1e6 * late:.0f} after "
            f"{LONG:,} ({100 * (late / early - 1):+.1f} %); state {small:.3f} and {large:.3f} MiB, "
            f"the process grew by {found.grown:+.1f} MiB"
        )
        yield f"decoding, {name}", took, "within 10 %"


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "linear": lambda: show_chunks(linear(), "linear_memory, b8 t2048 d64", 5),
    "mlp": lambda: show_chunks(mlp(), "mlp_memory, b2 t1024 d64 chunk 64", 10),
    "hope": show_hope,
    "decode": show_decode,
}


def main(names: list[str]) -> None:
    """Prints the parts that are named, or all, and writes them down."""
    unknown = set(names) - set(PARTS)
    if unknown:
        sys.exit(f"bench_memories knows {', '.join(PARTS)}, not {', '.join(unknown)}.")
    path = PLACE / "results" / "memories.json"
    known = runs.read_json(path) or {}
    for name in names or PARTS:
        rows = []
        for row in PARTS[name]():
            say(": ".join(row[:2]) + f" (asked: {row[2]})")
            rows.append(row)
        known[name] = {"environment": runs.environment(), "rows": rows}
        runs.write_json(path, {part: known[part] for part in PARTS if part in known})
    lines = [tuple(row) for part in PARTS if part in known for row in known[part]["rows"]]
    shown = report.Table("Costs of memories", ("what", "measured", "asked"), lines).markdown()
    report.place(PLACE / "README.md", "memories", shown)


if __name__ == "__main__":
    main(sys.argv[1:])
