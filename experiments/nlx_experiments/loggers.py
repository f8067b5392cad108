# SPDX-License-Identifier: Apache-2.0
"""Who else is told what a run measures: TensorBoard, Weights & Biases, Trackio. JSONL always is.

Each is a package of its own, an extra of nlx, and asked for by `--log`.
"""

import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from nlx_experiments.errors import Refused

Name = Literal["tensorboard", "wandb", "trackio"]
NAMES: tuple[Name, ...] = get_args(Name)


class Logger(NamedTuple):
    """tell(step, {name: number}); close()."""

    tell: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def make(name: Name, folder: pathlib.Path, config: Mapping[str, Any]) -> Logger:
    """One of them, for the run in `folder`; going on where the run was stopped.

    config: as JSON holds it. Raises Refused where its package is not installed.
    """
    return {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}[name](folder, config)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record, nested ones by names with slashes."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}{name}"] = value
    return found


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(
            f'`log` holds {extra}, whose package is not installed: pip install "nlx[{extra}]".'
        ) from error


def _tensorboard(folder: pathlib.Path, config: Mapping[str, Any]) -> Logger:
    del config
    writer = _package("tensorboardX", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def tell(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Logger(tell, writer.close)


def _wandb(folder: pathlib.Path, config: Mapping[str, Any]) -> Logger:
    run = _package("wandb", "wandb").init(
        project="nlx", name=folder.name, id=folder.name, resume="allow", dir=str(folder),
        config=dict(config),
    )  # fmt: skip
    return Logger(lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


def _trackio(folder: pathlib.Path, config: Mapping[str, Any]) -> Logger:
    trackio = _package("trackio", "trackio")
    trackio.init(project="nlx", name=folder.name, resume="allow", config=dict(config))
    return Logger(lambda step, numbers: trackio.log(dict(numbers), step=step), trackio.finish)
