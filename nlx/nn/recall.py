# SPDX-License-Identifier: Apache-2.0
"""A memory that is written with every token and asked by it."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from nlx.level import Association, Level
from nlx.memories import Memory
from nlx.nest import Nest


class Asked(NamedTuple):
    """What tokens ask a memory of each head, and what they store in it."""

    query: Float[Array, "b t h k"]
    stored: Association  # key [b, t, h, k], value [b, t, h, v], gates [b, t, h] or None


class Ticks(NamedTuple):
    """What a mixer's nest is run on, one nest a head: its `nest` tick by tick is the mixer."""

    params: dict[str, Any]  # level -> where it starts, [h, ...]
    contexts: Any  # [b, t, h, ...]


def recall(memory: Memory, level: Level, *, after_write: bool = True) -> Nest:
    """One level "memory" whose output is what it recalls.

    memory: what is stored. level: how it is written. Its contexts are `Asked`, of one head.
    after_write: asked after the tick's own write; otherwise as its clock last showed it.
    """

    def forward(params: dict[str, Any], asked: Asked):
        visible = params["memory"]
        y = asked.query if after_write else memory.read(visible, asked.query)
        return y, {"memory": asked.stored}

    def read(working: dict[str, Any], query: Any, asked: Asked):
        del asked
        return memory.read(working["memory"], query)

    return Nest({"memory": level}, forward, read=read if after_write else None)
