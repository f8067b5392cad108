# SPDX-License-Identifier: Apache-2.0
"""Checksums: the same of NumPy, of a device and of any mesh; another one after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nlx_experiments import checksums

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool")


def arrays(dtype, seed=0):
    random = np.random.default_rng(seed)
    for shape in ((), (1,), (7,), (3, 5), (2, 3, 4)):
        yield np.asarray(jnp.asarray(random.normal(size=shape) * 50).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_a_device_agree(dtype):
    for array in arrays(dtype):
        of_numpy = checksums.of_tree({"a": array})
        assert of_numpy == checksums.of_tree({"a": jnp.asarray(array)})
        assert of_numpy["['a']"].endswith(f" {dtype} {list(array.shape)}")


def test_wide_numbers_agree(x64):
    for dtype in ("float64", "int64"):
        for array in arrays(dtype):
            assert checksums.of_tree(array) == checksums.of_tree(jnp.asarray(array))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_bit_of_every_entry_counts(dtype):
    array = np.asarray(jnp.arange(6).reshape(2, 3).astype(dtype))
    before = checksums.of_tree(array)
    seen = {str(before)}
    size = array.dtype.itemsize
    for byte in range(6 * size):
        for bit in range(8):
            changed = bytearray(array.tobytes())
            changed[byte] ^= 1 << bit
            other = np.frombuffer(bytes(changed), array.dtype).reshape(2, 3)
            seen.add(str(checksums.of_tree(other)))
    assert len(seen) == 1 + 6 * size * 8


def test_order_and_swaps_count():
    array = np.arange(6, dtype=np.float32)
    sums = {str(checksums.of_tree(a)) for a in (array, array[::-1], np.roll(array, 1), 0 * array)}
    assert len(sums) == 4
    assert checksums.of_tree(array) != checksums.of_tree(array.reshape(2, 3))
    zeros = np.zeros(4, np.float32)
    assert checksums.of_tree(zeros) != checksums.of_tree(-zeros)


def test_the_formula_by_hand():
    first = sum((2 * n + 1) * checksums.FACTOR * x for n, x in enumerate((3, 0, 255))) % 2**32
    found = checksums.of_tree(np.array([3, 0, 255], np.uint8))[""]
    assert found.startswith(f"{first:08x}")


def test_nothing_is_warned_of_where_it_wraps():
    checksums.of_tree(np.full((300, 300), -1.5, np.float32))
    assert jax.device_count() >= 1
