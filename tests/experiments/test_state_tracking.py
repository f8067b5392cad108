# SPDX-License-Identifier: Apache-2.0
"""State tracking: who competes, and the paper's table beside ours."""

import numpy as np
from nlx_experiments import formal_languages, recall, sequence_learner, state_tracking


def test_the_same_models_compete_everywhere_with_as_many_parameters():
    """Within 1 % where `hidden` can do it, and the variants of Hope are what they are called."""
    tracking, recalled = state_tracking.full(), recall.full()
    for row in (tracking["parity"], tracking["a^n b^n"], tracking["S5"], recalled["compression"]):
        decoded = 64 if row.task.compressed else 0
        counts = {
            (model, variant): sequence_learner.count(config, decoded)
            for model, variants in row.models.items()
            for variant, config in variants.items()
        }
        middle = np.median(list(counts.values()))
        assert max(abs(c / middle - 1) for c in counts.values()) < 0.01, counts
    hope = state_tracking.full()["a^n b^n"].models["hope"]["additive, C = 128"]
    assert (hope.erase, hope.retain, hope.momentum, hope.chunk_size) == (False,) * 3 + (128,)


def test_the_default_is_a_part_of_the_whole():
    rows = state_tracking.full()
    part = state_tracking.few(rows)
    assert list(part) == [*formal_languages.LANGUAGES, "S5 by swaps"]
    for name, row in part.items():
        assert {m: len(v) for m, v in row.models.items()} == dict(hope=2, deltanet=2, transformer=2)
        for model, variants in row.models.items():
            assert variants.items() <= rows[name].models[model].items()
        assert row.plan == rows[name].plan


def test_the_papers_table_is_beside_ours():
    shares = {"rows": [1.0, 0.5], "tokens": [1.0, 0.9], "loss": [0.0, 0.1]}
    found = {"a": shares, "b": shares, "validation": 1.5, "validations": [2.0, 1.0]}
    record = {"rates": {"0.01": found}, "rate": "0.01", "steps": 1}
    task = {"plan": {"bins": {"a": (2, 50), "b": (51, 100)}}, "chance": {"a": 0.5, "b": 0.5}}
    names = list(formal_languages.LANGUAGES)
    results = {n: task | {"models": {"deltanet": {"": record}}} for n in names}
    text = state_tracking.shown(results)
    assert "| deltanet | 75/75 [100/100] (98.2/10.1) | 75/75 [100/100] (0/0) |" in text
    assert "not run here: LSTM 100/100, 100/100," in text
    assert "parity 50/50; (aa)* 50/50;" in text
    assert "| deltanet | 1 of 2 | 1 of 2 |" in text
