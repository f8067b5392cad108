"""Every variant of long context: models of equal parameters, and exams that decide cells."""

import numpy as np
import pytest
from nlx_experiments import babilong, context, forecasting, long_context, needle
from nlx_experiments import sequence_learner as learner

TEXT = np.frombuffer(bytes(range(1, 200)) * 400, np.uint8)
TEXTS = TEXT, TEXT, TEXT


def parameters(models):
    return [learner.count(config) for variants in models.values() for config in variants.values()]


@pytest.mark.slow
@pytest.mark.parametrize("module", [needle, babilong, context])
@pytest.mark.parametrize("size", ["FULL", "OF_GPU"])
def test_models_have_equal_parameters_and_cells_know_their_exam(module, size):
    size = getattr(module, size)
    made = {
        needle: lambda longest: needle.full(size, longest, needle._in_symbols()),
        babilong: lambda longest: babilong.full(size, TEXTS, longest, 5_000),
        context: lambda longest: context.full(size._replace(examined=longest), TEXTS),
    }[module]
    short, long = made(1024), made(4096)
    for name, row in short.items():
        assert list(row.models) == ["hope", "titans", "deltanet", "gated deltanet", "transformer"]
        counts = parameters(row.models)
        assert max(counts) < 1.02 * min(counts)
        assert row.control == row.models["deltanet"][""]
        assert row.plan.seeds >= 3
        assert row.exam is not None
        other = long[name].exam
        assert other is not None
        assert row.exam.what != other.what
        longest = list(row.plan.bins)[-1]
        assert module is context or longest in row.task.examined


@pytest.mark.slow
@pytest.mark.parametrize("size", [forecasting.FULL, forecasting.OF_GPU])
def test_forecasters_have_equal_parameters(size):
    sizes = {**long_context.base(2, size.width, size.layers), "chunk_size": 4}
    counts = parameters(long_context.contestants(sizes, size.parameters))
    assert max(counts) < 1.02 * min(counts)
    assert size.context % 4 == 0
    assert size.steps % size.every == 0
