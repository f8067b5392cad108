# SPDX-License-Identifier: Apache-2.0
"""The command: one sentence and a code that is not 0 for bad input, before anything is done."""

import dataclasses
import pathlib
import re
import signal
import subprocess
import time

import pytest
from nlx_experiments import console, damage, faults, hosts, learner, loop, run, runs


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch, tmp_path):
    """Bad input is refused before a model is made, and leaves no run folder."""

    def refuse(config):
        raise AssertionError("a model was made")

    monkeypatch.setattr(learner, "make", refuse)
    monkeypatch.setattr(learner, "build", refuse)
    monkeypatch.chdir(tmp_path)
    yield
    assert not pathlib.Path("runs").exists()


BAD = {
    "trian": "there is no command 'trian'; .* Did you mean train?",
    "train": "needs a name first: nlx train PRESET",
    "train --steps 3": "needs a name first",
    "train transformer+-tiny": "'transformer\\+-tiny'.* 'transformer\\+\\+-tiny'",
    "train transformer++-tiny --steps 0": "`steps` is 0; it must be at least 1",
    "train transformer++-tiny --steps many": "--steps: .*'many'",
    "train transformer++-tiny --learning-rate nan": "`learning_rate` is nan; it must be in",
    "train transformer++-tiny --stepz 3": "Unrecognized options: --stepz.*\\+-tiny --help` shows",
    "train transformer++-tiny --optimizer sgd": "'sgd' .*'adamw', 'dmgd'",
    "train transformer++-tiny --model.heads 3": "`heads` is 3; it must be",
    "train transformer++-tiny --model.cms-periods 0": "`cms_periods` is \\(0,\\)",
    "train transformer++-tiny --data missing": "missing, which does not exist",
    "train transformer++-tiny --data empty": "empty, in which there is no UTF-8 text",
    "train transformer++-tiny --data short --length 99": "`length` is 99, .* only \\d+ bytes",
    "train transformer++-tiny --run /dev/null/run": "/dev/null/run, which cannot be written",
    "train transformer++-tiny --model.vocabulary 64": "`model.vocabulary` is 64; it must be 256",
    "train transformer++-tiny --tokenizer bpe --model.vocabulary 64": "64; it must be at least 256",
    "train transformer++-tiny --tokenizer none.json": "none.json, which cannot be read; it must be",
    "eval nowhere": "choices",
    "eval nowhere piqa": "holds 'piqa'; it must be NAME=FILE",
    "run language --models hoop": "`models` holds 'hoop'; it must be one of",
    "generate bare": "config.json says nothing of data, model, preset",
    "generate nowhere --bytes 50": "options: --bytes, 50. `nlx generate --help` shows all options",
    "generate nowhere": "nowhere is no run: it holds no config.json",
    "generate nowhere --temperature -1": "`temperature` is -1.0; it must be in",
    "inspect": "needs a name first: nlx inspect PRESET, OPTIMIZER or RUN",
    "inspect hope-tinny": "'hope-tinny'.*'hope-tiny'",
    "inspect xyz": "no preset, optimizer or run 'xyz'; Optimizers are",
    "inspect dmgdd": "no preset, optimizer or run 'dmgdd'; did you mean 'dmgd'",
    "inspect runs/nowhere": "runs/nowhere is no run: it holds no config.json",
    "inspect empty": "empty is no run: it holds no config.json",
    "inspect hope-tiny --text short/0": "`--text` is for a run to read, and hope-tiny is none",
    "inspect hope-tiny dmgd": "Unrecognized options: dmgd",
    "run dmeo": "there is no experiment 'dmeo'; .* Did you mean demo?",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence(words, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "binary").write_bytes(b"\0\1\2")
    (tmp_path / "short").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for i in range(3):
        (tmp_path / "short" / f"{i}").write_text("short")
    assert run.main(words.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("nlx: ")
    assert error.count("\n") == 1
    assert re.search(BAD[words], error), error


def test_help_is_printed(capsys):
    assert run.main([]) == 0
    assert "nlx train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        run.main(["train", "transformer++-tiny", "--help"])
    assert left.value.code == 0
    assert "--model.width" in capsys.readouterr().out


def test_help_of_run_lists_the_experiments(capsys):
    assert run.main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    for name in run._experiments():
        assert re.search(rf"^  {name} +\w.*[.?]$", out, re.MULTILINE), name


def test_an_experiment_says_what_it_wrote(monkeypatch, capsys, tmp_path):
    @dataclasses.dataclass
    class Options:
        place: pathlib.Path = tmp_path

    def main(options):
        (options.place / "results" / "new.md").write_text("a table")

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.md").write_text("another table")
    monkeypatch.setattr(run, "_experiments", lambda: {"it": (Options, main)})
    assert run.main(["run", "it"]) == 0
    assert capsys.readouterr().out == f"\nWritten: {tmp_path / 'results' / 'new.md'}\n"


@pytest.mark.parametrize(
    "command",
    ["train", "data", "generate", "serve", "eval", "inspect", "export", "compile", "launch"],
)
def test_help_names_the_word_that_a_command_needs(command, capsys):
    with pytest.raises(SystemExit) as left:
        run.main([command, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    told = re.search(rf"nlx {command} (\S+)", run.__doc__)[1]
    assert told in out.split("\n\n")[0]


def test_ctrl_c_leaves_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(run.COMMANDS, "generate", interrupted)
    assert run.main(["generate", "x"]) == 130
    assert capsys.readouterr().err == "nlx: stopped.\n"


def test_a_training_that_is_left_at_once_says_what_is_saved(monkeypatch, capsys, tmp_path):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    words = ["train", "transformer++-tiny", "--run", str(tmp_path)]
    assert run.main(words) == 130
    assert "before anything was saved" in capsys.readouterr().out
    for name in ("20", "100", "120.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert run.main(words) == 130
    assert "Stopped; step 100 is saved in" in capsys.readouterr().out


def test_one_signal_that_comes_by_two_ways_is_one_request(monkeypatch):
    monkeypatch.setenv(hosts.CHILD, "1")
    with console.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        stop.at -= 2 * console.AT_ONCE
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_leaves_at_once(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with console.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out.startswith("SIGTERM: saving after this step")


@pytest.mark.parametrize("kind", [console.Bar, console.Lines])
def test_progress_shows_its_numbers(kind, capsys):
    arguments = ("hope", 500, 3) if kind is console.Bar else ("hope", 500)
    with kind(*arguments) as shown:
        shown.show(120, 2.34567, 12345.6, {"outer": 0.0123, "cms_0": 4.5e-4})
    out = capsys.readouterr().out
    assert kind is console.Bar or console.COMPILING in out
    for part in ("hope", "120/500", "2.346 bits/byte", "12,346 tokens/s", "cms_0 4.5e-04"):
        assert part in out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(tmp_path, number, code):
    (tmp_path / "text").mkdir()
    for i in range(9):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} bottles\n" * 60)
    command = faults.command(tmp_path, "hope-tiny", 5000, "run")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not runs.read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert "the same command goes on from there" in out
    assert "Traceback" not in out + error
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) == runs.read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]


@pytest.mark.slow
def test_kill_9_loses_nothing(tmp_path):
    assert faults.main(["--kills", "3", "--folder", str(tmp_path)]) == 0


@pytest.mark.slow
def test_other_harm_is_told_and_loses_nothing(tmp_path, capsys):
    arguments = ["--kills", "0", "--harms", "some", "--folder", str(tmp_path)]
    assert faults.main(arguments) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count("nothing lost") == len(damage.SOME) == 5


def test_harm_that_is_not_told_is_found():
    fault = damage.Fault(lambda places: None, "is damaged", 2)
    assert damage.missing(fault, 2, "nlx: it is damaged.") is None
    assert "ended with 0, not 2" in damage.missing(fault, 0, "it is damaged")
    assert "did not say" in damage.missing(fault, 2, "nothing")
    assert "showed a trace" in damage.missing(fault, 2, "Traceback: it is damaged")
