# SPDX-License-Identifier: Apache-2.0
"""`nlx export`: a run's weights as one .safetensors file, and from there into a new run.

    nlx export runs/hope-tiny --out hope.safetensors
    nlx train hope-tiny --init-from hope.safetensors --run runs/again

The file holds every parameter under its dotted path, and in its header the preset, the model's
fields and the step. Nothing in it is executed when it is read.
"""

import dataclasses
import json
import pathlib
from typing import Annotated

import jax
import tyro

from nlx_experiments import config, learner, weights
from nlx_experiments.console import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the weights of a run's newest checkpoint as a .safetensors file."""

    run: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    out: pathlib.Path | None = None
    """The file; model.safetensors in the run's folder by default."""


def main(options: Export) -> pathlib.Path:
    """Writes the file; returns its path.

    Raises Refused: no run, no checkpoint, or a file that cannot be written.
    """
    chosen = config.of_run(options.run)
    params, step = learner.restored(chosen)
    path = options.out or options.run / "model.safetensors"
    about = {"preset": chosen.preset, "model": config.to_json(chosen)["model"], "step": step}
    weights.write(path, params, {"nlx": json.dumps(about)})
    numbers = sum(x.size for x in jax.tree.leaves(params))
    say(f"{path}: {numbers:,} numbers of {chosen.preset} after {step} steps.")
    return path
