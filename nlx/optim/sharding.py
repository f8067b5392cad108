# SPDX-License-Identifier: Apache-2.0
"""Where an optimizer's memories live: split over devices like the parameters they are of."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree


def state_sharding(
    tx: optax.GradientTransformation,
    parameter_shardings: PyTree[NamedSharding],
    params: PyTree[Array],
) -> PyTree[NamedSharding]:
    """The sharding of every array of `tx.init(params)`: for `jax.jit(tx.init, out_shardings=...)`.

    A memory of a parameter's shape is split like the parameter. One of another shape, the weights
    of a deep memory or an outer product, along those axes that are as long as the parameter's at
    the same place, if it has as many. All else is whole on every device.

    parameter_shardings: for each parameter, as `nlx.parallel.parameter_shardings` makes them, at
    least one. params: arrays, or anything with shape and dtype.

    Raises ValueError for no sharding at all.
    """
    meshes = [sharding.mesh for sharding in jax.tree.leaves(parameter_shardings)]
    if not meshes:
        raise ValueError("`parameter_shardings` must hold the sharding of a parameter, got none.")
    whole = NamedSharding(meshes[0], PartitionSpec())

    def like(memory: Any, sharding: Any, param: Any) -> Any:
        if isinstance(memory, optax.MaskedNode):
            return memory
        if len(memory.shape) != len(param.shape):
            return whole
        spec = (*sharding.spec, *[None] * len(param.shape))
        sizes = zip(spec, memory.shape, param.shape, strict=False)
        return NamedSharding(
            sharding.mesh, PartitionSpec(*(name if m == p else None for name, m, p in sizes))
        )

    return optax.tree.map_params(
        tx,
        like,
        jax.eval_shape(tx.init, params),
        parameter_shardings,
        params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
