# SPDX-License-Identifier: Apache-2.0
"""What the TPU kernels share: the room in VMEM."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

VMEM_LIMIT = 56 * 2**20  # bytes a kernel may ask for: v5p and v7x have 64 MiB, v5e and v6e 128


def interpreter(tree: Any) -> Any:
    """Simulates a TPU's memories, NaN until written; its callbacks know no float64 (jax 0.11)."""
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(tree))
    return True if wide else pltpu.InterpretParams(uninitialized_memory="nan")


def fit(plan: Any, *parts: Any) -> Any:
    """The plan with as many chunks a group, at most its own, as VMEM has room for; at least one.

    The parts are constants, state, tokens and marks as of `forward`, or their shapes.
    """
    while plan.every > 1 and needs(plan, *parts) > VMEM_LIMIT:
        plan = plan._replace(every=plan.every // 2)
    return plan


def too_large(plan: Any, *parts: Any) -> str | None:
    """Why a grid step of the backward kernel does not fit into VMEM, or None."""
    size = needs(plan, *parts)
    if size <= VMEM_LIMIT:
        return None
    return sentence(size)


def sentence(size: int) -> str:
    """That so many bytes are too many."""
    return (
        f"would need about {size / 2**20:.0f} MiB of a TPU core's fast memory and may take "
        f"{VMEM_LIMIT / 2**20:.0f}; take a smaller chunk or memory, or another form"
    )


def needs(plan: Any, constants: Any, state: Any, tokens: Any, marks: Any) -> int:
    """About how many bytes of VMEM a grid step of the backward kernel needs.

    Blocks that move are there twice, one being copied while another is computed with; then the
    states of a group; then what one chunk computes.
    """
    total = lambda tree, lead: sum(
        block_bytes(x.shape[lead:], x.dtype) for x in jax.tree.leaves(tree)
    )
    states, slow = plan.heads * total(state, 2), plan.heads * total(constants, 1)
    chunk = plan.heads * total(tokens, 3) + total(marks, 3)
    return 4 * slow + plan.every * 5 * chunk + (plan.every + 5) * states + plan.work


def held(counts: tuple[int, int], array: int, state: Any) -> int:
    """Bytes of so many arrays of a chunk, and so many states [b, h, ...] of one head."""
    one = sum(block_bytes(x.shape[2:], x.dtype) for x in jax.tree.leaves(state))
    return counts[0] * array + counts[1] * one


def block_bytes(shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """Bytes of a block in VMEM, whose last two axes are filled up to whole registers."""
    item = jnp.dtype(dtype).itemsize
    *outer, rows, columns = (1, 1, *shape)
    sublanes = 8 * max(1, 4 // item)
    return math.prod(outer) * -(-rows // sublanes) * sublanes * -(-columns // 128) * 128 * item
