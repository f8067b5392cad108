# SPDX-License-Identifier: Apache-2.0
"""cms_chain: the reference against NumPy, gradients by hand; every form against the reference."""

import jax
import jax.numpy as jnp
import nlx_kernels
import numpy as np
import pytest
from nlx_kernels.cms_chain import shapes

ChainBlock = nlx_kernels.ChainBlock


def draw_weights(draw, shape):
    """Weights of every block, every row's own if the shape says so."""
    rows = (shape.b,) if shape.rows else ()
    return tuple(
        ChainBlock(
            scale=1 + 0.3 * draw.normal(*rows, shape.d),
            up=draw.normal(*rows, shape.d, f) / shape.d**0.5,
            down=draw.normal(*rows, f, shape.d) / f**0.5,
            gate=draw.normal(*rows, shape.d, f) / shape.d**0.5 if shape.gated else None,
        )
        for f in shape.hidden
    )


def act_and_slope(activation, p):
    if activation == "silu":
        s = 1 / (1 + np.exp(-p))
        return p * s, s * (1 + p * (1 - s))
    a = (2 / np.pi) ** 0.5
    t = np.tanh(a * (p + 0.044715 * p**3))
    return 0.5 * p * (1 + t), 0.5 * (1 + t) + 0.5 * p * (1 - t**2) * a * (1 + 3 * 0.044715 * p**2)


def numpy_chain(x, blocks, error, activation):
    """One token through the chain and back: y, dx, and the gradient of each block's arrays.

    error: of the objective with respect to y.
    """
    trace, y = [], x
    for scale, up, down, gate in blocks:
        length = np.sqrt(np.mean(y**2) + 1e-6)
        z = scale * y / length
        hidden, slope = act_and_slope(activation, z @ (up if gate is None else gate))
        linear = 1.0 if gate is None else z @ up
        trace.append((y, length, z, hidden, slope, linear))
        y = y + (hidden * linear) @ down
    out, gradients = y, []
    for (scale, up, down, gate), saved in zip(blocks[::-1], trace[::-1], strict=True):
        y, length, z, hidden, slope, linear = saved
        d_hidden = down @ error
        first = d_hidden * linear * slope
        slopes = dict(down=np.outer(hidden * linear, error))
        if gate is None:
            slopes["up"], dz = np.outer(z, first), up @ first
        else:
            slopes["gate"], slopes["up"] = np.outer(z, first), np.outer(z, d_hidden * hidden)
            dz = gate @ first + up @ (d_hidden * hidden)
        slopes["scale"] = dz * y / length
        inner = dz * scale
        error = error + inner / length - y * (inner @ y) / (len(y) * length**3)
        gradients.append(ChainBlock(**slopes))
    return out, error, gradients[::-1]


@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("silu", True)])
def test_reference_is_the_chain_by_hand(activation, gated, draw, x64, agree):
    """Values, input gradients and weight gradients, token by token."""
    shape = shapes.Shape(2, 3, 4, (5, 3), gated=gated)
    x, weights, error = draw.normal(2, 3, 4), draw_weights(draw, shape), draw.normal(2, 3, 4)
    options = dict(activation=activation, implementation="reference")

    @jax.jit
    def run(x, weights):
        y, back = jax.vjp(lambda *a: nlx_kernels.cms_chain(*a, **options), x, weights)
        return y, *back(error)

    blocks = [ChainBlock(*(None if w is None else np.asarray(w) for w in b)) for b in weights]
    y, dx = np.zeros((2, 2, 3, 4))
    total = None
    for n in np.ndindex(2, 3):
        y[n], dx[n], own = numpy_chain(np.asarray(x[n]), blocks, np.asarray(error[n]), activation)
        total = own if total is None else jax.tree.map(np.add, total, own)
    agree(run(x, weights), (y, dx, tuple(total)), 1e-12)


@pytest.fixture(scope="module")
def forms(gradients):
    """Both forms, compiled once for each precision."""

    def form(implementation):
        return gradients(
            lambda given: nlx_kernels.cms_chain(**given, implementation=implementation)
        )

    return {implementation: form(implementation) for implementation in ("xla", "reference")}


@pytest.fixture
def given(draw, x64):
    """A chain of every kind of block: shared and the rows' own, without and with a gate."""
    kinds = [draw_weights(draw, shape) for shape in shapes.TESTS.values()]
    return dict(x=draw.normal(2, 7, 8), weights=tuple(block for kind in kinds for block in kind))


def test_xla_is_the_reference(given, forms, agree):
    agree(forms["xla"](given), forms["reference"](given), 1e-12)


def test_bfloat16(given, forms, agree):
    """Tokens in bfloat16, weights and their gradients in float32."""
    low = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    low["x"] = low["x"].astype(jnp.bfloat16)
    outputs, slopes = forms["xla"](low)
    assert outputs[0].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slopes["weights"]))
    want = forms["reference"](jax.tree.map(lambda x: x.astype(jnp.float64), low))
    agree(outputs, want[0], 1e-2)
    agree(slopes, want[1], 2e-2)


def test_weights_of_its_own_are_what_each_row_would_do_alone(given, forms, agree):
    """A row's output and gradients with respect to its own weights; nothing of the other row."""
    (y,), slopes = forms["xla"](given)
    changed = jax.tree.map(lambda w: w.at[1].mul(1.5) if len(w) == 2 else w, given["weights"])
    changed = dict(x=given["x"].at[1].add(1.0), weights=changed)
    (other,), other_slopes = forms["xla"](changed)
    np.testing.assert_array_equal(other[0], y[0])
    assert jnp.abs(other[1] - y[1]).min() > 1e-3
    for block, before, after in zip(
        given["weights"], slopes["weights"], other_slopes["weights"], strict=True
    ):
        if block.up.ndim == 3:
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), before, after)
