# SPDX-License-Identifier: Apache-2.0
"""Compiles a function for a GPU that is not there, and says what its kernels take of it.

Needs the CUDA plugin of jax and two of NVIDIA's packages, ptxas and libdevice (`pip install
"nlx[aot]"`); no GPU, driver or toolkit, and nothing of it runs. `targets` holds what the compiler
must know of a GPU: h100.txtpb was written by one, h200.txtpb is OpenXLA's with the name of an H200.
"""

import importlib.util
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGETS = pathlib.Path(__file__).with_name("targets")
KERNEL = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers"
)
NAME = re.compile(r"\\00(?!stable_)(\w+)_mosaic_gpu\\00")  # in a kernel's module, as text


class Kernel(NamedTuple):
    """What one kernel takes: registers of a thread, bytes that did not fit and went to memory."""

    registers: int
    spilled: int


class Report(NamedTuple):
    """What compiling a program for a GPU gave. Memory in bytes.

    Attributes:
      target: name of the GPU, a file of `targets`.
      seconds: taken by lowering and compiling.
      arguments, outputs, temporaries: device memory.
      kernels: the Mosaic kernels, by name.
    """

    target: str
    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    kernels: dict[str, Kernel]


def missing() -> str | None:
    """What is not installed of what compiling for a GPU needs, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "jax-cuda13-plugin"
    toolkit = importlib.util.find_spec("nvidia")
    roots = [] if toolkit is None else list(toolkit.submodule_search_locations or [])
    for package, path in (
        ("nvidia-cuda-nvcc", "cu13/bin/ptxas"),
        ("nvidia-nvvm", "cu13/nvvm/libdevice/libdevice.10.bc"),
    ):
        if not any((pathlib.Path(root) / path).exists() for root in roots):
            return package
    return None


def gpu_mesh(target: str) -> Mesh:
    """A mesh of one GPU, "h100" or "h200".

    Raises:
      RuntimeError: a package is not installed.
      ValueError: an unknown target.
    """
    if (package := missing()) is not None:
        raise RuntimeError(
            f'ahead_of_time_gpu: {package} is not installed; it must be: pip install "nlx[aot]".'
        )
    known = sorted(path.stem for path in TARGETS.glob("*.txtpb"))
    if target not in known:
        raise ValueError(
            f"ahead_of_time_gpu: target is {target!r}; it must be one of {', '.join(known)}."
        )
    text = (TARGETS / f"{target}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology="1x1x1"
        )
    except NotImplementedError:  # jax looked for a GPU, found none, and dropped the compiler too
        raise RuntimeError(
            "ahead_of_time_gpu: JAX_PLATFORMS is not set; without a GPU it must be cpu."
        ) from None
    return topologies.make_mesh(topology, (1,), ("device",))


def compile_for_gpu(function: Callable[..., Any], *arguments: Any, target: str = "h200") -> Report:
    """Compiles a function for a GPU, its Mosaic kernels included, to machine code.

    Args:
      function: of arrays; jitted or not.
      *arguments: trees of arrays or `jax.ShapeDtypeStruct`s.
      target: see `gpu_mesh`.

    Raises:
      ValueError, jax.errors.JaxRuntimeError: what a compiler refuses, such as too much shared
        memory.
    """
    mesh = gpu_mesh(target)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _Assembler() as assembler:
        compiled = _lower(function, arguments, mesh).compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    kernels: dict[str, Kernel] = {}
    for name, _, stores, loads, registers in KERNEL.findall(assembler.said):
        spilled = int(stores) + int(loads)
        kernels[name.removesuffix("_mosaic_gpu_kernel")] = Kernel(int(registers), spilled)
    return Report(
        target,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        kernels,
    )


def kernels_for_gpu(
    function: Callable[..., Any], *arguments: Any, target: str = "h200"
) -> set[str]:
    """Names of the kernels in a function lowered for a GPU, without compiling it."""
    return set(NAME.findall(_lower(function, arguments, gpu_mesh(target)).as_text()))


def _lower(function: Callable[..., Any], arguments: Any, mesh: Mesh) -> Any:
    """Lowers a function of described arguments for the GPU of a mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*described).lower()


class _Assembler:
    """Has Mosaic print what ptxas says, and keeps it from the process's output."""

    said = ""

    def __enter__(self) -> "_Assembler":
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        self.file = tempfile.TemporaryFile()
        self.before = {number: os.dup(number) for number in (1, 2)}
        for number in self.before:
            os.dup2(self.file.fileno(), number)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, copy in self.before.items():
            os.dup2(copy, number)
            os.close(copy)
        del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
        self.file.seek(0)
        self.said = self.file.read().decode(errors="replace")
        self.file.close()
