# SPDX-License-Identifier: Apache-2.0
"""How a model learns a stream of tasks: fourteen methods, the same rows and trials.

fine-tuning         Adam on all parameters, the class vectors among them
fine-tuning, rate 0.001     the same at a rate that is not chosen by what is left at the end
in context          no learning: examples of the tasks seen so far in the prompt (below)
ewc                 fine-tuning with the penalty strength/2 sum_tasks sum_n F_n (p_n - p*_n)^2
replay              fine-tuning, half of each batch from a memory of a few rows of the tasks before
replay, equal bytes the same, its rows as many bytes as "hope, 3 levels" carries in all
hope, k levels      k more levels of MLPs, each on its clock: the paper's stacking (below)
hope, 1 level, long horizon     one that remembers as long as the slowest of three: horizon x 16
hope, 3 levels, one clock   the same units, all written at every step, each remembering for as many
                    steps as on its own clock: what is not the clocks'
hope, 3 levels, values by adam  the same values and clocks, by Adam: what is not the rule's
hope, k levels, adam      whole units of every layer by Adam: clocks, not the rule, keys that move

**Fine-tuning.** Gradients are clipped to norm 1; Adam's memories go on from task to task.

**EWC** (Kirkpatrick et al., 2017, Eq. 3, a penalty for each task): after a task F is the diagonal
of the Fisher information, the mean over 64 rows of the squared gradient of log p(y | row),
the answers y drawn from the model itself; of language it is that of one scored byte, as the loss
is, a row's divided by how many it has.

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
16 steps and never. At the end of its period a level writes the mean gradient of the task's loss by
a rule of its own (Eq. 71, whose f is "an arbitrary optimizer"). With rate 0 it is the model that
was given. The paper leaves open how one MLP becomes several levels, how many layers learn, and by
which rule. Taken here:

- An MLP is a memory: hidden activations are keys, the rows of its last matrix the values found by
  them. What is found by a key is kept only if the key stays what it was, so a level writes values
  alone, and of the last layer: those of a layer below would move the keys of the layers above.
  All else has frequency 0, class vectors too.
- It writes by `least_squares`: the optimizer is a memory of its own, of the keys. A step is small
  along keys that were often seen and goes where they are new, so a class is written without writing
  over others. Scores of classes are linear in these values: the rule alone, on one clock, is close
  to what analytic class-incremental learning solves in closed form (Zhuang et al., 2022).
- A level remembers its keys for `horizon` firings, one number for all: the fastest for that many
  steps, the next for 4 times, the slowest for 16 times as many.
- **It carries data of earlier tasks**, in sum: the Gram matrix of a level's keys is their second
  moment over all that was read, [units, units]. No row can be taken from it as from replay's, but
  it is a memory of the past tasks' inputs, and it is counted.

What is called a level here is narrower than the paper's: of its units only the last layer's values
ever change, and its rule sees second moments of keys, which no gradient of the task's loss has.
Levels by least squares have one setting, the one chosen for three levels (`CHOSEN_AS`). As horizons
count firings, a further level also remembers longer: what that alone does, the one level with a
long horizon tells, and what clocks alone do, the levels on one clock.

Damping and periods were set by hand, and sixteen pilots on three tasks of one seed, by another form
of the same rule, decided that the last layer alone is written (four that wrote two layers ended at
55.6 % at best, twelve at 77.8); no rival had such pilots. An earlier table tried as many settings,
in part others: of EWC's strengths 100 and 10,000 the lower was best, of its rates 3e-3, of Hope's
rates 64 and 256 the lower, of its horizons 64 and 256 the longer; the grids go on from there.

**Bytes.** `carried` counts what a method takes from task to task beside the parameters in use
(`continual_rules.carried`), and of rows that are kept one byte for each of theirs and 4 for a
label.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from nlx.clock import Clock

PERIODS = (1, 4, 16)
LONG = PERIODS[-1]
Choice = Mapping[str, float]


class Method(NamedTuple):
    """One row of the tables.

    grid: what is tried. learns: all parameters; levels by least squares, on their clocks or on one,
    or with a horizon `LONG` times as long; their "values by adam", or whole "levels by adam"; or
    nothing. levels: how many. replay: which rows are kept: `Plan.kept`, or as many bytes as `EQUAL`
    carries.
    """

    grid: tuple[Choice, ...]
    learns: Literal[
        "all",
        "levels",
        "levels on one clock, for as many steps",
        "levels of a long horizon",
        "values by adam",
        "levels by adam",
        "nothing",
    ] = "all"
    levels: int = 0
    replay: Literal["no", "few", "equal"] = "no"


def _grid(**axes: tuple[float, ...]) -> tuple[Choice, ...]:
    grids = np.meshgrid(*axes.values(), indexing="ij")
    return tuple(
        dict(zip(axes, map(float, point), strict=True))
        for point in zip(*(g.ravel() for g in grids), strict=True)
    )


_RATES = _grid(rate=(3e-4, 1e-3, 3e-3, 1e-2))
_WRITE = _grid(rate=(16.0, 64.0), horizon=(256.0, 1024.0))
EQUAL = "hope, 3 levels"
METHODS: Mapping[str, Method] = {
    "fine-tuning": Method(_RATES),
    "fine-tuning, rate 0.001": Method(_grid(rate=(1e-3,))),
    "in context": Method(({},), "nothing"),
    "ewc": Method(_grid(rate=(3e-3,), strength=(1.0, 1e1, 1e2, 1e4))),
    "replay": Method(_RATES, replay="few"),
    "replay, equal bytes": Method(_RATES, replay="equal"),
    "hope, 1 level": Method(_WRITE, "levels", 1),
    "hope, 2 levels": Method(_WRITE, "levels", 2),
    EQUAL: Method(_WRITE, "levels", 3),
    "hope, 1 level, long horizon": Method(_WRITE, "levels of a long horizon", 1),
    "hope, 3 levels, one clock": Method(_WRITE, "levels on one clock, for as many steps", 3),
    "hope, 3 levels, values by adam": Method(_RATES, "values by adam", 3),
    "hope, 1 level, adam": Method(_RATES, "levels by adam", 1),
    f"{EQUAL}, adam": Method(_RATES, "levels by adam", 3),
}


# Levels by least squares have one setting, chosen for three of them.
CHOSEN_AS: Mapping[str, str] = dict.fromkeys(
    ("hope, 1 level", "hope, 1 level, long horizon", "hope, 2 levels", "hope, 3 levels, one clock"),
    EQUAL,
)


class Plan(NamedTuple):
    """What all methods are given: rows of a step, passes over a task, rows kept for replay."""

    batch: int
    epochs: int
    kept: int


def clocks_of(method: Method) -> list[Clock]:
    """Of its levels, in steps, fast to slow; none where there are none."""
    periods = PERIODS[:1] * method.levels if "one clock" in method.learns else PERIODS
    return [Clock(period) for period in periods[: method.levels]]


def stretches(method: Method) -> tuple[int, ...]:
    """Of its levels, how many horizons each remembers its keys for, in firings of its own."""
    if "one clock" in method.learns:
        return PERIODS[: method.levels]
    return (LONG if "long" in method.learns else 1,) * method.levels
