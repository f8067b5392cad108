# SPDX-License-Identifier: Apache-2.0
"""cms_chain: the forward of a continuum memory system."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Array, Float

from nlx_kernels._checks import Checker
from nlx_kernels._dispatch import Implementation, Kernel, choose
from nlx_kernels.cms_chain import pallas_tpu, reference, xla
from nlx_kernels.cms_chain.block import ChainBlock

OFFERED = {
    "xla": xla.cms_chain,
    "reference": reference.cms_chain,
    "pallas_tpu": Kernel(pallas_tpu.cms_chain, pallas_tpu.refusal),
}


def cms_chain(
    x: Float[Array, "b t d"],
    weights: Sequence[ChainBlock],
    *,
    activation: Literal["gelu", "silu"] = "gelu",
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "b t d"]:
    """Residual MLP blocks one after the other, every token alone.

        y_0 = x ;  z_l = scale_l y_{l-1} / sqrt(mean(y_{l-1}^2) + 1e-6)
        y_l = y_{l-1} + act(z_l U_l) D_l         with a gate: (act(z_l G_l) * z_l U_l) D_l

    Args:
      x: tokens, float64, float32 or bfloat16.
      weights: one `ChainBlock` per block, in order, each shared by all rows or with a leading axis
        b on its arrays; any dtype that x's accumulator holds. At least one.
      activation: gelu is its tanh form.
      implementation: None chooses: "pallas_tpu" on a TPU, else "xla"; a name is obeyed or refused.
      interpret: run a kernel on the CPU.

    Returns:
      y_k, in x's dtype.

    Raises:
      ValueError, TypeError: one sentence that names the argument.

    References:
      Behrouz et al. (2025), Nested Learning, Eq. 70; Shazeer (2020), GLU Variants Improve
      Transformer, Eq. 6 (the gate).
    """
    run = choose("cms_chain", implementation, interpret, OFFERED)
    check = Checker("cms_chain")
    (x,) = check.inputs(x=(x, "b t d"))
    check.option("activation", activation, tuple(reference.ACTIVATIONS))
    several = isinstance(weights, tuple | list) and not isinstance(weights, ChainBlock)
    if not several or not weights:
        found = f"{type(weights).__name__}{' of 0' if several else ''}"
        raise ValueError(
            f"cms_chain: weights is a {found}; it must be a tuple of one or more ChainBlocks."
        )
    blocks = [_block(check, n, block) for n, block in enumerate(weights)]
    return run(x, blocks, activation=activation).astype(x.dtype)


def _block(check: Checker, n: int, block: Any) -> ChainBlock:
    """A block whose arrays fit each other, with or without the rows' axis."""
    check.fields(f"weights[{n}]", block, ChainBlock)
    rows = "b " if getattr(block.up, "ndim", 2) == 3 else ""
    axes = dict(scale="d", up=f"d f{n}", down=f"f{n} d", gate=f"d f{n}")
    return ChainBlock(
        **{
            name: check.weights(f"weights[{n}].{name}", value, rows + axes[name])
            for name, value in block._asdict().items()
            if value is not None
        }
    )
