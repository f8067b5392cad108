# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays that don't depend on how devices share them out.

Of the bits x_n of entry n in row-major order, as unsigned integers, in arithmetic modulo 2^32:

    s_1 = sum_n (2 n + 1) A x_n,    s_2 = sum_n h(x_n + h(n))

A odd, h a mixing of bits (Appleby, 2011, MurmurHash3's finalizer). Every weight in s_1 is odd, so
one entry that changes always shows; s_2 tells apart what cancels there. Devices sum what they have
and exchange two numbers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

FACTOR = 0x9E3779B1


def of_tree(tree: PyTree[Array | np.ndarray]) -> dict[str, str]:
    """Path -> checksum, dtype and shape of every array; random keys are no arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path): _told(pair, leaf)
        for (path, leaf), pair in zip(leaves, sums, strict=True)
    }


def _told(sums: Any, leaf: Any) -> str:
    first, second = (int(s) for s in sums)
    return f"{first:08x}{second:08x} {leaf.dtype} {list(leaf.shape)}"


def _sums(leaf: Array | np.ndarray) -> Any:
    """On the array's own devices; in NumPy for what is NumPy's."""
    if isinstance(leaf, jax.Array):
        return _compiled(leaf)
    bits = np.ascontiguousarray(leaf).reshape(-1)
    bits = bits.view(_unsigned(bits.dtype))
    with np.errstate(over="ignore"):
        return _of_bits(np, bits, np.arange(math.prod(bits.shape), dtype=np.uint32))


@jax.jit
def _compiled(x: Array) -> tuple[Array, Array]:
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype)) if x.dtype != jnp.bool_ else x
    strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, x.shape)
    place = sum(
        (iota(axis) * jnp.uint32(stride) for axis, stride in enumerate(strides)),
        jnp.zeros(x.shape, jnp.uint32),
    )
    return _of_bits(jnp, bits, place)


def _of_bits(numpy: Any, bits: Any, place: Any) -> tuple[Any, Any]:
    """Both sums; wide entries are taken in halves."""
    u32 = numpy.uint32
    halves = [bits.astype(u32)]
    if bits.dtype.itemsize == 8:
        halves = [(bits & 0xFFFFFFFF).astype(u32), (bits >> 32).astype(u32)]
    first = second = u32(0)
    for n, half in enumerate(halves):
        weight = (place * u32(2) + u32(1)) * u32(FACTOR + 2 * n)
        first = first + numpy.sum(half * weight, dtype=u32)
        second = second + numpy.sum(_mixed(half + _mixed(place + u32(n), u32), u32), dtype=u32)
    return first, second


def _mixed(x: Any, u32: Any) -> Any:
    x = (x ^ (x >> u32(16))) * u32(0x85EBCA6B)
    x = (x ^ (x >> u32(13))) * u32(0xC2B2AE35)
    return x ^ (x >> u32(16))


def _unsigned(dtype: Any) -> Any:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[jnp.dtype(dtype).itemsize]
