# SPDX-License-Identifier: Apache-2.0
"""What the pictures and tables of `nlx inspect` say: texts, places, lines and cells are read."""

import numpy as np
import pytest
from nlx_experiments import arrows, diagram, heatmap, report, whitebox

from nlx.inspect import Link, Range, Row, Trace, Watched

MEMORY, ATTENTION = "blocks.*.mixer.memory.*", "blocks.*.mixer.attention"
CONVOLUTION = "blocks.*.mixer.streams.key.convolution"


@pytest.fixture
def figures(monkeypatch):
    """Figures by the name of their file, instead of files."""
    kept = {}
    monkeypatch.setattr(report, "save", lambda figure, path: kept.update({path.name: figure}))
    return kept


def row(name, clock, write="gated(clip=1.0)"):
    return Row(name, 2, 64, "association per token", "l2", write, clock, 1)


ROWS = [
    row("outer", "every step", "restarted(summed(reduce=mean), firings=4)"),
    row(ATTENTION, "every token"),
    row(MEMORY, "32 tokens"),
    row(CONVOLUTION, "every token"),
]
LINKS = [
    Link("outer", MEMORY, "initial state"),
    Link("outer", MEMORY, "retain"),
    Link("outer", ATTENTION, "query"),
    Link("outer", CONVOLUTION, "context"),
    Link(MEMORY, ATTENTION, "value"),
    Link(ATTENTION, MEMORY, "rate"),
    Link(MEMORY, MEMORY, "erase"),
    Link(CONVOLUTION, MEMORY, "key"),
]


def drawn(figures, tmp_path, rows=ROWS, links=LINKS):
    diagram.draw(tmp_path / "levels.png", "title", rows, links)
    figure = figures["levels.png"]
    figure.canvas.draw()
    axes = figure.axes[0]
    return axes, {text.get_text(): text for text in axes.texts if text.get_text()}


def ends(axes):
    """(colour, where it ends) of every arrow."""
    arrows_ = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    return [(a.arrow_patch.get_edgecolor(), a.xy) for a in arrows_]


def test_every_arrow_says_what_it_hands_over(figures, tmp_path):
    _, texts = drawn(figures, tmp_path)
    words = {"initial state", "retain", "query", "context", "value", "rate", "key", "↺ erase"}
    labels = {"memory", "attention", "convolutions", "outer", "blocks.*.mixer"}
    bands = {"every step", "32 tokens", "every token"}
    inside = {"l2", "gated", "2 × 32", "summed, restarted at 4"}
    assert set(texts) == words | labels | bands | inside


def test_slow_levels_stand_at_the_bottom_in_their_bands(figures, tmp_path):
    _, texts = drawn(figures, tmp_path)
    height = lambda name: texts[name].get_position()[1]
    assert height("every step") < height("32 tokens") < height("every token")
    for box, band in (("outer", "every step"), ("memory", "32 tokens"),
                      ("attention", "every token"), ("convolutions", "every token")):  # fmt: skip
        assert abs(height(box) - height(band)) < arrows.HEIGHT / 2


def test_arrows_end_at_their_box(figures, tmp_path):
    axes, texts = drawn(figures, tmp_path)
    found = ends(axes)
    centre = {name: texts[name].get_position()[0] for name in ("memory", "attention")}
    for word, target in (("initial state", "memory"), ("retain", "memory"), ("query", "attention")):
        x = texts[word].get_position()[0]
        assert abs(x - centre[target]) < arrows.WIDTH / 2
        box = texts[target].get_position()[1] - 0.43
        (y,) = {round(end[1], 6) for _, end in found if abs(end[0] - x) < 1e-6 and end[1] < box}
        assert abs(y - (box - arrows.HEIGHT / 2)) < 1e-6


def test_texts_stay_in_their_boxes_and_no_line_strikes_one(figures, tmp_path):
    long = "scale_by_a_rule_of_long_name"
    axes, texts = drawn(figures, tmp_path, [row(long, "8 steps"), *ROWS])
    width = axes.transData.transform([(arrows.WIDTH, 0), (0, 0)])
    most = width[0, 0] - width[1, 0]
    for name in ("memory", "convolutions", "l2", "2 × 32", long):
        assert texts[name].get_window_extent().width < most
    lines = max(line.get_zorder() for line in axes.lines)
    for word in ("initial state", "retain", "query", "key", "value", "rate", "context"):
        ground = texts[word].get_bbox_patch()  # hides the line behind it
        assert ground.get_facecolor() == (1, 1, 1, 1)
        assert texts[word].get_zorder() > lines


def test_mixers_of_different_blocks_share_no_frame(figures, tmp_path):
    rows = [ROWS[0], row("blocks.*.mixer", "every token"), row("blocks.*.mixer.memory", "2 tokens")]
    _, texts = drawn(figures, tmp_path, rows, [])
    assert {"attention", "memory"} <= set(texts)
    assert "blocks.*.mixer" not in texts  # no frame, so none of its names


def trace(seed, ticks=40):
    numbers = np.random.default_rng(seed).uniform(0.2, 0.8, size=(6, 1, ticks, 2))
    return Trace(*numbers[:4], Range(-numbers[4], numbers[5]))


def test_a_text_stands_on_its_values(figures, tmp_path):
    content = np.frombuffer(b"ab\ncd", np.uint8)
    values = np.array([1.0, 2, 3, 4, 5])
    heatmap.draw(tmp_path / "text.png", "title", content, values, "bits")
    axes = figures["text.png"].axes[0]
    grid = axes.images[0].get_array()
    for text in axes.texts:
        column, line = text.get_position()
        index = {"a": 0, "b": 1, "↵": 2, "c": 3, "d": 4}[text.get_text()]
        assert grid[line, column] == values[index]


def test_rows_of_traces_draw_what_they_name(figures, tmp_path):
    levels = {f"blocks.0.mixer.{name}": trace(n) for n, name in enumerate(("key", "memory"))}
    heatmap.draw_traces(tmp_path / "traces.png", levels)
    axes = figures["traces.png"].axes
    named = dict(zip(("update", "retention", "age", "eigenvalues"), axes, strict=True))
    for (word, at), of in zip(named.items(), ("update", "retain", "age", None), strict=True):
        assert at.get_ylabel().startswith(word)
        for n, each in enumerate(levels.values()):
            if of is None:
                low = heatmap._smooth(each.eigenvalues.low[0].min(-1))
                high = heatmap._smooth(each.eigenvalues.high[0].max(-1))
                np.testing.assert_allclose(at.lines[2 * n].get_ydata(), low)
                np.testing.assert_allclose(at.lines[2 * n + 1].get_ydata(), high)
            else:
                faint, strong = (line.get_ydata() for line in at.lines[2 * n : 2 * n + 2])
                mean = getattr(each, of)[0].mean(-1)
                np.testing.assert_allclose(faint, mean)
                np.testing.assert_allclose(strong, heatmap._smooth(mean))


def test_inner_surprise_is_that_of_the_memories(figures, tmp_path):
    content = np.frombuffer(b"abcdefgh", np.uint8)
    levels = {"blocks.0.mixer.memory": trace(0, 8), "blocks.0.mixer.key": trace(1, 8)}
    lengths = np.array([1, 2, 1, 1, 1, 1, 1])  # bytes of each token
    whitebox._memories(tmp_path, content, lengths, Watched(np.zeros((1, 7)), levels), {})
    size = levels["blocks.0.mixer.memory"].surprise[0, 1:].mean(-1)
    shown = figures["inner.png"].axes[0].images[0].get_array()[0, :8]
    np.testing.assert_allclose(shown, np.repeat(size / size.mean(), lengths))


def test_cells_of_the_trace_table_stand_under_their_names():
    level = trace(0)
    table = whitebox._trace_table({"memory": level})
    (cells,) = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows]
    assert cells == {
        "memory": "memory",
        "surprise": level.surprise.mean(),
        "update": level.update.mean(),
        "retention": level.retain.mean(),
        "age at the end": level.age[:, -1].mean(),
        "eigenvalues from": level.eigenvalues.low.min(),
        "to": level.eigenvalues.high.max(),
    }
