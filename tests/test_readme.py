"""The README's examples run as they stand, one after the other."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples_run(capsys):
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    recent, old = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert recent < old / 2
    assert names["scores"].shape == (1, 1, 256)
