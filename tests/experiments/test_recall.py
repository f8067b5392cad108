# SPDX-License-Identifier: Apache-2.0
"""Recall: equal bytes of state."""

import pytest
from nlx_experiments import recall

from nlx import nn


@pytest.mark.parametrize(
    ("options", "name", "steps"),
    [
        (recall.Recall(), "recall", 800),
        pytest.param(recall.Longer(), "recall-longer", 3200, marks=pytest.mark.slow),
        pytest.param(recall.Gpu(), "recall-gpu", 5000, marks=pytest.mark.slow),
    ],
)
def test_every_size_has_a_table_of_its_own(options, name, steps, monkeypatch):
    seen = []
    monkeypatch.setattr(recall.experiment, "run", lambda *given, measure: seen.append(given))
    recall.main(options)
    ((_, table, rows, _),) = seen
    assert table == name
    assert {row.plan.steps for row in rows.values()} == {steps}


@pytest.mark.parametrize("size", [recall.FULL, recall.OF_GPU])
def test_states_are_equal_where_they_are_said_to_be(size):
    for name, row in recall.full(size).items():
        told = 2**10 * int(name.split()[-2]) if "KiB" in name else size.state
        for model, variants in row.models.items():
            for config in variants.values():
                if model != "transformer":
                    assert abs(recall.state_bytes(config) / told - 1) < 0.2, (name, model)


def test_a_state_is_counted_once_and_without_what_stands_still():
    """Hope: four streams' convolutions of 3 tokens, then weights of each memory that learns."""
    size = lambda **fields: recall.state_bytes(
        nn.ModelConfig(
            mixer="self_modifying", feed_forward="cms", vocabulary=2, width=8, heads=2, layers=1,
            hidden=4, memory_hidden=5, cms_periods=(1,), chunk_size=4, projection_chunk_size=4,
            **fields,
        )
    )  # fmt: skip
    memory = 2 * 2 * 4 * 5  # two heads, two matrices
    rest = 4 * 3 * 8 + 1  # and where the row stands
    assert size() == 4 * (rest + 2 * 5 * memory)
    assert size(momentum=False) == 4 * (rest + 5 * memory)
    assert size(momentum=False, retain=False) == 4 * (rest + 4 * memory)
    assert size(momentum=False, adaptive_key=False) == 4 * (rest + 4 * memory)
    still = dict(retain=False, adaptive_key=False, adaptive_value=False)
    assert size(momentum=False, **still) == 4 * (rest + 2 * memory)
