# SPDX-License-Identifier: Apache-2.0
"""Where parameters live on a mesh: logical axes, and the table that maps them to mesh axes."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

# Logical axis of a parameter -> mesh axis that shards it; None, or an axis the mesh lacks: whole.
RULES: Mapping[str, str | None] = {
    "vocabulary": "model",
    "embed": "data",  # fully sharded: gathered where it is used
    "heads": "model",
    "mlp": "model",
    "memory": None,  # a memory's hidden units stay together: its write is one small solve
}


def parameter_shardings(
    model: nnx.Module, mesh: Mesh | AbstractMesh, rules: Mapping[str, str | None] = RULES
) -> PyTree[NamedSharding]:
    """The sharding of every parameter, in the structure of `nnx.split(model)[1]`.

    model: made, or only shaped by `nnx.eval_shape`. mesh: with the axes "data" and "model", either
    or neither. rules: logical axis -> mesh axis.

    Raises ValueError for a logical axis without a rule, and for one that the mesh does not divide.
    """

    def sharding(path: Any, variable: nnx.Variable) -> nnx.Variable:
        name = ".".join(map(str, path))
        spec = _spec(name, variable.get_metadata("axes"), variable.shape, dict(mesh.shape), rules)
        return variable.replace(NamedSharding(mesh, spec))

    return nnx.map_state(sharding, nnx.state(model, nnx.Param))


def _spec(
    name: str,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rules: Mapping[str, str | None],
) -> PartitionSpec:
    """The partition of one parameter."""
    entries: list[str | None] = []
    for axis, length in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(
                f"`rules` has no entry {axis!r}, the axis of {name}; it must have one."
            )
        mesh_axis = None if axis is None else rules[axis]
        if mesh_axis is None or mesh_axis not in sizes or mesh_axis in entries:
            mesh_axis = None
        elif length % sizes[mesh_axis]:
            raise ValueError(
                f"`mesh` has {sizes[mesh_axis]} devices along {mesh_axis!r}; it must divide the "
                f"{length} entries of {name} along {axis!r}."
            )
        entries.append(mesh_axis)
    return PartitionSpec(*entries)
