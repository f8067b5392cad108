# SPDX-License-Identifier: Apache-2.0
"""A linear memory per head, written and read at every token."""

from nlx_kernels.linear_memory.api import linear_memory as linear_memory
from nlx_kernels.linear_memory.split import linear_memory_split as linear_memory_split
