# SPDX-License-Identifier: Apache-2.0
"""fast_update: one tick of the weights that every row learns for itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from nlx_kernels._checks import INPUT_DTYPES, Checker
from nlx_kernels._dispatch import Implementation, Kernel, choose
from nlx_kernels.fast_update import pallas_tpu, reference, xla
from nlx_kernels.fast_update.carry import FastCarry

KINDS = {"integer": jnp.integer, "bool": jnp.bool_, "floating number": jnp.floating}
OFFERED = {
    "xla": xla.fast_update,
    "reference": reference.fast_update,
    "pallas_tpu": Kernel(pallas_tpu.fast_update, pallas_tpu.refusal),
}


def fast_update(
    weights: PyTree[Float[Array, "b ..."]],
    carry: FastCarry | None,
    gradient: PyTree[Float[Array, "b ..."]],
    *,
    fires: bool | Bool[Array, " b"],
    rate: float | Float[Array, " b"],
    momentum: float | Float[Array, " b"] | None = None,
    decay: float | Float[Array, " b"] = 0.0,
    ticks: int | Int[Array, " b"] = 1,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[PyTree[Float[Array, "b ..."]], FastCarry]:
    """Collects a gradient, and where the row's clock fires descends along the mean.

        T <- T + g ;  n <- n + ticks
        where `fires`:  P <- momentum P + T / n ;  W <- W - rate (P + decay W) ;  T, n <- 0

    Args:
      weights: arrays [b, ...], every row's own, float64, float32 or bfloat16.
      carry: as returned; None: nothing came before.
      gradient: like the weights, at the visible ones; the sum over `ticks` ticks.
      fires: whether the row's clock fires after this tick, one for all rows or [b].
      rate: learning rate, >= 0, one for all rows or [b], as the next two.
      momentum: share of P kept, in [0, 1]; None: P = T / n, and no buffer.
      decay: pull to zero beside the rate, >= 0.
      ticks: ticks that the gradient sums over, >= 0.
      implementation: None chooses: "pallas_tpu" on a TPU, else "xla"; a name is obeyed or refused.
      interpret: run a kernel on the CPU.

    Returns:
      The weights in their dtypes, and the carry.

    Raises:
      ValueError, TypeError: one sentence that names the argument.

    References:
      Behrouz et al. (2025), Nested Learning, Eq. 71 (there the sum), 33 (momentum).
    """
    run = choose("fast_update", implementation, interpret, OFFERED)
    rows = _leading(weights)
    wide = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, jnp.promote_types(w.dtype, jnp.float32)), weights
    )
    if carry is None:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), wide)
        buffer = None if momentum is None else zeros
        carry = FastCarry(zeros, jnp.zeros(rows, jnp.int32), buffer)
    Checker("fast_update").fields("carry", carry, FastCarry)
    _alike("carry.total", carry.total, wide)
    _alike("carry.ticks", carry.ticks, jax.ShapeDtypeStruct((rows,), jnp.int32))
    _alike("carry.momentum", carry.momentum, None if momentum is None else wide)
    _alike("gradient", gradient, weights)
    return run(
        weights,
        carry,
        jax.tree.map(lambda g, t: g.astype(t.dtype), gradient, carry.total),
        ticks=_per_row("ticks", ticks, rows, "integer").astype(jnp.int32),
        fires=_per_row("fires", fires, rows, "bool"),
        rate=_per_row("rate", rate, rows, "floating number"),
        momentum=None
        if momentum is None
        else _per_row("momentum", momentum, rows, "floating number"),
        decay=_per_row("decay", decay, rows, "floating number"),
    )


def _leading(weights: Any) -> int:
    """The rows of the weights."""
    shapes = [jnp.shape(w) for w in jax.tree.leaves(weights)]
    dtypes = {str(getattr(w, "dtype", type(w).__name__)) for w in jax.tree.leaves(weights)}
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"fast_update: weights has the shapes {shapes}; it must be one or more arrays "
            "[b, ...] with one b."
        )
    if unknown := sorted(dtypes - set(INPUT_DTYPES)):
        raise TypeError(
            f"fast_update: weights has the dtypes {unknown}; it must be {', '.join(INPUT_DTYPES)}."
        )
    return shapes[0][0]


def _alike(name: str, tree: Any, like: Any) -> None:
    """Structure, shapes and dtypes of others."""
    found, must = (_shown(part) for part in (tree, like))
    if found != must:
        raise ValueError(f"fast_update: {name} is {found}; it must be {must}.")


def _shown(tree: Any) -> str:
    arrays = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else x, tree)
    return str(arrays)


def _per_row(name: str, value: Any, rows: int, kind: str) -> Array:
    """A value for each row."""
    value = jnp.asarray(value)
    if value.shape not in ((), (rows,)) or not jnp.issubdtype(value.dtype, KINDS[kind]):
        raise ValueError(
            f"fast_update: {name} is {value.dtype}{list(value.shape)}; it must be one {kind}, or "
            f"[b] with b={rows}."
        )
    return jnp.broadcast_to(value, (rows,))
