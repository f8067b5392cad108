# SPDX-License-Identifier: Apache-2.0
"""Block sizes that were measured to be quicker than the default, a JSON for each kind of device.

`tuned/<kind>.json`, as `nlx bench --tune` writes it, holds "<op> <dtype> <channels>" ->
{"block_size": tokens, ...}; what else stands there says how it was measured. What is not in it, and
a device without a file, has the default. Changes speed only.
"""

import functools
import json
import pathlib

import jax

from nlx_kernels._dispatch import device_kind

FOLDER = pathlib.Path(__file__).with_name("tuned")
DEFAULT = 64


def block_size(op: str, *arrays: jax.Array) -> int:
    """Tokens of a block on the device that is traced for; arrays [..., channels] of one dtype."""
    widths = {x.shape[-1] for x in arrays}
    if len(widths) > 1:
        return DEFAULT
    entry = table(FOLDER, device_kind()).get(key(op, arrays[0].dtype, *widths))
    return DEFAULT if entry is None else entry["block_size"]


def key(op: str, dtype: object, width: int) -> str:
    """The name of an entry."""
    return f"{op} {dtype} {width}"


def path(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The file for a kind of device, "NVIDIA H100 80GB HBM3" or "cpu"."""
    return folder / f"{kind.lower().replace(' ', '-')}.json"


@functools.cache
def table(folder: pathlib.Path, kind: str) -> dict[str, dict[str, int]]:
    """The entries for a kind of device; none without a file.

    Raises:
      ValueError: the file is damaged.
    """
    file = path(folder, kind)
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text())
        good = all(type(e["block_size"]) is int and e["block_size"] > 0 for e in entries.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise ValueError(
            f"{file} is damaged; it must hold a positive whole block_size for each entry, or not "
            f"be there: `nlx bench --tune` writes it."
        )
    return entries
