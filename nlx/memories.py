# SPDX-License-Identifier: Apache-2.0
"""What is stored: the parametric forms of an associative memory, as pure functions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

Activation = Callable[[Float[Array, " f"]], Float[Array, " f"]]

ACTIVATIONS: dict[str, Activation] = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}


class Memory(NamedTuple):
    """A parametric map from keys to values.

    init(key) -> params: initial parameters from a random key.
    read(params, key) -> output: what the memory recalls for one key.
    inputs(params, key) -> directions: for each weight matrix the direction a write erases, in the
        structure of params; None where nothing maps keys, so nothing can be erased.
    """

    init: Callable[[Key[Array, ""]], Any]
    read: Callable[[Any, Any], Any]
    inputs: Callable[[Any, Any], Any] | None


def constant(like: PyTree) -> Memory:
    """A value-less memory: M(k) = W for every key; starts at zero.

    like: arrays, or anything with shape and dtype, that give the shapes of W.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 33-34: momentum stores gradients in it.
    """

    def init(key):
        del key
        return jax.tree.map(jnp.zeros_like, like)

    def read(params, key):
        del key
        return params

    return Memory(init, read, None)


def linear(dk: int, dv: int) -> Memory:
    """A matrix memory: M(k) = k W, W of shape [dk, dv]; starts at zero; erases along k as given.

    dk, dv: channels of a key and of a value, >= 1. Raises ValueError otherwise.
    Source: Katharopoulos et al. (2020); Schlag et al. (2021).
    """
    _check_sizes("dk, dv", (dk, dv))

    def init(key):
        del key
        return jnp.zeros((dk, dv))

    def read(params: Float[Array, "k v"], key: Float[Array, " k"]) -> Float[Array, " v"]:
        return key @ params

    def inputs(params: Float[Array, "k v"], key: Float[Array, " k"]) -> Float[Array, " k"]:
        del params
        return key

    return Memory(init, read, inputs)


def mlp(
    sizes: Sequence[int],
    activation: str | Activation = "gelu",
    residual: bool = True,
    norm: bool = False,
) -> Memory:
    """A deep memory without biases: M(z) = z + act(... act(z W_1) ...) W_L, W_i of shape [in, out].

    sizes: channels of the key, of each hidden layer, and of the value: L + 1 integers >= 1.
    activation: "gelu" (tanh form), "silu", or a function of one layer's hidden vector.
    residual: whether z is added to the output; then the first and last size must agree.
    norm: whether what is added to z is brought to mean 0 and variance 1 first (epsilon 1e-6).

    Parameters are a tuple of L matrices, drawn from N(0, 1/in). The directions to erase are the
    unit vectors of each layer's own input, 0 where the input is 0.
    Raises ValueError for any other argument.
    Source: Behrouz et al. (2025), Nested Learning, eqs. 57 (per layer), 89;
    Sun et al. (2024), Learning to (Learn at Test Time), section 2.7 (norm).
    """
    act = _activation(activation)
    _check_sizes("sizes", sizes)
    if len(sizes) < 2:
        raise ValueError(f"`sizes` must name at least a key and a value size, got {tuple(sizes)}.")
    if residual and sizes[0] != sizes[-1]:
        raise ValueError(f"`residual` needs equal first and last `sizes`, got {tuple(sizes)}.")

    def init(key):
        shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
        keys = jax.random.split(key, len(shapes))
        return tuple(
            jax.random.normal(k, shape) / shape[0] ** 0.5
            for k, shape in zip(keys, shapes, strict=True)
        )

    def layer_inputs(params, key):
        hidden = [key]
        for weight in params[:-1]:
            hidden.append(act(hidden[-1] @ weight))
        return tuple(hidden)

    def read(params: tuple[Float[Array, "i o"], ...], key: Float[Array, " k"]):
        output = layer_inputs(params, key)[-1] @ params[-1]
        output = _standardised(output) if norm else output
        return key + output if residual else output

    def inputs(params: tuple[Float[Array, "i o"], ...], key: Float[Array, " k"]):
        return tuple(unit(h) for h in layer_inputs(params, key))

    return Memory(init, read, inputs)


def unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """x / ||x||, and 0 with zero gradient where x is 0.

    x: any vector. Lengths below the square root of the smallest normal number count as 0.
    """
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    present = square >= jnp.finfo(x.dtype).tiny
    return jnp.where(present, x / jnp.sqrt(jnp.where(present, square, 1)), 0)


def soft_unit(activation: str | Activation = "gelu") -> Activation:
    """An activation followed by a soft normalisation: g / sqrt(||g||^2 + 1/4) with g = act(p).

    activation: "gelu" (tanh form), "silu", or a function of a vector. Raises ValueError otherwise.
    The result is shorter than 1 and its derivative in g at most 2, so neither a read nor a
    gradient of the memory below it can blow up.
    """
    act = _activation(activation)

    def soft(p: Float[Array, " f"]) -> Float[Array, " f"]:
        g = act(p)
        return g * jax.lax.rsqrt(jnp.sum(jnp.square(g), -1, keepdims=True) + 0.25)

    return soft


def _standardised(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """Mean 0 and variance 1."""
    x = x - jnp.mean(x)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + 1e-6)


def _activation(activation: str | Activation) -> Activation:
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"`activation` must be {names} or a function, got {activation!r}.")
        return ACTIVATIONS[activation]
    return activation


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    if any(size < 1 for size in sizes):
        raise ValueError(f"`{name}` must be integers >= 1, got {tuple(sizes)}.")
