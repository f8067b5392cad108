# SPDX-License-Identifier: Apache-2.0
"""Flax NNX modules over the pure functions: mixers, feed-forwards, blocks, language models.

Every mixer and feed-forward is ``(x [b, t, d], state, segment_ids) -> (y, state)``. One code path
trains, reads a prompt and decodes: whole == chunked == token by token.
"""

from nlx.nn.attention import Attention as Attention
from nlx.nn.attention import AttentionState as AttentionState
from nlx.nn.attention import Lookup as Lookup
from nlx.nn.block import Block as Block
from nlx.nn.block import BlockState as BlockState
from nlx.nn.cms import CMS as CMS
from nlx.nn.cms import Variant as Variant
from nlx.nn.continuum import Chunk as Chunk
from nlx.nn.continuum import StreamState as StreamState
from nlx.nn.continuum import anew as anew
from nlx.nn.continuum import begin as begin
from nlx.nn.continuum import in_context as in_context
from nlx.nn.continuum import stream as stream
from nlx.nn.convolution import Convolution as Convolution
from nlx.nn.deltanet import DeltaNet as DeltaNet
from nlx.nn.deltanet import GatedDeltaNet as GatedDeltaNet
from nlx.nn.feedforward import MLP as MLP
from nlx.nn.feedforward import SwiGLU as SwiGLU
from nlx.nn.hope import HopeState as HopeState
from nlx.nn.hope import SelfModifying as SelfModifying
from nlx.nn.linear_memory import LinearMemoryState as LinearMemoryState
from nlx.nn.mamba2 import Mamba2 as Mamba2
from nlx.nn.mixer import Mixer as Mixer
from nlx.nn.model import LanguageModel as LanguageModel
from nlx.nn.model import clocks_by_level as clocks_by_level
from nlx.nn.model import labels_by_level as labels_by_level
from nlx.nn.model import parameter_count as parameter_count
from nlx.nn.model import pretraining as pretraining
from nlx.nn.model import restarts_by_level as restarts_by_level
from nlx.nn.neural_memory import NeuralMemory as NeuralMemory
from nlx.nn.neural_memory import NeuralMemoryState as NeuralMemoryState
from nlx.nn.norm import RMSNorm as RMSNorm
from nlx.nn.presets import PRESETS as PRESETS
from nlx.nn.presets import ModelConfig as ModelConfig
from nlx.nn.presets import preset as preset
from nlx.nn.pretrained import from_pretrained_mlps as from_pretrained_mlps
from nlx.nn.retnet import RetNet as RetNet
from nlx.nn.titans import TitansLMM as TitansLMM
from nlx.nn.titans import TitansMAG as TitansMAG
from nlx.nn.titans import TitansMAL as TitansMAL
from nlx.nn.titans import TitansState as TitansState
from nlx.nn.titans_mac import MACState as MACState
from nlx.nn.titans_mac import TitansMAC as TitansMAC
from nlx.nn.ttt import TTTMLP as TTTMLP
from nlx.nn.ttt import TTTLinear as TTTLinear
from nlx.nn.ttt import TTTState as TTTState
