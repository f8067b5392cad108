"""Forecasting: the series against PyWavelets' own reader, windows by hand, rules and a fit."""

import types

import numpy as np
import pytest
import pywt.data
from nlx_experiments import forecasting, forecasting_learner, sequence_learner
from nlx_experiments import forecasting_tasks as tasks
from nlx_experiments.forecasting_tasks import Windows

from nlx import nn


def test_the_series_is_the_one_that_its_package_reads():
    """`pywt.data.nino` standardises the quarters of the second region."""
    found = tasks.temperatures()
    assert found.shape == (4, 800)
    assert 18 < found.min() < found.max() < 32
    quarters = found[1, :792].reshape(-1, 3).mean(1)
    scaled = (quarters - quarters.mean()) / quarters.std(ddof=1)
    np.testing.assert_allclose(scaled, pywt.data.nino()[1], atol=1e-9)


def test_windows_of_a_part_forecast_its_own_months_only():
    months = np.arange(100.0)
    series = np.stack([months, 7 + 2 * months])
    train, validation, test = tasks.split(series, 10, 4)
    scaled = (months - months[:70].mean()) / months[:70].std()
    for part, first, last in ((train, 10, 70), (validation, 70, 80), (test, 80, 100)):
        count = last - first - 3
        assert part.past.shape == (2 * count, 10)
        for n in range(count):
            np.testing.assert_allclose(part.past[n], scaled[first - 10 + n : first + n])
            np.testing.assert_allclose(part.future[n], scaled[first + n : first + n + 4])
        np.testing.assert_allclose(part.past[count:], part.past[:count])  # both standardised
    with pytest.raises(ValueError, match="`context` is 10 and `horizon` 11; both must be >= 1"):
        tasks.split(series, 10, 11)


def test_rules_of_thumb_and_errors_by_hand():
    windows = Windows(np.arange(14.0)[None], np.array([[3.0, 3.0]]))
    assert tasks.persistence(windows).tolist() == [[13, 13]]
    assert tasks.last_year(windows).tolist() == [[2, 3]]
    assert tasks.average(windows).tolist() == [[6.5, 6.5]]
    assert tasks.errors(tasks.last_year(windows), windows.future) == {"mse": 0.5, "mae": 0.5}
    longer = Windows(windows.past, np.zeros((1, 13)))
    assert tasks.last_year(longer)[0, [0, 11, 12]].tolist() == [2, 13, 2]


def test_normalised_windows_scale_back():
    windows = Windows(np.random.default_rng(0).normal(5, 3, (6, 9)), np.ones((6, 2)))
    scaled, mean, deviation = tasks.normalised(windows)
    np.testing.assert_allclose(scaled.past.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.past.std(1), 1, atol=1e-4)
    np.testing.assert_allclose(scaled.future * deviation + mean, windows.future)


def test_the_linear_forecaster_finds_a_linear_law():
    """x_t = 2 cos(w) x_{t-1} - x_{t-2}: any two months tell the next ones, at any scale."""
    t = np.arange(200)[None]
    series = np.concatenate([np.sin(0.3 * t), 5 + 2 * np.sin(0.3 * t + 1)])
    parts = tasks.split(series, 21, 4)
    missed = tasks.errors(tasks.linear(*parts), parts[2].future)
    assert missed["mse"] < 1e-3 * tasks.errors(tasks.average(parts[2]), parts[2].future)["mse"]


def test_the_linear_forecaster_is_what_the_docstring_says():
    parts = tasks.split(tasks.temperatures(), 96, 12)
    assert tasks.errors(tasks.linear(*parts), parts[2].future)["mse"] == pytest.approx(
        0.57, abs=5e-3
    )
    assert forecasting.lines(parts)["persistence"]["mse"] == pytest.approx(1.51, abs=5e-3)


@pytest.mark.slow
def test_a_forecaster_learns_and_its_control_does_not():
    """A sine that repeats in the window: the same months at the same place of each patch."""
    t = np.arange(400)[None]
    parts = tasks.split(np.sin(2 * np.pi * t / 16), 32, 4)
    size = forecasting.TINY._replace(context=32, horizons=(4,), steps=60, every=30, rates=(2e-2,))
    config = nn.ModelConfig(
        mixer="attention", feed_forward="swiglu", vocabulary=2, width=8, heads=2, layers=1, hidden=8
    )
    missed = {}
    for control in (False, True):
        record = forecasting.measure(config, 4, size, parts, control)
        missed[control] = forecasting.best(record)["mse"][0]
    assert missed[False] < 0.1 < 0.5 < missed[True]


def test_a_signal_ends_a_cell_after_the_validation_it_came_in(monkeypatch):
    """Nothing is compiled: what trains does nothing, what examines finds one error."""
    parts = tasks.split(np.sin(np.arange(400.0))[None], 32, 4)
    size = forecasting.TINY._replace(context=32, horizons=(4,), steps=60, every=5)
    state = types.SimpleNamespace(params={"w": np.zeros(1)})
    fake = lambda *given, **named: (lambda seeds: state, lambda *given: (state, None))
    monkeypatch.setattr(sequence_learner, "trainer", fake)
    monkeypatch.setattr(forecasting_learner, "_errors", lambda *given: [{"mse": 1.0, "mae": 1.0}])
    calls = []

    def leave():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    sizes = dict(vocabulary=2, width=8, heads=2, layers=1, hidden=8)
    config = nn.ModelConfig(mixer="attention", feed_forward="swiglu", **sizes)
    with pytest.raises(InterruptedError):
        forecasting_learner.measure(config, 4, size, parts, leave=leave)
    assert len(calls) == 3


def test_tables_show_models_rules_and_the_control(tmp_path):
    found = {"validation": [0.2, 0.3], "mse": [0.4, 0.5], "mae": [0.6, 0.7]}
    record = {"": {"rates": {"0.01": found}, "rate": "0.01"}}
    lines = {name: {"mse": 1.0, "mae": 2.0} for name in ("linear", *forecasting.RULES)}
    results = {"6": {"models": {"hope": record, forecasting.CONTROL: record}, "lines": lines}}
    text = forecasting.shown(results)
    assert "| hope | 0.450 (0.400 to 0.500) |" in text
    assert "| *control: what follows other windows* | 0.650 (0.600 to 0.700) |" in text
    assert "| *linear* | 2.000 |" in text
    assert "* 6 months: linear -0.550 ± 0.050, level." in text
    forecasting.plot(tmp_path / "errors.png", results)
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_hope_is_compared_seed_by_seed_with_rivals_and_the_linear_forecaster():
    record = lambda *missed: {"": {"rates": {"0.01": {"mse": [*missed]}}, "rate": "0.01"}}
    models = {
        "hope": record(0.4, 0.5, 0.6),
        "titans": record(0.5, 0.6, 0.7),
        "deltanet": record(0.6, 0.5, 0.4),
        forecasting.CONTROL: record(1.0, 1.0, 1.0),
    }
    task = {"models": models, "lines": {"linear": {"mse": 0.1}}}
    _, lines = forecasting.verdicts({"6": task})
    assert lines == (
        "* 6 months: titans -0.100 ± 0.000, ahead; deltanet +0.000 ± 0.115, level; "
        "linear +0.400 ± 0.058, behind."
    )
    del models["hope"]
    assert forecasting.verdicts({"6": task}) == []
