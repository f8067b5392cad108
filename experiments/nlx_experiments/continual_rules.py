# SPDX-License-Identifier: Apache-2.0
"""The compiled part of every method of `continual_methods`: losses, examinations, steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nlx import nn, writes
from nlx.clock import Clock
from nlx.level import Level, LevelState
from nlx.nest import Nest
from nlx.nn.model import by_level
from nlx_experiments.continual_model import Reader, mean_over
from nlx_experiments.continual_tasks import Kind
from nlx_experiments.continual_write import Pair, least_squares


class Batch(NamedTuple):
    """Rows as jax takes them, and the classes that may be answered."""

    tokens: Int[Array, "b t"]
    labels: Int[Array, " b"]
    scored: Float[Array, "b t"]
    seen: Bool[Array, " c"]


def task_loss(reader: Reader, batch: Batch, kind: Kind) -> tuple[Float[Array, ""], Any]:
    """Cross-entropy in nats: of a row's class among those seen, or of a scored byte; and keys.

    Keys are what the last layer's values were read by: [n, units], the mean over a row's bytes
    where a row has one answer; at bytes that are not scored they are 0.
    """
    if kind == "classes":
        x, keys = reader.mix(batch.tokens)
        scores = reader.class_scores(x, batch.tokens)
        scores = jnp.where(batch.seen[None], scores, -1e30)
        lost = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
        return lost.mean(), {name: mean_over(k, batch.tokens) for name, k in keys.items()}
    x, keys = reader.mix(batch.tokens[:, :-1])
    scores, counts = reader.model.read_out(x), batch.scored[:, 1:]
    lost = optax.softmax_cross_entropy_with_integer_labels(scores, batch.tokens[:, 1:])
    flat = {n: (k * counts[..., None]).reshape(-1, k.shape[-1]) for n, k in keys.items()}
    return jnp.sum(lost * counts) / jnp.maximum(jnp.sum(counts), 1), flat


def examinations(graph: nnx.GraphDef, kind: Kind) -> dict[str, Any]:
    """right(params, batch, counts) -> (how many are right, of how many); write(params, tokens,
    begins) -> tokens, those from `begins` on the likeliest, one after the other."""

    def right(params: Any, batch: Batch, counts: Float[Array, " b"]):
        reader = nnx.merge(graph, params)
        if kind == "classes":
            scores = reader.class_scores(reader.mix(batch.tokens)[0], batch.tokens)
            given = jnp.argmax(jnp.where(batch.seen[None], scores, -jnp.inf), 1)
            return jnp.sum((given == batch.labels) * counts), jnp.sum(counts)
        given = jnp.argmax(reader.model.read_out(reader.mix(batch.tokens[:, :-1])[0]), -1)
        scored = batch.scored[:, 1:] * counts[:, None]
        return jnp.sum((given == batch.tokens[:, 1:]) * scored), jnp.sum(scored)

    def write(params: Any, tokens: Array, begins: Array):
        reader = nnx.merge(graph, params)

        def body(place, tokens):
            scores = reader.model.read_out(reader.mix(tokens)[0])[:, place - 1]
            there = jnp.where(place >= begins, jnp.argmax(scores, -1), tokens[:, place])
            return tokens.at[:, place].set(there.astype(tokens.dtype))

        return jax.lax.fori_loop(1, tokens.shape[1], body, tokens)

    return {"right": jax.jit(right), "write": jax.jit(write)}


class Whole(NamedTuple):
    """Memories of methods that train all parameters."""

    rule: Any  # of Adam
    fisher: Any  # sum over tasks of F
    anchor: Any  # sum over tasks of F p*


def whole(graph: nnx.GraphDef, kind: Kind) -> dict[str, Any]:
    """begin, step and remember of fine-tuning, EWC and replay."""

    def begin(params: Any) -> Whole:
        none = jax.tree.map(jnp.zeros_like, params)
        return Whole(adam(0.0).init(params), none, none)

    def step(params: Any, memories: Whole, batch: Batch, choice: Mapping[str, Array]):
        def loss(params):
            lost, _ = task_loss(nnx.merge(graph, params), batch, kind)
            if "strength" not in choice:
                return lost
            return lost + choice["strength"] * penalty(params, memories)

        moved, rule = adam(choice["rate"]).update(jax.grad(loss)(params), memories.rule, params)
        return optax.apply_updates(params, moved), memories._replace(rule=rule)

    def remember(params: Any, memories: Whole, batch: Batch, key: Array) -> Whole:
        found = fisher(graph, params, batch, key, kind)
        total = jax.tree.map(jnp.add, memories.fisher, found)
        anchor = jax.tree.map(lambda a, f, p: a + f * p, memories.anchor, found, params)
        return memories._replace(fisher=total, anchor=anchor)

    return {"begin": begin, "step": jax.jit(step), "remember": jax.jit(remember)}


def penalty(params: Any, memories: Any) -> Float[Array, ""]:
    """sum_tasks sum_n 1/2 F_n (p_n - p*_n)^2, less a constant: of two sums, however many tasks.

    memories: what has `fisher` and `anchor`, as in `Whole`.

    Source: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting, Eq. 3.
    """
    part = lambda p, f, a: jnp.sum(0.5 * f * p * p - a * p)
    parts = jax.tree.map(part, params, memories.fisher, memories.anchor)
    return sum(jax.tree.leaves(parts), jnp.zeros(()))


def fisher(graph: nnx.GraphDef, params: Any, batch: Batch, key: Array, kind: Kind) -> Any:
    """Diagonal of the Fisher information: mean over rows of (d log p(y | row) / dp)^2, y from p.

    Of language y is one byte for each scored place, and F is of one of them, as the loss is a mean
    over them: a row's square, of the sum of their log-likelihoods, divided by how many it has.
    """

    def squared(row: Batch, key: Array):
        row = row._replace(tokens=row.tokens[None], scored=row.scored[None])

        def log_likelihood(params):
            reader = nnx.merge(graph, params)
            if kind == "classes":
                scores = reader.class_scores(reader.mix(row.tokens)[0], row.tokens)
                scores, counts = jnp.where(row.seen[None], scores, -1e30), jnp.ones(1)
            else:
                scores = reader.model.read_out(reader.mix(row.tokens[:, :-1])[0])[0]
                counts = row.scored[0, 1:]
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), drawn[:, None], 1)[:, 0]
            return jnp.sum(chosen * counts) / jnp.sqrt(jnp.maximum(jnp.sum(counts), 1))

        return jax.tree.map(jnp.square, jax.grad(log_likelihood)(params))

    def add(total, one):
        row, key = one
        return jax.tree.map(jnp.add, total, squared(row._replace(seen=batch.seen), key)), None

    keys = jax.random.split(key, len(batch.tokens))
    rows = batch._replace(seen=jnp.zeros(len(batch.tokens)))
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (rows, keys))
    return jax.tree.map(lambda x: x / len(batch.tokens), total)


def adam(rate: float | Float[Array, ""]) -> optax.GradientTransformation:
    """What a level writes by, and what `whole` moves all parameters by."""
    scale = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
    return optax.chain(scale, optax.stateless(lambda u, _: jax.tree.map(lambda x: -rate * x, u)))


class Stacked(NamedTuple):
    """Memories of levels of MLPs."""

    carries: dict[str, Any]  # of every level's write
    tick: Int[Array, ""]  # steps taken


Held = Literal["values", "values by adam", "units by adam"]


def stacked(
    graph: nnx.GraphDef, kind: Kind, held: Held = "values", stretches: Sequence[int] = (1,) * 3
) -> dict[str, Any]:
    """begin and step of a model whose MLPs are levels on clocks (`nn.from_pretrained_mlps`).

    As a nest under the task's loss: one level for each clock of `nn.clocks_by_level`, which at the
    end of its period writes the mean gradient of the period (Eq. 71, by a rule of its own) to what
    it holds: the values of its units in the last layer, by `least_squares`. A level's `Pair` has
    its values, and a tap of 0 in the Gram matrix's place, which has the keys' for its gradient.
    All else has frequency 0.

    held: what a level holds and moves: as above; the same values by Adam; or its units of every
    layer, whole, by Adam. stretches: of each level, how many horizons it remembers its keys for.
    """

    def nest_of(params: Any, choice: Mapping[str, Any]):
        reader = nnx.merge(graph, params)
        clocks = nn.clocks_by_level(reader) | {"outer": Clock(None)}
        rules = dict.fromkeys(clocks, adam(choice["rate"]))
        if held == "values":
            for n, stretch in enumerate(stretches):
                rules[f"cms_{n}"] = least_squares(choice["rate"], stretch * choice["horizon"])
        if held == "units by adam":
            parts, joined, loss = _by_units(reader, kind)
        else:
            given = graph, params, kind, len(clocks) - 1
            parts, joined, loss = _by_values(*given, taps=held == "values")
        levels = {
            name: Level(
                lambda key, name=name: parts[name],
                write=None if clocks[name].period is None else writes.summed(rules[name]),
                clock=clocks[name],
            )
            for name in parts
        }
        return Nest(levels, lambda parts, batch: ((), {}), loss), parts, joined

    def begin(params: Any) -> Stacked:
        nest, parts, _ = nest_of(params, {"rate": jnp.float32(0), "horizon": jnp.float32(1)})
        return Stacked({n: s.carry for n, s in nest.start(parts).items()}, jnp.int32(0))

    def step(params: Any, memories: Stacked, batch: Batch, choice: Mapping[str, Array]):
        nest, parts, joined = nest_of(params, choice)
        states = {n: LevelState(parts[n], memories.carries[n], memories.tick) for n in parts}
        states, _ = nest.step(states, batch)
        params = joined({name: state.params for name, state in states.items()})
        carries = {name: state.carry for name, state in states.items()}
        return params, Stacked(carries, memories.tick + 1)

    return {"begin": begin, "step": jax.jit(step)}


Parts = dict[str, Any]  # by level, what it holds
Split = tuple[Parts, Callable[[Parts], Any], Callable[[Parts, Batch], Array]]  # joined, loss


def _by_units(reader: Reader, kind: Kind) -> Split:
    """All parameters by level: what they are, back to one tree, and the task's loss of them."""
    graph, parts, join = by_level(reader)
    return (
        parts,
        join,
        lambda parts, batch: task_loss(nnx.merge(graph, join(parts)), batch, kind)[0],
    )


def _by_values(graph: nnx.GraphDef, params: Any, kind: Kind, levels: int, *, taps: bool) -> Split:
    """The same of the values that levels read in the last layer, as `Pair`s; taps: with Grams."""
    size = lambda w: len(w) if taps else 0
    values = values_of(params, levels)
    parts = {n: Pair(w, jnp.zeros((size(w), size(w)), w.dtype)) for n, w in values.items()}

    def joined(parts: Parts) -> Any:
        return holding(params, {name: pair.values for name, pair in parts.items()})

    def loss(parts: Parts, batch: Batch) -> Array:
        lost, keys = task_loss(nnx.merge(graph, joined(parts)), batch, kind)
        if not taps:
            return lost
        read = len(batch.tokens) if kind == "classes" else jnp.sum(batch.scored[:, 1:])
        for name, k in jax.lax.stop_gradient(keys).items():
            if name in parts:
                gram = k.T @ k / jnp.maximum(read, 1)
                lost = lost + jnp.sum(gram * parts[name].gram)
        return lost

    return parts, joined, loss


def carried(memories: Any, penalty: bool = False) -> int:
    """Bytes that a method takes from task to task beside the parameters in use.

    Where all parameters learn, Adam's memories, and with a penalty its two sums; of levels what
    their writes carry, sums that wait for a firing among it.
    """
    if isinstance(memories, Whole) and not penalty:
        memories = memories.rule
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memories))


def values_of(params: nnx.State, levels: int) -> dict[str, Float[Array, "i o"]]:
    """The last matrix of each level's MLP in the last layer: its label -> the matrix."""
    named = [(_place(path), v[...]) for path, v in nnx.to_flat_state(params) if _place(path)]
    last = max(layer for (layer, _), _ in named)
    return {f"cms_{n}": w for (layer, n), w in named if layer == last and n < levels}


def holding(params: nnx.State, values: Mapping[str, Array]) -> nnx.State:
    """The parameters with these values."""
    last = max(_place(path) for path, _ in nnx.to_flat_state(params))[0]

    def place(path, variable):
        layer, level = _place(path) or (-1, -1)
        there = layer == last and f"cms_{level}" in values
        return variable.replace(values[f"cms_{level}"]) if there else variable

    return nnx.map_state(place, params)


def _place(path: tuple) -> tuple[int, ...]:
    """Layer and level of an MLP's values, third and sixth in their path; () of all else."""
    return (path[2], path[5]) if path[-2:] == ("down", "kernel") else ()
