"""A stream goes on from where it was stopped or killed, to the bit, and says what it took."""

import json
import signal

import pytest
from flax import nnx
from nlx_experiments import run, stream
from nlx_experiments.checkpoints import Checkpoints, digest
from nlx_experiments.console import say
from nlx_experiments.errors import Refused, Stopped

from nlx import nn


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Little text, so that nothing waits for it."""
    (tmp_path / "text").write_text("What is read is what is left. " * 40)
    load = stream.data.load
    monkeypatch.setattr(stream.data, "load", lambda paths: load((tmp_path / "text",)))
    monkeypatch.chdir(tmp_path)


def options(folder, **fields):
    sizes = dict(piece=20, tokens=120, save_every=60, marks=(20, 60, 120))
    return stream.Tiny(**{"folder": folder, "place": folder, **sizes, **fields})


def state_of(folder):
    like = nn.LanguageModel(nn.preset("hope-tiny"), rngs=nnx.Rngs(0)).init_state(1)
    with Checkpoints(folder / "state", keep=2, say=say) as saves:
        saved = saves.restore({"state": like})
    assert saved is not None
    return saved.step, digest(saved.trees)


def test_goes_on_to_the_bit(tmp_path, monkeypatch):
    """Stopped after 40 bytes, killed after 100 of which 60 are saved."""
    undisturbed = stream.main(options(tmp_path / "once"))
    advance = stream.Reading.advance

    def disturbed(self):
        advance(self)
        if self.position["tokens"] == 40:
            signal.raise_signal(signal.SIGTERM)
        if self.position["tokens"] == 100:
            raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(stream.Reading, "advance", disturbed)
        with pytest.raises(Stopped, match="40 of 120 bytes"):
            stream.main(options(tmp_path / "often"))
        with pytest.raises(MemoryError):
            stream.main(options(tmp_path / "often"))
    assert state_of(tmp_path / "often")[0] == 60
    went_on = stream.main(options(tmp_path / "often"))
    bits = lambda result: [(m["tokens"], m["bits_per_byte"]) for m in result["marks"]]
    assert bits(went_on) == bits(undisturbed)
    assert state_of(tmp_path / "often") == state_of(tmp_path / "once")
    assert state_of(tmp_path / "often")[0] == 120


def test_says_what_it_took(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- stream -->\nold\n<!-- end of stream -->\nafter\n")
    words = "run stream --piece 20 --tokens 60 --save-every 60 --marks 20 60"
    assert run.main([*words.split(), "--place", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results" / "stream.json").read_text())
    assert result["tokens"] == 60
    assert result["tokens_per_s"] > 0
    assert [m["tokens"] for m in result["marks"]] == [20, 60]
    assert 0 < result["marks"][0]["peak_mib"] <= result["marks"][1]["peak_mib"]
    assert all(4 < m["bits_per_byte"] < 16 for m in result["marks"])
    shown = readme.read_text()
    assert shown.startswith("before\n<!-- stream -->\n| bytes read |")
    assert shown.endswith("<!-- end of stream -->\nafter\n")
    assert "old" not in shown
    assert "60 bytes at" in capsys.readouterr().out


def test_a_text_shorter_than_the_stream_is_read_again(tmp_path):
    model = nn.LanguageModel(nn.preset("deltanet-tiny"), rngs=nnx.Rngs(0))
    seen = []
    reading = stream.Reading(model, stream.data.encode("abcdefg"), 5)
    reading.read = lambda weights, tokens, state: (
        seen.append("".join(map(chr, tokens[0]))) or 0.0,
        state,
    )
    for _ in range(3):
        reading.advance()
    assert seen == ["abcdef", "fgabcd", "defgab"]


def test_bad_input_gets_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="`tokens` is 70; it must be a positive multiple"):
        options(tmp_path, tokens=70)
    with pytest.raises(ValueError, match="`marks` is 30; it must be a positive multiple"):
        options(tmp_path, marks=(20, 30))
    with pytest.raises(Refused, match="'transformer\\+\\+-tiny'.* must be one whose state is"):
        stream.main(options(tmp_path, preset="transformer++-tiny"))
    with pytest.raises(Refused, match="`place` is nowhere, which holds no README.md"):
        stream.main(stream.Stream(place=stream.pathlib.Path("nowhere")))
