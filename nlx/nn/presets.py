# SPDX-License-Identifier: Apache-2.0
"""What a language model is made of, and the named ones."""

import dataclasses
import difflib
from typing import Any, Literal, get_args

from nlx.nn.cms import Variant

Mixer = Literal["attention", "self_modifying"]
FeedForward = Literal["swiglu", "cms"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model: mixer x feed-forward, and its sizes."""

    mixer: Mixer
    """What mixes tokens."""
    feed_forward: FeedForward
    """What follows it."""
    vocabulary: int = 256
    """Number of tokens; 256 for bytes."""
    width: int
    """Channels."""
    layers: int
    """Blocks, each a mixer and a feed-forward."""
    heads: int
    """Heads of the mixer, each of width / heads channels."""
    kv_heads: int | None = None
    """Key and value heads of attention; None: as many as heads."""
    hidden: int
    """Hidden units of the SwiGLU, or of each block of the continuum memory system."""
    cms_periods: tuple[int, ...] = (1,)
    """Optimizer steps from one update of a block to the next, fast to slow; one block each."""
    cms_variant: Variant = "sequential"
    """How its blocks are put together; nested and independent: see `nlx.nn.CMS`."""
    memory_hidden: int = 32
    """Hidden units of each of Hope's memories."""
    chunk_size: int = 32
    """Tokens between two moments at which Hope's memory takes over what it wrote."""
    projection_chunk_size: int = 64
    """The same of its memories that make keys, values, rates and retention."""
    read: Literal["after_write", "chunk_start"] = "after_write"
    """Read the memory after the token's own write, or as it was at the chunk's start."""
    momentum: bool = True
    """Whether Hope's writes carry momentum."""
    erase: bool = True
    """Whether Hope's writes erase along the key (delta gradient descent)."""
    adaptive_query: bool = False
    """Whether a memory makes the queries too."""
    tied: bool = False
    """Whether the read-out shares the embedding's table."""
    context: int = 1024
    """Tokens that an attention cache holds unless it is told otherwise."""
    bfloat16: bool = False
    """Compute activations in bfloat16; parameters, gates, states and sums stay at least float32."""

    def __post_init__(self) -> None:
        """Raises ValueError, a sentence that names the field, for a value out of range."""
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), field.type)
        if self.width % self.heads:
            raise ValueError(
                f"`heads` is {self.heads}; it must be a divisor of width = {self.width}."
            )
        if list(self.cms_periods) != sorted(self.cms_periods) or not self.cms_periods:
            raise ValueError(
                f"`cms_periods` is {self.cms_periods}; it must be one or more integers >= 1, "
                "fast to slow."
            )


def preset(name: str) -> ModelConfig:
    """The configuration named `<architecture>-<size>`, such as "hope-tiny".

    Raises ValueError for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0)[0]
        raise ValueError(
            f"`preset` is {name!r}; did you mean {nearest!r}? Known are {', '.join(PRESETS)}."
        )
    return PRESETS[name]


def _check(name: str, value: Any, kind: Any) -> None:
    """One field against its annotation."""
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1
    if kind is bool:
        holds, must = isinstance(value, bool), "True or False"
    elif kind is int or kind == int | None:
        holds, must = whole(value) or (kind is not int and value is None), "an integer >= 1"
    elif name == "cms_periods":
        holds = isinstance(value, tuple) and all(map(whole, value))
        must = "one or more integers >= 1, fast to slow"
    else:
        holds, must = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    if not holds:
        raise ValueError(f"`{name}` is {value!r}; it must be {must}.")


_TINY: dict[str, Any] = dict(width=128, heads=4)
_SMALL: dict[str, Any] = dict(width=384, heads=6)
_TRANSFORMER: dict[str, Any] = dict(mixer="attention", feed_forward="swiglu")
_HOPE_ATTENTION: dict[str, Any] = dict(mixer="attention", feed_forward="cms")
_HOPE: dict[str, Any] = dict(mixer="self_modifying", feed_forward="cms")

PRESETS: dict[str, ModelConfig] = {
    "hope-tiny": ModelConfig(
        **_HOPE, **_TINY, layers=2, hidden=256, cms_periods=(1, 4), projection_chunk_size=32
    ),
    "hope-attention-tiny": ModelConfig(
        **_HOPE_ATTENTION, **_TINY, layers=2, hidden=400, cms_periods=(1, 4)
    ),
    "transformer++-tiny": ModelConfig(**_TRANSFORMER, **_TINY, layers=2, hidden=536),
    "hope-small": ModelConfig(
        **_HOPE, **_SMALL, layers=6, hidden=768, cms_periods=(1, 4, 16), memory_hidden=64
    ),
    "hope-attention-small": ModelConfig(
        **_HOPE_ATTENTION, **_SMALL, layers=6, hidden=1008, cms_periods=(1, 4, 16)
    ),
    "transformer++-small": ModelConfig(**_TRANSFORMER, **_SMALL, layers=6, hidden=2016),
}
