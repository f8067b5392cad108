# SPDX-License-Identifier: Apache-2.0
"""Answers without learning: rows and their answers stand in the prompt, then the question."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from nlx import nn
from nlx_experiments import continual_language as language
from nlx_experiments.continual_tasks import Rows, encoded

FILL = ord("\n")  # stands before a prompt that is shorter than the window
NAMED = 24  # bytes of a label's name that are scored


def trigrams(content: bytes) -> frozenset[bytes]:
    """All three bytes that follow each other in it."""
    return frozenset(content[n : n + 3] for n in range(len(content) - 2))


def alike(question: frozenset[bytes], known: Sequence[frozenset[bytes]]) -> list[int]:
    """Places of the known, most alike first: by the share of trigrams that both hold (Jaccard)."""
    share = [len(question & k) / max(1, len(question | k)) for k in known]
    return sorted(range(len(known)), key=lambda n: -share[n])


def prompt(question: bytes, examples: Sequence[bytes], room: int) -> bytes:
    """As many examples as fit, the first of them nearest to the question, then it: `room` bytes.

    A question that is longer loses its beginning; what is shorter is filled up before.
    """
    text = question[-room:]
    for example in examples:
        if len(example) + len(text) > room:
            break
        text = example + text
    return bytes([FILL]) * (room - len(text)) + text


def _bytes(rows: Int[np.ndarray, "n t"]) -> list[bytes]:
    return [bytes(row[row > 0].tolist()) for row in rows]


@functools.cache
def _scorer(graph: nnx.GraphDef, room: int):
    """(weights, prompt [1, t], names [c, n]) -> mean log-likelihood of each name's bytes."""

    def score(params, tokens: Array, names: Array) -> Array:
        model = nnx.merge(graph, params)
        told, state = model(tokens, model.init_state(1, room + NAMED))
        count = len(names)
        state = jax.tree.map(lambda x: jnp.repeat(x, count, 0), state)
        after, _ = model(names[:, :-1], state)
        first = jnp.repeat(told[:, -1:], count, 0)
        scores = jax.nn.log_softmax(jnp.concatenate([first, after], 1))
        chosen = jnp.take_along_axis(scores, names[..., None], 2)[..., 0]
        there = (names > 0).astype(chosen.dtype)
        return jnp.sum(chosen * there, 1) / jnp.sum(there, 1)

    return jax.jit(score)


def classes(
    model: nn.LanguageModel,
    rows: Rows,
    known: Rows | None,
    texts: Sequence[str],
    seen: Bool[np.ndarray, " c"],
) -> float:
    """Share of rows whose label's name is the likeliest of those seen, after the row.

    texts: names of all labels. Others as of `text`.
    """
    ends = [f" = {name}\n".encode() for name in texts]
    names = encoded(ends, NAMED)
    room = max(1, model.config.context - NAMED)
    graph, params = nnx.split(model)
    score = _scorer(graph, room)
    held = [] if known is None else _bytes(known.tokens)
    grams = [trigrams(h) for h in held]
    right = 0
    for question, label in zip(_bytes(rows.tokens), rows.labels, strict=True):
        order = alike(trigrams(question), grams)[:16]
        examples = [held[n] + ends[known.labels[n]] for n in order] if known is not None else []
        asked = encoded([prompt(question, examples, room)], room)
        scores = np.asarray(score(params, jnp.asarray(asked), jnp.asarray(names)))
        right += int(np.where(seen, scores, -np.inf).argmax() == label)
    return right / max(1, len(rows))


@functools.cache
def _foreteller(graph: nnx.GraphDef):
    return jax.jit(lambda params, tokens: jnp.argmax(nnx.merge(graph, params)(tokens)[0], -1))


def text(
    model: nn.LanguageModel, rows: Rows, known: Rows | None, generator: np.random.Generator
) -> float:
    """Share of a row's scored bytes that are the likeliest, after rows drawn from the known.

    model: read in windows of its `context`. rows: asked. known: all that may stand in a prompt.
    generator: draws.
    """
    length = rows.tokens.shape[1]
    room = max(0, model.config.context - length)
    held = [] if known is None else _bytes(known.tokens)
    graph, params = nnx.split(model)
    right = total = 0.0
    for begin in range(0, len(rows), 64):
        part = rows.take(np.arange(begin, min(begin + 64, len(rows))))
        before = []
        for _ in range(64):
            some = generator.integers(0, len(held), 16) if held else ()
            before.append(prompt(b"", [held[n] for n in some], room) if room else b"")
        tokens = np.concatenate(
            [encoded(before, room), np.pad(part.tokens, ((0, 64 - len(part)), (0, 0)))], 1
        )
        told = np.asarray(_foreteller(graph)(params, jnp.asarray(tokens)))[: len(part), room:-1]
        hits = (told == part.tokens[:, 1:]) * part.scored[:, 1:]
        right, total = right + hits.sum(), total + part.scored[:, 1:].sum()
    return float(right / max(total, 1))


@functools.cache
def _writer(graph: nnx.GraphDef, room: int, count: int):
    """(weights, prompts [b, room]) -> the `count` likeliest bytes after each, one by one."""

    def write(params, tokens: Array) -> Array:
        model = nnx.merge(graph, params)
        scores, state = model(tokens, model.init_state(len(tokens), room + count))

        def body(carry, _):
            byte, state = carry
            after, state = model(byte[:, None], state)
            return (jnp.argmax(after[:, -1], -1), state), byte

        first = jnp.argmax(scores[:, -1], -1)
        _, written = jax.lax.scan(body, (first, state), None, count)
        return written.T

    return jax.jit(write)


def translations(model: nn.LanguageModel, rows: Rows, known: Rows | None) -> float:
    """chrF over 100 of what the model writes after the known pairs most alike to the question.

    Arguments as of `text`.
    """
    length = rows.tokens.shape[1]
    room = max(length, model.config.context - length)
    held = [] if known is None else _bytes(known.tokens)
    sources = [trigrams(h.split(language.ARROW.encode())[0]) for h in held]
    asked, begins = language.asked(rows)
    prompts = []
    for question in _bytes(asked):
        order = alike(trigrams(question.split(language.ARROW.encode())[0]), sources)[:16]
        prompts.append(prompt(question, [held[n] for n in order], room))
    graph, params = nnx.split(model)
    count = length - int(begins.min())
    tokens = jnp.asarray(encoded(prompts, room))
    written = np.asarray(_writer(graph, room, count)(params, tokens))
    return language.chrf([bytes(row.tolist()) for row in written], rows)
