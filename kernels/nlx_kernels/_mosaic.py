# SPDX-License-Identifier: Apache-2.0
"""What the Mosaic GPU kernels share: tiles in shared memory, and products on the tensor cores.

A warpgroup holds a matrix [64 m, n] in its registers. The left operand of a product may stay there,
the right one lies in shared memory, where 16-bit matrices may be read transposed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from nlx_kernels._dispatch import platform

SIDE = 64  # rows of one warpgroup's product, tokens of a chunk, values of a state's block
MATRIX = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def narrow(run: Callable[..., Any]) -> Callable[..., Any]:
    """Traces without 64-bit numbers, which a kernel has no use for and the interpreter confuses."""

    @functools.wraps(run)
    def call(*arguments, **options):
        with jax.enable_x64(False):
            return run(*arguments, **options)

    return call


def tiles(*shape: int, dtype=jnp.bfloat16):
    """Shared memory for matrices [..., rows, columns], laid out as the tensor cores read them."""
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Products:
    """Products of matrices on the tensor cores, summed in registers in float32.

    The interpreter knows no left side in registers: there a sum is a plain array.
    """

    def __init__(self, interpret: bool):
        """Compiled, or interpreted."""
        self.interpret = interpret

    def sums(self, body: Callable[..., Any], *shapes: tuple[int, int]) -> Any:
        """What `body` returns, called with sums of these shapes that start at 0."""
        if self.interpret:
            return body(*(_Sum(shape) for shape in shapes))
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def multiply(self, total, left, right) -> None:
        """Starts total += left @ right."""
        if self.interpret:
            total.value += jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)
        else:
            plgpu.wgmma(total, left, right)

    def read(self, total, pending: int = 0) -> jax.Array:
        """The sum, once no more than `pending` of the products started are under way."""
        if self.interpret:
            return total.value
        return plgpu.wgmma_accumulator_load(total, wait_n=pending)

    def product(self, *pairs, shape: tuple[int, int] = (SIDE, SIDE)) -> jax.Array:
        """The sum of the pairs' products."""

        def body(total):
            for left, right in pairs:
                self.multiply(total, left, right)
            return self.read(total)

        return self.sums(body, shape)

    def update(self, total: jax.Array, body: Callable[[Any], None]) -> jax.Array:
        """The sum that starts at `total`, in its registers, after `body` was called with it."""
        if self.interpret:
            body(started := _Sum(total.shape, total))
            return started.value
        return pl.run_state(body)(plgpu.ACC.init(total))

    def add(self, total: jax.Array, *pairs) -> jax.Array:
        """total and the sum of the pairs' products, in the registers of `total`."""

        def body(sum_):
            for left, right in pairs:
                self.multiply(sum_, left, right)

        return self.update(total, body)


class _Sum:
    """A sum as the interpreter has it."""

    def __init__(self, shape: tuple[int, int], start: jax.Array | None = None):
        self.value = jnp.zeros(shape, jnp.float32) if start is None else start


def columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A vector with one number for each column, as a matrix."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(vector, shape, [1]), MATRIX)


def rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A vector with one number for each row, as a matrix."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(vector, shape, [0]), MATRIX)


def store_transposed(target, matrix: jax.Array) -> None:
    """Writes a matrix from registers to shared memory as its transpose."""
    target.T[...] = plgpu.layout_cast(matrix, TRANSPOSED)


def stream(n: int, stages: int, fetch: Callable[[Any, Any], None], free) -> None:
    """Keeps `stages` chunks in flight: what the fetching warpgroup does.

    Args:
      n: chunks.
      stages: at most n.
      fetch: (chunk, slot) -> None, starts the copies of a chunk.
      free: a barrier for each slot, at which its reader arrives.
    """
    for i in range(stages):
        fetch(i, i)

    @pl.loop(jnp.int32(0), jnp.int32(n - stages))
    def _(i):
        slot = jax.lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(free.at[slot])
        fetch(i + stages, slot)

    for i in range(n - stages, n):  # a program ends when its last barriers were seen
        plgpu.barrier_wait(free.at[i % stages])


def is_hopper() -> bool:
    """Whether what is traced runs on a Hopper GPU, by the mesh in context or the default device."""
    if platform() != "gpu":
        return False
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return any(name in device.device_kind for name in ("H100", "H200", "GH200", "H800"))
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"
