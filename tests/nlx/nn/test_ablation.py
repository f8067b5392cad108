# SPDX-License-Identifier: Apache-2.0
"""Every row of the paper's Table 6 as a switch of Hope, against the row written out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import nn

WIDTH, HEADS, HIDDEN, LENGTH = 6, 2, 4, 7
CHUNKS = {"memory": 3, "others": 2}
ROWS = {
    "hope": {},
    "w/o DGD": {"erase": False},
    "w/o momentum": {"momentum": False},
    "w/o weight decay": {"retain": False},
    "w/o inner-projection k": {"adaptive_key": False},
    "w/o inner-projection v": {"adaptive_value": False},
    "w/o inner-projection q": {"adaptive_query": False},
    "w/o all of them": {
        "erase": False,
        "momentum": False,
        "retain": False,
        "adaptive_key": False,
        "adaptive_value": False,
        "adaptive_query": False,
    },
}
ALL = "w/o all of them"
row = pytest.mark.parametrize(
    "switches",
    [
        pytest.param(switches, id=name, marks=() if name == ALL else pytest.mark.slow)
        for name, switches in ROWS.items()
    ],
)
pytestmark = pytest.mark.usefixtures("x64")


def make(switches, **fields):
    sizes = dict(heads=HEADS, hidden=HIDDEN)
    chunks = dict(chunk_size=CHUNKS["memory"], projection_chunk_size=CHUNKS["others"])
    given = {"adaptive_query": True, **switches, **fields}
    mixer = nn.SelfModifying(WIDTH, **sizes, **chunks, **given, rngs=nnx.Rngs(0))
    moved = lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape, jnp.float64)
    nnx.update(mixer, jax.tree.map(moved, nnx.state(mixer)))
    return mixer


def unit(z):
    return z / np.sqrt(np.sum(z**2) + 1e-6)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gelu(z):
    return 0.5 * z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))


def inside(w, z):
    """s(z W_1), and the length that s divides by."""
    act = gelu(z @ w[0])
    length = np.sqrt(np.sum(act**2) + 0.25)
    return act / length, length


def recall(w, z):
    """M(z) = z + s(z W_1) W_2."""
    return z + inside(w, z)[0] @ w[1]


def slopes(w, key, target):
    """Of 1/2 |M(key) - target|^2 by both layers."""
    error, (hidden, length), p = recall(w, key) - target, inside(w, key), key @ w[0]
    below = w[1] @ error
    below = (below - hidden * (hidden @ below)) / length
    return np.outer(key, below * (gelu(p + 1e-6) - gelu(p - 1e-6)) / 2e-6), np.outer(hidden, error)


def of_one_head(mixer, h, x, erase, momentum, retain, adaptive_key, adaptive_value, adaptive_query):
    """Spec 4.1 token by token, a removed part left out: only what is left has memories."""
    streams, _ = mixer.streams(x[None], None, None)
    stream = {name: np.asarray(made[0, :, h]) for name, made in streams.items()}
    keep = np.asarray(mixer.momentum(x)[:, h]) if momentum else np.zeros(len(x))
    rows = {"key": adaptive_key, "value": adaptive_value, "query": adaptive_query, "retain": retain}
    boxes = [b for b in ("key", "value", "rate", "retain", "memory", "query") if rows.get(b, True)]
    assert set(boxes) == set(mixer.boxes)
    of_head = lambda tree: jax.tree.map(lambda p: np.asarray(p)[h], nnx.to_pure_dict(tree))
    box = {name: of_head(nnx.state(mixer.boxes[name])) for name in boxes}
    working = {b: [box[b]["w1"], box[b]["w2"]] for b in boxes}
    seen, buffers = dict(working), {b: [0.0, 0.0] for b in boxes}
    answers = []
    for t in range(len(x)):
        made = lambda b, name, t=t: (
            recall(seen[b], stream[name][t]) if b in boxes else stream[name][t]
        )
        k, v, q = unit(made("key", "key")), made("value", "value"), unit(made("query", "query"))
        alpha = 1.0
        if retain:
            score = recall(seen["retain"], stream["gate"][t]) @ np.asarray(mixer.retain_readout[h])
            alpha = sigmoid(score + float(mixer.retain_bias[h]))
        for b in boxes:
            score = recall(seen["rate"], stream["gate"][t]) @ box[b]["rate_readout"]
            eta = (1 + alpha) * sigmoid(score + box[b]["rate_bias"])
            gradients = slopes(seen[b], k, recall(seen[b], v))
            inputs, written = (k, inside(seen[b], k)[0]), []
            for layer, (w, g, z) in enumerate(zip(working[b], gradients, inputs, strict=True)):
                g, z = g * min(1, 1 / np.linalg.norm(g)), z / np.linalg.norm(z)
                buffers[b][layer] = keep[t] * buffers[b][layer] - eta * g
                erased = eta * np.outer(z, z @ w) if erase else 0
                written.append(alpha * w - erased + buffers[b][layer])
            working[b] = written
        answers.append(recall(working["memory"], q))
        for b in boxes:
            if (t + 1) % CHUNKS["memory" if b == "memory" else "others"] == 0:
                limit = lambda w: w * min(1, 4 / np.linalg.norm(w))
                seen[b] = working[b] = [limit(w) for w in working[b]]
    return np.stack(answers)


@row
def test_a_row_is_what_is_left(switches):
    mixer = make(switches)
    x = jax.random.normal(jax.random.key(2), (LENGTH, WIDTH), jnp.float64)
    flags = dict.fromkeys(("erase", "momentum", "retain"), True)
    flags |= dict.fromkeys(("adaptive_key", "adaptive_value", "adaptive_query"), True) | switches
    heads = [of_one_head(mixer, h, x, **flags) for h in range(HEADS)]
    read = mixer.norm(jnp.asarray(np.stack(heads, 1))[None]).reshape(1, LENGTH, WIDTH)
    want = mixer.output(read * jax.nn.silu(mixer.gate(x[None])))
    np.testing.assert_allclose(jax.jit(mixer)(x[None])[0], want, rtol=1e-8, atol=1e-8)


@row
def test_what_stands_still_stays_and_all_else_learns(switches):
    """No removed memory moves, and every parameter that is left has a gradient."""
    mixer = make(switches)
    graph, params = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(2), (1, LENGTH, WIDTH), jnp.float64)
    loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params)(x)[0]))
    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert all(bool(jnp.any(g != 0) and jnp.all(jnp.isfinite(g))) for g in gradients)
    _, state = mixer(x)
    for name, layers in state.memory.weights.items():
        moves = not jnp.array_equal(layers[1][0], mixer.parameters().memories[name][1])
        assert moves == (name not in mixer.still), name


def test_a_configuration_reaches_its_rows():
    config = dataclasses.replace(nn.preset("hope-tiny"), retain=False, adaptive_key=False)
    model = nnx.eval_shape(lambda: nn.LanguageModel(config, rngs=nnx.Rngs(0)))
    assert model.blocks[0].mixer.still == ("key", "retain")
