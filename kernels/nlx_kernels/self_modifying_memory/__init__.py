# SPDX-License-Identifier: Apache-2.0
"""Hope's inner loop: memories that make their own keys, values and gates, all of them written."""

from nlx_kernels.self_modifying_memory.api import self_modifying_memory as self_modifying_memory
from nlx_kernels.self_modifying_memory.state import (
    SelfModifyingParameters as SelfModifyingParameters,
)
from nlx_kernels.self_modifying_memory.state import SelfModifyingState as SelfModifyingState
from nlx_kernels.self_modifying_memory.state import Streams as Streams
