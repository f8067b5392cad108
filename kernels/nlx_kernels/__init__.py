# SPDX-License-Identifier: Apache-2.0
"""The ops under nlx: fused inner loops, each beside its plain reference. Depends on jax alone."""

from nlx_kernels._chunk import Piece as Piece
from nlx_kernels._dispatch import Implementation as Implementation
from nlx_kernels.cms_chain import ChainBlock as ChainBlock
from nlx_kernels.cms_chain import cms_chain as cms_chain
from nlx_kernels.fast_update import FastCarry as FastCarry
from nlx_kernels.fast_update import fast_update as fast_update
from nlx_kernels.linear_memory import linear_memory as linear_memory
from nlx_kernels.linear_memory import linear_memory_split as linear_memory_split
from nlx_kernels.mlp_memory import Made as Made
from nlx_kernels.mlp_memory import MemoryTokens as MemoryTokens
from nlx_kernels.mlp_memory import MLPMemoryState as MLPMemoryState
from nlx_kernels.mlp_memory import generated_memory as generated_memory
from nlx_kernels.mlp_memory import mlp_memory as mlp_memory
from nlx_kernels.newton_schulz import newton_schulz as newton_schulz
from nlx_kernels.self_modifying_memory import SelfModifyingParameters as SelfModifyingParameters
from nlx_kernels.self_modifying_memory import SelfModifyingState as SelfModifyingState
from nlx_kernels.self_modifying_memory import Streams as Streams
from nlx_kernels.self_modifying_memory import self_modifying_memory as self_modifying_memory
