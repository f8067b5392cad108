# SPDX-License-Identifier: Apache-2.0
"""What a language model is made of, and the named ones."""

import dataclasses
import difflib
from typing import Any, Literal, get_args

from nlx.nn.cms import Variant

MixerName = Literal[
    "attention",
    "retnet",
    "deltanet",
    "gated_deltanet",
    "mamba2",
    "ttt_linear",
    "ttt_mlp",
    "titans_lmm",
    "titans_mac",
    "titans_mag",
    "titans_mal",
    "self_modifying",
]
FeedForward = Literal["swiglu", "cms"]
Remat = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model: mixer x feed-forward, and its sizes."""

    mixer: MixerName
    """What mixes tokens."""
    then: tuple[MixerName, ...] = ()
    """Mixers of the blocks after the first, in turn; from then on the blocks repeat."""
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
    window: int | None = None
    """Tokens that attention sees, itself included; None: all before it, or `context` in Titans."""
    rotary: bool = True
    """Whether attention turns queries and keys by their positions; not that of Titans."""
    negative_eigenvalues: bool = False
    """Whether DeltaNet writes with rates up to 2, not 1: it can then track parity."""
    hidden: int
    """Hidden units of the SwiGLU, or of each block of the continuum memory system."""
    cms_periods: tuple[int, ...] = (1,)
    """Optimizer steps from one update of a block to the next, fast to slow; one block each."""
    cms_variant: Variant = "sequential"
    """How its blocks are put together; nested and independent: see `nlx.nn.CMS`."""
    memory_hidden: int = 32
    """Hidden units of each memory of Hope and Titans."""
    memory_depth: int = 2
    """Layers of each of Titans' memories, at most 4."""
    persistent: int = 4
    """Learned tokens before every sequence in Titans; 0: none."""
    chunk_size: int = 32
    """Tokens written with gradients at the same weights: by the memories of Hope and
    Titans, and by TTT."""
    projection_chunk_size: int = 64
    """The same of Hope's memories that make keys, values, rates and retention."""
    read: Literal["after_write", "chunk_start"] = "after_write"
    """Read the memory after the token's own write, or as it was at the chunk's start."""
    momentum: bool = True
    """Whether the writes of Hope and Titans carry momentum."""
    erase: bool = True
    """Whether Hope's writes erase along the key (delta gradient descent)."""
    retain: bool = True
    """Whether Hope's memories forget (weight decay)."""
    adaptive_key: bool = True
    """Whether a memory of Hope makes the keys; else they are a slow map of the input."""
    adaptive_value: bool = True
    """The same of the values."""
    adaptive_query: bool = False
    """The same of the queries."""
    tied: bool = False
    """Whether the read-out shares the embedding's table."""
    context: int = 1024
    """Tokens that an attention cache holds unless it is told otherwise."""
    remat: bool | Remat = False
    """Keep what stands between blocks for the backward pass, and make all inside them again; or
    keep of that what a policy of `jax.checkpoint_policies` says."""
    bfloat16: bool = False
    """Compute activations in bfloat16; parameters, gates, states and sums stay at least float32."""

    @property
    def mixers(self) -> tuple[MixerName, ...]:
        """Those of the blocks, up to where they repeat."""
        return (self.mixer, *self.then)

    def __post_init__(self) -> None:
        """Raises ValueError, a sentence that names the field, for a value out of range."""
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), field.type)
        if self.width % self.heads:
            raise ValueError(
                f"`heads` is {self.heads}; it must be a divisor of width = {self.width}."
            )
        if self.layers % len(self.mixers):
            raise ValueError(
                f"`layers` is {self.layers}; it must be a multiple of the "
                f"{len(self.mixers)} mixers {', '.join(self.mixers)}."
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
            f"`preset` is {name!r}; did you mean {nearest!r}? Known are the architectures "
            f"{', '.join(_ARCHITECTURES)}, each as -{', -'.join(_SIZES)}."
        )
    return PRESETS[name]


def _check(name: str, value: Any, kind: Any) -> None:
    """One field against its annotation."""
    least = 0 if name == "persistent" else 1
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least
    if kind is bool:
        holds, must = isinstance(value, bool), "True or False"
    elif kind in (int, int | None):
        holds, must = whole(value) or (kind is not int and value is None), f"an integer >= {least}"
    elif name == "remat":
        holds = isinstance(value, bool) or value in get_args(Remat)
        must = f"True, False or one of {', '.join(get_args(Remat))}"
    elif name == "then":
        holds = isinstance(value, tuple) and set(value) <= set(get_args(MixerName))
        must = f"any of {', '.join(get_args(MixerName))}"
    elif name == "cms_periods":
        holds = isinstance(value, tuple) and all(map(whole, value))
        must = "one or more integers >= 1, fast to slow"
    else:
        holds, must = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    if not holds:
        raise ValueError(f"`{name}` is {value!r}; it must be {must}.")


# Layers x width and heads of the papers' sizes as Miras has them (400m, which it lacks, is 340m and
# four layers more), 32 000 tokens, read out with the embedding.
_PAPER: dict[str, Any] = dict(heads=16, vocabulary=32_000, tied=True, context=4096)
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(layers=2, width=128, heads=4),
    "small": dict(layers=6, width=384, heads=6),
    "340m": dict(layers=24, width=1024, **_PAPER),
    "400m": dict(layers=28, width=1024, **_PAPER),
    "760m": dict(layers=24, width=1536, **_PAPER),
    "1.3b": dict(layers=24, width=2048, **_PAPER),
}

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "transformer++": dict(mixer="attention", feed_forward="swiglu"),
    "retnet": dict(mixer="retnet", feed_forward="swiglu"),
    "deltanet": dict(mixer="deltanet", feed_forward="swiglu"),
    "gated-deltanet": dict(mixer="gated_deltanet", feed_forward="swiglu"),
    "ttt-linear": dict(mixer="ttt_linear", feed_forward="swiglu", chunk_size=16),
    "ttt-mlp": dict(mixer="ttt_mlp", feed_forward="swiglu", chunk_size=16),
    "titans-lmm": dict(mixer="titans_lmm", feed_forward="swiglu"),
    "titans-mac": dict(mixer="titans_mac", feed_forward="swiglu"),
    "titans-mag": dict(mixer="titans_mag", feed_forward="swiglu"),
    "titans-mal": dict(mixer="titans_mal", feed_forward="swiglu"),
    "samba": dict(mixer="mamba2", then=("attention",), feed_forward="swiglu"),
    "hope": dict(mixer="self_modifying", feed_forward="cms"),
    "hope-nested": dict(mixer="self_modifying", feed_forward="cms", cms_variant="nested"),
    "hope-independent": dict(mixer="self_modifying", feed_forward="cms", cms_variant="independent"),
    "hope-attention": dict(mixer="attention", feed_forward="cms"),
}

# Hidden units with which each has as many parameters as Transformer++ of its size.
_HIDDEN: dict[str, tuple[int, ...]] = {
    #                  tiny  small   340m   400m   760m   1.3b
    "transformer++": (536, 2016, 2816, 2880, 4352, 5632),
    "retnet": (368, 1504, 1472, 1536, 2304, 2880),
    "deltanet": (528, 2008, 2816, 2880, 4352, 5632),
    "gated-deltanet": (360, 1496, 1408, 1472, 2304, 2880),
    "ttt-linear": (480, 1864, 2432, 2496, 3776, 4928),
    "ttt-mlp": (400, 1712, 2304, 2368, 3584, 4608),
    "titans-lmm": (464, 1832, 2432, 2496, 3776, 4864),
    "titans-mac": (336, 1456, 1408, 1472, 2240, 2816),
    "titans-mag": (336, 1448, 1408, 1472, 2240, 2816),
    "titans-mal": (288, 1320, 1024, 1088, 1728, 2112),
    "samba": (448, 1840, 2432, 2496, 3776, 4928),
    "hope": (256, 768, 960, 992, 1472, 1920),
    "hope-nested": (168, 384, 480, 496, 736, 960),
    "hope-independent": (256, 768, 960, 992, 1472, 1920),
    "hope-attention": (400, 1008, 1408, 1440, 2176, 2816),
}

_PAPERS = ("340m", "400m", "760m", "1.3b")
_WINDOW: dict[str, dict[str, Any]] = {
    "tiny": dict(window=64),
    "small": dict(window=128),
    **dict.fromkeys(_PAPERS, dict(window=2048)),
}
_MEMORY: dict[str, dict[str, Any]] = {
    "tiny": dict(memory_hidden=32),
    **dict.fromkeys(("small", "340m", "400m"), dict(memory_hidden=64)),
    "760m": dict(memory_hidden=96),
    "1.3b": dict(memory_hidden=128),
}

_HOPE: dict[str, dict[str, Any]] = {
    "tiny": dict(cms_periods=(1, 4), projection_chunk_size=32),
    **{size: dict(cms_periods=(1, 4, 16)) | _MEMORY[size] for size in ("small", *_PAPERS)},
}

# What an architecture has at one size alone. The widths of memories, the periods, the windows and
# MAC's chunks are not published: memories are as wide inside as a head.
_AT_SIZE: dict[str, dict[str, dict[str, Any]]] = {
    "samba": _WINDOW,
    "titans-lmm": _MEMORY,
    "titans-mac": {
        size: memory | dict(chunk_size={"tiny": 32, "small": 64}.get(size, 256))
        for size, memory in _MEMORY.items()
    },
    "titans-mag": {size: memory | _WINDOW[size] for size, memory in _MEMORY.items()},
    "titans-mal": {size: memory | _WINDOW[size] for size, memory in _MEMORY.items()},
    **dict.fromkeys(("hope", "hope-nested", "hope-independent"), _HOPE),
    "hope-attention": {
        "tiny": dict(cms_periods=(1, 4)),
        **dict.fromkeys(("small", "340m", "400m", "760m", "1.3b"), dict(cms_periods=(1, 4, 16))),
    },
}

PRESETS: dict[str, ModelConfig] = {
    f"{name}-{size}": ModelConfig(
        **fields, **_SIZES[size], **_AT_SIZE.get(name, {}).get(size, {}), hidden=hidden
    )
    for name, fields in _ARCHITECTURES.items()
    for size, hidden in zip(_SIZES, _HIDDEN[name], strict=True)
}
"""Every architecture at every size, by name, such as "hope-tiny"."""
