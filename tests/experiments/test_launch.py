# SPDX-License-Identifier: Apache-2.0
"""Recipes: as the golden files beside this one, and bad input in a sentence.

A recipe that is meant to change: NLX_GOLDEN=write pytest tests/experiments/test_launch.py
"""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml
from nlx_experiments import config, launch, run
from nlx_experiments.errors import Refused
from nlx_experiments.launch import Launch

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = {
    "gcloud.sh": dict(
        target="gcloud", accelerator="v5e:16x16", setup="sudo mount 10.0.0.2:/runs /shared"
    ),
    "xpk.sh": dict(target="xpk", accelerator="v5p:4x4x4", image="registry/nlx:0.1", cluster="c"),
    "jobset.yaml": dict(
        target="jobset", accelerator="v6e:4x8", image="registry/nlx:0.1", claim="runs-claim"
    ),
    "jobset-gpu.yaml": dict(target="jobset", accelerator="h100:8x4", image="registry/nlx:0.1"),
    "skypilot.yaml": dict(target="skypilot", accelerator="v4:2x2x4"),
    "skypilot-gpu.yaml": dict(target="skypilot", accelerator="h200:8x2"),
    "slurm.sh": dict(target="slurm", accelerator="h100:8x2", partition="long", hours=4),
    "slurm-setup.sh": dict(target="slurm", accelerator="a100:4x1", setup="module load cuda"),
}


def chosen(**fields):
    common = dict(preset="hope-1.3b", run="/shared/hope", name="hope", zone="us-east5-a")
    return Launch(
        **common | {"flags": "--batch 256 --mesh.fsdp 4 --model.remat dots_saveable"} | fields
    )


@pytest.mark.parametrize("name", CASES)
def test_recipes_are_the_golden_files(name):
    text = launch.recipe(chosen(**CASES[name]))
    if os.environ.get("NLX_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", CASES)
def test_recipes_can_be_read_by_who_runs_them(name, tmp_path):
    text = launch.recipe(chosen(**CASES[name]))
    if name.endswith(".sh"):
        path = tmp_path / name
        path.write_text(text)
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    else:
        made = yaml.safe_load(text)
        if "skypilot" in name:
            assert "&& nlx train hope-1.3b --run /shared/hope" in made["run"]
        else:
            job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
            assert job["parallelism"] == job["completions"] == (8 if name == "jobset.yaml" else 4)
            (container,) = job["template"]["spec"]["containers"]
            (rule,) = job["podFailurePolicy"]["rules"]
            assert rule["onExitCodes"]["values"] == [2]
            assert rule["onExitCodes"]["containerName"] == container["name"]
            if name == "jobset.yaml":
                (mount,), (volume,) = (
                    container["volumeMounts"],
                    job["template"]["spec"]["volumes"],
                )
                assert mount == {"name": volume["name"], "mountPath": "/shared"}
                assert volume["persistentVolumeClaim"] == {"claimName": "runs-claim"}
            assert container["command"][2].startswith("nlx train hope-1.3b --run /shared/hope")


def test_the_command_is_one_that_nlx_takes():
    words = shlex.split(launch.command(chosen(target="slurm", accelerator="h100:8x2")))
    assert words[:3] == ["nlx", "train", "hope-1.3b"]
    default = config.make("hope-1.3b")
    made = run.parse(config.TrainConfig, words[3:], "nlx train", default)
    assert (made.batch, made.mesh.fsdp, made.model.remat) == (256, 4, "dots_saveable")
    assert (made.hosts.coordinator, made.time_limit) == ("auto", 24 * 60 - 10)


def test_numbers_of_chips_and_hosts():
    machines = lambda accelerator: launch._machines(chosen(target="xpk", accelerator=accelerator))
    for accelerator, kind, hosts in (
        ("v5e:16x16", "v5litepod-256", 64),
        ("v5p:4x4x4", "v5p-128", 16),
        ("v6e:2x2", "v6e-4", 1),
        ("v4:2x2x4", "v4-32", 4),
    ):
        found = machines(accelerator)
        assert (found.type, found.hosts) == (kind, hosts)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(target="slurm", accelerator="v5e:4x4"),
            "has GPUs; it must be such as h100",
        ),
        (dict(target="gcloud", accelerator="h100:8x2"), "which has TPUs alone; take jobset"),
        (dict(target="jobset", accelerator="v5e:4x4"), "`image` is missing; `target` jobset needs"),
        (dict(target="gcloud", accelerator="v9:4x4"), "`accelerator` is 'v9:4x4'; it must be such"),
        (dict(target="gcloud", accelerator="v5p:4x4"), "'v5p:4x4', not 3 numbers >= 1; it must be"),
        (
            dict(target="gcloud", accelerator="v5e:4x4", flags="--run x"),
            "`flags` holds --run",
        ),
        (
            dict(target="gcloud", accelerator="v5e:4x4", flags="--mesh.fsdp 5"),
            "is v5e:4x4, 16 devices, and the mesh is data -1, fsdp 5, tensor 1, sequence 1; its",
        ),
        (
            dict(target="gcloud", accelerator="v5e:4x4", flags="--mesh.data 2 --mesh.fsdp 4"),
            "16 devices, and the mesh is data 2, fsdp 4",
        ),
        (
            dict(target="gcloud", accelerator="v5e:4x4", flags="--batch 8"),
            "`batch` is 8; it must be a multiple of 16",
        ),
        (dict(target="gcloud", accelerator="v5e:4x4", flags="'"), "which no shell can read"),
        (dict(target="gcloud", accelerator="v5e:4x4", flags="--btach 3"), "[Uu]nrecognized.*btach"),
        (
            dict(target="gcloud", accelerator="v5e:4x4", preset="hop-tiny"),
            "did you mean",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused(fields, sentence):
    with pytest.raises(Refused, match=sentence):
        launch.recipe(chosen(**fields))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(run="gs://bucket/run"), "`run` is 'gs://bucket/run'; it must be a folder: mount"),
        (dict(name="Hope!"), "`name` is 'Hope!'; it must be up to 40 of a-z"),
        (dict(claim="runs"), "`claim` is 'runs'; it needs `target` jobset"),
        (dict(hours=0.1), "`hours` is 0.1; it must be more than 10 minutes"),
        (dict(target="pbs"), "`target` is 'pbs'; it must be one of gcloud, xpk"),
    ],
)
def test_fields_out_of_range_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        chosen(**dict(target="slurm", accelerator="h100:8x2") | fields)
