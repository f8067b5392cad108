"""One step through every room: what the oldest supported Python and jax must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nlx
from nlx import memories, nn, objectives, optim, train, writes


def test_a_level_scans_as_it_steps():
    level = nlx.associative_memory(
        memories.linear(3, 2), objectives.l2, writes.gated(), nlx.Clock(2)
    )
    keys = jax.random.normal(jax.random.key(0), (5, 3))
    contexts = nlx.Association(keys, keys[:, :2], jnp.full(5, 0.1))
    stepped = scanned = level.start(level.init(jax.random.key(1)))
    for n in range(5):
        stepped = level.step(stepped, jax.tree.map(lambda a, n=n: a[n], contexts))
    scanned = level.scan(scanned, contexts)
    np.testing.assert_allclose(stepped.params, scanned.params, atol=1e-6)


@pytest.mark.slow
def test_hope_takes_a_training_step():
    small = dict(mixer="self_modifying", feed_forward="cms", width=8, heads=2, layers=1, hidden=8)
    config = nn.ModelConfig(**small, memory_hidden=4, chunk_size=4, projection_chunk_size=4)
    model = nn.LanguageModel(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    rule = optim.dmgd(1e-2)
    step = train.make_train_step(train.language_model_loss(graph), rule, nn.labels_by_level(model))
    state = train.init_train_state(params, rule)
    tokens = jnp.arange(18).reshape(2, 9) % 5
    losses = []
    for _ in range(8):
        state, metrics = jax.jit(step)(state, {"tokens": tokens})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
