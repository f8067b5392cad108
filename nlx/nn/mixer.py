# SPDX-License-Identifier: Apache-2.0
"""What mixes tokens in a block: one code path that trains, reads a prompt and decodes."""

from typing import Any, Protocol

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nlx.nn.attention import Attention
from nlx.nn.deltanet import DeltaNet, GatedDeltaNet
from nlx.nn.hope import SelfModifying
from nlx.nn.mamba2 import Mamba2
from nlx.nn.presets import MixerName, ModelConfig
from nlx.nn.retnet import RetNet
from nlx.nn.titans import TitansLMM, TitansMAG, TitansMAL
from nlx.nn.titans_mac import TitansMAC
from nlx.nn.ttt import TTTMLP, TTTLinear


class Mixer(Protocol):
    """y_t from x_1 .. x_t of the segment: whole == chunked == token by token."""

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike | None = None) -> Any:
        """The state before the first token: a row per user. dtype: of x."""
        ...

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: Any = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """state: as returned; None: nothing came before.

        Raises TypeError or ValueError, one sentence, for inputs or a state that are not its own.
        """
        ...


def make_mixer(config: ModelConfig, name: MixerName, *, rngs: nnx.Rngs) -> Mixer:
    """The mixer of this name at the configuration's sizes."""
    width, heads = config.width, config.heads
    match name:
        case "attention":
            return Attention(
                width,
                heads=heads,
                kv_heads=config.kv_heads,
                window=config.window,
                theta=10_000.0 if config.rotary else None,
                rngs=rngs,
            )
        case "retnet":
            return RetNet(width, heads=heads, rngs=rngs)
        case "deltanet":
            negative = config.negative_eigenvalues
            return DeltaNet(width, heads=heads, negative_eigenvalues=negative, rngs=rngs)
        case "gated_deltanet":
            return GatedDeltaNet(width, heads=heads, rngs=rngs)
        case "mamba2":
            return Mamba2(width, heads=heads, rngs=rngs)
        case "ttt_linear":
            return TTTLinear(width, heads=heads, chunk_size=config.chunk_size, rngs=rngs)
        case "ttt_mlp":
            return TTTMLP(width, heads=heads, chunk_size=config.chunk_size, rngs=rngs)
        case "titans_lmm":
            return TitansLMM(width, heads=heads, rngs=rngs, **_titans(config))
        case "titans_mac":
            return TitansMAC(width, heads=heads, rngs=rngs, **_titans(config))
        case "titans_mag":
            window = config.window or config.context
            return TitansMAG(width, heads=heads, window=window, rngs=rngs, **_titans(config))
        case "titans_mal":
            window = config.window or config.context
            return TitansMAL(width, heads=heads, window=window, rngs=rngs, **_titans(config))
        case "self_modifying":
            return SelfModifying(
                width,
                heads=heads,
                hidden=config.memory_hidden,
                chunk_size=config.chunk_size,
                projection_chunk_size=config.projection_chunk_size,
                read=config.read,
                momentum=config.momentum,
                erase=config.erase,
                retain=config.retain,
                adaptive_key=config.adaptive_key,
                adaptive_value=config.adaptive_value,
                adaptive_query=config.adaptive_query,
                rngs=rngs,
            )


def _titans(config: ModelConfig) -> dict[str, Any]:
    """What Titans' memories have in common."""
    return dict(
        hidden=config.memory_hidden,
        depth=config.memory_depth,
        chunk_size=config.chunk_size,
        persistent=config.persistent,
        momentum=config.momentum,
        read=config.read,
    )
