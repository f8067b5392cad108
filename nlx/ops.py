# SPDX-License-Identifier: Apache-2.0
"""The one seam between nlx and its kernels: every op, under one name."""

from nlx_kernels import ChainBlock as ChainBlock
from nlx_kernels import FastCarry as FastCarry
from nlx_kernels import Implementation as Implementation
from nlx_kernels import Made as Made
from nlx_kernels import MemoryTokens as MemoryTokens
from nlx_kernels import MLPMemoryState as MLPMemoryState
from nlx_kernels import Piece as Piece
from nlx_kernels import SelfModifyingParameters as SelfModifyingParameters
from nlx_kernels import SelfModifyingState as SelfModifyingState
from nlx_kernels import Streams as Streams
from nlx_kernels import cms_chain as cms_chain
from nlx_kernels import fast_update as fast_update
from nlx_kernels import generated_memory as generated_memory
from nlx_kernels import linear_memory as linear_memory
from nlx_kernels import linear_memory_split as linear_memory_split
from nlx_kernels import mlp_memory as mlp_memory
from nlx_kernels import newton_schulz as newton_schulz
from nlx_kernels import self_modifying_memory as self_modifying_memory
