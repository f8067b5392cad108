"""The laws of language models, on tiny ones in float64: two mixers, two feed-forwards, a pattern.

Each mixer alone: test_laws.py.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nlx import nn, train

CONFIGS = {
    "hope": nn.ModelConfig(
        mixer="self_modifying",
        feed_forward="cms",
        vocabulary=32,
        width=16,
        layers=1,
        heads=2,
        hidden=8,
        cms_periods=(1, 3),
        memory_hidden=8,
        chunk_size=3,
        projection_chunk_size=6,
    ),
    "hope-attention": nn.ModelConfig(
        mixer="attention",
        feed_forward="cms",
        vocabulary=32,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        hidden=8,
        cms_periods=(1, 3),
    ),
    "samba": nn.ModelConfig(
        mixer="mamba2",
        then=("attention",),
        feed_forward="swiglu",
        vocabulary=32,
        width=16,
        layers=4,
        heads=2,
        window=7,
        hidden=8,
    ),
}
CONFIGS["hope, adaptive query"] = dataclasses.replace(CONFIGS["hope"], adaptive_query=True)
LENGTH = 12
BY_TIER = [pytest.param(n, marks=[pytest.mark.slow] * ("query" in n)) for n in CONFIGS]
pytestmark = pytest.mark.usefixtures("x64")


class Built(NamedTuple):
    """One architecture: all tests share its two compiled functions."""

    model: nn.LanguageModel
    params: nnx.State
    tokens: jax.Array  # [2, 12], all different
    apply: object  # (params, tokens, state, segment_ids) -> (logits, state)
    gradient: object  # (params, weight [2, 12]) -> the weighted loss, its gradients
    traced: list  # one entry per compilation of `apply`


@pytest.fixture(scope="module", params=BY_TIER)
def built(request):
    with jax.enable_x64(True):
        model = nn.LanguageModel(CONFIGS[request.param], rngs=nnx.Rngs(1))
        graphdef, params = nnx.split(model)
        tokens = jax.random.permutation(jax.random.key(2), 32)[: 2 * LENGTH].reshape(2, LENGTH)
        traced = []

        def apply(params, tokens, state, segment_ids=None):
            traced.append(tokens.shape)
            return nnx.merge(graphdef, params)(tokens, state, segment_ids)

        def loss(params, weight):
            logits, _ = nnx.merge(graphdef, params)(tokens)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, 31 - tokens)
            return jnp.sum(weight * nll)

        yield Built(
            model, params, tokens, jax.jit(apply), jax.jit(jax.value_and_grad(loss)), traced
        )


def pieces(built, tokens, state, length):
    """The logits of a sequence read `length` tokens at a time, and the last state."""
    logits = []
    for n in range(0, tokens.shape[1], length):
        part, state = built.apply(built.params, tokens[:, n : n + length], state, None)
        logits.append(part)
    return jnp.concatenate(logits, axis=1), state


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), a, b)


def test_whole_is_chunked_is_token_by_token(built):
    whole, _ = built.apply(built.params, built.tokens, None)
    assert whole.dtype == jnp.float64
    start = built.model.init_state(2, capacity=LENGTH)
    by_four, after_four = pieces(built, built.tokens, start, 4)
    by_one, after_one = pieces(built, built.tokens, start, 1)
    close(by_four, whole)
    close(by_one, whole)
    close(after_four, after_one)


def test_state_keeps_structure_shapes_and_dtypes(built):
    start = built.model.init_state(2, capacity=LENGTH)
    _, after = built.apply(built.params, built.tokens[:, :4], start, None)
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert like(after) == like(start)


def test_decoding_compiles_once_for_every_position(built):
    before = len(built.traced)
    start = built.model.init_state(2, capacity=LENGTH)
    pieces(built, built.tokens, start, 1)
    pieces(built, built.tokens[:, ::-1], start, 1)
    assert len(built.traced) - before <= 1


def test_rows_stand_at_positions_of_their_own(built):
    whole, _ = built.apply(built.params, built.tokens, None)
    start = built.model.init_state(2, capacity=LENGTH)
    _, early = pieces(built, built.tokens[:, :4], start, 4)
    _, late = pieces(built, built.tokens[:, 4:8], early, 4)
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), early, late)
    tokens = jnp.stack([built.tokens[0, 4:5], built.tokens[1, 8:9]])
    logits, _ = built.apply(built.params, tokens, mixed, None)
    close(logits[:, 0], jnp.stack([whole[0, 4], whole[1, 8]]))


def test_packed_segments_are_what_they_would_be_alone(built):
    segment_ids = jnp.array([[0] * 4 + [1] * 8, [5] * 8 + [2] * 4])
    packed, _ = built.apply(built.params, built.tokens, None, segment_ids)
    start = built.model.init_state(2, capacity=LENGTH)
    first, _ = pieces(built, built.tokens[:, :8], start, 4)
    second, _ = pieces(built, built.tokens[:, 4:], start, 4)
    last, _ = pieces(built, built.tokens[:, 8:], start, 4)
    close(packed[0], jnp.concatenate([first[0, :4], second[0]]))
    close(packed[1], jnp.concatenate([first[1], last[1]]))


def test_causal_and_no_leak_across_the_batch(built):
    """All tokens differ, so the embedding's gradient says which positions one loss depends on."""
    at = 6
    _, gradients = built.gradient(built.params, jnp.zeros((2, LENGTH)).at[0, at].set(1.0))
    rows = jnp.abs(gradients["embedding"]["table"][...]).max(axis=1)
    assert jnp.all(rows[built.tokens[0, : at + 1]] > 0)
    assert jnp.all(rows[built.tokens[0, at + 1 :]] == 0)
    assert jnp.all(rows[built.tokens[1]] == 0)


def test_every_parameter_has_a_gradient_equal_to_finite_differences(built):
    """One entry of each named parameter: the one that the loss depends on most."""
    weight = jnp.ones((2, LENGTH)) / (2 * LENGTH)
    _, gradients = built.gradient(built.params, weight)
    leaves, tree = jax.tree.flatten(built.params)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(built.params)]
    for n, (path, gradient) in enumerate(zip(paths, jax.tree.leaves(gradients), strict=True)):
        entry = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
        assert np.all(np.isfinite(gradient)), path
        assert abs(gradient[entry]) > 1e-9, path

        def moved(step, n=n, entry=entry):
            changed = [*leaves[:n], leaves[n].at[entry].add(step), *leaves[n + 1 :]]
            return built.gradient(jax.tree.unflatten(tree, changed), weight)[0]

        wide, narrow = ((moved(h) - moved(-h)) / (2 * h) for h in (2e-4, 1e-4))
        np.testing.assert_allclose(
            (4 * narrow - wide) / 3, gradient[entry], rtol=1e-5, err_msg=path
        )


def test_a_full_cache_is_refused_or_shows(built):
    """Outside jit a sentence; inside NaN from the first token that finds no room, in its row."""
    state = built.model.init_state(2, capacity=LENGTH - 2)
    first, rest = built.tokens[:, : LENGTH - 3], built.tokens[:, LENGTH - 3 :]
    whole, _ = built.apply(built.params, built.tokens, None, None)
    _, state = built.apply(built.params, first, state, None)
    logits, _ = pieces(built, rest, state, 1)
    if not any(m == "attention" for m in built.model.config.mixers) or built.model.config.window:
        close(logits, whole[:, LENGTH - 3 :])
        return
    close(logits[:, 0], whole[:, LENGTH - 3])
    assert np.all(np.isnan(logits[:, 1:]))
    with pytest.raises(ValueError, match="`capacity` is 10; it must be at least 12"):
        built.model(rest, state)


def test_blocks_alone_are_checked_as_the_model_is():
    model = nn.LanguageModel(nn.preset("transformer++-tiny"), rngs=nnx.Rngs(0))
    x, state = jnp.zeros((2, 3, 128)), model.init_state(2, capacity=2)
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 3, 7\); it must be \[b, t, 128\]"):
        model.mix(x[..., :7])
    with pytest.raises(ValueError, match="`state` is of 1 blocks and .* it must be of 2 blocks"):
        model.mix(x, state[:1])
    with pytest.raises(ValueError, match="`capacity` is 2; it must be at least 3"):
        model.mix(x, state)


@pytest.mark.slow
def test_remat_keeps_less_and_changes_nothing():
    """Of four layers the backward pass is given what stands between them, and little more; with a
    policy the products too."""
    config = dataclasses.replace(nn.preset("hope-tiny"), layers=4, width=32, hidden=32, heads=2)
    tokens, kept, slopes = jnp.arange(33)[None], [], []
    for remat in (False, True, "dots_with_no_batch_dims_saveable"):
        model = nn.LanguageModel(dataclasses.replace(config, remat=remat), rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)
        loss = train.language_model_loss(graph)
        run = lambda params, loss=loss: loss(params, {"tokens": tokens})
        slopes.append(jax.jit(jax.grad(run))(params))
        _, pull = jax.eval_shape(lambda params, run=run: jax.vjp(run, params), params)
        kept.append(sum(x.size for x in jax.tree.leaves(pull)))
    agree = lambda *leaves: [np.testing.assert_allclose(x, leaves[0], atol=1e-6) for x in leaves]
    jax.tree.map(agree, *slopes)
    assert kept[1] < 0.5 * kept[0], kept
    assert kept[1] < kept[2] < kept[0], kept


def test_labels_name_the_level_of_every_parameter(built):
    labels = nn.labels_by_level(built.model)
    clocks = nn.clocks_by_level(built.model)
    assert jax.tree.structure(labels) == jax.tree.structure(built.params)
    assert set(jax.tree.leaves(labels)) == set(clocks)
    periods = built.model.config.cms_periods if built.model.config.feed_forward == "cms" else ()
    assert [clocks[f"cms_{n}"].period for n in range(len(periods))] == list(periods)
    assert len(clocks) == len(periods) + 1
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        place = jax.tree_util.keystr(path)
        inside = [n for n in range(len(periods)) if f"['levels'][{n}]" in place]
        assert label == (f"cms_{inside[0]}" if inside else "outer"), place


def test_partition_trains_each_level_on_its_own(built):
    labels = nn.labels_by_level(built.model)
    rules = {label: optax.set_to_zero() for label in nn.clocks_by_level(built.model)}
    tx = optax.partition(rules | {"outer": optax.sgd(1.0)}, labels)
    ones = jax.tree.map(jnp.ones_like, built.params)
    updates, _ = tx.update(ones, tx.init(built.params), built.params)
    for label, update in zip(jax.tree.leaves(labels), jax.tree.leaves(updates), strict=True):
        assert jnp.all(update == (-1.0 if label == "outer" else 0.0))


def test_loss_of_a_model_is_the_loss_of_its_logits(built):
    graphdef, params = nnx.split(built.model)
    logits, _ = built.apply(params, built.tokens, None)
    tokens = jnp.concatenate([built.tokens, built.tokens[:, :1]], axis=1)
    assert logits.shape == (2, LENGTH, 32)
    value = train.next_token_loss(logits, tokens)
    logp = jax.nn.log_softmax(logits)
    picked = [logp[b, t, tokens[b, t + 1]] for b in range(2) for t in range(LENGTH)]
    np.testing.assert_allclose(value, -np.mean(picked), rtol=1e-12)
