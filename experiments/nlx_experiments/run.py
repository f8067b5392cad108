# SPDX-License-Identifier: Apache-2.0
"""The `nlx` command.

    nlx train PRESET [--data PATH ...] [--run DIR] [--steps N] [--field value]
    nlx data OUT --source PATH ... [--tokenizer bpe --vocabulary N] [--huggingface NAME]
    nlx generate RUN --prompt TEXT [--length N]
    nlx serve RUN [--port N]
    nlx eval RUN NAME=FILE ...
    nlx inspect PRESET|OPTIMIZER|RUN [--text FILE]
    nlx run EXPERIMENT
    nlx export RUN [--out FILE]
    nlx bench [--ops OP ...] [--ahead-of-time h200]
    nlx compile PRESET --topology v5e:16x16 [--mesh.fsdp N] [--field value]
    nlx launch PRESET --target jobset --accelerator v5p:4x4x4 --run FOLDER [--flags "..."]

Bad input gets one sentence and exit code 2; a run stopped by SIGINT or SIGTERM is saved and exits
with 130 or 143, as shells and schedulers expect, one whose time was over with 75, one of several
processes that lost another with 69, one whose output is read no more with 141; what was printed
before stays true.
"""

import contextlib
import difflib
import importlib.util
import io
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tyro

from nlx_experiments.errors import Lost, Refused, Stopped, as_sentence

T = TypeVar("T")
Command = Callable[[list[str]], None]


def train(argv: list[str]) -> None:
    """Trains a preset, or goes on where it was stopped."""
    from nlx_experiments import config, hosts, loop

    name, flags = _first(argv, "train", "PRESET")
    default = config.make(name or "hope-tiny")
    chosen = parse(config.TrainConfig, flags, f"nlx train {name or 'PRESET'}", default)
    code = hosts.supervised(chosen.hosts, ["train", *argv])
    if code is None:
        try:
            loop.train(chosen)
        except KeyboardInterrupt:  # the second signal, or one before there is anything to save
            raise Stopped(_left(chosen.folder), signal.SIGINT) from None
    elif code:
        sys.exit(code)


def generate(argv: list[str]) -> None:
    """Continues a prompt with a trained run."""
    from nlx_experiments import generate as generation

    generation.main(parse(generation.Generate, argv, "nlx generate"))


def serve(argv: list[str]) -> None:
    """Serves a trained run to many users, each with a memory of their own."""
    if importlib.util.find_spec("h11") is None:
        raise Refused("`nlx serve` needs the package h11: pip install 'nlx[serve]'.")
    from nlx_experiments import serve as serving

    serving.main(parse(serving.Serve, argv, "nlx serve"))


def prepare(argv: list[str]) -> None:
    """Writes text, JSON lines or a Hugging Face dataset as token shards."""
    from nlx_experiments import prepare as preparation

    _first(argv, "data", "OUT")
    preparation.main(parse(preparation.Prepare, argv, "nlx data"))


def evaluate(argv: list[str]) -> None:
    """Scores a trained run on multiple choice."""
    from nlx_experiments import choices

    choices.main(parse(choices.Eval, argv, "nlx eval"))


def inspect(argv: list[str]) -> None:
    """Shows the levels of a preset, an optimizer or a run, and what a run does with a text."""
    from nlx_experiments import whitebox

    _first(argv, "inspect", "PRESET, OPTIMIZER or RUN")
    whitebox.main(parse(whitebox.Inspect, argv, "nlx inspect"))


def experiment(argv: list[str]) -> None:
    """Runs a named experiment."""
    name, flags = _first(argv, "run", "EXPERIMENT")
    experiments = _experiments()
    if name is None:
        lines = [f"  {name:21s}{_summary(kind)}" for name, (kind, _) in experiments.items()]
        told = "usage: nlx run EXPERIMENT ... ; nlx run EXPERIMENT --help says more"
        print("\n".join([told, *lines]))
        return
    if name not in experiments:
        raise Refused(_unknown("experiment", name, experiments))
    options, main = experiments[name]
    chosen = parse(options, flags, f"nlx run {name}")
    place = getattr(chosen, "place", None)  # where tables and pictures go
    before = _times(place)
    main(chosen)
    if written := [path for path, time in _times(place).items() if before.get(path) != time]:
        print("\nWritten: " + ", ".join(map(str, written)))


def bench(argv: list[str]) -> None:
    """Times the ops, or compiles them for a GPU that is not there."""
    from nlx_experiments import bench as benchmark

    benchmark.main(parse(benchmark.Bench, argv, "nlx bench"))


def compile_step(argv: list[str]) -> None:
    """Compiles a training step for a slice of TPUs that is not there."""
    from nlx_experiments import config, pod

    name, flags = _first(argv, "compile", "PRESET")
    default = config.make(name or "hope-tiny", kind=pod.Compile)
    pod.main(parse(pod.Compile, flags, f"nlx compile {name or 'PRESET'}", default))


def export(argv: list[str]) -> None:
    """Writes a run's weights as a .safetensors file."""
    from nlx_experiments import export as exporting

    _first(argv, "export", "RUN")
    exporting.main(parse(exporting.Export, argv, "nlx export"))


def launch(argv: list[str]) -> None:
    """Writes the recipe that trains a preset on a cluster."""
    from nlx_experiments import launch as launching

    _first(argv, "launch", "PRESET")
    launching.main(parse(launching.Launch, argv, "nlx launch"))


def _experiments() -> dict[str, tuple[type, Callable[[Any], Any]]]:
    """By name, what an experiment is told and what runs it."""
    from nlx_experiments import (
        ablation,
        agents,
        babilong,
        compare_optimizers,
        context,
        continual,
        demo,
        demo_check,
        forecasting,
        language,
        laws,
        learned_optimizers,
        needle,
        personalisation,
        pods,
        reasoning,
        recall,
        sizes,
        state_tracking,
        stream,
    )

    return {
        "ablation": (ablation.Ablation, ablation.main),
        "ablation-gpu": (ablation.Gpu, ablation.main),
        "ablation-tiny": (ablation.Tiny, ablation.main),
        "agents": (agents.Agents, agents.main),
        "agents-gpu": (agents.Gpu, agents.main),
        "agents-tiny": (agents.Tiny, agents.main),
        "babilong": (babilong.Babilong, babilong.main),
        "babilong-gpu": (babilong.Gpu, babilong.main),
        "babilong-longer": (babilong.Longer, babilong.main),
        "babilong-tiny": (babilong.Tiny, babilong.main),
        "context": (context.Context, context.main),
        "context-gpu": (context.Gpu, context.main),
        "context-longer": (context.Longer, context.main),
        "context-tiny": (context.Tiny, context.main),
        "continual": (continual.Continual, continual.main),
        "continual-gpu": (continual.Gpu, continual.main),
        "continual-tiny": (continual.Tiny, continual.main),
        "demo": (demo.Demo, demo.main),
        "demo-check": (demo_check.DemoCheck, demo_check.main),
        "forecasting": (forecasting.Forecasting, forecasting.main),
        "forecasting-gpu": (forecasting.Gpu, forecasting.main),
        "forecasting-tiny": (forecasting.Tiny, forecasting.main),
        "language": (language.Language, language.main),
        "language-gpu": (language.Gpu, language.main),
        "language-340m": (language.Gpu340m, language.main),
        "language-tiny": (language.Tiny, language.main),
        "laws": (laws.Laws, laws.main),
        "learned": (learned_optimizers.Learned, learned_optimizers.main),
        "learned-tiny": (learned_optimizers.Tiny, learned_optimizers.main),
        "needle": (needle.Needle, needle.main),
        "needle-gpu": (needle.Gpu, needle.main),
        "needle-tiny": (needle.Tiny, needle.main),
        "optimizers": (compare_optimizers.CompareOptimizers, compare_optimizers.main),
        "optimizers-tiny": (compare_optimizers.Tiny, compare_optimizers.main),
        "personalisation": (personalisation.Personalisation, personalisation.main),
        "personalisation-tiny": (personalisation.Tiny, personalisation.main),
        "pods": (pods.Pods, pods.main),
        "pods-tiny": (pods.Tiny, pods.main),
        "reasoning": (reasoning.Reasoning, reasoning.main),
        "reasoning-gpu": (reasoning.Gpu, reasoning.main),
        "reasoning-tiny": (reasoning.Tiny, reasoning.main),
        "recall": (recall.Recall, recall.main),
        "recall-gpu": (recall.Gpu, recall.main),
        "recall-longer": (recall.Longer, recall.main),
        "recall-tiny": (recall.Tiny, recall.main),
        "sizes": (sizes.Sizes, sizes.main),
        "state-tracking": (state_tracking.StateTracking, state_tracking.main),
        "state-tracking-gpu": (state_tracking.Gpu, state_tracking.main),
        "state-tracking-tiny": (state_tracking.Tiny, state_tracking.main),
        "stream": (stream.Stream, stream.main),
        "stream-tiny": (stream.Tiny, stream.main),
    }


def _times(place: pathlib.Path | None) -> dict[pathlib.Path, int]:
    """When the results in a folder, and its README.md, were last written."""
    if place is None:
        return {}
    paths = [*sorted(place.glob("results/*")), place / "README.md"]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def _left(folder: pathlib.Path) -> str:
    """What is there of a training that was left at once."""
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    if not steps:
        return f"Stopped before anything was saved in {folder}; the same command begins anew."
    return (
        f"Stopped; step {max(steps)} is saved in {folder}, and the same command goes on from there."
    )


def _summary(kind: type) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


COMMANDS: Mapping[str, Command] = {
    "train": train,
    "data": prepare,
    "generate": generate,
    "serve": serve,
    "eval": evaluate,
    "inspect": inspect,
    "run": experiment,
    "bench": bench,
    "compile": compile_step,
    "launch": launch,
    "export": export,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
        elif argv[0] not in COMMANDS:
            raise Refused(_unknown("command", argv[0], COMMANDS))
        else:
            COMMANDS[argv[0]](argv[1:])
    except Refused as error:
        print(f"nlx: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, flush=True)
        return stopped.code
    except Lost as lost:
        print(f"nlx: {lost}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    except KeyboardInterrupt:
        print("nlx: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read us has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        name = "" if error.filename is None else f"{error.filename}: "
        print(f"nlx: {name}{error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


def _usage() -> str:
    lines = [f"  nlx {name:10s}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: nlx COMMAND ... ; nlx COMMAND --help says more", *lines])


def _first(argv: list[str], command: str, what: str) -> tuple[str | None, list[str]]:
    """The word after the command and the rest; None where a help text is asked for in its place."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if argv and argv[0] in ("-h", "--help"):
        return None, argv
    raise Refused(f"`nlx {command}` needs a name first: nlx {command} {what}.")


def _unknown(kind: str, name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"there is no {kind} {name!r}; there are {', '.join(known)}.{meant}"


def parse(kind: type[T], argv: list[str], prog: str, default: T | None = None) -> T:
    """The dataclass that the flags describe; what does not fit becomes one sentence."""
    said = io.StringIO()
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said), as_sentence():
            return tyro.cli(kind, args=argv, prog=prog, **keywords)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        sentence = _plain(said.getvalue())
        if "Unrecognized options" in sentence:
            sentence += f". `{prog} --help` shows all options."
        raise Refused(sentence) from None


def _plain(box: str) -> str:
    """The words inside the frame that tyro draws around its messages."""
    words = re.sub(r"[\u2500-\u257f]+|-{4,}", " ", re.sub(r"\x1b\[[0-9;]*m", "", box))
    words = re.split(r"(?:Argument|For full) helptext", " ".join(words.split()))[0]
    titles = "Value error|Invalid choice|Unrecognized options|Missing argument|Parsing error"
    return re.sub(rf"^(?:{titles}) (?:Error parsing [A-Z]\w*: )?", "", words).strip()


if __name__ == "__main__":
    sys.exit(main())
