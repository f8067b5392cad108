# SPDX-License-Identifier: Apache-2.0
"""Where the parts of an op's arguments are computed on the mesh in context.

The axes of a mesh by name: rows are split over "data" and "fsdp", heads over "tensor" and
"sequence", tokens that each stand alone over "sequence". A memory needs all tokens of its row, so
where "sequence" splits a text, its heads are split in their place (Jacobs et al., 2023, DeepSpeed
Ulysses). Compilers cannot split a kernel, and may exchange numbers inside a loop that they split:
so an op runs inside `jax.shard_map`, each device on what it has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

ROWS, HEADS, TOKENS = ("data", "fsdp"), ("tensor", "sequence"), ("sequence",)
EVERYWHERE = ("data", "fsdp", "tensor", "sequence")


def axes(names: Sequence[str], length: int) -> tuple[str, ...]:
    """Those of the mesh's axes over which an axis of this length is split: as many as divide it.

    Left out are axes that the mesh in context lacks, that have one device, or over which a
    `jax.shard_map` around the call splits already.
    """
    found: tuple[str, ...] = ()
    sizes = _free()
    for name in names:
        several = sizes.get(name, 1) > 1
        if several and length % math.prod(sizes[n] for n in (*found, name)) == 0:
            found += (name,)
    return found


def on_each(
    run: Callable[..., Any],
    given: Mapping[str, Any],
    parts: Mapping[str, Any],
    made: Any,
    **lengths: int,
) -> Any:
    """run(**given), each device of the mesh in context on its own part.

    run: a pure function of named trees of arrays, each row and head alone.
    given: its arguments. parts: for each of them how its arrays are split, a tree of strings above
    it, one letter an axis, from the first: "b" rows, "h" heads, "n" tokens that each stand alone,
    "r" rows over all axes of the mesh, "." whole. made: the same of what it returns. lengths: of
    each letter that stands there.
    """
    free = _free()
    if math.prod(free.values()) == 1:
        return run(**given)
    of = {"b": ROWS, "h": HEADS, "n": TOKENS, "r": EVERYWHERE}
    split = {letter: axes(of[letter], length) for letter, length in lengths.items()}
    spec = lambda word: PartitionSpec(*(split[letter] if letter in of else None for letter in word))
    specs = lambda tree: jax.tree.map(spec, tree)
    names = list(given)
    inner = jax.shard_map(
        lambda *values: run(**dict(zip(names, values, strict=True))),
        in_specs=tuple(specs(parts[name]) for name in names),
        out_specs=specs(made),
        axis_names=set(free),  # those of one device too: a kernel wants all
        check_vma=False,
    )
    return inner(*given.values())


def _free() -> dict[str, int]:
    """Name -> devices, of the axes over which a compiler may still split."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: mesh.shape[name] for name, kind in kinds.items() if kind == AxisType.Auto}
