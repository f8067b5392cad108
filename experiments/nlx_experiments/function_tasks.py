# SPDX-License-Identifier: Apache-2.0
"""Functions in context: x_1 f(x_1) x_2 f(x_2) ..., a new function in every row.

A row draws a function f of n bits from a class, and inputs x_i, no two the same, so that what was
seen is never asked. Symbols 0 and 1 are its values, 2 + x the inputs: a model must find out what
the bits of an input are. Every f(x_i) is the answer at x_i, before it is told.

Classes, over s = 2 x - 1 in {-1, 1}^n; nearly constant functions are drawn anew:

    linear           w . s > b,  w ~ N(0, 1) each, b ~ N(0, 1)
    conjunction      two bits, each or its opposite, or what is left of it (so it may be an "or")
    xor              of two or three bits, or its opposite
    decision list    bits in random order, each has a side and a value: the first bit on its side
                     decides
    network          v . tanh(W s + a) > c  with 8 hidden units, all ~ N(0, 1)

Source: Bhattamishra et al. (2023), Understanding In-Context Learning in Transformers and LLMs by
Learning to Learn Discrete Functions, section 3 (conjunctions, parities, thresholds, lists).
"""

import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nlx_experiments.sequence_tasks import Batch, Draw, Task

Tables = Bool[np.ndarray, "b x"]
Class = Callable[[np.random.Generator, int, Float[np.ndarray, "x n"]], Tables]
HIDDEN, LEAST = 8, 0.25  # units of a network; share of the rarer value


def _linear(generator: np.random.Generator, rows: int, s: Float[np.ndarray, "x n"]) -> Tables:
    weights, least = generator.normal(size=(rows, s.shape[1])), generator.normal(size=(rows, 1))
    return weights @ s.T > least


def _conjunction(generator: np.random.Generator, rows: int, s: Float[np.ndarray, "x n"]) -> Tables:
    bits = np.argsort(generator.random((rows, s.shape[1])), 1)[:, :2]
    sides = generator.choice([-1, 1], (rows, 2, 1))
    return (s.T[bits] == sides).all(1) ^ (generator.random((rows, 1)) < 0.5)


def _xor(generator: np.random.Generator, rows: int, s: Float[np.ndarray, "x n"]) -> Tables:
    order = np.argsort(generator.random((rows, s.shape[1])), 1)
    chosen = order < generator.integers(2, 4, (rows, 1))
    negative = (chosen[:, None] & (s < 0)).sum(2) % 2
    return (negative == 1) ^ (generator.random((rows, 1)) < 0.5)


def _list(generator: np.random.Generator, rows: int, s: Float[np.ndarray, "x n"]) -> Tables:
    n = s.shape[1]
    order = np.argsort(generator.random((rows, n)), 1)
    on_side = s.T[order] == generator.choice([-1, 1], (rows, n, 1))  # [b, n, x]
    values = generator.random((rows, n + 1)) < 0.5
    first = np.where(on_side.any(1), on_side.argmax(1), n)
    return np.take_along_axis(values, first, 1)


def _network(generator: np.random.Generator, rows: int, s: Float[np.ndarray, "x n"]) -> Tables:
    normal = lambda *shape: generator.normal(size=(rows, *shape))
    hidden = np.tanh(normal(HIDDEN, s.shape[1]) @ s.T + normal(HIDDEN, 1))
    return (normal(1, HIDDEN) @ hidden)[:, 0] > normal(1)


CLASSES: dict[str, Class] = {
    "linear": _linear,
    "conjunction": _conjunction,
    "xor": _xor,
    "decision list": _list,
    "network": _network,
}


def inputs(bits: int) -> Float[np.ndarray, "x n"]:
    """All inputs as vectors of -1 and 1, bit i of x at place i."""
    return 2.0 * (np.arange(2**bits)[:, None] >> np.arange(bits) & 1) - 1


def tables(
    generator: np.random.Generator,
    name: str,
    rows: int,
    bits: int,
    kept_back: bool | None = None,
    outside: Sequence[str] = (),
) -> Tables:
    """Values at every input of so many functions of a class, none nearly constant.

    kept_back: only those that training does (True) or does not (False) leave out; None: any.
    outside: classes of which none may be a member too; see `members`.
    """
    found = np.zeros((rows, 2**bits), bool)
    left = np.arange(rows)
    while len(left):
        found[left] = CLASSES[name](generator, len(left), inputs(bits))
        ones = found[left].mean(1)
        wrong = (ones < LEAST) | (ones > 1 - LEAST)
        if kept_back is not None:
            wrong |= never_trained(found[left]) != kept_back
        if outside:
            others = members(tuple(outside), bits)
            wrong |= np.array([row.tobytes() in others for row in np.packbits(found[left], 1)])
        left = left[wrong]
    return found


@functools.cache
def members(names: tuple[str, ...], bits: int) -> frozenset[bytes]:
    """The functions of some classes, packed: all that 20,000 draws of each show."""
    drawn = [tables(np.random.default_rng(0), name, 20_000, bits) for name in names]
    return frozenset(row.tobytes() for row in np.packbits(np.concatenate(drawn), 1))


def never_trained(values: Tables) -> Bool[np.ndarray, " b"]:
    """Whether training leaves a function out: a fifth of all, by a hash of all its values."""
    bits = np.packbits(values, 1)
    return np.array([zlib.crc32(row.tobytes()) % 5 == 0 for row in bits], bool)


def functions(names: Sequence[str], bits: int = 5, held_out: Sequence[str] = ()) -> Task:
    """Rows of functions of some classes, each with the same chance; examined on each class alone.

    Rows have one length, at most two symbols for every input. Training leaves out a fifth of all
    functions, and those alone are examined; of the classes held out those alone that are in no
    class trained on either. Of xor, where it is held out, all are examined: they are few.

    names: of `CLASSES`, those trained on. bits: of an input, 4 to 10. held_out: further classes to
    examine.

    Raises ValueError for an unknown or repeated class, other numbers of bits, and longer rows.
    """
    _check(names, held_out, bits)

    def drawing(names: Sequence[str], kept_back: bool | None, outside: Sequence[str] = ()) -> Draw:
        def draw(generator: np.random.Generator, rows: int, shortest: int, longest: int) -> Batch:
            del shortest
            if not 2 <= longest <= 2 * 2**bits:
                raise ValueError(
                    f"`longest` is {longest}; it must be from 2 to {2 * 2**bits}: two symbols for "
                    f"each of {2**bits} inputs."
                )
            parts = generator.multinomial(rows, [1 / len(names)] * len(names))
            drawn = zip(names, parts, strict=True)
            values = [tables(generator, n, count, bits, kept_back, outside) for n, count in drawn]
            f = generator.permutation(np.concatenate(values))
            x = np.argsort(generator.random(f.shape), 1)[:, : longest // 2]
            return rows_of(x, np.take_along_axis(f, x, 1), longest)

        return draw

    return Task(
        "functions without " + " and ".join(held_out) if held_out else "functions",
        2 + 2**bits,
        2,
        drawing(names, False),
        graded="tokens",
        curve=True,
        examined={name: drawing([name], True) for name in names}
        | {name: drawing([name], None if name == "xor" else True, names) for name in held_out},
    )


def rows_of(x: Int[np.ndarray, "b n"], y: Bool[np.ndarray, "b n"], length: int) -> Batch:
    """x_1 y_1 x_2 y_2 ...; y_i is the answer at x_i."""
    pairs = lambda a, b: np.stack([a, b], 2).reshape(len(x), -1)
    fill = lambda z: np.pad(z, ((0, 0), (0, length - z.shape[1])))
    y, none = y.astype(int), np.zeros_like(x)
    scored = pairs(none + 1, none).astype(np.float32)
    return Batch(fill(pairs(2 + x, y)), fill(pairs(y, none)), fill(scored))


def majority(batch: Batch) -> Float[np.ndarray, " n"]:
    """Share right after 0, 1, ... examples of the value that most of them had; a half if even."""
    y = _pairs(batch)[1]
    votes = np.cumsum(np.where(y, 1, -1), 1) - np.where(y, 1, -1)
    return np.where(votes == 0, 0.5, (votes > 0) == y).mean(0)


def nearest(batch: Batch, bits: int) -> Float[np.ndarray, " n"]:
    """Share right after 0, 1, ... examples of the value of the inputs that differ in fewest bits.

    The majority of all those; a half where they are even, or there are none.
    """
    x, y = _pairs(batch)
    s = inputs(bits)[x]
    apart = (s[:, :, None] != s[:, None]).sum(3).astype(float)
    apart[:, ~np.tri(x.shape[1], k=-1, dtype=bool)] = np.inf  # only those before
    closest = np.isfinite(apart) & (apart == apart.min(2, keepdims=True))
    votes = (closest * np.where(y, 1, -1)[:, None]).sum(2)
    return np.where(votes == 0, 0.5, (votes > 0) == y).mean(0)


def bayes(
    batch: Batch,
    names: Sequence[str],
    bits: int,
    *,
    outside: Sequence[str] = (),
    samples: int = 10_000,
    seed: int = 0,
) -> Float[np.ndarray, " n"]:
    """Share right after 0, 1, ... examples by the vote of functions that were drawn from classes.

    sum_f 0.01^(examples that f has wrong) (+ or -) f(x), over samples of the classes in equal
    parts: the posterior under that prior, as far as so many functions show it, and what agrees best
    where none agrees.

    names: of `CLASSES`. outside: classes of which none is a member. samples: functions in all.
    seed: of their drawing.
    """
    generator = np.random.default_rng(seed)
    count = samples // len(names)
    prior = [tables(generator, name, count, bits, outside=outside) for name in names]
    votes = np.where(np.concatenate(prior), 1, -1).astype(np.float32)  # [f, x]
    x, y = _pairs(batch)
    right = np.zeros(x.shape)
    believed = np.ones((len(x), len(votes)), np.float32)
    for t in range(x.shape[1]):
        said = votes[:, x[:, t]].T  # [b, f]
        vote = (believed * said).sum(1)
        right[:, t] = np.where(vote == 0, 0.5, (vote > 0) == y[:, t])
        believed *= np.where((said > 0) == y[:, t, None], 1, 0.01).astype(np.float32)
        believed /= believed.max(1, keepdims=True)
    return right.mean(0)


def _pairs(batch: Batch) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
    """Inputs and values of a batch of `functions`."""
    asked = batch.scored[0] > 0
    return batch.tokens[:, asked] - 2, batch.answers[:, asked] > 0


def _check(names: Sequence[str], held_out: Sequence[str], bits: int) -> None:
    for argument, given in dict(names=names, held_out=held_out).items():
        for name in given:
            if name not in CLASSES:
                known = ", ".join(CLASSES)
                raise ValueError(f"`{argument}` holds {name!r}; it must be of {known}.")
    if not names or len({*names, *held_out}) < len(names) + len(held_out):
        raise ValueError(
            f"`names` and `held_out` are {[*names]} and {[*held_out]}; there must be at least one "
            "name, none of them twice."
        )
    if not isinstance(bits, int) or not 4 <= bits <= 10:
        raise ValueError(f"`bits` is {bits!r}; it must be an integer from 4 to 10.")
