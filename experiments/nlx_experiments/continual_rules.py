# SPDX-License-Identifier: Apache-2.0
"""The compiled part of every method of `continual_methods`: losses, examinations, steps."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nlx import optim
from nlx.clock import Clock
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

    Keys are what every level's values were read by: [n, units], the mean over a row's bytes where a
    row has one answer; at bytes that are not scored they are 0.
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

    adam: Any
    fisher: Any  # sum over tasks of F
    anchor: Any  # sum over tasks of F p*


def whole(graph: nnx.GraphDef, kind: Kind) -> dict[str, Any]:
    """begin, step and remember of fine-tuning, EWC and replay."""
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))

    def begin(params: Any) -> Whole:
        none = jax.tree.map(jnp.zeros_like, params)
        return Whole(rule.init(params), none, none)

    def step(params: Any, memories: Whole, batch: Batch, choice: Mapping[str, Array]):
        def loss(params):
            lost, _ = task_loss(nnx.merge(graph, params), batch, kind)
            if "strength" not in choice:
                return lost
            return lost + choice["strength"] * penalty(params, memories)

        gradients = jax.grad(loss)(params)
        moved, adam = rule.update(gradients, memories.adam, params)
        params = jax.tree.map(lambda p, m: p - choice["rate"] * m, params, moved)
        return params, memories._replace(adam=adam)

    def remember(params: Any, memories: Whole, batch: Batch, key: Array) -> Whole:
        found = fisher(graph, params, batch, key, kind)
        total = jax.tree.map(jnp.add, memories.fisher, found)
        anchor = jax.tree.map(lambda a, f, p: a + f * p, memories.anchor, found, params)
        return memories._replace(fisher=total, anchor=anchor)

    return {"begin": begin, "step": jax.jit(step), "remember": jax.jit(remember)}


def penalty(params: Any, memories: Whole) -> Float[Array, ""]:
    """sum_tasks sum_n 1/2 F_n (p_n - p*_n)^2, less a constant: of two sums, however many tasks.

    Source: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting, Eq. 3.
    """
    part = lambda p, f, a: jnp.sum(0.5 * f * p * p - a * p)
    parts = jax.tree.map(part, params, memories.fisher, memories.anchor)
    return sum(jax.tree.leaves(parts), jnp.zeros(()))


def fisher(graph: nnx.GraphDef, params: Any, batch: Batch, key: Array, kind: Kind) -> Any:
    """Diagonal of the Fisher information: mean over rows of (d log p(y | row) / dp)^2, y from p.

    Of language y is one byte for each scored place, and a row's log-likelihood their sum.
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
            return jnp.sum(chosen * counts)

        return jax.tree.map(jnp.square, jax.grad(log_likelihood)(params))

    def add(total, one):
        row, key = one
        return jax.tree.map(jnp.add, total, squared(row._replace(seen=batch.seen), key)), None

    keys = jax.random.split(key, len(batch.tokens))
    rows = batch._replace(seen=jnp.zeros(len(batch.tokens)))
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (rows, keys))
    return jax.tree.map(lambda x: x / len(batch.tokens), total)


def hope(
    graph: nnx.GraphDef, kind: Kind, clocks: Sequence[Clock], adam: bool = False
) -> dict[str, Any]:
    """begin and step of levels on their clocks; nothing else ever moves.

    The values in use are what was given plus what every level wrote: theta = sum_m theta^(m). One
    gradient serves all levels, as in the nested variant of `nlx.nn.CMS`.

    clocks: of the levels, fast to slow. adam: what they write by, in place of `least_squares`.
    """

    def rule(choice: Mapping[str, Any]) -> optax.GradientTransformation:
        if adam:
            scale = optax.scale_by_adam(b2=0.99)
            return optax.chain(scale, optax.scale(-1.0), _times(choice["rate"]))
        return least_squares(choice["rate"], choice["horizon"])

    def begin(params: Any) -> list[Any]:
        start = rule({"rate": 0.0, "horizon": 1.0})
        none = lambda w: Pair(jnp.zeros_like(w), jnp.zeros((len(w), len(w)), w.dtype))
        shares = {name: none(w) for name, w in values_of(params).items()}
        return [optim.on_clock(start, clock).init(shares) for clock in clocks]

    def step(params: Any, memories: list[Any], batch: Batch, choice: Mapping[str, Array]):
        values = values_of(params)

        def loss(values):
            return task_loss(nnx.merge(graph, holding(params, values)), batch, kind)

        gradients, keys = jax.grad(loss, has_aux=True)(values)
        read = len(batch.tokens) if kind == "classes" else jnp.sum(batch.scored[:, 1:])
        gram = lambda name: keys[name].T @ keys[name] / jnp.maximum(read, 1)
        given: Any = {name: Pair(gradients[name], gram(name)) for name in values}
        kept = []
        for clock, memory in zip(clocks, memories, strict=True):
            moved: Any
            moved, memory = optim.on_clock(rule(choice), clock).update(given, memory)
            values = {name: w + moved[name].values for name, w in values.items()}
            kept.append(memory)
        return holding(params, values), kept

    return {"begin": begin, "step": jax.jit(step)}


def _times(rate: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: rate * u, updates))


def values_of(params: nnx.State) -> dict[str, Float[Array, "i o"]]:
    """The last matrix of the last layer's MLP, named as its keys: "<layer>"."""
    named = {_layer(path): v[...] for path, v in nnx.to_flat_state(params) if _layer(path)}
    last = max(named, key=int)
    return {last: named[last]}


def holding(params: nnx.State, values: Mapping[str, Array]) -> nnx.State:
    """The parameters with these values."""

    def place(path, variable):
        layer = _layer(path)
        return variable.replace(values[layer]) if layer in values else variable

    return nnx.map_state(place, params)


def _layer(path: tuple) -> str:
    """Of an MLP's values the layer, the third part of their path; "" of all else."""
    return str(path[2]) if path[-2:] == ("down", "kernel") else ""
