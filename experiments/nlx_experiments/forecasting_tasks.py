# SPDX-License-Identifier: Apache-2.0
"""A real series to forecast: sea surface temperatures of the equatorial Pacific, month by month.

Four regions (Nino 1+2, 3, 4 and 3.4), 1950 to 2016, in degrees Celsius: NOAA's ERSST v4 indices,
in the public domain, as the wheel of PyWavelets holds them. Each region is a series of its own. The
protocol is the one of long-term forecasting: the first 70 % of the months to train on, the next
10 % to choose by, the rest to report; the series standardised by the mean and deviation of the
first part; windows of `context` months, from which the next `horizon` follow; mean squared and mean
absolute error over all windows, regions and months.

Source: Huang et al. (2015), ERSST v4; Zhou et al. (2021), Informer, section 4 (protocol); Zeng et
al. (2023), Are Transformers Effective for Time Series Forecasting? (linear forecasters).
"""

import importlib.resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MONTHS_A_YEAR = 12
SHARES = 0.7, 0.8  # where training and validation end
RIDGES = tuple(10.0**n for n in range(-6, 1))


class Windows(NamedTuple):
    """Stretches of the series, and what follows them."""

    past: Float[np.ndarray, "n c"]
    future: Float[np.ndarray, "n h"]


def temperatures() -> Float[np.ndarray, "r t"]:
    """Region x month, degrees Celsius.

    Raises ImportError without PyWavelets, which the extra nlx[experiments] holds.
    """
    held = importlib.resources.files("pywt.data") / "sst_nino3.npz"
    with importlib.resources.as_file(held) as path, np.load(path) as file:
        table = file["data"]
    return table[:, 2::2].T.astype(float)  # year, month, then temperature and anomaly of each


def split(
    series: Float[np.ndarray, "r t"], context: int, horizon: int
) -> tuple[Windows, Windows, Windows]:
    """All windows of each part, standardised; a later part's first one looks into the part before.

    series: region x month. context, horizon: months, >= 1.

    Raises ValueError where a part holds no window.
    """
    months = series.shape[1]
    ends = [0, *(round(share * months) for share in SHARES), months]
    known = series[:, : ends[1]]
    series = (series - known.mean(1, keepdims=True)) / known.std(1, keepdims=True)
    parts = []
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        begin = max(first - context, 0)
        count = last - begin - context - horizon + 1
        if context < 1 or horizon < 1 or count < 1:
            raise ValueError(
                f"`context` is {context} and `horizon` {horizon}; both must be >= 1, and together "
                f"at most {last - begin}, the months of a part."
            )
        where = begin + np.arange(count)[:, None] + np.arange(context + horizon)
        windows = series[:, where].reshape(-1, context + horizon)
        parts.append(Windows(windows[:, :context], windows[:, context:]))
    return parts[0], parts[1], parts[2]


def normalised(windows: Windows) -> tuple[Windows, np.ndarray, np.ndarray]:
    """Windows less their mean, by their deviation (of the past alone); and both, [n, 1].

    Source: Kim et al. (2022), Reversible Instance Normalization, Eq. 2, without its parameters.
    """
    mean = windows.past.mean(1, keepdims=True)
    deviation = windows.past.std(1, keepdims=True) + 1e-5
    return Windows(*((x - mean) / deviation for x in windows)), mean, deviation


def errors(
    forecast: Float[np.ndarray, "n h"], future: Float[np.ndarray, "n h"]
) -> dict[str, float]:
    """{"mse", "mae"}, in units of the standardised series."""
    missed = forecast - future
    return {"mse": float(np.mean(missed**2)), "mae": float(np.mean(np.abs(missed)))}


def persistence(windows: Windows) -> Float[np.ndarray, "n h"]:
    """The last month again and again."""
    return np.repeat(windows.past[:, -1:], windows.future.shape[1], 1)


def last_year(windows: Windows) -> Float[np.ndarray, "n h"]:
    """The last twelve months again and again."""
    return windows.past[:, np.arange(windows.future.shape[1]) % MONTHS_A_YEAR - MONTHS_A_YEAR]


def average(windows: Windows) -> Float[np.ndarray, "n h"]:
    """The mean of the window."""
    return np.repeat(windows.past.mean(1, keepdims=True), windows.future.shape[1], 1)


def linear(train: Windows, validation: Windows, test: Windows) -> Float[np.ndarray, "n h"]:
    """Ridge regression from the normalised window to what follows, a map and a constant.

    (X'X / n + ridge I) W = X'Y / n, the ridge of RIDGES that does best on validation.
    """
    extended = lambda x: np.concatenate([x, np.ones((len(x), 1))], 1)
    known = normalised(train)[0]
    x, y = extended(known.past), known.future
    squares, products = x.T @ x / len(x), x.T @ y / len(x)
    best, lowest = None, np.inf
    for ridge in RIDGES:
        weights = np.linalg.solve(squares + ridge * np.eye(x.shape[1]), products)

        def forecast(windows: Windows, weights=weights) -> np.ndarray:
            scaled, mean, deviation = normalised(windows)
            return extended(scaled.past) @ weights * deviation + mean

        missed = errors(forecast(validation), validation.future)["mse"]
        if missed < lowest:
            best, lowest = forecast(test), missed
    assert best is not None
    return best
