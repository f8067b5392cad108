# SPDX-License-Identifier: Apache-2.0
"""`nlx run agents`: agents that adapt while they live, by a memory that goes on through episodes.

command    nlx run agents [--only TASK ...] [--models MODEL ...]
           nlx run agents-tiny: next to nothing of it, in minutes, most of which compile;
           agents-gpu: width 64, five times the updates, for a GPU
shows      regret after a switch of odds, goals, compass or physics (`bandits.py`, `gridworld.py`,
           `cartpole.py`), of Hope, a GRU and a Transformer trained by PPO through their memory
           (`ppo.py`); mazes and chains of up to ten times the length trained on (`mazes.py`); what
           is left of skills that are learned one after the other, as it is or with a penalty
           (`skills.py`)
takes      of one core, in the bandit of many contexts, Hope 35 minutes, the Transformer 45, a GRU
           8; other cells 1 to 10; four to five hours in all, by what was run. A cell that is
           stopped begins anew, finished ones are kept
expects    where many contexts each have an arm of their own, Hope's regret after the switch below a
           GRU's (16.3, 21.4, sure), and in the mean below a Transformer's (24.5), of which one seed
           in five is best of all (11.6); a T-maze of ten times the length solved by Hope (98 %) and
           the GRU, by the Transformer not; skills in turn forgotten, and kept by elastic weight
           consolidation. Other tasks are not run

All models have as many parameters within 1 %, the same lifetimes side by side, updates and seeds.
Rivals have two learning rates, of which validation lifetimes choose, Hope the higher one only, as
its steps cost most. Lifetimes that are reported on were lived for nothing else and are the same for
all models. They are told what they did last, what it brought and whether an episode began, nothing
of the switch; it is drawn while they are trained and stands in the middle of a lifetime that is
examined. How many contexts occur in a lifetime was chosen by pilots of one seed: a GRU solved four,
and lifetimes that all have ten taught little.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from nlx_experiments import agents_contest as contest
from nlx_experiments import agents_table, agents_tasks, report, runs
from nlx_experiments.agents_tasks import Size, Task
from nlx_experiments.cells import Store
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Stopped
from nlx_experiments.sequence_experiment import PLACE, Options, check, compiled

FULL = Size(32, 18_000, (3e-3, 1e-2), 5, 20, 256)
OF_GPU = FULL._replace(width=64, parameters=66_000, every=50, lifetimes=1024)
TINY = Size(8, 1_700, (1e-2,), 2, 1, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agents(Options):
    """Agents that adapt while they live."""

    runs: pathlib.Path = pathlib.Path("runs/agents")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Agents):
    """Width 64, five times the updates: for a GPU."""

    runs: pathlib.Path = pathlib.Path("runs/agents-gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Agents):
    """One task of each kind, two models and updates: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/agents-tiny")
    models: tuple[str, ...] = ("hope", "gru")
    place: pathlib.Path = pathlib.Path("runs/agents-tiny")
    tiny = True


def main(options: Agents) -> dict[str, Any]:
    """Runs what is not known yet; writes table, pictures and numbers.

    Raises Refused for an unknown task or model; Stopped: a signal came, finished cells are kept.
    """
    gpu = isinstance(options, Gpu)
    name = "agents-gpu" if gpu else "agents"
    size = OF_GPU if gpu else TINY if options.tiny else FULL
    tasks = agents_tasks.tiny() if options.tiny else agents_tasks.full()
    if gpu:
        longer = lambda plan: plan._replace(updates=5 * plan.updates, lifetimes=64)
        tasks = {n: task._replace(plan=longer(task.plan)) for n, task in tasks.items()}
    check(options, only=tasks, models=agents_tasks.MODELS)
    cache = compiled(options.runs, hastily=options.tiny)
    with runs.Run(options.runs) as folder, StopRequest() as stop, cache:
        runs.note_environment(folder, say)
        store, results = Store(folder), {}
        path = options.place / "results" / f"{name}.json"
        before = published(runs.read_json(path) or {})
        for title, task in tasks.items():
            found = {}
            for model, config in agents_tasks.models(task, size).items():
                tried = size._replace(rates=size.rates[-1:]) if model == "hope" else size
                what = contest.identity((title, model), task, tried, config)
                wanted = not options.only or title in options.only
                wanted &= not options.models or model in options.models
                if wanted and what not in store.known:
                    record = _cell(f"{title}, {model}", task, tried, config, stop)
                    store.add({"what": what, **record})
                if what in (known := before | store.known):
                    found[model] = known[what] | {
                        "carried": contest.carried(config, task.worlds[0])
                    }
            if found:
                results[title] = found
    write(options, name, results, tasks)
    return results


def published(content: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a results file, by what they are: tables keep them where a run has no newer."""
    tasks = content.get("tasks", {}).values()
    return {record["what"]: record for models in tasks for record in models.values()}


def _cell(name: str, task: Task, size: Size, config: Any, stop: StopRequest) -> dict[str, Any]:
    """Runs a cell, and tells of it."""

    def leave() -> None:
        if stop.received is not None:
            raise Stopped(
                f"{stop.received.name}: {name} was not finished and begins anew; all before it is "
                "kept, the same command goes on from there.",
                stop.received,
            )

    told = lambda updates, values: say(f"{name}: {updates} updates, reward {values.max():.3f}")
    record = contest.measure(config, task, size, leave, told)
    of = contest.best(record)["validation"]
    say(f"{name}: {sum(of) / len(of):.3f} at {record['rate']}, {record['seconds']:.0f} s")
    return record


def write(
    options: Agents, name: str, results: Mapping[str, Any], tasks: Mapping[str, Task]
) -> None:
    """Numbers, pictures and text of what is finished."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / f"{name}.json", {"environment": runs.environment(), "tasks": results})
    if not results:
        return
    agents_table.plot(folder, name, results, tasks)
    text = agents_table.shown(results, tasks)
    runs.write_whole(folder / f"{name}.md", text + "\n")
    if options.place == PLACE:
        report.place(options.place / "README.md", name, text)
    say(f"\n{text}")
