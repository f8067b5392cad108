# SPDX-License-Identifier: Apache-2.0
"""The one place where an op's implementation is chosen.

``None`` takes the first that the op offers. A name is obeyed or refused with a sentence: it is
never replaced by another. No environment variable and no platform changes the choice.
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

Implementation = Literal["reference", "xla", "pallas_tpu", "mosaic_gpu"]
KERNELS = ("pallas_tpu", "mosaic_gpu")


def choose(
    op: str,
    implementation: Implementation | None,
    interpret: bool,
    offered: Mapping[str, Callable],
) -> Callable:
    """The implementation of `op` that a call asks for.

    Args:
      op: name of the op, for the error's sentence.
      implementation: a name, or None for the first of `offered`.
      interpret: run a kernel on the CPU; means nothing for what is not a kernel, so is refused.
      offered: the op's implementations by name, the preferred one first.

    Raises:
      ValueError: unknown name, a name this op does not offer, or `interpret` without a kernel.
    """
    names = get_args(Implementation)
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"{op}: implementation={implementation!r} is unknown; it must be None or one of "
            f"{', '.join(map(repr, names))}."
        )
    chosen = next(iter(offered)) if implementation is None else implementation
    if chosen not in offered:
        raise ValueError(
            f"{op}: implementation={chosen!r} does not exist for this op; it must be None or one "
            f"of {', '.join(map(repr, offered))}."
        )
    if interpret and chosen not in KERNELS:
        raise ValueError(
            f"{op}: interpret=True runs a kernel on the CPU, but {chosen!r} is no kernel; "
            f"interpret must be False."
        )
    return offered[chosen]
