# SPDX-License-Identifier: Apache-2.0
"""Taps: the Gram matrix of a layer's inputs, as a gradient of the same backward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from nlx.optim.matrices import gathered


@jax.custom_vjp
def tap(x: Float[Array, "*n i"], gram: Float[Array, "i i"]) -> Float[Array, "*n i"]:
    """x, unchanged; the "gradient" in `gram` is C = mean over the n vectors of x x^T.

    Write `tap(x, taps["w"]) @ params["w"]`, with `taps = input_taps(params)`; then
    `jax.grad(loss, (0, 1))(params, taps)` is the gradient and the Gram matrices, in one pass, under
    jit, scan and remat. A tap met more than once gives the sum; so call it on the whole batch, not
    inside a vmap over examples, where the sum would be of n means of one.

    x: inputs of the layer. gram: zeros, at least float32; its value is never read.
    Source: the x x^T of Behrouz et al. (2025), Nested Learning, eqs. 56, 57.
    """
    del gram
    return x


def _forward(x, gram):
    return x, (x, jnp.zeros((), gram.dtype))


def _backward(residuals, cotangent):
    x, wide = residuals
    rows = gathered(x.reshape(-1, x.shape[-1]).astype(wide.dtype))
    return cotangent, rows.T @ rows / max(len(rows), 1)


tap.defvjp(_forward, _backward)


def input_taps(params: PyTree[Array]) -> PyTree[Array]:
    """Zeros to tap: [in, in] for each leaf [in, out], a scalar for every other leaf.

    params: a pytree of arrays, kernels stored [in, out].
    """

    def zeros(leaf):
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.zeros((leaf.shape[0],) * 2 if leaf.ndim == 2 else (), dtype)

    return jax.tree.map(zeros, params)


class InputTap(nnx.Variable):
    """The tap of a layer's `kernel`, beside it in the module; always 0."""


def tap_inputs(model: nnx.Module) -> None:
    """Taps, in place, every layer of a Flax NNX model that has a `kernel` [in, out].

    The layer must be called with its input alone, as `nnx.Linear` is. Take gradients in both kinds
    of variables, and split them:

        of = nnx.DiffState(0, (nnx.Param, optim.InputTap))
        gradients, input_gram = optim.split_taps(nnx.grad(loss, argnums=of)(model, batch))
        optimizer.update(model, gradients, input_gram=input_gram)
    """
    module: Any
    for _, module in list(nnx.iter_modules(model)):
        kernel = getattr(module, "kernel", None)
        if isinstance(kernel, nnx.Param) and kernel.ndim == 2 and not hasattr(module, "input_tap"):
            module.input_tap = InputTap(input_taps(kernel[...]))
            module.__class__ = _tapped(type(module))


def split_taps(gradients: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The gradients of parameters, and in their structure the Gram matrices of their inputs.

    gradients: in `nnx.Param` and `InputTap`. A parameter without a tap gets a scalar 0.
    """
    found, params = nnx.split_state(gradients, InputTap, ...)
    grams = {path[:-1]: variable for path, variable in nnx.to_flat_state(found)}

    def gram(path, variable):
        own = grams.get(path[:-1]) if path[-1] == "kernel" else None
        return variable.replace(jnp.zeros(()) if own is None else own[...])

    return params, nnx.map_state(gram, params)


@functools.cache
def _tapped(layer: type) -> type:
    """A subclass that taps its input."""

    def call(self, x: Any, *args, **kwargs):
        return layer.__call__(self, tap(x, self.input_tap[...]), *args, **kwargs)

    return type(f"Tapped{layer.__name__}", (layer,), {"__call__": call, "__doc__": layer.__doc__})
