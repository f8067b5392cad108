# SPDX-License-Identifier: Apache-2.0
"""The one place where an op's implementation is chosen.

A name is obeyed or refused with a sentence: it is never replaced by another. ``None`` takes the
kernel of the platform where the op offers one and it does not refuse the call, else the first
implementation that the op offers. The platform is that of the mesh in context
(`jax.sharding.use_abstract_mesh`, `jax.set_mesh`) if there is one, so that a program compiled ahead
of time for a TPU holds its kernels, else that of `jax.default_backend()` if it has one device:
compilers cannot split a kernel over several, so there a mesh must be in context. No environment
variable changes the choice. Kernels have reverse-mode derivatives only: `jax.jvp` needs "xla".
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax

Implementation = Literal["reference", "xla", "pallas_tpu", "mosaic_gpu"]
KERNELS = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu"}


class Kernel(NamedTuple):
    """An implementation that not every device and not every call can have.

    Attributes:
      run: like the other implementations, with `interpret`.
      refusal: given the same, why it does not run, as the end of a sentence, or None.
    """

    run: Callable[..., Any]
    refusal: Callable[..., str | None]


def choose(
    op: str,
    implementation: Implementation | None,
    interpret: bool,
    offered: Mapping[str, Callable | Kernel],
) -> Callable[..., Any]:
    """The implementation of `op` that a call asks for.

    Args:
      op: name of the op, for the error's sentence.
      implementation: a name, or None for the platform's kernel or the first of `offered`.
      interpret: run a kernel on the CPU; means nothing for what is not a kernel, so is refused.
      offered: the op's implementations by name, the preferred one first.

    Raises:
      ValueError: unknown name, a name this op does not offer, `interpret` without a kernel; and,
        when what is returned is called, a kernel that cannot take the call.
    """
    names = get_args(Implementation)
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"{op}: implementation={implementation!r} is unknown; it must be None or one of "
            f"{', '.join(map(repr, names))}."
        )
    first = next(iter(offered))
    chosen = first if implementation is None else implementation
    if chosen not in offered:
        raise ValueError(
            f"{op}: implementation={chosen!r} does not exist for this op; it must be None or one "
            f"of {', '.join(map(repr, offered))}."
        )
    if interpret and chosen not in KERNELS.values():
        raise ValueError(
            f"{op}: interpret=True runs a kernel on the CPU, but {chosen!r} is no kernel; "
            f"interpret must be False."
        )
    if implementation is None:
        chosen = KERNELS.get(platform() or "", chosen)
    kernel = offered.get(chosen)
    if not isinstance(kernel, Kernel):
        plain = offered[first if implementation is None else chosen]
        assert not isinstance(plain, Kernel)
        return plain

    def run(*arguments, **options):
        why = _checked_by_shard_map(arguments)
        why = why or kernel.refusal(*arguments, interpret=interpret, **options)
        if why is None:
            return kernel.run(*arguments, interpret=interpret, **options)
        plain = offered[first]
        if implementation is None and not isinstance(plain, Kernel):
            return plain(*arguments, **options)
        raise ValueError(f"{op}: implementation={chosen!r} {why}.")

    return run


def _checked_by_shard_map(arguments: Any) -> str | None:
    """Why a kernel cannot stand in a `jax.shard_map` that checks what varies; None elsewhere."""
    for leaf in jax.tree.leaves(arguments):
        kind = jax.typeof(leaf)
        varies = getattr(kind, "manual_axis_type", None)  # jax before 0.11 has `vma` alone
        if getattr(varies, "varying", None) if varies is not None else getattr(kind, "vma", None):
            return "needs jax.shard_map(..., check_vma=False) around it"
    return None


def platform() -> str | None:
    """The platform for which is traced: "tpu", "gpu" or "cpu"; None: several devices, no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    device = _absent_device()
    if device is not None:
        return device.platform
    return jax.default_backend() if not mesh.empty or jax.device_count() == 1 else None


def device_kind() -> str:
    """The kind of device for which is traced, as jax names it."""
    return (_absent_device() or jax.devices()[0]).device_kind


def _absent_device() -> Any:
    """The device that the mesh in context describes without having it, or None."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
