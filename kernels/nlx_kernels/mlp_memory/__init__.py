# SPDX-License-Identifier: Apache-2.0
"""An MLP memory per head, written at every token with the gradients of its chunk's start."""

from nlx_kernels.mlp_memory.api import mlp_memory as mlp_memory
from nlx_kernels.mlp_memory.generated import generated_memory as generated_memory
from nlx_kernels.mlp_memory.state import MLPMemoryState as MLPMemoryState
from nlx_kernels.mlp_memory.xla import Made as Made
from nlx_kernels.mlp_memory.xla import MemoryTokens as MemoryTokens
