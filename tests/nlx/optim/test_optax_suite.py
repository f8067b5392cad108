# SPDX-License-Identifier: Apache-2.0
"""optax's own tests for contributed optimizers, run from the installed wheel over ours.

The suite keeps its optimizers in a module-level list; its source is read, the list replaced, and
the test class collected here. Nothing is skipped: a skip counts as a failure.
"""

import collections
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import nlx
from nlx import learned, optim
from nlx.testing import SUITE_LEARNING_RATES

WHEEL = pathlib.Path(str(importlib.util.find_spec("optax").origin)).parent
ANCHOR = re.compile(
    r"^_ALL_OPTIMIZERS_UNDER_TEST = tuple\(.*?^_MAIN_OPTIMIZERS_UNDER_TEST = tuple\([^\n]*\n",
    re.DOTALL | re.MULTILINE,
)


def feature_momentum(learning_rate: optax.ScalarOrSchedule, decay: float = 0.9):
    """Momentum of bounded features, the suite's only optimizer with a map to give."""
    return optim.feature_momentum(learning_rate, lambda u: u / (1 + jnp.abs(u)), decay)


def clocked_sgd(learning_rate: optax.ScalarOrSchedule):
    """Gradient descent that moves every third step."""
    return optim.on_clock(optax.sgd(learning_rate), nlx.Clock(3, phase=1))


def clocked_dmgd(learning_rate: optax.ScalarOrSchedule):
    """The deep optimizer, moving every second step by the sum of the gradients."""
    return optim.on_clock(optim.dmgd(learning_rate), nlx.Clock(2), reduce="sum")


def dmgd_in_soap(learning_rate: optax.ScalarOrSchedule):
    """Deep momentum read out through SOAP's eigenbasis and second moment."""
    memory = optim.scale_by_deep_momentum()
    return optax.chain(
        optim.preconditioned(memory, optim.scale_by_soap(0.0)),
        optax.scale_by_learning_rate(learning_rate),
    )


def learned_rule(rule: learned.Rule, theta):
    """A rule with a theta, in a chain with the rate that the suite gives."""

    def factory(learning_rate: optax.ScalarOrSchedule):
        return optax.chain(
            learned.as_transformation(rule, theta),
            optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        )

    return factory


def nothing(rule: learned.Rule):
    """A theta of zeros."""
    return jax.tree.map(jnp.zeros_like, rule.init(jax.random.key(0)))


def descending_lstm():
    """An LSTM by hand that is gradient descent: gates that do not move, cells that barely do."""
    rule = learned.lstm_rule(2, 1, scale=1.0, p=None)
    theta, gain, wide = nothing(rule), 1e-3, 20.0
    gates = jnp.array([wide, wide, -wide, -wide, wide, wide, 0, 0])  # input, forget, output, cell
    theta["layer_0"]["bias"] = gates
    theta["layer_0"]["input"] = theta["layer_0"]["input"].at[0, 6].set(gain)
    theta["output"]["kernel"] = theta["output"]["kernel"].at[0, 0].set(-1 / gain)
    return rule, theta


def descending_mlp():
    """An MLP by hand that goes down the first of its momenta."""
    rule = learned.mlp_rule(2, 1, step=1.0)
    theta, signs = nothing(rule), jnp.array([1.0, -1.0])
    theta["layer_0"]["kernel"] = theta["layer_0"]["kernel"].at[2].set(signs)
    theta["layer_1"]["kernel"] = theta["layer_1"]["kernel"].at[:, 0].set(signs)
    return rule, theta


def at_rate_one(rule: learned.Rule):
    """A rule as its meta-training begins, but for its rate."""
    return rule, rule.init(jax.random.key(0)) | {"log_rate": jnp.zeros(())}


LEARNED = {
    "lstm_rule": descending_lstm(),
    "mlp_rule": descending_mlp(),
    "momentum_rule": at_rate_one(learned.momentum_rule()),
    "adam_rule": at_rate_one(learned.adam_rule()),
    "hypergradient_rule": at_rate_one(learned.hypergradient_rule(hyper=1e-6)),
    "dmgd_rule": at_rate_one(learned.dmgd_rule()),
}
FACTORIES = {name: learned_rule(*made) for name, made in LEARNED.items()}
FACTORIES |= {name: getattr(optim, name) for name in SUITE_LEARNING_RATES} | {
    "feature_momentum": feature_momentum,
    "clocked_sgd": clocked_sgd,
    "clocked_dmgd": clocked_dmgd,
    "dmgd_in_soap": dmgd_in_soap,
}
RATES = SUITE_LEARNING_RATES | {"clocked_sgd": 1e-3, "clocked_dmgd": 1e-2, "dmgd_in_soap": 1e-2}
RATES |= dict.fromkeys(LEARNED, 1e-3) | {"adam_rule": 1e-2, "dmgd_rule": 1e-2}
VARIANTS = (
    ("dmgd", {"learning_rate": 1e-3, "precondition": False}),
    ("dmgd", {"learning_rate": 1e-2, "memory": "coordinates"}),
    ("dmgd", {"learning_rate": 1e-2, "objective": "l2"}),
    ("m3", {"learning_rate": 1e-2, "second_moment": False}),
)
CASES = tuple(
    {"opt_name": name, "opt_kwargs": kwargs, "wrapper_name": None, "wrapper_kwargs": None}
    for name, kwargs in (*((n, {"learning_rate": rate}) for n, rate in RATES.items()), *VARIANTS)
)
QUICK = tuple(case for case in CASES[: len(RATES)] if case["opt_name"] in ("momentum", "dmgd"))
SLOW = tuple(case for case in CASES if case not in QUICK)
PER_CASE = {
    "test_optimizers_accept_extra_args": 2,
    "test_optimizers": 4,
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
    "test_preserve_dtype": 2,
    "test_gradient_accumulation": 2,
    "test_state_shape_dtype_shard_stability": 4,
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": 1,
}


def suite(cases):
    """optax's ContribTest over `cases`, its skips turned into failures."""
    path = WHEEL / "contrib" / "_common_test.py"
    source, found = ANCHOR.subn("", path.read_text())
    assert found == 1, f"{path} has no list of optimizers to replace: look at its new form"
    module = types.ModuleType("optax_contrib_common_test")
    sys.modules[module.__name__] = module
    head, test_class = source.split("class ContribTest(")
    vars(module).update(_ALL_OPTIMIZERS_UNDER_TEST=cases, _MAIN_OPTIMIZERS_UNDER_TEST=cases)
    exec(compile(head, str(path), "exec"), vars(module))
    vars(module).update(_ALL_OPTIMIZERS_UNDER_TEST=cases, _MAIN_OPTIMIZERS_UNDER_TEST=cases)
    module._get_opt_factory = FACTORIES.__getitem__
    exec(compile("class ContribTest(" + test_class, str(path), "exec"), vars(module))
    module.ContribTest.skipTest = lambda self, reason: self.fail(f"skipped: {reason}")
    return module.ContribTest


def sharding_suite():
    """Prints how many of optax's own sharding tests ran over ours; needs 8 devices, so a process.

    The released file compares versions of JAX as text, which would skip half of it.
    """
    import unittest

    path = WHEEL / "_src" / "sharding_test.py"
    source, skips = re.subn(r"if jax.__version__ < '0\.7\.2'", "if False", path.read_text())
    source, lists = re.subn(r"^OPTIMIZERS = \{.*?^\}", "", source, flags=re.DOTALL | re.MULTILINE)
    assert (skips, lists) == (2, 1), f"{path} has changed: look at its new form"
    optimizers = {
        f"{case['opt_name']}_{i}": FACTORIES[case["opt_name"]](**case["opt_kwargs"])
        for i, case in enumerate(CASES)
    }
    module = types.ModuleType("optax_sharding_test")
    sys.modules[module.__name__] = module
    vars(module).update(OPTIMIZERS=optimizers)
    exec(compile(source, str(path), "exec"), vars(module))
    names = [n for n in dir(module.ShardingTest) if n.startswith("test_") and "microbatch" not in n]
    result = unittest.TextTestRunner().run(
        unittest.TestSuite(module.ShardingTest(name) for name in names)
    )
    print(f"{result.testsRun} ran, {len(result.skipped)} skipped, passed: {result.wasSuccessful()}")


def by_name(test_class) -> dict[str, int]:
    """How many cases each test of the suite was expanded to."""
    names = (re.sub(r"\d+$", "", name) for name in dir(test_class) if name.startswith("test_"))
    return dict(collections.Counter(names))


ContribTest = suite(QUICK)
SlowContribTest = pytest.mark.slow(suite(SLOW))


def test_the_suite_is_whole():
    assert len(QUICK) + len(SLOW) == len(CASES)
    for cases, tests in ((QUICK, ContribTest), (SLOW, SlowContribTest)):
        assert by_name(tests) == {name: n * len(cases) for name, n in PER_CASE.items()}


@pytest.mark.slow
def test_sharding():
    program = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('suite', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); m.sharding_suite()"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program, __file__],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{3 * len(CASES)} ran, 0 skipped, passed: True" in done.stdout, (
        done.stdout + done.stderr
    )
