"""Titans' mixers against NumPy loops written from the paper, and under the laws of mixers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import nn

SIZES = dict(heads=2, hidden=5, chunk_size=4, persistent=4)
MIXERS = {"lmm": nn.TitansLMM, "mac": nn.TitansMAC, "mag": nn.TitansMAG, "mal": nn.TitansMAL}
WINDOW = 5
LENGTH = 12
pytestmark = pytest.mark.usefixtures("x64")


def make(name, **options):
    """A mixer of 8 channels, its limits low enough to be met."""
    window = dict(window=WINDOW) if name in ("mag", "mal") else {}
    mixer = MIXERS[name](8, **SIZES | window | options, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(mixer):
        if hasattr(module, "bound"):
            module.clip, module.bound = 1.0, 2.0
    return mixer


def inputs(seed=1):
    return jax.random.normal(jax.random.key(seed), (2, LENGTH, 8))


def close(got, want, tolerance=1e-9):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


# 1. what the paper says, token by token


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu_slope(x):
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    slope = (2 / np.pi) ** 0.5 * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + np.tanh(inner)) + 0.5 * x * slope / np.cosh(inner) ** 2


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def shrink(x, limit):
    return x * min(1, limit / np.linalg.norm(x)) if limit else x


def array(parameter):
    return np.asarray(parameter[...])


class Head:
    """One memory M(z) = z + gelu(.. z W_1 ..) W_L under Titans' write (Eq. 11-16)."""

    def __init__(self, weights, chunk, clip, bound):
        self.now, self.start = list(weights), list(weights)
        self.surprise = [0 * w for w in weights]
        self.tokens, self.chunk, self.clip, self.bound = 0, chunk, clip, bound

    def layers(self, z, weights):
        into = [z]
        for w in weights[:-1]:
            into.append(into[-1] @ w)
        return into

    def recall(self, z, weights=None):
        weights = self.now if weights is None else weights
        y = z
        for n, w in enumerate(weights):
            y = (gelu(y) if n else y) @ w
        return z + y

    def write(self, k, v, rate, retain, momentum):
        before, inputs = [], [k]
        for w in self.start:
            before.append(inputs[-1] @ w)
            inputs.append(gelu(before[-1]))
        error, gradients = k + before[-1] - v, []
        for n in reversed(range(len(self.start))):
            gradients.insert(0, shrink(np.outer(inputs[n], error), self.clip))
            if n:
                error = (error @ self.start[n].T) * gelu_slope(before[n - 1])
        self.surprise = [
            momentum * s - rate * g for s, g in zip(self.surprise, gradients, strict=True)
        ]
        self.now = [retain * w + s for w, s in zip(self.now, self.surprise, strict=True)]
        self.tokens += 1

    def end(self):
        """After a token's read: where a chunk ends, gradients are taken at the weights of now."""
        if self.tokens % self.chunk == 0:
            self.now = [shrink(w, self.bound) for w in self.now]
            self.start = self.now


def heads_of(memory):
    """A head's memory for every head of a `DeepMemory`."""
    layers = [array(layer) for layer in memory.layers]
    limits = memory.chunk_size, memory.clip, memory.bound
    return [Head([w[h] for w in layers], *limits) for h in range(memory.heads)]


def gates_of(memory, x):
    """(rate, retain, momentum) of one token, each [h]."""
    gate = lambda g: sigmoid(x @ array(g.kernel) + array(g.bias))
    retain = 1 - gate(memory.forget)
    momentum = gate(memory.momentum) if memory.momentum else np.zeros(memory.heads)
    return (1 + retain) * (1 - momentum) / memory.chunk_size * gate(memory.rate), retain, momentum


def stream(module, x):
    """silu(conv_4(x W)) of one row [t, d], in heads [t, h, d]."""
    mapped = np.concatenate([np.zeros((3, 8)), x @ array(module.map.kernel)])
    kernel = array(module.convolution.kernel)
    made = np.stack([(kernel[::-1] * mapped[t : t + 4][::-1]).sum(0) for t in range(len(x))])
    return silu(made).reshape(len(x), module.heads, -1)


def neural_memory(module, x):
    """What is recalled at P, if it has any, and at x, of one row [t, d], in heads."""
    heads = heads_of(module.memory)
    recalled = []
    for part in (x,) if module.persistent is None else (array(module.persistent), x):
        q, k, v = (stream(module.streams[name], part) for name in ("query", "key", "value"))
        q, k = unit(q), unit(k)
        out = np.zeros_like(q)
        for t in range(len(part)):
            rate, retain, momentum = gates_of(module.memory, part[t])
            for h, head in enumerate(heads):
                head.write(k[t, h], v[t, h], rate[h], retain[h], momentum[h])
                weights = head.start if module.memory.read == "chunk_start" else head.now
                out[t, h] = head.recall(q[t, h], weights)
                head.end()
        recalled.append(out)
        for head in heads:
            head.start, head.surprise, head.tokens = head.now, [0 * w for w in head.now], 0
    return recalled


def numpy_lmm(mixer, x, recalled):
    mixer = mixer.out
    normed = rms(recalled, array(mixer.norm.scale)).reshape(len(x), 8)
    return normed * silu(x @ array(mixer.gate.kernel)) @ array(mixer.output.kernel)


def rotated(z, place):
    """Rotary positions of one token in heads [h, d]."""
    half = z.shape[-1] // 2
    turn = np.exp(1j * place * 10_000.0 ** (-np.arange(half) / half))
    turned = (z[:, :half] + 1j * z[:, half:]) * turn
    return np.concatenate([turned.real, turned.imag], -1)


def attended(module, query, place, seen):
    """Softmax attention of one token [d] at its place over pairs (token, place).

    A token without a place looks the same from everywhere.
    """
    heads = lambda z, part: (z @ array(getattr(module, part).kernel)).reshape(module.heads, -1)
    q = rotated(heads(query, "query"), place)
    keys = [rotated(heads(z, "key"), place if at is None else at) for z, at in seen]
    keys = np.stack(keys)
    values = np.stack([heads(z, "value") for z, _ in seen])
    weights = np.exp(np.einsum("hd,shd->sh", q, keys) / q.shape[-1] ** 0.5)
    out = np.einsum("sh,shd->hd", weights / weights.sum(0), values)
    return out.reshape(-1) @ array(module.output.kernel)


def windowed(module, x, prefix):
    """Attention of every token of x over the prefix and the window's tokens."""
    tokens = list(zip(x, range(len(x)), strict=True))
    first = [(token, None) for token in prefix]
    rows = [
        attended(module, token, t, [*first, *tokens[max(0, t + 1 - WINDOW) : t + 1]])
        for token, t in tokens
    ]
    return np.stack(rows)


def persistent_of(module):
    return np.zeros((0, 8)) if module.persistent is None else array(module.persistent)


def numpy_mag(mixer, x):
    y = windowed(mixer.attention, x, persistent_of(mixer.long_term))
    recalled = neural_memory(mixer.long_term, x)[-1].reshape(len(x), 8)
    gate = silu(rms(recalled, array(mixer.memory_norm.scale)))
    return rms(y, array(mixer.attention_norm.scale)) * gate @ array(mixer.output.kernel)


def numpy_mal(mixer, x):
    long_term = mixer.memory.long_term
    recalled, parts = neural_memory(long_term, x), [persistent_of(long_term), x]
    layer = lambda part, z: rms(numpy_lmm(mixer.memory, part, z), array(mixer.norm.scale))
    *prefix, y = (layer(p, z) for p, z in zip(parts[-len(recalled) :], recalled, strict=True))
    return windowed(mixer.attention, y, prefix[0] if prefix else [])


def numpy_mac(mixer, x):
    memory, heads = mixer.memory, heads_of(mixer.memory)
    chunk, norms = memory.chunk_size, {n: array(norm.scale) for n, norm in mixer.norms.items()}
    projected = lambda z, s: silu(z @ array(mixer.maps[s].kernel)).reshape(len(heads), -1)
    first, out = [(token, None) for token in persistent_of(mixer)], []
    for token in x:
        number = len(out) % chunk
        if number == 0:
            recalled, tokens = [], []
        asked = unit(projected(token, "query"))
        h = np.concatenate(
            [head.recall(q, head.start) for head, q in zip(heads, asked, strict=True)]
        )
        recalled.append((rms(h, norms["recalled"]), number))
        tokens.append((token, chunk + number))
        y = attended(mixer.attention, *tokens[-1], [*first, *recalled, *tokens])
        y = rms(y, norms["attended"])
        q, k, v = (projected(y, s) for s in ("query", "key", "value"))
        gates = gates_of(memory, y)
        for n, head in enumerate(heads):
            head.write(unit(k)[n], v[n], *(gate[n] for gate in gates))
        at = [head.start if memory.read == "chunk_start" else head.now for head in heads]
        read = [head.recall(z, w) for head, z, w in zip(heads, unit(q), at, strict=True)]
        learned = silu(rms(np.concatenate(read), norms["learned"]))
        out.append(y * learned @ array(mixer.output.kernel))
        for head in heads:
            head.end()
    return np.stack(out)


NUMPY = {
    "lmm": lambda mixer, x: numpy_lmm(mixer, x, neural_memory(mixer.long_term, x)[-1]),
    "mac": numpy_mac,
    "mag": numpy_mag,
    "mal": numpy_mal,
}


def check_numpy(name, mixer, x, y):
    for row in range(2):
        close(y[row], NUMPY[name](mixer, np.asarray(x[row])))


VARIANTS = [
    dict(depth=1, momentum=False, persistent=0),
    dict(depth=4, persistent=9),
    dict(depth=3, read="chunk_start"),
    dict(chunk_size=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_variants_are_the_paper(name, options):
    mixer, x = make(name, **options), inputs()
    check_numpy(name, mixer, x, jax.jit(lambda x: mixer(x))(x)[0])


def test_neural_memory_is_its_nest():
    """One head, tick by tick, from where the persistent tokens leave it."""
    module, x = make("lmm").long_term, inputs()[:1, :7]
    op = lambda x: (module.ask(x, None, None)[0], module.begin()[1], module(x))
    contexts, weights, (recalled, state) = jax.jit(op)(x)
    nest = module.nest()
    start = nest.start({"memory": tuple(w[1] for w in weights)})
    after, y = jax.jit(nest.scan)(start, jax.tree.map(lambda a: a[0, :, 1], contexts))
    close(y, recalled[0, :, 1])
    params, carry, _ = after["memory"]
    one_head = jax.tree.map(lambda w: w[0, 1], state.memory[:3])
    close((carry.weights, params, carry.momentum), one_head)


def test_mac_is_its_nest():
    """All heads, tick by tick; what a token's context holds after it changes nothing."""
    mixer, x = make("mac"), inputs()[:1, :7]
    chunks = [jnp.roll(x[0], -start, 0)[:4] for start in (0, 0, 0, 0, 4, 4, 4)]
    contexts = jnp.stack(chunks), jnp.arange(7) % 4
    nest = mixer.nest()
    weights = mixer.memory.weights()
    start = nest.start({f"memory.{n}": tuple(w[n] for w in weights) for n in range(2)})
    after, y = jax.jit(nest.scan)(start, contexts)
    whole, state = jax.jit(lambda x: mixer(x))(x)
    close(y, whole[0])
    for n in range(2):
        params, carry, _ = after[f"memory.{n}"]
        one_head = jax.tree.map(lambda w, n=n: w[0, n], state.memory[:3])
        close((carry.weights, params, carry.momentum), one_head)


# 2. laws; three compilations a mixer: all tokens with gradients, six tokens with segments, one


class Built(NamedTuple):
    name: str
    mixer: nnx.Module
    params: nnx.State
    x: jax.Array
    start: object  # the state before the first token
    apply: object  # (x, state, segment_ids) -> (y, state)
    gradient: object  # (params, x, weight [b, t]) -> ((weighted sum of y, (y, state)), gradients)
    y: jax.Array  # of all tokens, from no state
    state: object


QUICK = [pytest.param("lmm", marks=pytest.mark.slow), "mac", "mag", "mal"]  # mal holds an lmm


@pytest.fixture(scope="module", params=QUICK)
def built(request):
    with jax.enable_x64(True):
        mixer, x = make(request.param), inputs()
        graphdef, params = nnx.split(mixer)

        def total(params, x, weight):
            y, state = nnx.merge(graphdef, params)(x)
            return jnp.einsum("bt,btd,d->", weight, y, jnp.cos(jnp.arange(8.0))), (y, state)

        gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, whole), _ = gradient(params, x, jnp.ones((2, LENGTH)))
        apply = jax.jit(lambda x, state, ids: mixer(x, state, ids))
        start = jax.jit(lambda: mixer.init_state(2, LENGTH))()
        return Built(request.param, mixer, params, x, start, apply, gradient, *whole)


def six(built, x, state, ids=None):
    """Six tokens at a time."""
    ids = jnp.zeros(x.shape[:2], int) if ids is None else ids
    ys = []
    for at in range(0, x.shape[1], 6):
        y, state = built.apply(x[:, at : at + 6], state, ids[:, at : at + 6])
        ys.append(y)
    return jnp.concatenate(ys, 1), state


def one(built, x, state):
    """Token by token."""
    ys = []
    for at in range(x.shape[1]):
        y, state = built.apply(x[:, at : at + 1], state, None)
        ys.append(y)
    return jnp.concatenate(ys, 1), state


def memories(state):
    """A state without windowed attention's cache: a call from no state builds none."""
    return state._replace(attention=None) if isinstance(state, nn.TitansState) else state


def test_mixer_is_the_paper(built):
    check_numpy(built.name, built.mixer, built.x, built.y)


@pytest.mark.parametrize("cut", [six, one])
def test_any_split_is_the_whole(built, cut):
    y, state = cut(built, built.x, built.start)
    close(y, built.y)
    close(memories(state), memories(built.state))


def test_state_keeps_structure_shapes_and_dtypes(built):
    like = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    _, state = one(built, built.x[:, :1], built.start)
    assert like(state) == like(built.start)
    assert like(memories(built.state)) == like(memories(state))


def test_rows_stand_at_positions_of_their_own(built):
    _, early = one(built, built.x[:, :1], built.start)
    _, late = six(built, built.x[:, :6], built.start)
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), early, late)
    x = jnp.stack([built.x[0, 1:7], built.x[1, 6:12]])
    y, state = six(built, x, mixed)
    close(y, jnp.stack([built.y[0, 1:7], built.y[1, 6:12]]))
    close(*(jax.tree.map(lambda a: a[1], memories(s)) for s in (state, built.state)))


def test_packed_segments_are_what_they_would_be_alone(built):
    """A segment goes on from the call before, fills a chunk, is one token, begins with a chunk."""
    cuts = [[0, 2, 7, 11, 12], [0, 4, 8, 9, 12]]
    ids = [jnp.repeat(jnp.array([3, 7, 3, 5]), jnp.diff(jnp.array(c))) for c in cuts]
    packed, state = six(built, built.x, built.start, jnp.stack(ids))
    for row in range(2):
        for begin, stop in zip(cuts[row][:-1], cuts[row][1:], strict=True):
            alone, end = one(built, built.x[:, begin:stop], built.start)
            close(packed[row, begin:stop], alone[row])
        close(*(jax.tree.map(lambda a, row=row: a[row], memories(s)) for s in (state, end)))


def test_causal_and_no_leak_across_the_batch(built):
    for at in (4, 6):
        weight = jnp.zeros((2, LENGTH)).at[0, at].set(1.0)
        _, (_, slope) = built.gradient(built.params, built.x, weight)
        seen = jnp.abs(slope).max(-1)
        assert jnp.all(seen[0, : at + 1] > 0)
        assert jnp.all(seen[0, at + 1 :] == 0)
        assert jnp.all(seen[1] == 0)


def test_gradients_reach_every_parameter_and_are_finite_differences(built):
    """Along a random direction of each parameter, and of the inputs."""
    weight = jax.random.normal(jax.random.key(2), (2, LENGTH))
    floats = built.params, built.x
    _, slopes = built.gradient(*floats, weight)
    leaves, tree = jax.tree.flatten(floats)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(floats)]
    for n, (path, slope) in enumerate(zip(paths, jax.tree.leaves(slopes), strict=True)):
        assert jnp.all(jnp.isfinite(slope)), path
        assert jnp.abs(slope).max() > 1e-9, path
        direction = jax.random.normal(jax.random.key(n), slope.shape)

        def moved(step, n=n, direction=direction):
            changed = [*leaves[:n], leaves[n] + step * direction, *leaves[n + 1 :]]
            return built.gradient(*jax.tree.unflatten(tree, changed), weight)[0][0]

        np.testing.assert_allclose(
            (moved(1e-5) - moved(-1e-5)) / 2e-5,
            jnp.sum(slope * direction),
            rtol=1e-6,
            atol=1e-8,
            err_msg=path,
        )
