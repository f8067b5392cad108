"""Perplexity by position: stretches, windows, and the loss against rows read whole."""

import math

import numpy as np
import pytest
from nlx_experiments import context
from nlx_experiments.errors import Refused
from nlx_experiments.sequence_reading import Piece

TEXT = np.frombuffer(bytes(range(1, 200)) * 3, np.uint8)


def test_stretches_double_and_end_with_the_window():
    assert context.stretches(16) == [16]
    assert context.stretches(100) == [16, 32, 64, 100]
    assert context._rounded(np.arange(40.0), [16, 32, 40]) == [7.5, 23.5, 35.5]
    assert context._rounded(np.array([1.0, np.nan, 2.0, 2.0]), [2, 4]) == [None, 2.0]


def test_windows_lie_evenly_from_the_first_byte_to_the_last():
    batch = context.evenly(TEXT, 3, 100)
    assert batch.tokens[:, 0].tolist() == [TEXT[0], TEXT[248], TEXT[496]]
    assert batch.answers[-1, -1] == TEXT[-1]
    assert (batch.tokens[:, 1:] == batch.answers[:, :-1]).all()
    with pytest.raises(Refused, match="`--data` leaves 100 bytes to report on; it must be more"):
        context.evenly(TEXT[:100], 3, 100)


def test_the_loss_of_a_stretch_is_the_mean_of_its_places_in_all_windows(monkeypatch):
    lost = np.random.default_rng(0).random((2, 3, 40))
    asked = []

    def read(model, weights, pieces, *, capacity, leave):
        done = 0
        for piece in pieces:
            asked.append((piece.tokens.shape, capacity))
            part = lost[:, :, done : done + piece.tokens.shape[1]]
            done += piece.tokens.shape[1]
            yield Piece(piece, part > 1, part)

    monkeypatch.setattr(context, "read", read)
    batch = context.evenly(TEXT, 3, 40)
    found = context.examine(batch, 12, None, None, lambda: None)  # type: ignore[arg-type]
    assert found["ends"] == [16, 32, 40]
    assert asked == [((3, 12), 40)] * 3 + [((3, 4), 40)]
    for seed in range(2):
        means = [lost[seed, :, a:b].mean() for a, b in ((0, 16), (16, 32), (32, 40))]
        np.testing.assert_allclose(found["loss"][seed], means, atol=1e-5)


def test_tables_show_perplexities(tmp_path):
    bins = {"fresh": {"rows": [0.0] * 2, "tokens": [0.5] * 2, "loss": [1.0] * 2}}
    found = {"validation": 1.0, "validations": [1.0] * 2, **bins}
    exam = {"ends": [16, 32], "loss": [[math.log(4), math.log(2)], [math.log(9), math.log(2)]]}
    models = {"hope": {"": {"rates": {"0.01": found}, "rate": "0.01", "steps": 9, "exam": exam}}}
    plan = {"bins": {"fresh": (1, 2)}, "stages": [[0, 256]], "tested": 9}
    results = {context.TASK: {"plan": plan, "chance": {"fresh": 0.1}, "models": models}}
    sizes = {"hope": {"": 4_321}}
    text = context.shown(results, sizes)
    assert "| model | state | 1 to 16 | 17 to 32 |" in text
    assert "| hope | 4,321 | 6.500 (4.000 to 9.000) | 2.000 (2.000 to 2.000) |" in text
    exam["loss"][0][1] = None
    assert "| nan (nan to nan) |" in context.shown(results, sizes)
    context.plot(tmp_path / "curves.png", results[context.TASK])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_hope_is_compared_seed_by_seed_beyond_the_length_trained_on():
    """Positions count alike: 32 of the stretch to 64, 16 of the one to 80."""

    def record(*by_seed):
        found = {"validation": 1.0, "fresh": {"tokens": [0.5] * 3}}
        exam = {
            "ends": [16, 32, 64, 80],
            "loss": [[9.0, 9.0, late, last] for late, last in by_seed],
        }
        return {"": {"rates": {"0.01": found}, "rate": "0.01", "steps": 9, "exam": exam}}

    models = {
        "hope": record((1.0, 4.0), (1.1, 4.0), (1.2, 4.0)),
        "titans": record((1.0, 4.3), (1.1, 4.3), (1.2, 4.3)),
        "deltanet": record((1.2, 4.0), (1.1, 4.0), (1.0, 4.0)),
        "gated deltanet": record((1.0, 1.0), (1.0, 1.0), (1.0, None)),
    }
    task = {"plan": {"stages": [[0, 32]]}, "models": models}
    said, lines, aim = context.verdicts(task)
    assert "after the first 32" in said
    assert lines.splitlines() == [
        "* Hope against titans: -0.1000 ± 0.0000 nats, ahead.",
        "* Hope against deltanet: +0.0000 ± 0.0770 nats, level.",
        "* Hope against gated deltanet: +nan nats, a training diverged.",
    ]
    assert aim == (
        "The aim: at least level with Titans in the mean: yes; above deltanet: no; "
        "above gated deltanet: no."
    )
    assert context.verdicts({**task, "plan": {"stages": [[0, 80]]}}) == []
