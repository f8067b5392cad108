# SPDX-License-Identifier: Apache-2.0
"""cms_chain's Pallas TPU kernel, interpreted on memory that is NaN until it is written."""

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels.cms_chain import pallas_tpu, shapes


def arguments(draw, shape):
    rows = (shape.b,) if shape.rows else ()
    weights = tuple(
        nlx_kernels.ChainBlock(
            scale=1 + 0.3 * draw.normal(*rows, shape.d),
            up=draw.normal(*rows, shape.d, f) / shape.d**0.5,
            down=draw.normal(*rows, f, shape.d) / f**0.5,
            gate=draw.normal(*rows, shape.d, f) / shape.d**0.5 if shape.gated else None,
        )
        for f in shape.hidden
    )
    return dict(x=draw.normal(shape.b, shape.t, shape.d), weights=weights)


def form(gradients, implementation):
    interpret = implementation == "pallas_tpu"
    return gradients(
        lambda given: [
            nlx_kernels.cms_chain(
                **given, activation=act, implementation=implementation, interpret=interpret
            )
            for act in ("gelu", "silu")
        ]
    )


@pytest.mark.parametrize("name", [*shapes.TESTS, "two blocks"])
def test_kernel_is_the_reference(name, draw, gradients, x64, agree, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TOKENS", 3)
    monkeypatch.setattr(pallas_tpu, "HIDDEN", 2)
    shape = shapes.TESTS.get(name, shapes.Shape(2, 7, 8, (5, 3), gated=True))
    given = arguments(draw, shape)
    agree(form(gradients, "pallas_tpu")(given), form(gradients, "reference")(given), 1e-9)


@pytest.mark.parametrize(
    ("dtype", "values", "grads"), [(jnp.float32, 2e-6, 5e-6), (jnp.bfloat16, 1e-2, 2e-2)]
)
def test_low_precision(dtype, values, grads, draw, gradients, x64, agree):
    given = arguments(draw, shapes.TESTS["rows-gated"])
    low = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    low["x"] = low["x"].astype(dtype)
    outputs, slopes = form(gradients, "pallas_tpu")(low)
    assert outputs[0].dtype == dtype
    want = form(gradients, "reference")(jax.tree.map(lambda x: x.astype(jnp.float64), low))
    agree(outputs, want[0], values)
    agree(slopes, want[1], grads)


def test_what_does_not_fit_is_refused():
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    block = nlx_kernels.ChainBlock(array(8192), array(8192, 8192), array(8192, 8192))
    run = lambda x, block: nlx_kernels.cms_chain(x, (block,), implementation="pallas_tpu")
    with pytest.raises(ValueError, match="fast memory"):
        jax.eval_shape(run, array(1, 256, 8192), block)
