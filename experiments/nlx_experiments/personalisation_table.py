# SPDX-License-Identifier: Apache-2.0
"""Tables and picture of `nlx run personalisation`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from nlx_experiments import paired, report

KINDS = ("kept", "reset", "shared")  # of a user's memory


def shown(results: Mapping[str, Any]) -> str:
    """Tables, who is ahead, and what others did to a user."""
    size, parts = results["size"], []
    for task, found in results["tasks"].items():
        rows = []
        for model, record in found["models"].items():
            loss = {kind: np.array(record["loss"][kind]) for kind in KINDS}
            mean = lambda x: f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})"
            rows.append(
                (
                    model,
                    record["parameters"],
                    record["bytes"],
                    mean(loss["kept"][:, 0]),
                    *(mean(loss[kind][:, -1]) for kind in KINDS),
                )  # fmt: skip
            )
        for name, nats in found["lines"].items():
            rows.append((name, "", "", f"{nats[0]:.3f}", f"{nats[-1]:.3f}", "", ""))
        columns = ["model", "parameters", "bytes a user", "first session", "last, kept"]
        table = report.Table("", [*columns, "last, reset", "last, shared"], rows)
        told = [
            f"* {model}: kept against reset "
            f"{_apart(record, 'reset').told(3, 'nats', less=True)}; against shared "
            f"{_apart(record, 'shared').told(3, 'nats', less=True)}."
            for model, record in found["models"].items()
        ]
        parts += [
            f"**{task}**: nats a token in the first session and in the {size['sessions']}th, of "
            f"{size['session']} tokens, {size['users']} users, mean of the seeds (lowest to "
            "highest):",
            table.markdown(),
            "In the last session, seed by seed, with the standard error; less is better:",
            "\n".join(told),
        ]
    served = [r for found in results["tasks"].values() for r in found["models"].values()]
    parts.append(
        f"Served together and alone, of each model {served[0]['served']:,} users: "
        f"{sum(r['differ'] for r in served)} of {sum(r['served'] for r in served):,} got other "
        "bits."
    )
    parts.append("![cost of a token by session](results/personalisation.png)")
    return "\n\n".join(parts)


def _apart(record: Mapping[str, Any], kind: str) -> paired.Difference:
    last = lambda of: [seed[-1] for seed in record["loss"][of]]
    return paired.by_seed(last("kept"), last(kind))


def plot(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Cost by session: a panel a task, a colour a model, a line a kind of memory."""
    tasks = results["tasks"]
    figure, grid = plt.subplots(
        1, len(tasks), figsize=(6.5 * len(tasks), 4.5), layout="constrained", squeeze=False
    )
    dashes = dict(zip(KINDS, ("-", ":", "--"), strict=True))
    for axes, (task, found) in zip(grid[0], tasks.items(), strict=True):
        for (model, record), colour in zip(found["models"].items(), report.COLOURS, strict=False):
            for kind in KINDS:
                nats = np.array(record["loss"][kind]).mean(0)
                label = model if kind == "kept" else "_"
                axes.plot(1 + np.arange(nats.size), nats, dashes[kind], color=colour, label=label)
        for (name, nats), grey in zip(found["lines"].items(), ("#bbbbbb", "#777777"), strict=False):
            axes.plot(1 + np.arange(len(nats)), nats, color=grey, label=name)
        title = f"{task}: memory kept —, reset ··, shared - -"
        axes.set(title=title, xlabel="session", ylabel="nats a token")
        axes.legend(frameon=False, fontsize=8)
    report.save(figure, path)
