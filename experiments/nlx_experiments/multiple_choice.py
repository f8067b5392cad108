# SPDX-License-Identifier: Apache-2.0
"""Multiple choice and last words: how likely a model finds each continuation.

A model is any function of tokens to log-probabilities of the token after each. With L_i the sum
of log p over the tokens of choice i after its context,

    acc        the right choice has the largest L_i
    acc_norm   the right choice has the largest L_i / characters of the choice
    acc_bytes  the right choice has the largest L_i / bytes of the choice in UTF-8

the names and definitions of lm-evaluation-harness (Gao et al., `ConfigurableTask.process_results`;
its acc_norm counts characters, which for English are the bytes; the space before a choice doesn't
count). Of choices that are equally likely the first is taken. An item with one choice is a last
word (LAMBADA): right if greedy decoding gives it, token by token, and the words' perplexity is

    exp(-mean over items of L).

A choice whose L is no number is never taken, and an item with no other is wrong.

Context and choice are encoded together, and the choice's tokens are those after as many as the
context alone has; white space at a context's end belongs to the choice, as in the harness. Every
text begins with the separator, as the files of the training text do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from nlx_experiments.tokenization import Stream, Tokenizer

LogProbabilities = Callable[[Int[np.ndarray, "b t"]], Any]  # -> [b, t, tokens]
BATCH, LONGEST, SHORTEST = 8, 2048, 32


class Item(NamedTuple):
    """One question: a context for each choice (mostly the same), the choices, the right one.

    answer: in [0, len(choices)); of a last word 0.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


class Scores(NamedTuple):
    """Shares in [0, 1] of items that are right; perplexity of last words, else None."""

    items: int
    acc: float
    acc_norm: float | None
    acc_bytes: float | None
    perplexity: float | None


def item(context: str, choices: Sequence[str], answer: int) -> Item:
    """An item whose choices share their context.

    Raises ValueError for no choices or an answer that is none of them.
    """
    if not 0 <= answer < len(choices):
        raise ValueError(
            f"`answer` is {answer}; it must be in [0, {len(choices)}), one of the choices."
        )
    return Item((context,) * len(choices), tuple(choices), answer)


def score(
    model: LogProbabilities,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    batch: int = BATCH,
    longest: int = LONGEST,
) -> Scores:
    """The model's scores.

    Args:
      model: tokens [b, t] -> log-probabilities in nats of the token after each, [b, t, tokens].
      tokenizer: whose tokens the model knows.
      items: one or more, all with one choice or all with more.
      batch: rows at a time, >= 1.
      longest: tokens of a text that are read, the last ones, >= 1.

    Raises ValueError for no items, or last words among questions.
    """
    single = {len(one.choices) == 1 for one in items}
    if len(single) != 1:
        raise ValueError(
            f"`items` holds {len(items)}; it must hold one or more, of one choice each or of "
            "more each."
        )
    pairs = [
        (context, f" {choice}")
        for one in items
        for context, choice in zip(one.contexts, one.choices, strict=True)
    ]
    found = iter(log_likelihoods(model, tokenizer, pairs, batch=batch, longest=longest))
    if single == {True}:
        likely, greedy = zip(*found, strict=True)
        mean = -math.fsum(likely) / len(likely)
        perplexity = math.exp(mean) if mean < 700 else None
        return Scores(len(items), float(np.mean(greedy)), None, None, perplexity)
    right = np.zeros(3)
    for one in items:
        sums = np.nan_to_num([next(found)[0] for _ in one.choices], nan=-math.inf)
        lengths = [len(choice) for choice in one.choices]
        in_bytes = [len(choice.encode(errors="surrogateescape")) for choice in one.choices]
        by = (np.ones(len(sums)), np.maximum(lengths, 1), np.maximum(in_bytes, 1))
        if sums.max() > -math.inf:
            right += [np.argmax(sums / lengths) == one.answer for lengths in by]
    acc, acc_norm, acc_bytes = (right / len(items)).tolist()
    return Scores(len(items), acc, acc_norm, acc_bytes, None)


def log_likelihoods(
    model: LogProbabilities,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int = BATCH,
    longest: int = LONGEST,
) -> list[tuple[float, bool]]:
    """Of each continuation after its context: log p in nats, and whether greedy decoding gives it.

    Args: as of `score`; pairs: (context, which may be empty; continuation).
    """
    encoded = [encode(tokenizer, *pair) for pair in pairs]
    return of_tokens(model, encoded, tokenizer.size, batch=batch, longest=longest)


def encode(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[Stream, Stream]:
    """The separator and the context's tokens, and those of the continuation."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    whole = tokenizer.encode(context + continuation)
    count = len(tokenizer.encode(context)) if context else 0
    before = np.concatenate([[tokenizer.separator], whole[:count]])
    return before, whole[count:]


def of_tokens(
    model: LogProbabilities,
    pairs: Sequence[tuple[Stream, Stream]],
    size: int,
    *,
    batch: int = BATCH,
    longest: int = LONGEST,
) -> list[tuple[float, bool]]:
    """As `log_likelihoods`, of pairs of tokens; of the context at least one is there.

    Rows are padded on the right, which what comes before doesn't see, to few different lengths: a
    model is compiled once for each. size: tokens that may follow; scores above are left out of the
    greedy choice.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    rows = [np.concatenate(pair)[-longest - 1 :].astype(np.int32) for pair in pairs]
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        length = max(SHORTEST, 1 << (len(rows[chosen[0]]) - 2).bit_length())
        tokens = np.zeros((batch, length), np.int32)
        for place, n in enumerate(chosen):
            tokens[place, : len(rows[n]) - 1] = rows[n][:-1]
        scores = np.asarray(model(tokens))
        for place, n in enumerate(chosen):
            count = min(len(pairs[n][1]), len(rows[n]) - 1)
            at = np.arange(len(rows[n]) - 1 - count, len(rows[n]) - 1)
            wanted = rows[n][at + 1]
            likely = scores[place, at, wanted].astype(np.float64)
            best = np.argmax(scores[place, at, :size], axis=-1)
            found[n] = (math.fsum(likely), bool((best == wanted).all()))
    return found
