# SPDX-License-Identifier: Apache-2.0
"""Training on eight simulated devices: the losses of one, and checkpoints that fit any mesh."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from nlx_experiments import batching, checkpoints, config, data, learner, loop, runs
from nlx_experiments.config import MeshConfig
from nlx_experiments.errors import Refused

from nlx import nn

SIZES = dict(width=32, layers=1, heads=4, hidden=16, cms_periods=(1, 2))
MESHES = {
    "one": None,
    "4x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "2x4": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}


def chosen(folder, mesh, **fields):
    model = dataclasses.replace(nn.preset("hope-attention-tiny"), **SIZES)
    made = config.make("hope-attention-tiny", run=folder, steps=4, batch=8, length=16, **fields)
    devices = MeshConfig(data=1) if mesh is None else mesh
    return dataclasses.replace(made, model=model, mesh=devices, eval_bytes=500, log_every=1)


def on_devices(folder):
    """Trains steps of packed rows on each mesh, saves on one, restores on all."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    texts = pathlib.Path(folder, "texts")
    texts.mkdir()
    for n in range(9):
        (texts / f"{n}.txt").write_text("".join(f"{n} times {i} is {n * i}\n" for i in range(60)))
    corpus = data.load([texts])
    batches = batching.training_data(corpus.train, length=16, batch=8, seed=0, pack=True)
    losses, states, every = {}, {}, jax.devices
    for name, mesh in MESHES.items():
        if mesh is None:
            jax.devices = lambda: every()[:1]
        functions = learner.make(chosen(None, mesh, accumulate=1 if mesh is None else 2))
        jax.devices = every
        state = functions.init()
        start, found = functions.init().params, []
        for step in range(3):
            batch = {name: batches[step][name] for name in ("tokens", "segment_ids")}
            state, measured = functions.step(state, start, batch)
            found.append(float(measured["loss"]))
        bits = functions.bits(state.params, batches[9]["tokens"])
        losses[name] = [*found, float(np.mean(bits))]
        states[name] = state
    for name in ("4x2", "2x4"):
        np.testing.assert_allclose(losses[name], losses["one"], rtol=1e-5)
    trees = {n: {"weights": s.params, "memories": s.opt_state} for n, s in states.items()}
    with checkpoints.Checkpoints(pathlib.Path(folder, "saved"), keep=2, say=print) as kept:
        kept.save(3, trees["4x2"], {})
        kept.wait()
        wanted = checkpoints.digest(trees["4x2"])
        assert wanted != checkpoints.digest(trees["2x4"])
        for like in trees.values():
            saved = kept.restore(like)
            assert checkpoints.digest(saved.trees) == wanted
            places = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
            assert places(saved.trees["weights"]) == places(like["weights"])


def goes_on_elsewhere(folder):
    """Stops on one mesh, ends on another: the losses of one that was not stopped."""
    texts = pathlib.Path(folder, "texts")
    texts.mkdir()
    for n in range(9):
        (texts / f"{n}.txt").write_text("".join(f"{n} times {i} is {n * i}\n" for i in range(60)))
    metrics = {}
    for name in ("whole", "moved"):
        made = chosen(pathlib.Path(folder, name), MESHES["4x2"], data=(texts,), save_every=2)
        if name == "moved":
            run_to(made, 2)
            made = dataclasses.replace(made, mesh=MESHES["2x4"], accumulate=2)
        loop.train(made)
        lines = runs.read_lines(made.folder / "metrics.jsonl")
        metrics[name] = [line["bits_per_byte"] for line in lines]
    assert len(metrics["moved"]) == 4
    np.testing.assert_allclose(metrics["moved"], metrics["whole"], rtol=1e-5)


def run_to(made, step):
    """Trains until a checkpoint of this step is there, then fails as a killed process would."""
    before = loop.Log.add

    def add(self, done, measured):
        if done > step:
            raise KeyboardInterrupt
        before(self, done, measured)

    loop.Log.add = add
    try:
        loop.train(made)
    except KeyboardInterrupt:
        pass
    finally:
        loop.Log.add = before


@pytest.mark.parametrize(
    "function", ["on_devices", pytest.param("goes_on_elsewhere", marks=pytest.mark.slow)]
)
def test_eight_devices(function, on_eight_devices, tmp_path):
    on_eight_devices(__file__, function, str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(mesh=MeshConfig(tensor=2)),
            "the mesh is data 0, .* tensor 2, .* there are 1",
        ),
        (dict(mesh=MeshConfig(data=0)), "`data` is 0; it must be an integer >= 1, or -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(fields, sentence):
    with pytest.raises(Refused, match=sentence):
        learner.make(dataclasses.replace(chosen(None, None), **fields))


def test_parts_must_divide_the_batch():
    with pytest.raises(Refused, match="`accumulate` is 3; it must be a divisor of batch = 8"):
        chosen(None, None, accumulate=3)
