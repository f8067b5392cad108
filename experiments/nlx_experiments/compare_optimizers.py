# SPDX-License-Identifier: Apache-2.0
"""`nlx run optimizers`: what an optimizer gains from being a memory that learns.

command    nlx run optimizers [--runs DIR] [--only ROW ...]
           nlx run optimizers-tiny: the same with next to nothing in it, a minute
shows      loss, steps to AdamW's loss, time and state of every optimizer on the rows below;
           results/optimizers.json and .png, and the table in README.md
takes      93 minutes on two cores that were busy with other work too; stopped at any moment, the
           same command goes on
expects    the verdicts in README.md

Declared beforehand, by pilot runs on other seeds; "first" is of everything in the row:

row                     schedule   declared            meant to be
toy                     constant   delta momentum      first
quadratic, three noises constant   dmgd                first
digits                  constant   dmgd in soap        first
                        cosine     dmgd in soap        within 2 % of the best
text                    constant   dmgd, averaged      within 2 % of the best
                        cosine     dmgd, orthogonal    within 2 % of the best
permuted labels         constant   dgd                 first (there is no end to fall towards)

One grid of learning rates for all, four to a decade, longer where the best is at an end of it;
every momentum is 0.9, 0.8 or 0.95, or, with permuted labels, every weight decay one of seven. Where
a rule fixes its momentum, another number of its own is tried at as many values (DMGD's inner rate,
DGD's gamma). ! marks what lies at the end of what was tried. Rates and settings are chosen by the
mean loss on seeds 0, 1, ...; reported are seeds 4000, 4001, ... What is declared for the quadratics
and for the digits was changed after earlier runs, whose seeds (1000, ... and 3000, ...) don't
count.

On the digits, averaged weights (`schedule_free`) help SOAP and DMGD in SOAP alike, to one loss in
pilot runs; the two are shown, aside, and "first" is of the rest.
"""

import dataclasses
import hashlib
import math
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax

from nlx import optim
from nlx_experiments import compare_rows as rows_of
from nlx_experiments import report, runs
from nlx_experiments.compare_search import SCHEDULES, Contest, Row, Store
from nlx_experiments.console import StopRequest, say
from nlx_experiments.errors import Refused

PLACE = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptimizers:
    """Compares deep optimizers with their rivals on small problems."""

    runs: pathlib.Path = pathlib.Path("runs/optimizers")
    """Where finished cells are kept."""
    only: tuple[str, ...] = ()
    """Rows to run; all by default."""
    place: pathlib.Path = PLACE
    """Where README.md and results/ are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(CompareOptimizers):
    """The same with two optimizers, two seeds and a few steps: does everything work?"""

    runs: pathlib.Path = pathlib.Path("runs/optimizers-tiny")
    place: pathlib.Path = pathlib.Path("runs/optimizers-tiny")


def main(options: CompareOptimizers) -> None:
    """Runs what is not known yet; writes table, picture and numbers after each row."""
    tiny = isinstance(options, Tiny)
    names = rows_of.TINY if tiny else rows_of.FULL
    unknown = [name for name in options.only if name not in names]
    if unknown:
        raise Refused(f"`only` holds {unknown[0]!r}; it must be one of {', '.join(names)}.")
    if not tiny and not (options.place / "README.md").exists():
        raise Refused(
            f"`place` is {options.place}, which holds no README.md to write the table to."
        )
    with runs.Run(options.runs) as run, StopRequest() as stop:
        runs.note_environment(run, say)
        run.agree("code", code())
        cache_compilations(run.folder)
        store, minutes = Store(run), run.read("minutes") or {}
        for name in options.only or names:
            row, before, begun = names[name](), minutes.get(name, 0), time.monotonic()
            results = compete(name, row, store, stop)
            minutes[name] = round(before + (time.monotonic() - begun) / 60, 2)
            run.write("minutes", minutes)
            write(options, name, row, results, minutes[name])
    say(f"\n{(options.place / 'results' / 'optimizers.md').read_text()}")
    say(f"{sum(minutes.values()):.0f} minutes in all")


def compete(name: str, row: Row, store: Store, stop: StopRequest) -> dict[str, Any]:
    """Every rule of a row under every schedule, at its best rate and setting, on fresh seeds."""
    results: dict[str, Any] = {}
    for rule_name, rule in row.rules.items():
        contest = Contest(name, row, rule_name, store, stop)
        entry: dict[str, Any] = {"deep": rule.deep, "aside": rule.aside}
        entry["bytes"] = contest.bytes()
        for schedule in row.schedules:
            begun = time.monotonic()
            cell, edge = contest.choose(schedule)
            record = contest.measure([cell._replace(fresh=True)])[cell._replace(fresh=True)]
            setting = rule.settings[cell.setting]
            entry[schedule] = {"rate": cell.rate, "setting": setting, "edge": edge, **record}
            took = time.monotonic() - begun
            say(f"{name}, {rule_name}, {schedule}: {loss(entry[schedule])} ({took:.0f} s)")
        results[rule_name] = {**entry, "seconds": contest.seconds()}
    return results


def code() -> dict[str, str]:
    """What decides a cell: the files of the optimizers and of this experiment, by their hashes."""
    names = ("rules", "rows", "tasks", "search")
    ours = [PLACE / "nlx_experiments" / f"compare_{name}.py" for name in names]
    files = [*sorted(pathlib.Path(optim.__file__).parent.glob("*.py")), *ours]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def cache_compilations(folder: pathlib.Path) -> None:
    """What was compiled once is not compiled again by the command that goes on."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))


def write(
    options: CompareOptimizers, name: str, row: Row, results: Mapping[str, Any], minutes: float
) -> None:
    """Adds a row to the numbers, and makes table and picture of all rows there are."""
    folder = options.place / "results"
    folder.mkdir(parents=True, exist_ok=True)
    known = (runs.read_json(folder / "optimizers.json") or {}).get("rows", {})
    declared = {s: list(d) for s, d in row.declared.items()}
    task = row.task
    stretch = task.steps // task.points
    known[name] = {
        "minutes": minutes,
        "steps": task.steps,
        "stretch": 1 if task.online else stretch,  # steps from one value of `descent` to the next
        "log": row.log,
        "declared": declared,
        "schedules": list(row.schedules),
        "optimizers": results,
    }
    names = rows_of.TINY if isinstance(options, Tiny) else rows_of.FULL
    known = {n: known[n] for n in names if n in known}
    content = {"environment": runs.environment(), "rows": known}
    runs.write_json(folder / "optimizers.json", content)
    panels = [panel(n, r, s) for n, r in known.items() for s in r["declared"]]
    report.plot_panels(folder / "optimizers.png", panels)
    verdicts = [f"* {line}" for n, r in known.items() for line in verdict(n, r)]
    shown = "\n".join([*verdicts, "", table(known).markdown()])
    runs.write_whole(folder / "optimizers.md", shown + "\n")
    if (options.place / "README.md").exists():
        report.place(options.place / "README.md", "optimizers", shown)


def table(known: Mapping[str, Any]) -> report.Table:
    """All rows, the best optimizers first; ** what was declared."""
    lines = []
    for name, row in known.items():
        entries = row["optimizers"]
        adamw = entries["adamw"]
        main_schedule = next(iter(row["declared"]))
        ordered = sorted(entries, key=lambda n: mean(entries[n][main_schedule]))
        names = {n for n, _ in row["declared"].values()}
        for rule_name in ordered:
            entry = entries[rule_name]
            cells: list[str] = [name, f"**{rule_name}**" if rule_name in names else rule_name]
            for schedule in SCHEDULES:
                cells += (
                    ["", "", ""]
                    if schedule not in entry
                    else [
                        loss(entry[schedule]),
                        where(entry[schedule]),
                        steps(row, entry[schedule], adamw[schedule]),
                    ]
                )
            seconds = entry["seconds"] / adamw["seconds"]
            state = entry["bytes"] / max(adamw["bytes"], 1)
            lines.append((*cells, besides(entry[main_schedule]), f"{seconds:.1f}", f"{state:.2f}"))
    columns = ["row", "optimizer"]
    columns += [f"{s}: {c}" for s in SCHEDULES for c in ("loss", "at", "steps")]
    return report.Table("Optimizers", [*columns, "besides", "time", "bytes"], lines)


def verdict(name: str, row: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that was declared."""
    lines = []
    for schedule, (declared, most) in row["declared"].items():
        competing = {n: e for n, e in row["optimizers"].items() if not e.get("aside")}
        means = {n: mean(e[schedule]) for n, e in competing.items()}
        other = min((n for n in means if n != declared), key=lambda n: means[n])
        ours, best = means[declared], means[other]
        holds = ours < best if most == 1 else ours <= most * min(ours, best)
        aim = "first" if most == 1 else f"within {100 * (most - 1):.0f} % of the best"
        errors = [error(row["optimizers"][n][schedule]) for n in (declared, other)]
        apart = abs(best - ours) / max(math.hypot(*errors), 1e-30)
        lines.append(
            f"{name}, {schedule}: {declared} was meant {aim}: **{'yes' if holds else 'no'}**, "
            f"{ours:.3g} against {best:.3g} of {other}, {apart:.1f} standard errors apart."
        )
    return lines


def panel(name: str, row: Mapping[str, Any], schedule: str) -> report.Panel:
    """The curves of a row: what was declared, its two best rivals and AdamW in colour."""
    entries, declared = row["optimizers"], row["declared"][schedule][0]
    ordered = sorted(entries, key=lambda n: mean(entries[n][schedule]))
    strong = list(dict.fromkeys([declared, *[n for n in ordered if n != declared][:2], "adamw"]))
    colours = dict(zip(strong, report.COLOURS, strict=False))
    shown = [n for n in entries if n not in strong] + strong[::-1]
    curves = {
        n: (entries[n][schedule]["curve"], colours.get(n), 2.5 if n == declared else 1.2)
        for n in shown
    }
    return report.Panel(f"{name}, {schedule}", row["steps"], row["log"], curves)


def mean(result: Mapping[str, Any]) -> float:
    """Over seeds; infinite where one diverged."""
    losses = result["losses"]
    return math.inf if None in losses else statistics.fmean(losses)


def error(result: Mapping[str, Any]) -> float:
    """The standard error of the mean."""
    losses = result["losses"]
    if None in losses or len(losses) < 2:
        return math.inf
    return statistics.stdev(losses) / len(losses) ** 0.5


def loss(result: Mapping[str, Any]) -> str:
    """Mean and standard error, as the table shows them."""
    if None in result["losses"]:
        return "diverged"
    return f"{mean(result):.3g} ± {error(result):.1g}"


def where(result: Mapping[str, Any]) -> str:
    """Learning rate and setting; ! where better ones may lie beyond the grid."""
    setting = "".join(f", {name} {value:g}" for name, value in result["setting"].items())
    return f"{result['rate']:.2g}{'!' if result['edge'] else ''}{setting}"


def steps(row: Mapping[str, Any], result: Mapping[str, Any], adamw: Mapping[str, Any]) -> str:
    """Steps to the loss at which AdamW ends; within one permutation where those change."""
    target, descent = mean(adamw) * (1 + 1e-5), result.get("descent", result["curve"])  # rounded
    for i, value in enumerate(descent):
        if value is not None and value <= target:
            return f"{(i + 1) * row['stretch']}"
    return "-"


def besides(result: Mapping[str, Any]) -> str:
    """What else a row measures."""
    names = ("test", "plasticity", "forgetting")
    return ", ".join(f"{n} {result[n]:.3g}" for n in names if result.get(n) is not None)
