# SPDX-License-Identifier: Apache-2.0
"""newton_schulz: nearly orthogonal matrices from a polynomial, no decomposition."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from nlx_kernels._checks import INPUT_DTYPES, Checker
from nlx_kernels._dispatch import Implementation, choose
from nlx_kernels.newton_schulz import reference, xla

OFFERED = {"xla": xla.newton_schulz, "reference": reference.newton_schulz}
QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    x: Float[Array, "*n i o"],
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "*n i o"]:
    """Each matrix with its singular values drawn towards 1, its singular vectors kept.

        X_0 = x / ||x||_F ;   X <- a X + b (X X^T) X + c (X X^T)^2 X,   `steps` times

    The default (a, b, c) brings all but the smallest singular values to about 1 (0.7 to 1.2) in
    five steps; (1.5, -0.5, 0) converges to 1 exactly, but slowly from small ones.

    Args:
      x: matrices, float64, float32, float16 or bfloat16; computed in at least float32.
      steps: an integer >= 0.
      coefficients: the numbers a, b, c.
      implementation: None chooses; a name is obeyed or refused.
      interpret: run a kernel on the CPU.

    Returns:
      Like x. The result does not depend on the scale of x; 0 where x is 0 (below the smallest
      normal number), and 0 singular values stay 0.

    Raises:
      ValueError, TypeError: one sentence that names the argument.

    References:
      Jordan et al. (2024), Muon (the coefficients); Behrouz et al. (2025), Nested Learning,
      Eq. 42-44: with (1 + 2z, -2z, 0) a step is gradient descent at rate z on
      1/2 ||X^T X - I||_F^2.
    """
    run = choose("newton_schulz", implementation, interpret, OFFERED)
    check = Checker("newton_schulz")
    x = check.matrices("x", x, (*INPUT_DTYPES, "float16"))
    steps = check.size("steps", steps, least=0)
    if len(coefficients) != 3:
        raise ValueError(
            f"newton_schulz: coefficients is {coefficients!r}; it must be three numbers (a, b, c)."
        )
    if x.size == 0:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return run(wide, steps=steps, coefficients=coefficients).astype(x.dtype)
