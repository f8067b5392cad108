# SPDX-License-Identifier: Apache-2.0
"""The rows of Table 6, and their verdicts."""

import dataclasses

import pytest
from nlx_experiments import ablation


def test_an_ablation_without_the_whole_shows_what_there_is():
    found = {"held out": {"rows": [0.0] * 2, "loss": [1.0, 2.0]}, "validation": -1}
    found["validations"] = [-1, -1]
    record = {"rates": {"0.005": found}, "rate": "0.005", "steps": 1}
    plan = {"bins": {"held out": (4, 4)}}
    text = ablation.shown({"text": {"plan": plan, "models": {"w/o DGD": {"": record}}}})
    assert "| w/o DGD | 2.164 |  |  | 13.41 (+1.17) |  |  |  | 56.5 (-1.6) |" in text


def test_both_tasks_are_compared_with_the_papers_columns():
    """Text: lower is better; parity: the share of long rows, beside the paper's accuracy."""

    def record(loss, shares):
        found = {"held out": {"rows": [0.0] * 2, "loss": loss}, "validation": -1}
        found["validations"] = [-1, -1]
        found |= {b: {"rows": shares, "tokens": shares} for b in ("short", "long")}
        return {"": {"rates": {"0.005": found}, "rate": "0.005", "steps": 1}}

    models = {"Hope": record([1.0, 1.1], [1.0, 0.9]), "w/o DGD": record([1.2, 1.3], [0.6, 0.5])}
    tasks = {"text": ["held out"], "parity": ["short", "long"]}
    results = {
        t: {"plan": {"bins": dict.fromkeys(b, (1, 2))}, "models": models} for t, b in tasks.items()
    }
    text = ablation.shown(results)
    assert "+0.289 ± 0.000 | yes | 13.41 (+1.17) |" in text
    assert "All rows alike: text 1 steps, rate 0.005, 2 seeds; parity 1 steps," in text
    assert "55 (50 to 60) / 55 (50 to 60) | +40.0 ± 0.0 | yes | 56.5 (-1.6) |" in text


@pytest.mark.parametrize(
    "size", [ablation.FULL, pytest.param(ablation.OF_GPU, marks=pytest.mark.slow)]
)
def test_every_row_of_the_ablation_takes_one_thing_away(size):
    made = ablation.variants(256, size)
    assert list(made) == list(ablation.PAPER)
    whole = dataclasses.asdict(made["Hope"])
    for row, config in made.items():
        changed = {k for k, v in dataclasses.asdict(config).items() if whole[k] != v} - {"hidden"}
        assert changed == set(ablation.REMOVED[row])


def test_a_sign_is_only_told_beyond_the_noise():
    assert ablation.verdict(0.1, 0.01, 1.2, 4) == "yes"
    assert ablation.verdict(-0.1, 0.01, 1.2, 4) == "no"
    assert ablation.verdict(-0.1, 0.01, -0.05, 4) == "yes"
    assert ablation.verdict(0.01, 0.01, 1.2, 4) == "within the noise"
    assert ablation.verdict(0.03, 0.01, 1.2, 4) == "within the noise"  # t: 3.18 for four seeds
    assert ablation.verdict(0.03, 0.01, 1.2, 8) == "yes"
    assert ablation.verdict(0.03, 0.01, 1.2, 1) == "within the noise"
    assert ablation.verdict(float("nan"), 0.01, 1.2, 4) == "a training diverged"
    assert ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == (1, 0)
