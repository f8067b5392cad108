# SPDX-License-Identifier: Apache-2.0
"""cms_chain's forward as a Pallas TPU kernel: a block's hidden units never leave VMEM.

One kernel a block of the chain. The grid is (rows, tiles of tokens, tiles of hidden units); a tile
of tokens is normalised once, and what its hidden units add is summed in float32 while the tiles of
weights go by. The gradient is the XLA form's: a kernel that keeps no hidden units would compute
them twice more, 9 products for 6, and these products are bound by arithmetic, not by the memory
that it would save (README.md). Products are float32 for float32 inputs, of bfloat16 operands with
float32 sums for bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nlx_kernels import _tpu
from nlx_kernels._derivative import differentiable
from nlx_kernels.cms_chain import xla
from nlx_kernels.cms_chain.block import ChainBlock
from nlx_kernels.cms_chain.reference import ACTIVATIONS
from nlx_kernels.placement import axes, on_each

TOKENS, HIDDEN = 256, 512  # of a tile


def cms_chain(x, weights, *, activation, interpret=False):
    """Arguments are checked, and what `refusal` refuses does not come here."""
    plain = lambda x, weights: xla.cms_chain(x, weights, activation=activation)

    def forward(x, weights):
        for block in weights:
            x = _block(x, block, activation, interpret)
        return x, ()

    def backward(arrays, kept, slope):
        del kept
        return jax.vjp(plain, *arrays)[1](slope)

    return differentiable(forward, backward, plain)(x, weights)


def refusal(x, weights, *, interpret, **_) -> str | None:
    """Why the kernel cannot take a call, as the end of a sentence; None if it can."""
    if not interpret and x.dtype == jnp.float64:
        return "is for float32 and bfloat16; float64 is for interpret=True, or another form"
    if axes(("tensor",), 0):
        return "is for a mesh that does not split weights over an axis 'tensor'"
    size = max(_needs(x, block) for block in weights)
    if size > _tpu.VMEM_LIMIT:
        return _tpu.sentence(size)
    return None


def _tiles(x, block: ChainBlock) -> tuple[int, int]:
    """Tokens and hidden units of a tile: all of them, or a tile's."""
    return min(TOKENS, x.shape[1]), min(HIDDEN, block.up.shape[-1])


def _needs(x, block: ChainBlock) -> int:
    """About the bytes of VMEM of a grid step: blocks that move, twice, then what is computed."""
    (tokens, hidden), d = _tiles(x, block), x.shape[-1]
    size = _tpu.block_bytes
    matrices = 2 if block.gate is None else 3
    moving = 2 * size((tokens, d), x.dtype) + matrices * size((d, hidden), x.dtype)
    return 2 * moving + 6 * size((tokens, d)) + 6 * size((tokens, hidden))


def _block(x, block: ChainBlock, activation: str, interpret: bool):
    """One block on all tokens, each device of the mesh in context its rows and tokens."""
    run = functools.partial(_one_device, activation, interpret)
    parts = {"x": "bn", "block": "b" if block.up.ndim == 3 else "."}
    b, n, _ = x.shape
    return on_each(run, {"x": x, "block": block}, parts, "bn", b=b, n=n)


def _one_device(activation: str, interpret: bool, x, block: ChainBlock):
    b, t, d = x.shape
    tokens, hidden = _tiles(x, block)
    wide = block.scale.dtype
    rows = block.up.ndim == 3
    fill = -block.up.shape[-1] % hidden  # act(0) = 0: hidden units of no weight add nothing
    lead = [(0, 0)] * rows
    columns = lambda w: jnp.pad(w.astype(x.dtype), [*lead, (0, 0), (0, fill)])
    given = [
        jnp.pad(x, [(0, 0), (0, -t % tokens), (0, 0)]),
        block.scale[..., None, :],
        columns(block.up),
        jnp.pad(block.down.astype(x.dtype), [*lead, (0, fill), (0, 0)]),
    ]
    if block.gate is not None:
        given.append(columns(block.gate))
    row = lambda shape, index: pl.BlockSpec(
        (None, *shape) if rows else shape,
        lambda i, j, f: (i, *index(f)) if rows else index(f),
    )
    token = pl.BlockSpec((None, tokens, d), lambda i, j, f: (i, j, 0))
    column = row((d, hidden), lambda f: (0, f))
    specs = [token, row((1, d), lambda f: (0, 0)), column, row((hidden, d), lambda f: (f, 0))]
    precision = "default" if x.dtype == jnp.bfloat16 else "highest"
    y = pl.pallas_call(
        functools.partial(_kernel, ACTIVATIONS[activation], precision),
        name="cms_chain",
        grid=(b, -(-t // tokens), (block.up.shape[-1] + fill) // hidden),
        in_specs=specs + [column] * (block.gate is not None),
        out_specs=token,
        out_shape=jax.ShapeDtypeStruct(given[0].shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((tokens, d), x.dtype), pltpu.VMEM((tokens, d), wide)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_tpu.VMEM_LIMIT,
        ),
        interpret=_tpu.interpreter(given) if interpret else False,
    )(*given)
    return y[:, :t]


def _kernel(act, precision, x, scale, up, down, *rest):
    *gate, y, z, total = rest
    tile = pl.program_id(2)
    dot = functools.partial(jnp.dot, preferred_element_type=total.dtype, precision=precision)

    @pl.when(tile == 0)
    def _():
        wide = x[...].astype(total.dtype)
        square = jnp.mean(jnp.square(wide), -1, keepdims=True)
        z[...] = (wide * jax.lax.rsqrt(square + 1e-6) * scale[...]).astype(z.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)

    hidden = dot(z[...], up[...])
    hidden = act(dot(z[...], gate[0][...])) * hidden if gate else act(hidden)
    total[...] += dot(hidden.astype(z.dtype), down[...])

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        y[...] = (x[...].astype(total.dtype) + total[...]).astype(y.dtype)
