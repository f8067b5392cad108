# SPDX-License-Identifier: Apache-2.0
"""The optimizers' memories on eight devices: split like their parameters, same results."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nlx
from nlx import optim

MESH = AbstractMesh((4, 2), ("data", "model"))
PARAMS = {"w": jnp.ones((12, 32)), "stack": jnp.ones((2, 8, 16)), "b": jnp.ones(32)}
SPECS = {"w": P("data", "model"), "stack": P(None, "data"), "b": P("model")}
SHARDINGS = {name: NamedSharding(MESH, spec) for name, spec in SPECS.items()}


def specs(tree):
    return jax.tree.map(lambda sharding: sharding.spec, tree)


def test_what_is_shaped_like_a_parameter_is_split_like_it():
    tx = optim.dmgd(0.1)
    second, deep = specs(optim.state_sharding(tx, SHARDINGS, PARAMS))[:2]
    assert second.levels.carry.weights == SPECS | {"stack": P(None, "data", None)}
    assert deep.mu == SPECS | {"stack": P(None, "data", None)}
    assert deep.tick == P()
    assert set(deep.scale.values()) == {P()}
    first, last = deep.phi  # [in, 16] and [16, in]
    assert first == {"w": P("data", None), "stack": P(), "b": P()}
    assert last == {"w": P(None, None), "stack": P(), "b": P()}


def test_outer_products_are_split_along_their_first_axis():
    tree = specs(optim.state_sharding(optim.shampoo(0.1), SHARDINGS, PARAMS))
    levels = tree[0].inner_states["matrix"].inner_state.levels
    assert levels["left"].params["w"] == P("data", None)
    assert levels["right"].params["w"] == P(None, "model")
    assert levels["left"].params["stack"] == P(None, "data", None)
    assert levels["second"].carry.weights["w"] == SPECS["w"]


def test_no_sharding_is_refused():
    with pytest.raises(ValueError, match="`parameter_shardings` must hold the sharding"):
        optim.state_sharding(optim.momentum(0.1), {}, {})


def eight_devices():
    """Prints bytes per device, and whether two steps agree with those of one device."""
    import numpy as np
    import optax
    from jax.sharding import AxisType

    from nlx.testing import SUITE_LEARNING_RATES

    makers = {name: getattr(optim, name) for name in SUITE_LEARNING_RATES}
    makers["feature_momentum"] = lambda rate: optim.feature_momentum(rate, jnp.sign)
    makers["on_clock"] = lambda rate: optim.on_clock(optim.dmgd(rate), nlx.Clock(2))
    # Two gradients don't span a side: what rounding makes of the other directions depends on the
    # order of sums. A ridge hides it from Shampoo; SOAP looks at its first basis after the second.
    makers["shampoo"] = lambda rate: optim.shampoo(rate, ridge=1e-3)
    makers["soap"] = lambda rate: optim.soap(rate, clock=nlx.Clock(2))
    makers["adamw"] = optax.adamw
    alone = {n: jax.random.normal(jax.random.key(0), p.shape) for n, p in PARAMS.items()}

    def steps(tx, params, state):
        for n in range(2):
            gradients = jax.tree.map(lambda p: jnp.cos(3 * p + n), params)  # noqa: B023
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
        params = jax.device_put(alone, shardings)
        for name, make in makers.items():
            tx = make(0.1)
            wanted, _ = jax.jit(lambda p, tx=tx: steps(tx, p, tx.init(p)))(alone)
            of_state = optim.state_sharding(tx, shardings, params)
            state = jax.jit(tx.init, out_shardings=of_state)(params)
            run = jax.jit(lambda p, s, tx=tx: steps(tx, p, s), out_shardings=(shardings, of_state))
            got, after = run(params, state)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), got, wanted
            )
            whole = sum(leaf.nbytes for leaf in jax.tree.leaves(after))
            part = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(after))
            print(f"{kind.name:9} {name:24} {whole:7} bytes, {part:6} a device, {whole / part:.1f}")
    print("all agree")


@pytest.mark.slow
def test_eight_devices():
    program = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('sharding', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); m.eight_devices()"
    )
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", program, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.stdout.endswith("all agree\n"), done.stdout + done.stderr
    ratios = {line.split()[1]: float(line.split()[-1]) for line in done.stdout.splitlines()[:-1]}
    for name in ("momentum", "adam_memory", "delta_momentum", "m3"):
        assert ratios[name] > 0.95 * ratios["adamw"], done.stdout
