"""Fixtures shared by all tests: float64 on demand, a compilation cache, keys."""

import gc
import json
import os
import pathlib
import subprocess
import sys

# Tests compile more than they compute. Most of what XLA's CPU compiler does at optimization level 0
# is to emit fusions through MLIR; its older emitters compile five times as fast (jaxlib 0.11: one
# that doesn't know them ignores the option). Set before jax is imported.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    + " --xla_cpu_parallel_codegen_split_count=1"
)

# The interpreter of Mosaic kernels blocks threads that it needs itself: two are too few. And the
# compilers of absent devices must not be taken for devices.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# A tenth of the time went to looking for cycles among traces, which are many and live long.
gc.set_threshold(100_000, 20, 100)
ROOT = pathlib.Path(__file__).parents[1]
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "nlx",
    max_examples=int(os.environ.get("NLX_EXAMPLES", "12")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("nlx")


@pytest.fixture
def x64():
    """Runs one test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """A fixed random key."""
    return jax.random.key(0)


def on_eight_devices(path, function, *arguments):
    """Calls a function of a test file in a process that has eight simulated devices.

    The arguments are handed over as JSON; what the function raises fails the test.
    """
    folder, name = os.path.split(path.removesuffix(".py"))
    program = (
        "import importlib, json, sys; folder, name, function, arguments = sys.argv[1:];"
        "sys.path.insert(0, folder); module = importlib.import_module(name);"
        "getattr(module, function)(*json.loads(arguments))"
    )
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", program, folder, name, function, json.dumps(arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(name="on_eight_devices", scope="session")
def _on_eight_devices():
    return on_eight_devices
