# SPDX-License-Identifier: Apache-2.0
"""The tasks of `nlx run optimizers`, each a few pure functions.

Kernels are [in, out]; a loss taps the inputs of every kernel (`nlx.optim.tap`), for the optimizers
that read them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlx import optim
from nlx_experiments import batching
from nlx_experiments import data as text
from nlx_experiments.errors import Refused

Params = dict[str, jax.Array]


class Task(NamedTuple):
    """What is learned, for how many steps, and how it is scored."""

    steps: int
    points: int  # how often it is scored: after each `steps / points` steps
    data: Any  # arrays that `init` reads
    init: Callable[[Any, Any], tuple[Params, Any]]  # (data, key) -> parameters, what stays fixed
    loss: Callable[..., jax.Array]  # (fixed, params, taps, key, step)
    score: Callable[..., dict[str, jax.Array]]  # (fixed, params, step), after `step` steps
    online: bool = False  # whether the mean loss while learning is what counts, not the last score


def toy(steps: int = 200, k: float = 5.0, alpha: float = 0.5, omega: float = 5.0) -> Task:
    """r^2 + k (r - theta + alpha sin(omega r))^2, from (-3.5, 2) and a little around it.

    Source: Behrouz et al. (2025), Nested Learning, eq. 53, which gives no k, alpha and omega.
    """

    def init(data, key):
        del data
        return {"w": jnp.array([-3.5, 2.0]) + 0.1 * jax.random.normal(key, (2,))}, ()

    def psi(params):
        r, theta = params["w"]
        return r**2 + k * (r - theta + alpha * jnp.sin(omega * r)) ** 2

    return Task(
        steps,
        steps,
        (),
        init,
        lambda fixed, params, taps, key, step: psi(params),
        lambda fixed, params, step: {"loss": psi(params)},
    )


NOISES = ("gaussian", "heavy-tailed", "outliers")


def quadratic(
    noise: str, steps: int = 400, rows: int = 64, columns: int = 64, condition: float = 1e3
) -> Task:
    """1/2 |H^(1/2) (W - W*)|^2 / columns, as of a linear layer with labels W* x + noise.

    H has eigenvalues from 1 down to 1 / `condition` in a random basis. The gradient's noise is
    H^(1/2) Z, column c of Z being e_c times a Gaussian vector: e_c is 1, or Student's t with 1.5
    degrees of freedom, whose variance is infinite, or 30 in one case of twenty and else 1.
    """
    roots = jnp.logspace(0, -math.log10(condition) / 2, rows)

    def init(data, key):
        del data
        basis, best = jax.random.split(key)
        basis = jnp.linalg.qr(jax.random.normal(basis, (rows, rows)))[0]
        fixed = (basis * roots[None]) @ basis.T, jax.random.normal(best, (rows, columns))
        return {"w": jnp.zeros((rows, columns))}, fixed

    def error(fixed, params):
        root, best = fixed
        return root @ (params["w"] - best)

    def scale(key):
        if noise == "gaussian":
            return jnp.ones(columns)
        if noise == "heavy-tailed":
            return jax.random.t(key, 1.5, (columns,))
        return jnp.where(jax.random.bernoulli(key, 0.05, (columns,)), 30.0, 1.0)

    def loss(fixed, params, taps, key, step):
        del taps, step
        one, two = jax.random.split(key)
        z = jax.random.normal(one, (rows, columns)) * scale(two)[None]
        e = error(fixed, params)
        return jnp.sum(0.5 * e**2 + e * z)

    def score(fixed, params, step):
        del step
        return {"loss": jnp.sum(error(fixed, params) ** 2) / (2 * columns)}

    return Task(steps, 50, (), init, loss, score)


def digits(steps: int = 400, batch: int = 16) -> Task:
    """scikit-learn's 8 x 8 digits, an MLP 64-64-10; scored by the loss on all it is trained on."""
    x, y = _digits()
    train = {"x": x[:1500], "y": y[:1500], "test_x": x[1500:], "test_y": y[1500:]}

    def init(data, key):
        return _mlp_init(key, (64, 64, 10)), data

    def loss(fixed, params, taps, key, step):
        del step
        rows = jax.random.randint(key, (batch,), 0, fixed["y"].size)
        return _cross_entropy(_mlp(params, taps, fixed["x"][rows]), fixed["y"][rows])

    def score(fixed, params, step):
        del step
        on = lambda x, y: _cross_entropy(_mlp(params, None, x), y)
        return {
            "loss": on(fixed["x"], fixed["y"]),
            "test": on(fixed["test_x"], fixed["test_y"]),
        }

    return Task(steps, 40, train, init, loss, score)


def permuted(tasks: int = 50, steps: int = 100, batch: int = 16) -> Task:
    """The digits with labels permuted anew every `steps` steps; scored by the mean loss on the way.

    Plasticity: accuracy just after learning a permutation. Forgetting: how much of it is gone after
    the next one.
    """
    x, y = _digits()

    def init(data, key):
        weights, order = jax.random.split(key)
        labels = jax.vmap(lambda k: jax.random.permutation(k, 10))(jax.random.split(order, tasks))
        return _mlp_init(weights, (64, 64, 10)), {**data, "labels": labels}

    def loss(fixed, params, taps, key, step):
        rows = jax.random.randint(key, (batch,), 0, fixed["y"].size)
        labels = fixed["labels"][step // steps][fixed["y"][rows]]
        return _cross_entropy(_mlp(params, taps, fixed["x"][rows]), labels)

    def score(fixed, params, step):
        now = step // steps - 1
        said = jnp.argmax(_mlp(params, None, fixed["x"]), -1)
        accuracy = lambda labels: jnp.mean(said == labels[fixed["y"]])
        return {
            "accuracy": accuracy(fixed["labels"][now]),
            "accuracy before": accuracy(fixed["labels"][jnp.maximum(now - 1, 0)]),
        }

    return Task(tasks * steps, tasks, {"x": x, "y": y}, init, loss, score, online=True)


def transformer(
    steps: int = 300, width: int = 64, layers: int = 2, context: int = 64, batch: int = 8
) -> Task:
    """A transformer on the bytes of the standard library's source, scored on held-out files."""
    corpus = text.load()
    scored = batching.evaluation_windows(corpus.heldout, context, 64 * context)
    heldout = np.stack([corpus.heldout[i * context : (i + 1) * context + 1] for i in scored])
    heads = 4

    def init(data, key):
        shapes = {"embed": (256, width), "place": (context, width)}
        for i in range(layers):
            shapes |= {f"{i}/{name}": (width, width) for name in ("q", "k", "v", "o")}
            shapes |= {f"{i}/up": (width, 4 * width), f"{i}/down": (4 * width, width)}
        shapes["head"] = (width, 256)
        keys = jax.random.split(key, len(shapes))
        params = {
            name: jax.random.normal(k, shape)
            * (0.5 if name == "embed" else 1)
            / math.sqrt(1 if name in ("embed", "place") else shape[0])
            for (name, shape), k in zip(shapes.items(), keys, strict=True)
        }
        for i in range(layers):
            params[f"{i}/o"] *= 0.1
            params[f"{i}/down"] *= 0.1
        params["place"] *= 0.1
        params["head"] *= 0.1
        return params, data

    def apply(params, taps, tokens):
        dense = lambda x, name: _dense(params, taps, x, name)

        x = params["embed"][tokens] + params["place"][None]
        mask = jnp.tril(jnp.ones((1, 1, context, context), bool))
        for i in range(layers):
            h = _norm(x)
            q, k, v = (
                dense(h, f"{i}/{name}").reshape(*h.shape[:2], heads, -1) for name in ("q", "k", "v")
            )
            q, k = _norm(q), _norm(k)
            weights = jnp.einsum("bthd,bshd->bhts", q, k) * math.sqrt(width // heads)
            weights = jax.nn.softmax(jnp.where(mask, weights, -1e30))
            x += dense(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape), f"{i}/o")
            x += dense(jax.nn.gelu(dense(_norm(x), f"{i}/up")), f"{i}/down")
        return dense(_norm(x), "head")

    def of_windows(params, taps, windows):
        windows = windows.astype(jnp.int32)
        return _cross_entropy(apply(params, taps, windows[:, :-1]), windows[:, 1:])

    def loss(fixed, params, taps, key, step):
        del step
        starts = jax.random.randint(key, (batch,), 0, fixed["train"].size - context)
        windows = fixed["train"][starts[:, None] + jnp.arange(context + 1)[None]]
        return of_windows(params, taps, windows)

    def score(fixed, params, step):
        del step
        return {"loss": of_windows(params, None, fixed["heldout"])}

    return Task(steps, 10, {"train": corpus.train, "heldout": heldout}, init, loss, score)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise Refused(
            "the digits come with scikit-learn, which is not installed; install nlx[experiments]."
        ) from error
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(y.size)  # they are sorted by writer
    return (x[order] / 8 - 1).astype(np.float32), y[order].astype(np.int32)


def _mlp_init(key, sizes) -> Params:
    params = {}
    for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        key, one = jax.random.split(key)
        params |= {
            f"w{i}": jax.random.normal(one, (m, n)) * math.sqrt(2 / m),
            f"b{i}": jnp.zeros(n),
        }
    return params


def _mlp(params, taps, x):
    last = len(params) // 2 - 1
    for i in range(last + 1):
        x = _dense(params, taps, x, f"w{i}") + params[f"b{i}"][None]
        x = jax.nn.relu(x) if i < last else x
    return x


def _dense(params, taps, x, name):
    return (x if taps is None else optim.tap(x, taps[name])) @ params[name]


def _norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
