# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: queries and keys turned so that their products depend on distances alone."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def speeds(channels: int, theta: float, dtype: DTypeLike) -> Float[Array, " f"]:
    """Radians per token of the channel pairs (i, i + channels / 2): theta^(-2 i / channels).

    Source: Su et al. (2021), RoFormer, section 3.2.2.
    """
    half = channels // 2
    return theta ** (-jnp.arange(half, dtype=dtype) / half)


def turn(x: Float[Array, "b t h d"], angle: Float[Array, "b t f"]) -> Float[Array, "b t h d"]:
    """Turns channel pairs (i, i + d/2) by angle i, in all heads; in x's dtype.

    Source: Su et al. (2021), RoFormer, Eq. 34.
    """
    angle = angle[:, :, None]
    first, second = jnp.split(x.astype(angle.dtype), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rotate(
    x: Float[Array, "b t h d"], position: Int[Array, "b t"], theta: float | None
) -> Float[Array, "b t h d"]:
    """Turns channel pairs (i, i + d/2) by position / theta^(2 i / d); at least float32 inside.

    theta: None turns nothing.
    """
    if theta is None:
        return x
    wide = jnp.promote_types(jnp.float32, x.dtype)
    speed = speeds(x.shape[-1], theta, wide)
    return turn(x, jnp.einsum("bt,f->btf", position.astype(wide), speed))
