# SPDX-License-Identifier: Apache-2.0
"""What `nlx launch` writes for each target, and what every machine runs."""

import dataclasses
import math
import pathlib
import re
import shlex
from typing import Annotated, Literal, NamedTuple, get_args

import tyro

from nlx_experiments.errors import Refused

Target = Literal["gcloud", "xpk", "jobset", "skypilot", "slurm"]


class Family(NamedTuple):
    """A kind of TPU, as Google Cloud calls it."""

    type: str  # of a slice; its number counts cores or chips
    cores: int  # that the number counts, of a chip
    runtime: str  # software of a virtual machine
    selector: str  # of a node pool
    axes: int  # of a topology


FAMILIES = {
    "v4": Family("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
    "v5e": Family("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
    "v5p": Family("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
    "v6e": Family("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
}
CHIPS_A_HOST = 4
GPUS = {
    "h100": ("H100", "nvidia-h100-80gb"),
    "h200": ("H200", "nvidia-h200-141gb"),
    "a100": ("A100", "nvidia-tesla-a100"),
}  # as SkyPilot and as GKE call them
PORT = 8476
ACTIVATE = ". ~/nlx/bin/activate"
MARGIN = 10  # minutes before the end of its time at which a run saves and leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Writes a recipe that trains a preset on many devices."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """What to train."""
    target: Target
    """Who runs it."""
    accelerator: str
    """Chips and topology of TPUs, such as v5e:16x16 or v5p:4x4x4; or GPUs of a node and how many
    nodes, such as h100:8x2."""
    run: str
    """Folder of the run, on storage that all machines see as a folder."""
    flags: str = ""
    """More flags of `nlx train`, as a shell would have them."""
    setup: str = ""
    """A shell command for every machine first, such as one that mounts the storage."""
    name: str = "nlx"
    """Of the job."""
    claim: str | None = None
    """For jobset: the PersistentVolumeClaim that is mounted at the first folder of `run`; without
    one, the image or the cluster must see to it."""
    image: str | None = None
    """Container with nlx in it: xpk and jobset need one, slurm may have one."""
    package: str = "nlx[experiments]"
    """What pip installs where there is no container."""
    hours: float = 24.0
    """Of the job; the run leaves ten minutes before."""
    zone: str = "ZONE"
    """Of Google Cloud."""
    cluster: str = "CLUSTER"
    """Of GKE, for xpk."""
    partition: str | None = None
    """Of Slurm."""
    out: pathlib.Path | None = None
    """A file for the recipe; printed by default."""

    def __post_init__(self) -> None:
        """Raises ValueError in a sentence for what cannot be."""
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ValueError(
                f"`name` is {self.name!r}; it must be up to 40 of a-z, 0-9 and -, from a letter to "
                "no -."
            )
        if not self.hours * 60 > MARGIN:
            raise ValueError(f"`hours` is {self.hours}; it must be more than {MARGIN} minutes.")
        if "://" in self.run:
            raise ValueError(
                f"`run` is {self.run!r}; it must be a folder: mount the bucket, for example by "
                "`setup`."
            )
        if self.claim is not None and (self.target != "jobset" or not self.run.startswith("/")):
            raise ValueError(
                f"`claim` is {self.claim!r}; it needs `target` jobset and a `run` that begins with "
                "a /."
            )
        if self.target not in get_args(Target):
            raise ValueError(
                f"`target` is {self.target!r}; it must be one of {', '.join(get_args(Target))}."
            )


class Machines(NamedTuple):
    """What runs it: chips of TPUs in a topology, or GPUs on nodes."""

    kind: str
    sizes: tuple[int, ...]
    tpu: Family | None

    @property
    def chips(self) -> int:
        """Of all."""
        return math.prod(self.sizes)

    @property
    def hosts(self) -> int:
        """Machines, one process each."""
        return -(-self.chips // CHIPS_A_HOST) if self.tpu else self.sizes[1]

    @property
    def topology(self) -> str:
        """As a cluster is told."""
        return "x".join(map(str, self.sizes))

    @property
    def type(self) -> str:
        """As Google Cloud calls a slice."""
        assert self.tpu is not None
        return f"{self.tpu.type}-{self.chips * self.tpu.cores}"


def line(options: Launch, coordinator: str | None = None) -> str:
    """What a shell runs on every machine. coordinator: see `command`."""
    run = command(options)
    if coordinator is not None:
        run = run.replace("--hosts.coordinator auto", coordinator)
    return f"{options.setup} && exec {run}" if options.setup else run


def command(options: Launch) -> str:
    """What every process runs, where the cluster says who belongs together."""
    minutes = round(options.hours * 60) - MARGIN
    try:
        more = shlex.split(options.flags)
    except ValueError as error:
        raise Refused(f"`flags` is {options.flags!r}, which no shell can read: {error}.") from error
    for word in more:
        if word.startswith(("--run", "--hosts", "--time-limit")):
            raise Refused(f"`flags` holds {word}, which the recipe sets itself; leave it out.")
    words = ["nlx", "train", options.preset, "--run", options.run, *more]
    words += ["--hosts.coordinator", "auto", "--time-limit", str(minutes)]
    return shlex.join(words)


def gcloud(options: Launch, machines: Machines) -> str:
    """A script of gcloud's: makes a slice of TPUs, trains, removes it."""
    family = machines.tpu
    assert family is not None
    q = shlex.quote
    where = f"--zone={q(options.zone)}"
    install = _install(options, "jax[tpu]")
    return f"""#!/usr/bin/env bash
# bash this-file: makes a slice, trains on it, removes it. Needs gcloud, logged in, with a project.
set -euo pipefail
gcloud compute tpus tpu-vm create {q(options.name)} {where} \\
  --accelerator-type={machines.type} --version={family.runtime}
trap 'gcloud compute tpus tpu-vm delete {q(options.name)} {where} --quiet' EXIT
gcloud compute tpus tpu-vm ssh {q(options.name)} {where} --worker=all \\
  --command={q(install)}
gcloud compute tpus tpu-vm ssh {q(options.name)} {where} --worker=all \\
  --command={q(f"{ACTIVATE} && {line(options)}")}
"""


def _install(options: Launch, extra: str) -> str:
    """Makes an environment: the Python of a machine may be too old."""
    uv, q = "~/.local/bin/uv", shlex.quote
    return (
        "curl -LsSf https://astral.sh/uv/install.sh | sh && "
        f"{uv} venv --python 3.12 ~/nlx && "
        f"{uv} pip install --python ~/nlx/bin/python {q(options.package)} {q(extra)}"
    )


def xpk(options: Launch, machines: Machines) -> str:
    """A script that hands the job to xpk."""
    q = shlex.quote
    return f"""#!/usr/bin/env bash
# bash this-file: runs on a GKE cluster that `xpk cluster create` made.
set -euo pipefail
xpk workload create \\
  --cluster={q(options.cluster)} --zone={q(options.zone)} \\
  --workload={q(options.name)} --docker-image={q(str(options.image))} \\
  --tpu-type={machines.type} --num-slices=1 --max-restarts=10 \\
  --command={q(line(options))}
"""


def jobset(options: Launch, machines: Machines) -> str:
    """A JobSet for kubectl."""
    if machines.tpu is not None:
        selector = f"""cloud.google.com/gke-tpu-accelerator: {machines.tpu.selector}
                cloud.google.com/gke-tpu-topology: {machines.topology}"""
        limits = f"google.com/tpu: {min(CHIPS_A_HOST, machines.chips)}"
        coordinator = None
    else:
        selector = f"cloud.google.com/gke-accelerator: {GPUS[machines.kind][1]}"
        limits = f"nvidia.com/gpu: {machines.sizes[0]}"
        coordinator = (  # jax does not know how a JobSet numbers its pods
            f"--hosts.coordinator {options.name}-train-0-0.{options.name}:{PORT} "
            f'--hosts.count {machines.hosts} --hosts.index "$JOB_COMPLETION_INDEX"'
        )
    mount = volume = ""
    if options.claim is not None:
        folder = "/" + options.run.split("/")[1]
        mount = f"""
                  volumeMounts:
                    - name: runs
                      mountPath: {_yaml(folder)}"""
        volume = f"""
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: {options.claim}"""
    return f"""# kubectl apply -f this-file: needs JobSet 0.6 or newer in the cluster.
# What is refused (exit code 2) fails at once; anything else begins again and goes on.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {options.name}
spec:
  failurePolicy:
    maxRestarts: 10
    rules:
      - action: FailJobSet
        onJobFailureReasons: ["PodFailurePolicy"]
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          parallelism: {machines.hosts}
          completions: {machines.hosts}
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: nlx
                  operator: In
                  values: [2]
          activeDeadlineSeconds: {round(options.hours * 3600)}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                {selector}
              containers:
                - name: nlx
                  image: {options.image}
                  command: ["bash", "-c", {_yaml(line(options, coordinator))}]
                  resources:
                    limits:
                      {limits}{mount}{volume}
"""


def skypilot(options: Launch, machines: Machines) -> str:
    """A task for SkyPilot."""
    if machines.tpu is not None:
        wanted = f"""accelerators: tpu-{machines.type}
  accelerator_args:
    runtime_version: {machines.tpu.runtime}"""
        nodes, extra = 1, "jax[tpu]"
    else:
        wanted = f"accelerators: {GPUS[machines.kind][0]}:{machines.sizes[0]}"
        nodes, extra = machines.sizes[1], "jax[cuda13]"
    coordinator = None
    if machines.tpu is None:  # jax does not know how SkyPilot numbers its nodes
        coordinator = (
            f'--hosts.coordinator "$(echo "$SKYPILOT_NODE_IPS" | head -n1):{PORT}" '
            '--hosts.count "$SKYPILOT_NUM_NODES" --hosts.index "$SKYPILOT_NODE_RANK"'
        )
    return f"""# sky jobs launch this-file: a job that is preempted begins again and goes on.
name: {options.name}
num_nodes: {nodes}
resources:
  {wanted}
setup: |
  {_install(options, extra)}
run: |
  {ACTIVATE} && {line(options, coordinator)}
"""


def slurm(options: Launch, machines: Machines) -> str:
    """A batch script for Slurm."""
    gpus, nodes = machines.sizes
    minutes = round(options.hours * 60)
    lines = [
        "#!/usr/bin/env bash",
        "# sbatch this-file: a job whose time is over queues itself again and goes on.",
        f"#SBATCH --job-name={options.name}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={machines.kind}:{gpus}",
        f"#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00",
        "#SBATCH --requeue",
    ]
    if options.partition is not None:
        lines.append(f"#SBATCH --partition={options.partition}")
    container = [] if options.image is None else [f"--container-image={shlex.quote(options.image)}"]
    run = line(options)
    run = f"bash -c {shlex.quote(run)}" if options.setup else run
    run = " ".join(["srun", *container, run])
    lines += [
        "set -uo pipefail",
        "# One process a node has all its GPUs.",
        f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}",
        run,
        "code=$?",
        'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _yaml(text: str) -> str:
    """A string in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
