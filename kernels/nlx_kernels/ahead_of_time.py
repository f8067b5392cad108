# SPDX-License-Identifier: Apache-2.0
"""Compiles a function for TPUs that are not there, and says what it takes of them.

Needs the package libtpu (`pip install "nlx[aot]"`), which holds the compiler; no TPU, and nothing
of it runs. A program that a TPU's compiler refuses, for memory it does not have or an operation it
does not know, is refused here as there.
"""

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# libtpu asks the network and a lock file for a TPU of this machine unless it is told not to.
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Report(NamedTuple):
    """What compiling a program for a device gave. Memory in bytes, of one device.

    Attributes:
      topology: name of the TPUs.
      seconds: taken by lowering and compiling.
      arguments, outputs, temporaries, code: high-bandwidth memory (HBM).
      kernels: fast memory (VMEM) that each kernel holds, by the kernel's name; the largest if
        there are several of one name.
    """

    topology: str
    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    kernels: dict[str, int]


def available() -> bool:
    """Whether there is a compiler for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_mesh(
    topology: str, shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("device",)
) -> Mesh:
    """A mesh of the first devices of a topology such as "v5e:2x2", "v5p:4x4x4" or "v6e:2x2".

    Raises:
      RuntimeError: libtpu is not installed.
      ValueError: a mesh larger than the topology.
    """
    devices = devices_of(topology)
    count = int(np.prod(shape))
    if count > len(devices):
        raise ValueError(
            f"ahead_of_time: the mesh {shape} has {count} devices; {topology} has {len(devices)}."
        )
    return Mesh(np.array(devices[:count]).reshape(shape), names)


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology. Raises RuntimeError where libtpu is not installed."""
    if not available():
        raise RuntimeError(
            'ahead_of_time: libtpu is not installed; it must be: pip install "nlx[aot]".'
        )
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, "tpu").devices


def compile_for_tpu(
    function: Callable[..., Any], *arguments: Any, topology: str, mesh: Mesh | None = None
) -> Report:
    """Compiles a function for a TPU, its kernels included, to machine code.

    Args:
      function: of arrays; jitted or not.
      *arguments: arrays or `jax.ShapeDtypeStruct`s; what has no sharding is on every device whole.
      topology: see `tpu_mesh`.
      mesh: devices of it; None: its first one.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler refuses, such as too much fast memory.
    """
    start = time.perf_counter()
    program = compiled(function, *arguments, mesh=tpu_mesh(topology) if mesh is None else mesh)
    seconds = time.perf_counter() - start
    memory: Any = program.memory_analysis()
    return Report(
        topology,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        kernels_of(program.as_text() or ""),
    )


def compiled(function: Callable[..., Any], *arguments: Any, mesh: Mesh) -> Any:
    """The compiled program of `compile_for_tpu`, as jax gives it."""
    with _uncached():
        lowered = _lower(function, arguments, mesh)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return lowered.compile()


def kernels_for_tpu(function: Callable[..., Any], *arguments: Any, mesh: Mesh) -> set[str]:
    """Names of the kernels in a function lowered for the TPUs of a mesh, without compiling it."""
    return set(re.findall(r'kernel_name = "(\w+)"', _lower(function, arguments, mesh).as_text()))


def _lower(function: Callable[..., Any], arguments: Any, mesh: Mesh) -> Any:
    """Lowers a function of described arguments for the TPUs of a mesh."""
    whole = NamedSharding(mesh, PartitionSpec())

    def described(x: Any) -> jax.ShapeDtypeStruct:
        given = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if given else whole)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = function if hasattr(function, "trace") else jax.jit(function)
        traced = jitted.trace(*jax.tree.map(described, arguments))
        return traced.lower(lowering_platforms=("tpu",))


@contextlib.contextmanager
def _uncached():
    """Keeps programs out of the compilation cache, which cannot read them without their device."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, before)


def kernels_of(text: str) -> dict[str, int]:
    """Names and fast memory of the kernels in an optimised program's text."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.search(r'op_name="[^"]*?(\w+)[^"\w]*/pallas_call"', line)
        held = re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line)
        key = "unnamed" if name is None else name[1]
        found[key] = max(found.get(key, 0), 0 if held is None else int(held[1]))
    return found
