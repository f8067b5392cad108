# SPDX-License-Identifier: Apache-2.0
"""The one legend of axes, used in every jaxtyping signature of nlx and nlx_kernels.

    b   rows of a batch (sequences, users)          t   tokens or ticks along a sequence
    h   heads, each with a memory of its own        d   channels of one head, or of the model
    k   channels of a key or query                  v   channels of a value
    f   hidden units of an MLP                      c   tokens of one chunk
    n   examples, directions or rows without order  s   classes of a vocabulary
    i, o   input and output axis of one weight matrix, stored ``[i, o]``: a read is ``z @ W``

An array is written ``Float[Array, "b t h d"]``; a single axis has a leading space, ``" b"``.
"""
