# SPDX-License-Identifier: Apache-2.0
"""Shared by the ops' tests: random tokens, gradients of everything, comparison leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Draw:
    """Random arrays from one seed; float64 inside the x64 fixture."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)

    def normal(self, *shape):
        return jnp.asarray(self.random.normal(size=shape))

    def gate(self, *shape, low=0.0, high=1.0):
        return jnp.asarray(self.random.uniform(low, high, size=shape))

    def keys(self, b, t, h, k, correlation=0.0):
        """Unit keys; 1 makes all keys of a head identical."""
        shared, own = self.random.normal(size=(b, 1, h, k)), self.random.normal(size=(b, t, h, k))
        keys = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
        return jnp.asarray(keys / np.linalg.norm(keys, axis=-1, keepdims=True))

    def segments(self, b, t, share=0.1):
        """Segment ids, a new one at this share of the tokens, elsewhere in every row."""
        return jnp.asarray(np.cumsum(self.random.uniform(size=(b, t)) < share, 1), jnp.int32)

    def linear_memory(self, shape, correlation=0.0, strongest=1.9):
        """Its arguments; a few tokens forget everything, a few nothing."""
        b, t, h, k, v, _ = shape
        retain = self.gate(b, t, h, low=0.8)
        if t > 40:
            retain = retain.at[:, 5].set(0).at[:, 9:20].set(1).at[:, 31:33].set(0)
        return dict(
            q=self.normal(b, t, h, k),
            k=self.keys(b, t, h, k, correlation),
            v=self.normal(b, t, h, v),
            retain=retain,
            erase=self.gate(b, t, h, high=strongest),
            rate=self.gate(b, t, h),
            state=self.normal(b, h, k, v),
        )

    def mlp_memory(self, shape, correlation=0.0, momentum=True, erase=True, norm=False):
        """Its arguments without weights; a few tokens forget nothing, a few everything.

        The latter not under a norm: it would leave almost nothing to normalise, so that every digit
        lost there is lost by all forms alike.
        """
        b, t, h, k, _, v, _ = shape
        retain = self.gate(b, t, h, low=0.8)
        if t > 40:
            retain = retain.at[:, 9:20].set(1)
            retain = retain if norm else retain.at[:, 5].set(0).at[:, 31:33].set(0)
        given = dict(
            q=self.normal(b, t, h, k),
            k=self.keys(b, t, h, k, correlation),
            v=self.normal(b, t, h, v),
            rate=self.gate(b, t, h, high=0.2),
            retain=retain,
        )
        if momentum:
            given["momentum"] = self.gate(b, t, h, high=0.9)
        if erase:
            given["erase"] = self.gate(b, t, h)
        return given


def gradients(function):
    """arguments -> (outputs, gradients of a fixed weighting of them), both without integers."""

    def weighed(arguments):
        outputs = [x for x in jax.tree.leaves(function(arguments)) if x.dtype != jnp.int32]
        wide = [jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)) for x in outputs]
        total = [jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in wide]
        return sum(total), outputs

    def run(arguments):
        grads, outputs = jax.grad(weighed, has_aux=True, allow_int=True)(arguments)
        return outputs, grads

    compiled = jax.jit(run)

    def call(arguments):
        outputs, grads = compiled(arguments)
        return outputs, jax.tree.map(lambda g: g if g.dtype != jax.dtypes.float0 else None, grads)

    return call


def slopes_of_slopes(function, given):
    """Gradients of the sum of squares of the gradients of sin(function(given)), in float64."""
    loss = lambda given: jnp.sum(jnp.sin(function(given)))
    grads = lambda given: jax.tree.leaves(jax.grad(loss, allow_int=True)(given))
    size = lambda given: sum(jnp.sum(g**2) for g in grads(given) if g.dtype == jnp.float64)
    found = jax.jit(jax.grad(size, allow_int=True))(given)
    return [x for x in jax.tree.leaves(found) if x.dtype == jnp.float64]


def agree(got, want, tolerance):
    """Equal structure, and every leaf within a relative distance (L2), absolute below 1e-3."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, x), y in zip(leaves, jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.all(np.isfinite(x)), jax.tree_util.keystr(path)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2g} > {tolerance}"


def loops(jaxpr):
    """Lengths of all loops in a jaxpr, None for one of unknown length."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            found.append(equation.params.get("length"))
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += loops(getattr(inner, "jaxpr", inner))
    return found


@pytest.fixture(name="draw")
def _draw():
    return Draw()


@pytest.fixture(name="gradients", scope="session")
def _gradients():
    return gradients


@pytest.fixture(name="agree", scope="session")
def _agree():
    return agree


@pytest.fixture(name="loops", scope="session")
def _loops():
    return loops


@pytest.fixture(name="slopes_of_slopes", scope="session")
def _slopes_of_slopes():
    return slopes_of_slopes
