"""`nlx inspect` on presets, optimizers and runs: tables, pictures, one page."""

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import pytest
from nlx_experiments import config, heatmap, learner, run, whitebox

from nlx.inspect import Range, Trace

MODEL = dict(width=8, layers=1, heads=2, hidden=8, memory_hidden=4)
TEXT = "def é(x):\n\treturn '日本' + x\x01 # end\n"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(*paths):
    """Every path is a picture with something on it."""
    for path in paths:
        pixels = plt.imread(path)
        assert min(pixels.shape[:2]) > 100
        assert pixels.std() > 0.02


def begun(monkeypatch, preset, optimizer="adamw", **fields):
    """A run of a small model that has not learned."""
    chosen = config.to_json(config.make(preset, optimizer=optimizer, run=pathlib.Path("some")))
    chosen["model"] |= MODEL | fields
    pathlib.Path("some").mkdir()
    pathlib.Path("some/config.json").write_text(json.dumps(chosen))
    pathlib.Path("text").write_text(TEXT)
    record = {"step": 1, "updates": {"outer": 0.5, "cms_0": 0.0}}
    pathlib.Path("some/metrics.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(learner, "load", learner.build)


def test_a_run_gets_pictures_and_a_page(monkeypatch, capsys):
    begun(monkeypatch, "deltanet-tiny", "dmgd")
    assert run.main(["inspect", "some", "--text", "text"]) == 0
    out = capsys.readouterr().out
    assert "blocks.*.mixer.memory" in out  # the levels
    assert "blocks.0.mixer.memory  " in out  # what they did
    assert "scale_by_deep_momentum.deep" in out  # the optimizer
    assert "The page: some/inspect/index.html" in out
    names = ("levels", "optimizer", "surprise", "inner", "memories", "training")
    shown(*(f"some/inspect/{name}.png" for name in names))
    page = pathlib.Path("some/inspect/index.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)


def test_traces_of_many_blocks_and_levels_are_drawn(folder):
    def trace(seed):
        numbers = np.random.default_rng(seed).uniform(size=(6, 1, 30, 2))
        return Trace(*numbers[:4], Range(-numbers[4], numbers[5]))

    names = [f"blocks.{n}.mixer.{level}" for n in range(6) for level in ("key", "memory")]
    heatmap.draw_traces(folder / "wide.png", {name: trace(n) for n, name in enumerate(names)})
    shown(folder / "wide.png")
    assert plt.imread(folder / "wide.png").shape[1] == 120 * (2 + 5 * 4)  # four blocks of the six


def test_a_transformer_says_what_it_has_not(monkeypatch, capsys):
    begun(monkeypatch, "transformer++-tiny")
    assert run.main(["inspect", "some", "--text", "text"]) == 0
    out = capsys.readouterr().out
    assert "attention, which keeps tokens as they are" in out
    assert "adamw, as adam_memory: its levels" in out
    drawn = {path.stem for path in pathlib.Path("some/inspect").glob("*.png")}
    assert drawn == {"levels", "optimizer", "surprise", "training"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("missing", "missing, which cannot be read: No such file"),
        ("empty", "empty, which is empty"),
    ],
)
def test_a_text_that_is_none_is_refused(text, says, monkeypatch, capsys):
    begun(monkeypatch, "transformer++-tiny")
    pathlib.Path("empty").write_text("")
    assert run.main(["inspect", "some", "--text", text]) == 2
    assert says in capsys.readouterr().err
    assert not pathlib.Path("some/inspect").exists()


@pytest.mark.parametrize("name", ["hope-attention-tiny", "titans-mac-tiny", "samba-tiny"])
def test_an_architecture_has_a_table_and_a_picture(name, capsys):
    assert run.main(["inspect", name]) == 0
    assert "blocks.*.mixer" in capsys.readouterr().out
    shown(f"runs/inspect/{name}.png")


@pytest.mark.parametrize("name", ["dmgd", "m3", "dgd", "feature_momentum", "soap"])
def test_an_optimizer_has_a_table_and_a_picture(name, capsys):
    assert run.main(["inspect", name]) == 0
    out = capsys.readouterr().out
    assert "objective" in out
    assert f"runs/inspect/{name}.png" in out
    shown(f"runs/inspect/{name}.png")


def test_all_optimizers_are_known_by_name():
    expected = {"dmgd", "m3", "adam_memory", "momentum", "dgd", "soap", "delta_momentum"}
    assert expected <= set(whitebox.optimizers())


def test_every_byte_has_its_place():
    content = np.frombuffer(TEXT.encode(), np.uint8)
    marks = heatmap._characters(content)
    places, rows = heatmap._places(content)
    assert len(marks) == len(places) == len(content)
    assert "".join(marks) == "def é(x):↵→return '□□' + x□ # end↵"
    assert rows == 2
    assert len({tuple(place) for place in places}) == len(content)


def test_the_bytes_that_stand_out_are_listed_with_their_places():
    content = np.frombuffer(b"a bank of sand\n", np.uint8)
    bits, inner = np.zeros(15), np.zeros(15)
    bits[[3, 14]], inner[[0, 10]] = (2.5, 9.0), (4.0, 3.0)
    table = whitebox._standing_out(content, bits, inner)
    assert len(table.rows) == whitebox.MOST
    assert table.rows[0] == (r"14:  of sand[\n]", "9.00", "0: [a] bank of", "4.00")
    assert table.rows[1] == ("3: a b[a]nk of sa", "2.50", r"10: bank of [s]and\n", "3.00")
    alone = whitebox._standing_out(content, bits, None)
    assert alone.rows[0] == (r"14:  of sand[\n]", "9.00")
