# SPDX-License-Identifier: Apache-2.0
"""`nlx launch`: the recipe that runs `nlx train` on a slice of TPUs or on nodes with GPUs.

    nlx launch hope-1.3b --target jobset --accelerator v5p:4x4x4 --run /shared/hope \\
        --image registry/nlx:0.1 --flags "--batch 64 --mesh.fsdp 16 --mesh.tensor 4" > job.yaml

It writes text and starts nothing: read it, then hand it to the tool that it names. All recipes run
the same command in every process, which finds its fellows by what the cluster says, goes on from
the last checkpoint, and leaves before the time is over.
"""

import dataclasses
import math
import re
import shlex

from jax.sharding import AbstractMesh

from nlx import parallel
from nlx_experiments import config as configs
from nlx_experiments import recipes
from nlx_experiments.console import say
from nlx_experiments.errors import Refused, as_sentence
from nlx_experiments.recipes import FAMILIES, GPUS, Launch, Machines, command


def main(options: Launch) -> str:
    """Prints or writes the recipe; returns it.

    Raises Refused: an unknown preset or flag, an accelerator that the target hasn't, no container
    where one is needed.
    """
    text = recipe(options)
    if options.out is None:
        say(text.rstrip("\n"))
    else:
        options.out.write_text(text)
        say(f"{options.out} is written; its first lines say how it is started.")
    return text


def recipe(options: Launch) -> str:
    """The text."""
    machines = _machines(options)
    _check(options, machines)
    makers = {
        "gcloud": recipes.gcloud,
        "xpk": recipes.xpk,
        "jobset": recipes.jobset,
        "skypilot": recipes.skypilot,
        "slurm": recipes.slurm,
    }
    if options.target in ("gcloud", "xpk") and machines.tpu is None:
        raise Refused(
            f"`accelerator` is {options.accelerator} and `target` is {options.target}, which has "
            "TPUs alone; take jobset, skypilot or slurm."
        )
    if options.target == "slurm" and machines.tpu is not None:
        raise Refused(
            f"`accelerator` is {options.accelerator} and `target` is slurm, which has GPUs; it "
            "must be such as h100:8x2."
        )
    if options.target in ("xpk", "jobset") and options.image is None:
        raise Refused(
            f"`image` is missing; `target` {options.target} needs a container with nlx in it."
        )
    return makers[options.target](options, machines)


def _check(options: Launch, machines: Machines) -> None:
    """Raises Refused unless `nlx train` takes the command, and its mesh these devices."""
    from nlx_experiments.run import parse

    words = shlex.split(command(options))[3:]
    chosen = parse(configs.TrainConfig, words, "nlx train", configs.make(options.preset))
    sizes = dataclasses.asdict(chosen.mesh)
    told = math.prod(size for size in sizes.values() if size > 0)
    if machines.chips % told if -1 in sizes.values() else machines.chips != told:
        raise Refused(
            f"`accelerator` is {options.accelerator}, {machines.chips} devices, and the mesh is "
            f"{', '.join(f'{name} {size}' for name, size in sizes.items())}; its product must be "
            "as many."
        )
    axes = {name: machines.chips // told if size == -1 else size for name, size in sizes.items()}
    with as_sentence():
        parallel.check_sizes(
            AbstractMesh(tuple(axes.values()), tuple(axes)),
            batch=chosen.batch // chosen.accumulate,
            length=chosen.length,
            heads=chosen.model.heads,
        )


def _machines(options: Launch) -> Machines:
    must = "it must be such as v5e:16x16, v5p:4x4x4 or h100:8x2"
    kind, _, shape = options.accelerator.partition(":")
    if (kind not in FAMILIES and kind not in GPUS) or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise Refused(f"`accelerator` is {options.accelerator!r}; {must}.")
    sizes = tuple(map(int, shape.split("x")))
    axes = FAMILIES[kind].axes if kind in FAMILIES else 2
    if len(sizes) != axes or min(sizes) < 1:
        raise Refused(f"`accelerator` is {options.accelerator!r}, not {axes} numbers >= 1; {must}.")
    return Machines(kind, sizes, FAMILIES.get(kind))
