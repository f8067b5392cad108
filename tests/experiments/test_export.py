# SPDX-License-Identifier: Apache-2.0
"""Weights as a file: to the bit there and back, and nothing of another model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from nlx_experiments import checkpoints, config, export, learner, loop, runs, weights
from nlx_experiments.errors import Refused
from safetensors import safe_open
from safetensors.numpy import save_file

from nlx import nn


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("export")
    texts = folder / "texts"
    texts.mkdir()
    for n in range(9):
        (texts / f"{n}.txt").write_text("".join(f"{n} and {i}, " for i in range(90)))
    small = dict(width=16, layers=1, heads=2, hidden=8)
    model = dataclasses.replace(nn.preset("transformer++-tiny"), **small)
    made = config.make(
        "transformer++-tiny", model=model, run=folder / "run", data=(texts,), steps=2, batch=2,
        length=8, eval_bytes=100, optimizer="adamw",
    )  # fmt: skip
    loop.train(made)
    return made


@pytest.fixture(scope="module")
def file(chosen):
    return export.main(export.Export(run=chosen.folder))


def test_the_file_holds_every_parameter_to_the_bit(chosen, file):
    params, step = learner.restored(chosen)
    with safe_open(file, "numpy") as held:
        names, about = set(held.keys()), json.loads(held.metadata()["nlx"])
        table = held.get_tensor("embedding.table")
    assert (about["preset"], about["step"], step) == ("transformer++-tiny", 2, 2)
    assert about["model"]["width"] == 16
    assert len(names) == len(jax.tree.leaves(params))
    assert "blocks.0.mixer.query.kernel" in names
    np.testing.assert_array_equal(table, params["embedding"]["table"][...])


def test_a_run_begins_with_it(chosen, file, tmp_path):
    again = dataclasses.replace(chosen, run=tmp_path / "again", init_from=file)
    state = learner.make(again).init()
    params, _ = learner.restored(chosen)
    assert checkpoints.digest({"": state.params}) == checkpoints.digest({"": params})
    loop.train(again)
    assert json.loads((again.folder / "config.json").read_text())["init_from"] == str(file)
    assert config.of_run(again.folder).init_from == file
    first, *_ = runs.read_lines(again.folder / "metrics.jsonl")
    assert first["moved"]["outer"] < 0.1  # from the weights it began with
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(file.read_bytes())
    loop.train(dataclasses.replace(again, init_from=elsewhere))
    arrays = {name: np.asarray(x) for name, x in weights.named(params).items()}
    save_file(arrays | {"norm.scale": arrays["norm.scale"] + 1}, elsewhere)
    with pytest.raises(Refused, match="`init_from_sha256` is .* was begun with"):
        loop.train(dataclasses.replace(again, init_from=elsewhere))


def test_what_does_not_fit_is_refused(chosen, file, tmp_path):
    like = nnx.split(learner.build(chosen))[1]
    arrays = {name: np.asarray(leaf) for name, leaf in weights.named(like).items()}
    other = tmp_path / "other.safetensors"

    def refused(sentence, **changed):
        save_file({**arrays, **changed}, other)
        with pytest.raises(Refused, match=sentence):
            weights.read(other, like)

    table = arrays["embedding.table"]
    short, half = {"embedding.table": table[0]}, {"embedding.table": table.astype(np.float16)}
    refused(r"embedding.table is float32\[16\]; it must be float32\[256, 16\]", **short)
    refused("embedding.table is float16", **half)
    refused("which has more; it is of another model", more=table)
    save_file({name: x for name, x in arrays.items() if name != "norm.scale"}, other)
    with pytest.raises(Refused, match="which has no norm.scale; it is of another model"):
        weights.read(other, like)
    other.write_bytes(file.read_bytes()[:50])
    with pytest.raises(Refused, match="which cannot be read"):
        weights.read(other, like)
    with pytest.raises(Refused, match="`init_from` is .*, which cannot be read"):
        weights.read(tmp_path / "none", like)


def test_a_file_that_cannot_be_written_is_refused(chosen, tmp_path):
    with pytest.raises(Refused, match="`out` is .*/none/w, which cannot be written"):
        export.main(export.Export(run=chosen.folder, out=tmp_path / "none" / "w"))
