# SPDX-License-Identifier: Apache-2.0
"""What the Mosaic GPU kernels share: tiles in shared memory, and products on the tensor cores.

A warpgroup holds a matrix [64 m, n] in its registers. The left operand of a product may stay there,
the right one lies in shared memory, where 16-bit matrices may be read transposed.
"""

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


def tiles(*shape: int, dtype=jnp.bfloat16):
    """Shared memory for matrices [..., rows, columns], laid out as the tensor cores read them."""
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Products:
    """Products of matrices on the tensor cores, float32 in registers.

    The interpreter knows wgmma between shared memory only, and no sum that starts elsewhere than 0.
    """

    def __init__(self, interpret: bool):
        """Compiled, or interpreted."""
        self.interpret = interpret

    def product(self, *pairs, shape: tuple[int, int] = (SIDE, SIDE)) -> jax.Array:
        """The sum of the pairs' products; a left side may be in registers."""
        if self.interpret and any(isinstance(left, jax.Array) for left, _ in pairs):
            return sum(
                jnp.dot(l[...], r[...], preferred_element_type=jnp.float32) for l, r in pairs
            )

        def body(total):
            for left, right in pairs:
                plgpu.wgmma(total, left, right)
            return total[...]

        return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))

    def add(self, total: jax.Array, *pairs) -> jax.Array:
        """total and the sum of the pairs' products, in the registers of `total`."""
        if self.interpret:
            return total + self.product(*pairs, shape=total.shape)

        def body(total):
            for left, right in pairs:
                plgpu.wgmma(total, left, right)

        return pl.run_state(body)(plgpu.ACC.init(total))


def columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A vector with one number for each column, as a matrix."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(vector, shape, [1]), MATRIX)


def rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A vector with one number for each row, as a matrix."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(vector, shape, [0]), MATRIX)


def store_transposed(target, matrix: jax.Array) -> None:
    """Writes a matrix from registers to shared memory as its transpose."""
    target.T[...] = plgpu.layout_cast(matrix, TRANSPOSED)


def is_hopper() -> bool:
    """Whether what is traced runs on a Hopper GPU, by the mesh in context or the default device."""
    if platform() != "gpu":
        return False
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return any(name in device.device_kind for name in ("H100", "H200", "GH200", "H800"))
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"
