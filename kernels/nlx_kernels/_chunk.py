# SPDX-License-Identifier: Apache-2.0
"""The algebra of one chunk: many gated, rank-one writes to a weight matrix at once.

Inside a chunk every gradient is taken at the frozen chunk-start weights, so a layer with input u_t
and error e_t writes a rank-one matrix. With ``z_t = u_t / |u_t|`` and ``delta_t = |u_t| e_t`` token
t writes ``z_t delta_t^T`` and erases along z_t:

    P_t = m_t P_{t-1} - r_t z_t delta_t^T
    W_t = (a_t I - e_t z_t z_t^T) W_{t-1} + P_t

With A_tj = prod_{i=j+1..t} a_i, M_tj likewise, c = A M, A0 = cumprod a, M0 = cumprod m, B0 = A M0,
D = diag(r) Delta and `sh` the shift down by one token, the erased reads ``p_t = z_t W_{t-1}`` solve
one unit lower triangular system,

    (I + sh(A) * (Z Z^T) diag e) p = sh1(A0) Z W_0 + sh0(B0) Z P_0 - (sh(c) * (Z Z^T)) D

and then weights, momentum and reads are matrix products (derivation: mlp_memory/README.md).
Products of gates are taken by `cumprod`, not by logarithms, so that a gate of exactly 0 and the
gradient there are exact.

A *piece* is an interval of the tokens of one window that share their chunk-start weights; where
several segments begin in a window they all start from the same initial weights and are one piece.
Axes: ``[..., c]`` for gates, ``[..., c, i]`` for vectors, ``[..., i, o]`` for weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from nlx_kernels._solve import (
    columns_by_columns,
    interval_products,
    interval_products_in_kernel,
    rows_by_rows,
    unit_lower_inverse,
)

Tree = TypeVar("Tree")


def materialise(tree: Tree) -> Tree:
    """Keeps XLA from computing arrays anew inside every fusion that reads them."""
    return jax.lax.optimization_barrier(tree)


class Means(NamedTuple):
    """What is done another way inside a kernel, whose compilers know fewer primitives.

    Attributes:
      products: all products of neighbouring gates.
      keep: what is computed once, for several readers.
    """

    products: Callable[[Array], Array]
    keep: Callable


IN_XLA = Means(interval_products, materialise)
IN_KERNEL = Means(interval_products_in_kernel, lambda tree: tree)


class Piece(NamedTuple):
    """Which tokens of a window are written, and which of them share a segment.

    Attributes:
      valid: token belongs to the piece.
      pair: ``pair[t, j]``: j <= t, both valid, in one segment.
      first: the first valid token of each segment.
      last: one-hot, the last valid token (all False in an empty piece).
    """

    valid: Bool[Array, "*n c"]
    pair: Bool[Array, "*n c c"]
    first: Bool[Array, "*n c"]
    last: Bool[Array, "*n c"]


class Decay(NamedTuple):
    """Products of the gates inside a piece, named as in the module's equations.

    Attributes:
      A, M, c: over the tokens after j up to t, at [t, j].
      A0, M0, B0: since the segment's start or the piece's; M, M0, B0 are None without momentum.
      before_A, before_c, before_A0, before_B0: the same for the token before: `sh` of them.
    """

    A: Float[Array, "*n c c"]
    A0: Float[Array, "*n c"]
    M: Float[Array, "*n c c"] | None
    M0: Float[Array, "*n c"] | None
    c: Float[Array, "*n c c"]
    B0: Float[Array, "*n c"] | None
    before_A: Float[Array, "*n c c"]
    before_c: Float[Array, "*n c c"]
    before_A0: Float[Array, "*n c"]
    before_B0: Float[Array, "*n c"] | None


class Write(NamedTuple):
    """What a piece writes to one weight matrix.

    Attributes:
      z: directions written and erased.
      delta: token t writes ``-z_t delta_t^T``, its rate included.
      erased: token t erases ``z_t erased_t^T``; None: nothing.
    """

    z: Float[Array, "*n c i"]
    delta: Float[Array, "*n c o"]
    erased: Float[Array, "*n c o"] | None


def make_piece(valid: Bool[Array, "*n c"], segment: Int[Array, "*n c"]) -> Piece:
    """Builds the masks of one piece from its tokens and their segment numbers."""
    c = valid.shape[-1]
    causal = jnp.tril(jnp.ones((c, c), bool))
    same = segment[..., :, None] == segment[..., None, :]
    pair = causal.reshape((1,) * (valid.ndim - 1) + (c, c)) & same
    pair = pair & valid[..., :, None] & valid[..., None, :]
    first = valid & (pair.sum(-1) == 1)
    last = valid & ~jnp.concatenate([valid[..., 1:], jnp.zeros_like(valid[..., :1])], -1)
    return Piece(valid, pair, first, last)


def make_decay(
    retain: Float[Array, "*n c"],
    momentum: Float[Array, "*n c"] | None,
    piece: Piece,
    means: Means = IN_XLA,
) -> Decay:
    """Computes every product of gates a piece needs."""
    A, A0, before_A, before_A0 = _products(retain, piece, means)
    if momentum is None:
        decay = Decay(A, A0, None, None, A, None, before_A, before_A, before_A0, None)
        return means.keep(decay)
    M, M0, _, _ = _products(momentum, piece, means)
    ends = jnp.concatenate([M, M0[..., None]], -1)
    now, before = A @ ends, before_A @ ends
    c, B0, before_c, before_B0 = now[..., :-1], now[..., -1], before[..., :-1], before[..., -1]
    return means.keep(Decay(A, A0, M, M0, c, B0, before_A, before_c, before_A0, before_B0))


def _products(gate: Float[Array, "*n c"], piece: Piece, means: Means):
    """Returns A, A0 and both for the token before (1 before a segment's first token)."""
    every = means.products(jnp.where(piece.valid, gate, 1.0))
    start = jnp.where(piece.first, gate, 0.0)[..., None]
    now = jnp.where(piece.pair, every[..., 1:, 1:], 0.0)
    before = jnp.where(piece.pair, every[..., :-1, 1:], 0.0)
    opening = piece.first.astype(gate.dtype)
    return now, (now @ start)[..., 0], before, (before @ start)[..., 0] + opening


def solve_write(
    weights: Float[Array, "*n i o"],
    momentum: Float[Array, "*n i o"] | None,
    z: Float[Array, "*n c i"],
    delta: Float[Array, "*n c o"],
    rate: Float[Array, "*n c"],
    erase: Float[Array, "*n c"] | None,
    piece: Piece,
    decay: Decay,
    means: Means = IN_XLA,
) -> Write:
    """Scales the writes by their rates and solves for what each token erases.

    Args:
      weights, momentum: the working weights and momentum buffer before the piece.
      z, delta: the gradient of token t at the chunk-start weights is ``z_t delta_t^T``.
      rate, erase: gates; None erases nothing, otherwise z must be unit (or zero) vectors.
      piece, decay: masks and products of gates.
      means: as of `make_decay`.
    """
    delta = jnp.where(piece.valid, rate, 0.0)[..., None] * delta
    if erase is None:
        return Write(z, delta, None)
    erase = jnp.where(piece.valid, erase, 0.0)
    gram = rows_by_rows(z, z)
    target = decay.before_A0[..., None] * (z @ weights) - (decay.before_c * gram) @ delta
    if momentum is not None and decay.before_B0 is not None:
        target += decay.before_B0[..., None] * (z @ momentum)
    system = means.keep(decay.before_A * gram * erase[..., None, :])
    return Write(z, delta, erase[..., None] * (unit_lower_inverse(system) @ target))


def read_write(
    query: Float[Array, "*n c i"],
    weights: Float[Array, "*n i o"],
    momentum: Float[Array, "*n i o"] | None,
    write: Write,
    decay: Decay,
) -> Float[Array, "*n c o"]:
    """Reads ``query_t W_t``, the running weights after token t's write."""
    scores = rows_by_rows(query, write.z)
    out = decay.A0[..., None] * (query @ weights) - (decay.c * scores) @ write.delta
    if momentum is not None and decay.B0 is not None:
        out += decay.B0[..., None] * (query @ momentum)
    return out if write.erased is None else out - (decay.A * scores) @ write.erased


def end_write(
    weights: Float[Array, "*n i o"],
    momentum: Float[Array, "*n i o"] | None,
    write: Write,
    piece: Piece,
    decay: Decay,
) -> tuple[Float[Array, "*n i o"], Float[Array, "*n i o"] | None]:
    """Returns weights and momentum after the last token (unchanged by an empty piece)."""
    last = piece.last.astype(weights.dtype)
    empty = 1.0 - last.sum(-1)

    def row(matrix):
        """Picks the row of the last token, as a column of coefficients."""
        return (last[..., None, :] @ matrix)[..., 0, :, None]

    def kept(vector):
        return (last * vector).sum(-1)[..., None, None]

    change = row(decay.c) * write.delta
    if write.erased is not None:
        change += row(decay.A) * write.erased
    out = (kept(decay.A0) + empty[..., None, None]) * weights - columns_by_columns(write.z, change)
    if momentum is None or decay.M is None:
        return out, None
    out += kept(decay.B0) * momentum
    m0 = kept(decay.M0) + empty[..., None, None]
    return out, m0 * momentum - columns_by_columns(write.z, row(decay.M) * write.delta)


ACTIVATIONS = {
    "gelu": lambda z: jax.nn.gelu(z, approximate=True),
    "silu": jax.nn.silu,
}


class Trace(NamedTuple):
    """Layer inputs and errors of an MLP memory at the chunk-start weights, first layer first."""

    inputs: tuple[Float[Array, "*n c _i"], ...]
    errors: tuple[Float[Array, "*n c _o"], ...]


Normalise = Callable[[Array], Array] | None


def mlp(
    weights: Sequence[Float[Array, "*n _i _o"]],
    z: Float[Array, "*n c i"],
    activation: Callable[[Array], Array],
    residual: bool = True,
    normalise: Normalise = None,
) -> Float[Array, "*n c o"]:
    """Reads ``z + normalise(act(z W_1) ... W_L)``."""
    hidden = z @ weights[0]
    for weight in weights[1:]:
        hidden = activation(hidden) @ weight
    hidden = hidden if normalise is None else normalise(hidden)
    return z + hidden if residual else hidden


def backward(
    weights: Sequence[Float[Array, "*n _i _o"]],
    key: Float[Array, "*n c k"],
    value: Float[Array, "*n c v"],
    activation: Callable[[Array], Array],
    residual: bool = True,
    normalise: Normalise = None,
) -> Trace:
    """Backpropagates 1/2||M(key) - value||^2: layer l has the gradient input_l error_l^T."""
    inputs, pulls, hidden = [key], [], key @ weights[0]
    for weight in weights[1:]:
        out, pull = jax.vjp(activation, hidden)
        inputs.append(out)
        pulls.append(pull)
        hidden = out @ weight
    if normalise is None:
        error = hidden + key - value if residual else hidden - value
    else:
        out, pull = jax.vjp(normalise, hidden)
        (error,) = pull(out + key - value if residual else out - value)
    errors = [error]
    for weight, pull in zip(weights[:0:-1], pulls[::-1], strict=True):
        (error,) = pull(rows_by_rows(error, weight))
        errors.append(error)
    return Trace(tuple(inputs), tuple(errors[::-1]))


def direction(
    u: Float[Array, "*n c i"], error: Float[Array, "*n c o"], clip: float | None = None
) -> tuple[Float[Array, "*n c i"], Float[Array, "*n c o"]]:
    """Splits the gradient ``u error^T`` into a unit vector z and ``delta = |u| error``.

    A zero input gives zero z and delta, and zero gradients. The Frobenius norm of the gradient is
    |delta|; above `clip` (None: no limit) delta is scaled back to it.
    """
    length, z = _norm(u)
    delta = length * error
    if clip is None:
        return z, delta
    norm, _ = _norm(delta)
    return z, delta * jnp.where(norm > clip, clip / jnp.where(norm > clip, norm, 1.0), 1.0)


def _norm(z: Float[Array, "*n i"]) -> tuple[Float[Array, "*n 1"], Float[Array, "*n i"]]:
    """Length and direction, both 0 with gradient 0 where the square underflows."""
    square = jnp.sum(z * z, -1, keepdims=True)
    some = square >= jnp.finfo(square.dtype).tiny
    length = jnp.sqrt(jnp.where(some, square, 1.0))
    return jnp.where(some, length, 0.0), jnp.where(some, z / length, 0.0)


def bound_norm(weights: Float[Array, "*n i o"], bound: float | None) -> Float[Array, "*n i o"]:
    """Scales weight matrices of Frobenius norm > bound back to it."""
    if bound is None:
        return weights
    square = jnp.sum(weights * weights, (-2, -1), keepdims=True)
    large = square > bound * bound
    return weights * jnp.where(large, bound / jnp.sqrt(jnp.where(large, square, 1.0)), 1.0)


def soft_unit(z: Float[Array, "*n f"]) -> Float[Array, "*n f"]:
    """Shortens vectors below length 1: ``z / sqrt(|z|^2 + 1/4)``, smooth everywhere."""
    return z / jnp.sqrt(jnp.sum(z * z, -1, keepdims=True) + 0.25)


def layer_norm(z: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    """Normalises to mean 0 and variance 1 over the last axis, without scale and shift."""
    centred = z - jnp.mean(z, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-6)
