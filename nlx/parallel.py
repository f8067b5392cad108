# SPDX-License-Identifier: Apache-2.0
"""Meshes of devices: where parameters, activations and batches live on them.

    mesh = make_mesh(data=-1, tensor=2)
    params = jax.device_put(params, parameter_shardings(model, mesh))
    with jax.set_mesh(mesh):
        loss(params, jax.device_put(tokens, batch_sharding(mesh)))

One program for all devices, which the compiler splits: "data" has other rows on each device, so has
"fsdp", whose devices also share out the parameters between them; "tensor" splits heads and hidden
units; "sequence" splits a text, and its heads where a memory needs all of it. Without a mesh in
context every function here leaves what it is given as it is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree
from nlx_kernels.placement import HEADS, ROWS, TOKENS, axes

AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis of a parameter -> mesh axis that shards it; None, or an axis the mesh lacks: whole.
RULES: Mapping[str, str | None] = {
    "vocabulary": "tensor",
    "embed": "fsdp",  # gathered where it is used
    "heads": "tensor",
    "mlp": "tensor",
    "memory": None,  # a memory's hidden units stay together: its write is one small solve
}


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes of `AXES`, in this order.

    data, fsdp, tensor, sequence: devices along each axis, >= 1; -1, for one of them, takes all that
    the others leave. devices: all of this program's by default.

    Raises ValueError for other numbers, and for ones whose product isn't that of the devices.
    """
    numbers = data, fsdp, tensor, sequence
    sizes: dict[str, int] = dict(zip(AXES, numbers, strict=True))
    devices = jax.devices() if devices is None else list(devices)
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ValueError(f"`{name}` is {size!r}; it must be an integer >= 1, or -1.")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"`{open_axes[1]}` is -1, and so is `{open_axes[0]}`; only one axis can take all that "
            "is left."
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items() if size != -1)
        raise ValueError(
            f"the mesh is {told}; there are {len(devices)} devices, and it must have as many."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes.values())
    try:
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # an axis is no product of a torus' own, such as 4 of 8 x 8 x 8
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=kinds)


def parameter_shardings(
    model: nnx.Module, mesh: Mesh | AbstractMesh, rules: Mapping[str, str | None] = RULES
) -> PyTree[NamedSharding]:
    """The sharding of every parameter, in the structure of `nnx.split(model)[1]`.

    model: made, or only shaped by `nnx.eval_shape`. mesh: with any of the axes of `AXES`. rules:
    logical axis -> mesh axis. For an optimizer's memories: `nlx.optim.state_sharding`.

    Raises ValueError for a logical axis without a rule, and for one that the mesh does not divide.
    """

    def sharding(path: Any, variable: nnx.Variable) -> nnx.Variable:
        name = ".".join(map(str, path))
        spec = _spec(name, variable.get_metadata("axes"), variable.shape, dict(mesh.shape), rules)
        return variable.replace(NamedSharding(mesh, spec))

    return nnx.map_state(sharding, nnx.state(model, nnx.Param))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of tokens [b, t + 1], and all else that has a batch's rows first."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in ROWS if name in mesh.shape)))


def state_shardings(state: PyTree[Array], mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
    """Of what a model carries from call to call, `init_state` of it: fast weights and all else.

    Every array is split by its rows, where the mesh divides them; and by nothing else.

    state: arrays with a row per user first, or anything with their shapes.
    """

    def sharding(leaf: Any) -> NamedSharding:
        names = [name for name in ROWS if name in mesh.shape]
        fits = leaf.shape[0] % math.prod(mesh.shape[name] for name in names) == 0
        return NamedSharding(mesh, PartitionSpec(tuple(names) if fits else None))

    return jax.tree.map(sharding, state)


def check_sizes(mesh: Mesh | AbstractMesh, *, batch: int, length: int, heads: int) -> None:
    """Raises ValueError where the mesh's axes don't divide what they would split.

    batch: rows of a batch, or of the part of it that is computed at once. length: tokens of a row.
    heads: of the model.
    """
    for name, number, over in (
        ("batch", batch, ROWS),
        ("length", length, TOKENS),
        ("heads", heads, HEADS),
    ):
        split = math.prod(mesh.shape.get(axis, 1) for axis in over)
        if number % split:
            named = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in over if axis in mesh.shape)
            raise ValueError(
                f"`{name}` is {number}; it must be a multiple of {split}, the devices that split "
                f"it ({named})."
            )


def by_tokens(x: Float[Array, "b t d"], channels: str | None = None) -> Float[Array, "b t d"]:
    """x, rows and tokens split over the mesh in context.

    channels: their logical axis, split as parameters are along it; None: they are whole.
    """
    entry = None if channels is None else RULES[channels]
    return _split(x, ROWS, TOKENS, () if entry is None else (entry,))


def by_rows(state: PyTree[Array]) -> PyTree[Array]:
    """A state, its rows split over the mesh in context, as `state_shardings` places them."""
    return jax.tree.map(lambda leaf: _split(leaf, ROWS), state)


def by_heads(x: Float[Array, "b t h *d"]) -> Float[Array, "b t h *d"]:
    """x, rows and heads split over the mesh in context, every token of a row and head together."""
    return _split(x, ROWS, (), HEADS)


def gathered(param: nnx.Variable, dtype: DTypeLike | None = None) -> Array:
    """A parameter's value, whole where "fsdp" shares it out: the rows there are others, it is not.

    dtype: of what is gathered, where it may be smaller than the parameter's; None: its own.
    """
    value = param[...]
    value = value if dtype is None else value.astype(dtype)
    names = param.get_metadata("axes", None)
    if names is None or not axes(ROWS, 0):
        return value
    entries = [None if name is None else RULES[name] for name in names]
    spec = [
        (axes((entry,), length) or None) if entry not in (None, *ROWS) else None
        for entry, length in zip(entries, value.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*spec))


def _split(x: Array, *names: Sequence[str]) -> Array:
    """x, its first axes split over those of these mesh axes that divide them, the others whole."""
    spec = [axes(over, length) or None for over, length in zip(names, x.shape, strict=False)]
    if not axes(AXES, 0):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


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
