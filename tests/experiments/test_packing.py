# SPDX-License-Identifier: Apache-2.0
"""Rows of whole documents: every token is a target once, nothing is cut that fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from nlx_experiments import batching, packing
from nlx_experiments.errors import Refused

from nlx import nn, train

Lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(Lengths, st.integers(2, 16))
def test_every_token_is_a_target_once(lengths, room):
    ends = np.cumsum([*lengths, room])
    stream = np.arange(ends[-1])
    rows = packing.Packed(stream, ends, room - 1)
    targets, cut = [], []
    for n in range(len(rows)):
        row = rows[n]
        assert row["tokens"].shape == row["segment_ids"].shape == (room,)
        within = row["segment_ids"][1:] == row["segment_ids"][:-1]
        targets += row["tokens"][1:][within].tolist()
        np.testing.assert_array_equal(np.diff(row["tokens"])[within], 1)
        for piece in range(*rows.plan.first[n : n + 2].tolist()):
            cut.append(rows.plan.starts[piece])
    assert sorted(targets) == list(range(1, len(stream)))
    assert rows.targets == len(targets) / len(rows)
    begins = np.maximum(np.concatenate([[0], ends[:-1]]) - 1, 0)  # from the separator before
    assert sorted(set(begins) & set(cut)) == sorted(
        b for b, e in zip(begins, ends, strict=True) if e - b > 1
    )
    pieces = sum(-(-(e - b - 1) // (room - 1)) for b, e in zip(begins, ends, strict=True))
    assert len(cut) == pieces  # so those that fit are whole


@settings(max_examples=100, deadline=None)
@given(Lengths, st.integers(2, 16))
def test_no_two_rows_could_be_one(lengths, room):
    plan = packing.plan(np.cumsum(lengths), room)
    filled = np.add.reduceat(plan.lengths, plan.first[:-1]) if len(plan.lengths) else np.zeros(0)
    assert (filled <= room).all()
    least = np.sort(filled)[:2]
    assert len(least) < 2 or least.sum() > room


def test_the_fullest_row_with_room_is_taken():
    plan = packing.plan(np.cumsum([7, 4, 2, 4, 1]), 10)
    rows = [plan.lengths[a:b].tolist() for a, b in zip(plan.first, plan.first[1:], strict=False)]
    assert rows == [[7, 3], [5, 5], [2]]
    assert plan.starts.tolist() == [0, 10, 6, 12, 16]


@pytest.mark.parametrize(
    "preset", ["deltanet-tiny", pytest.param("hope-tiny", marks=pytest.mark.slow)]
)
def test_a_packed_batch_costs_what_its_documents_cost(preset):
    small = dict(width=16, layers=1, heads=2, hidden=16, chunk_size=4, projection_chunk_size=4)
    config = dataclasses.replace(nn.preset(preset), **small)
    graph, params = nnx.split(nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    lengths = [7, 2, 10, 3, 5, 1]
    generator = np.random.default_rng(0)
    stream = generator.integers(1, 255, sum(lengths)).astype(np.uint8)
    ends = np.cumsum(lengths)
    rows = packing.Packed(stream, ends, 11)
    batch = [rows[n] for n in range(len(rows))]
    batch = {k: np.stack([row[k] for row in batch]) for k in ("tokens", "segment_ids")}
    loss = jax.jit(train.language_model_loss(graph))
    found = loss(params, jax.tree.map(jnp.asarray, batch)) * train.scored(params, batch)
    wanted = 0.0
    for end, n in zip(ends, lengths, strict=True):
        document = jnp.asarray(stream[None, max(0, end - n - 1) : end])
        wanted += float(loss(params, {"tokens": document})) * (document.size - 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_documents_of_a_text_end_at_separators():
    stream = np.array([5, 6, 0, 7, 0, 8], np.uint8)
    packed = batching.training_data(stream, length=3, batch=1, seed=0, pack=True)
    rows = sorted(packed[n]["tokens"][0].tolist() for n in range(3))
    assert rows == [[0, 7, 0, 0], [0, 8, 0, 0], [5, 6, 0, 0]]
    assert {tuple(packed[n]["segment_ids"][0]) for n in range(3)} == {(0, 0, 0, -4), (0, 0, -3, -4)}


def test_a_text_shorter_than_a_row_is_refused():
    with pytest.raises(Refused, match="`length` is 9, but the text holds only 6 tokens; it must"):
        batching.training_data(np.arange(6), length=9, batch=1, seed=0, pack=True)
