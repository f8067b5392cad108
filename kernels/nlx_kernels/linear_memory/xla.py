# SPDX-License-Identifier: Apache-2.0
"""linear_memory, parallel inside blocks."""

from nlx_kernels.linear_memory.reference import linear_memory as linear_memory
