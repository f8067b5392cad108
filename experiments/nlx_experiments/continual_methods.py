# SPDX-License-Identifier: Apache-2.0
"""How a model learns a stream of tasks: twelve methods, the same rows, steps and trials.

fine-tuning         Adam on all parameters, the class vectors among them
in context          no learning: examples of the tasks seen so far in the prompt (below)
ewc                 fine-tuning with the penalty strength/2 sum_tasks sum_n F_n (p_n - p*_n)^2
replay              fine-tuning, half of each batch from a memory of a few rows of the tasks before
replay, equal bytes the same, its rows as many bytes as "least squares, 3 levels" carries in all
hope, k levels      k more levels of MLPs, each on its clock: the paper's stacking (below)
least squares, k levels      k levels that share the last layer's values: no stacking (below)
least squares, 3 levels, adam      the same, each level with Adam in place of its write

**Fine-tuning.** Gradients are clipped to norm 1; Adam's memories go on from task to task.

**EWC** (Kirkpatrick et al., 2017, Eq. 3, a penalty for each task): after a task F is the diagonal
of the Fisher information, the mean over 64 rows of the squared gradient of log p(y | row),
the answers y drawn from the model itself.

**Replay** (Chaudhry et al., 2019): after a task `kept` rows of each of its classes (of language:
of the task) are kept for ever; at equal bytes its share of them, each task's the same, which may be
all rows: then it is an upper bound. A step takes half of its rows from the task, so that it costs
what the others' do.

**In context**: before a question stand as many training rows with their answers as fit into the
window the model was trained on. Of classes and translations those most alike, by byte trigrams
shared with the question (retrieval, Liu et al., 2022); of domains any. Classes are scored by the
likelihood of their names; one row of each class is asked.

**Hope.** Ad-hoc stacking (Behrouz et al., 2025, section 7.3). What was pretrained is the level that
stands still, and k levels are added: the hidden units of every MLP are cut into k + 1 groups
(`nn.from_pretrained_mlps(split=True)`, which computes what the model did), on the clocks of 1, 4,
16 steps and never. At the end of its period a group moves by Adam on the mean gradient of the
task's loss (Eq. 71). Attention, embeddings, norms of the blocks and class vectors belong to no
level: their frequency is 0. With rate 0 it is the model that was given. The paper leaves open how
one MLP becomes several levels, how many layers, and which rule moves them.

**Least squares.** Not the paper's stacking, and no Hope by its name: what recursive least squares
on fixed keys keeps, on clocks. An MLP is a memory: hidden activations are keys, the rows of its
last matrix the values found by them. k levels on the clocks 1, 4, 16 add to the last layer's
values, each its own share, which starts at 0 (the nested variant of `nlx.nn.CMS`, Eq. 72, but that
no share begins anew: what a level remembers of its keys fades). It departs from the paper in this:

- Keys, attention, embeddings, norms and class vectors stay fixed. What is found by a key is kept
  only if the key stays what it was. For the same reason the values of the last layer alone are
  written: those of a layer below would move the keys of the layers above. (In a pilot on three
  tasks the best of four trials that wrote both layers ended at 55.6 %, the best of twelve that
  wrote the last alone at 77.8.)
- At the end of its period a level writes the mean gradient of the task's loss by `least_squares`:
  the step is small along keys that were often seen and goes where they are new, so a class is
  written without writing over others. Scores of classes are linear in these values, so this is
  close to what analytic class-incremental learning solves in closed form (Zhuang et al., 2022).
- Each level remembers its keys for `horizon` firings, one number for all: the fastest for that many
  steps, the next for 4 times, the slowest for 16 times as many.
- **It carries data of earlier tasks**, in sum: the Gram matrix of a level's keys is their second
  moment over all that was read, [units, units]. No row can be taken from it as from replay's, but
  it is a memory of the past tasks' inputs, and it is counted.

A pilot on a linear map alone (10 domains, one seed; the fixed keys of a model of 400 steps, rate
16): with a horizon of 64 firings 1, 2 and 3 levels end at 68.6, 73.2 and 74.8 % and know each task
just after it at 87.7, 87.2 and 87.0 %; of 256 at 79.5, 79.4, 78.9 and 84.8, 85.0, 85.2.

What each is worth can be read off the rows: "least squares, 1 level" has the write on one clock, so
its distance from fine-tuning is the fixed keys' and the write's, not levels'; what levels add is
the distance from there; "least squares, 3 levels, adam" has fixed keys and clocks without the
write.

**Bytes.** `carried` counts what a method takes from task to task beside the parameters in use
(`continual_rules.carried`), and of rows that are kept one byte for each of theirs and 4 for a
label.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from nlx.clock import Clock

PERIODS = (1, 4, 16)
Choice = Mapping[str, float]


class Method(NamedTuple):
    """One row of the tables.

    grid: what is tried. learns: all parameters; MLPs "stacked" as levels; levels that add to one
    layer's "shared" values, by least squares or "shared by adam"; or nothing. levels: how many.
    replay: which rows are kept: `Plan.kept`, or as many bytes as `EQUAL` carries.
    """

    grid: tuple[Choice, ...]
    learns: Literal["all", "stacked", "shared", "shared by adam", "nothing"] = "all"
    levels: int = 0
    replay: Literal["no", "few", "equal"] = "no"


def _grid(**axes: tuple[float, ...]) -> tuple[Choice, ...]:
    grids = np.meshgrid(*axes.values(), indexing="ij")
    return tuple(
        dict(zip(axes, map(float, point), strict=True))
        for point in zip(*(g.ravel() for g in grids), strict=True)
    )


_RATES = _grid(rate=(3e-4, 1e-3, 3e-3, 1e-2))
_WRITE = _grid(rate=(16.0, 64.0), horizon=(64.0, 256.0))
EQUAL = "least squares, 3 levels"
METHODS: Mapping[str, Method] = {
    "fine-tuning": Method(_RATES),
    "in context": Method(({},), "nothing"),
    "ewc": Method(_grid(rate=(1e-3, 3e-3), strength=(1e2, 1e4))),
    "replay": Method(_RATES, replay="few"),
    "replay, equal bytes": Method(_RATES, replay="equal"),
    "hope, 1 level": Method(_RATES, "stacked", 1),
    "hope, 2 levels": Method(_RATES, "stacked", 2),
    "hope, 3 levels": Method(_RATES, "stacked", 3),
    "least squares, 1 level": Method(_WRITE, "shared", 1),
    "least squares, 2 levels": Method(_WRITE, "shared", 2),
    EQUAL: Method(_WRITE, "shared", 3),
    f"{EQUAL}, adam": Method(_RATES, "shared by adam", 3),
}


class Plan(NamedTuple):
    """What all methods are given: rows of a step, passes over a task, rows kept for replay."""

    batch: int
    epochs: int
    kept: int


def clocks_of(method: Method) -> list[Clock]:
    """Of its levels, in steps, fast to slow; none where there are none."""
    return [Clock(period) for period in PERIODS[: method.levels]]
