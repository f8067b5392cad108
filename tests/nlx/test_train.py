"""The training step: values, skipped steps, update norms, donation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nlx import nn, optim, train

CONFIG = nn.ModelConfig(
    mixer="attention",
    feed_forward="cms",
    vocabulary=16,
    width=8,
    layers=1,
    heads=2,
    hidden=8,
    cms_periods=(1, 3),
)


def quadratic(params, batch):
    return 0.5 * jnp.sum((params["a"] - batch) ** 2) + jnp.sum(params["b"])


PARAMS = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
LABELS = {"a": "fast", "b": "slow"}


def test_step_is_the_optimizer_on_the_gradient():
    step = jax.jit(train.make_train_step(quadratic, optax.sgd(0.1), LABELS))
    state, metrics = step(train.init_train_state(PARAMS, optax.sgd(0.1)), jnp.zeros(2))
    np.testing.assert_allclose(state.params["a"], [2.7, 3.6], rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], [-0.1, -0.1], rtol=1e-6)
    assert (int(state.step), int(state.skipped)) == (1, 0)
    expected = {
        "loss": 12.5,
        "gradient_norm": np.sqrt(27),
        "skipped": 0,
        "spiked": 0,
        "update_norm/fast": 0.5,
        "update_norm/slow": 0.1 * np.sqrt(2),
        "gradient_norm/fast": 5.0,
        "gradient_norm/slow": np.sqrt(2),
        "parameter_norm/fast": np.hypot(2.7, 3.6),
        "parameter_norm/slow": 0.1 * np.sqrt(2),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_a_batch_are_the_batch(packed):
    """To 1e-12, though the parts of packed rows score other numbers of tokens each."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        graph, params = nnx.split(nn.LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
        batch = {"tokens": jnp.asarray(random.integers(0, 16, (6, 9)))}
        if packed:
            ids = np.cumsum(random.uniform(size=(6, 9)) < 0.4, 1)
            batch["segment_ids"] = jnp.asarray(ids)
            assert len({int(n) for n in (ids[:, 1:] == ids[:, :-1]).sum(1)}) > 1
        loss, tx, found = train.language_model_loss(graph), optax.sgd(0.1), []
        for accumulate in (1, 2, 6):
            step = train.make_train_step(loss, tx, accumulate=accumulate, weigh=train.scored)
            found.append(jax.jit(step)(train.init_train_state(params, tx), batch))
    same = lambda *xs: [np.testing.assert_allclose(x, xs[0], rtol=1e-9, atol=1e-12) for x in xs]
    jax.tree.map(same, *found)


def test_parts_are_rows_apart_so_that_devices_share_each():
    """Of rows 0, 1, 2, 3 in two parts, 0 and 2 come first."""
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda rows: seen.append(np.asarray(rows).tolist()), batch, ordered=True)
        return jnp.sum(params * batch)

    step = train.make_train_step(loss, optax.sgd(0.1), accumulate=2)
    jax.jit(step)(train.init_train_state(jnp.ones(()), optax.sgd(0.1)), jnp.arange(4.0))
    jax.effects_barrier()
    assert [rows for n, rows in enumerate(seen) if rows not in seen[:n]] == [[0, 2], [1, 3]]


def test_accumulation_must_divide_the_rows():
    with pytest.raises(ValueError, match="`accumulate` is 0; it must be an integer >= 1"):
        train.make_train_step(quadratic, optax.sgd(0.1), accumulate=0)
    step = train.make_train_step(quadratic, optax.sgd(0.1), accumulate=2)
    with pytest.raises(ValueError, match="`accumulate` is 2; it must be a divisor of .* 3 rows"):
        step(train.init_train_state(PARAMS, optax.sgd(0.1)), jnp.zeros((3, 2)))


def test_without_labels_all_is_outer():
    step = train.make_train_step(quadratic, optax.sgd(0.1))
    _, metrics = step(train.init_train_state(PARAMS, optax.sgd(0.1)), jnp.zeros(2))
    of_levels = {f"{kind}_norm/outer" for kind in ("update", "gradient", "parameter")}
    assert {name for name in metrics if "/" in name} == of_levels


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    tx = optax.adam(0.1)
    step = jax.jit(train.make_train_step(quadratic, tx, LABELS))
    state, _ = step(train.init_train_state(PARAMS, tx), jnp.zeros(2))
    after, metrics = step(state, jnp.array([bad, 0.0]))
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(after.params, state.params)
    same(after.opt_state, state.opt_state)
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert int(metrics["skipped"]) == 1
    assert metrics["update_norm/fast"] == metrics["update_norm/slow"] == 0
    again, metrics = step(after, jnp.zeros(2))
    unbroken, _ = step(state, jnp.zeros(2))
    same(again.params, unbroken.params)
    assert (int(again.skipped), int(metrics["skipped"])) == (1, 0)


def spikes(factor, slopes):
    """Which of some steps, whose gradients have these lengths, were skipped for their size."""
    loss = lambda params, batch: jnp.sum(params["a"] * batch)
    step = jax.jit(train.make_train_step(loss, optax.sgd(0.0), spike=factor))
    state, found = train.init_train_state({"a": jnp.zeros(1)}, optax.sgd(0.0)), []
    for slope in slopes:
        state, metrics = step(state, jnp.array([slope]))
        assert int(metrics["skipped"]) >= int(metrics["spiked"])
        found.append(int(metrics["spiked"]))
    assert int(state.skipped) == sum(found) + int(np.sum(~np.isfinite(slopes)))
    return found, state


def test_a_spike_is_skipped_and_does_not_count_as_usual():
    usual = [1.0, 2.0, 3.0] * 6  # the median is 2
    found, state = spikes(5.0, [*usual, 9.9, 10.1, np.nan, 10.1, 9.9])
    assert found == [0] * len(usual) + [0, 1, 0, 1, 0]
    kept = np.asarray(state.recent)
    assert kept[-1] == np.float32(9.9)
    assert np.sum(~np.isnan(kept)) == len(usual) + 2
    assert spikes(None, [*usual, 1e9])[0][-1] == 0


def test_few_steps_tell_no_spike():
    assert spikes(2.0, [1.0] * (train.ENOUGH - 1) + [100.0])[0][-1] == 0
    assert spikes(2.0, [1.0] * train.ENOUGH + [100.0])[0][-1] == 1
    with pytest.raises(ValueError, match="`spike` is 1.0; it must be above 1"):
        train.make_train_step(quadratic, optax.sgd(0.1), spike=1.0)


def test_only_the_last_norms_are_looked_at():
    found, _ = spikes(3.0, [1.0] * train.RECENT + [2.5] * train.RECENT + [7.0])
    assert sum(found) == 0


def test_loss_of_packed_rows_leaves_out_what_crosses_a_border():
    logits = jax.random.normal(jax.random.key(0), (1, 3, 4))
    tokens = jnp.array([[1, 2, 3, 0]], jnp.uint8)
    logp = jax.nn.log_softmax(logits)[0]
    whole = train.next_token_loss(logits, tokens)
    np.testing.assert_allclose(whole, -(logp[0, 2] + logp[1, 3] + logp[2, 0]) / 3, rtol=1e-6)
    packed = train.next_token_loss(logits, tokens, jnp.array([[7, 7, 8, 8]]))
    np.testing.assert_allclose(packed, -(logp[0, 2] + logp[2, 0]) / 2, rtol=1e-6)
    assert train.next_token_loss(logits, tokens, jnp.arange(4)[None]) == 0


def test_loss_refuses_tokens_that_do_not_belong():
    with pytest.raises(ValueError, match=r"`tokens` has shape \(1, 3\); it must be \(1, 4\)"):
        train.next_token_loss(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), int))


@pytest.mark.parametrize("batch", [jnp.zeros((1, 4), int), {"token": jnp.zeros((1, 4), int)}])
def test_a_batch_without_tokens_gets_a_sentence(batch):
    graphdef, params = nnx.split(nn.LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
    sentence = '`batch` is .*; it must be a mapping with "tokens"'
    with pytest.raises(TypeError, match=sentence):
        train.language_model_loss(graphdef)(params, batch)
    with pytest.raises(TypeError, match=sentence):
        train.scored(params, batch)


def test_a_model_learns_a_sequence_by_heart_and_compiles_once():
    model = nn.LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    loss, traced = train.language_model_loss(graphdef), []

    def counted(params, batch):
        traced.append(None)
        return loss(params, batch)

    tx = optax.adam(3e-2)
    step = train.make_train_step(counted, tx, nn.labels_by_level(model))
    step = jax.jit(step, donate_argnums=0)
    state = train.init_train_state(params, tx)
    batch = {
        "tokens": jax.random.randint(jax.random.key(1), (2, 9), 0, 16).astype(jnp.uint8),
        "segment_ids": jnp.array([[0] * 9, [0] * 4 + [1] * 5]),
    }
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.5
    assert losses[-1] < 0.1
    assert len(traced) == 1
    assert {"update_norm/outer", "update_norm/cms_0", "update_norm/cms_1"} < set(metrics)


def test_pretraining_as_a_nest_is_the_train_step_on_clocks(x64):
    """The levels of the model, ticked by batches, and optax rules on clocks: one function."""
    model = nn.LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rule = optax.sgd(0.3, momentum=0.9)
    nest = nn.pretraining(model, rule)
    clocks = nn.clocks_by_level(model)
    tx = optax.partition(
        {label: optim.on_clock(rule, clock) for label, clock in clocks.items()},
        nn.labels_by_level(model),
    )
    step = jax.jit(train.make_train_step(train.language_model_loss(graphdef), tx))
    state = train.init_train_state(params, tx)
    batches = {"tokens": jax.random.randint(jax.random.key(1), (7, 2, 9), 0, 16)}
    states, tick = nest.start(nest.init(jax.random.key(0)), jnp.int32(0)), jax.jit(nest.step)
    for t in range(7):
        batch = jax.tree.map(lambda x, t=t: x[t], batches)
        state, metrics = step(state, batch)
        states, loss = tick(states, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
    found = {path: leaf for level in states.values() for path, leaf in level.params.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        expected = found[jax.tree_util.keystr(path)]
        np.testing.assert_allclose(leaf, expected, rtol=1e-9, atol=1e-12)
