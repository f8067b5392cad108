"""What the papers say of each mixer, token by token in NumPy, and the laws of all of them.

Hope and attention over everything: test_mixers.py, and their laws test_model.py.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nlx import nn

LENGTH, HEADS = 12, 2
MIXERS = {
    "window": functools.partial(nn.Attention, window=4),
    "retnet": nn.RetNet,
    "deltanet": nn.DeltaNet,
    "gated_deltanet": nn.GatedDeltaNet,
    "mamba2": functools.partial(nn.Mamba2, state_dim=3),
    "ttt_linear": functools.partial(nn.TTTLinear, chunk_size=4),
    "ttt_mlp": functools.partial(nn.TTTMLP, chunk_size=4),
}
pytestmark = pytest.mark.usefixtures("x64")


def make(name):
    return MIXERS[name](8, heads=HEADS, rngs=nnx.Rngs(0))


def random(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


# 1. what the papers say, of one row x [t, d]


def array(parameter):
    return np.asarray(parameter[...])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def mapped(linear, x, heads=HEADS):
    """x W in heads [t, h, d]."""
    return (x @ array(linear.kernel)).reshape(len(x), heads, -1)


def convolved(convolution, x):
    """Four taps, the newest token's last."""
    kernel = array(convolution.kernel)
    padded = np.concatenate([np.zeros((3, x.shape[1])), x])
    return sum(kernel[j] * padded[j : j + len(x)] for j in range(4))


def streamed(stream, x):
    made = silu(convolved(stream.convolution, x @ array(stream.map.kernel)))
    return made.reshape(len(x), stream.heads, -1)


def gate(module, x):
    return sigmoid(x @ array(module.kernel) + array(module.bias))


def decay(module, x):
    """(step, retain) [t, h]."""
    step = np.log1p(np.exp(x @ array(module.kernel) + array(module.bias)))
    return step, np.exp(-np.exp(array(module.log_speed)) * step)


def read_out(module, x, o):
    """o [t, h, v]."""
    y = rms(o, array(module.norm.scale)).reshape(len(x), -1)
    y = y if module.gate is None else y * silu(x @ array(module.gate.kernel))
    return y @ array(module.output.kernel)


def attention(mixer, x):
    """Eq. 63, complex rotations at absolute positions."""
    q, k, v = (mapped(part, x) for part in (mixer.query, mixer.key, mixer.value))
    half, o = q.shape[-1] // 2, np.zeros_like(v)
    turns = np.exp(1j * np.outer(np.arange(len(x)), 10_000.0 ** (-np.arange(half) / half)))
    q, k = ((z[..., :half] + 1j * z[..., half:]) * turns[:, None] for z in (q, k))
    for h, t in itertools.product(range(HEADS), range(len(x))):
        seen = slice(max(0, t + 1 - mixer.window), t + 1)
        weights = np.exp((k[seen, h] @ q[t, h].conj()).real / np.sqrt(2 * half))
        o[t, h] = weights / weights.sum() @ v[seen, h]
    return o.reshape(len(x), -1) @ array(mixer.output.kernel)


def retnet(mixer, x):
    """Eq. 6: S_n = gamma S_{n-1} + K_n^T V_n, complex rotations at absolute positions."""
    q, k, v = (mapped(part, x) for part in (mixer.query, mixer.key, mixer.value))
    o = np.zeros_like(v)
    half = q.shape[-1] // 2
    speeds = 10_000.0 ** (-np.arange(half) / half)
    for h in range(HEADS):
        state = np.zeros((half, v.shape[-1]), complex)
        for t in range(len(x)):
            query, key = (z[t, h, :half] + 1j * z[t, h, half:] for z in (q, k))
            key = key * np.exp(1j * t * speeds) / np.sqrt(2 * half)
            state = (1 - 2.0 ** (-5 - h)) * state + np.outer(key, v[t, h])
            o[t, h] = ((query * np.exp(1j * t * speeds)).conj() @ state).real
    return read_out(mixer.out, x, o)


def corrected(mixer, x, alpha, beta):
    """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T; o_t = S_t q_t."""
    q, k, v = (streamed(mixer.streams[name], x) for name in ("query", "key", "value"))
    q, k, o = unit(q), unit(k), np.zeros_like(v)
    for h in range(HEADS):
        state = np.zeros((v.shape[-1], k.shape[-1]))
        for t in range(len(x)):
            key = k[t, h]
            state = alpha[t, h] * state @ (np.eye(len(key)) - beta[t, h] * np.outer(key, key))
            state = state + beta[t, h] * np.outer(v[t, h], key)
            o[t, h] = state @ q[t, h]
    return read_out(mixer.out, x, o)


def deltanet(mixer, x):
    beta = mixer.top * gate(mixer.beta, x)
    return corrected(mixer, x, np.ones_like(beta), beta)


def gated_deltanet(mixer, x):
    return corrected(mixer, x, decay(mixer.alpha, x)[1], gate(mixer.beta, x))


def mamba2(mixer, x):
    """h_t = exp(-A dt) h_{t-1} + dt B_t x_t^T; y_t = C_t h_t + D x_t."""
    v, b, c = (streamed(mixer.streams[name], x) for name in ("value", "key", "query"))
    step, retain = decay(mixer.decay, x)
    y = np.zeros_like(v)
    for h in range(HEADS):
        state = np.zeros((b.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            state = retain[t, h] * state + step[t, h] * np.outer(b[t, 0], v[t, h])
            y[t, h] = c[t, 0] @ state + array(mixer.skip)[h] * v[t, h]
    gated = y.reshape(len(x), -1) * silu(x @ array(mixer.gate.kernel))
    return rms(gated, array(mixer.norm.scale)) @ array(mixer.output.kernel)


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu_slope(x):
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    slope = (2 / np.pi) ** 0.5 * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + np.tanh(inner)) + 0.5 * x * slope / np.cosh(inner) ** 2


def inner(weights, z):
    """f(z) normalised, its standard deviation, and what goes into every layer before gelu."""
    into = [z]
    for n, w in enumerate(weights):
        into.append((gelu(into[-1]) if n else into[-1]) @ w)
    deviation = np.sqrt(into[-1].var() + 1e-6)
    return (into[-1] - into[-1].mean()) / deviation, deviation, into[:-1]


def inner_gradient(weights, k, v):
    """Of 1/2 |k + layernorm(f(k)) - v|^2, by hand."""
    normed, deviation, into = inner(weights, k)
    error = k + normed - v
    error = (error - error.mean() - normed * (error * normed).mean()) / deviation
    gradients = []
    for n in reversed(range(len(weights))):
        gradients.insert(0, np.outer(gelu(into[n]) if n else into[n], error))
        error = error @ weights[n].T * (gelu_slope(into[n]) if n else 1)
    return gradients


def ttt(mixer, x):
    """W_t = W_{t-1} - eta_t grad at the weights of the chunk's start; o_t = q + layernorm(f(q))."""
    made = {name: x @ array(linear.kernel) for name, linear in mixer.maps.items()}
    for name in ("query", "key"):
        made[name] = convolved(mixer.convolutions[name], made[name])
    q, k, v = (made[name].reshape(len(x), HEADS, -1) for name in ("query", "key", "value"))
    eta = {1: 1.0, 2: 0.1}[len(mixer.layers)] * gate(mixer.eta, x) / q.shape[-1]
    o = np.zeros_like(q)
    for h in range(HEADS):
        weights = start = [array(layer)[h] for layer in mixer.layers]
        for t in range(len(x)):
            start = weights if t % mixer.chunk_size == 0 else start
            gradients = inner_gradient(start, k[t, h], v[t, h])
            weights = [w - eta[t, h] * g for w, g in zip(weights, gradients, strict=True)]
            o[t, h] = q[t, h] + inner(weights, q[t, h])[0]
    return read_out(mixer.out, x, o)


NUMPY = {
    "window": attention,
    "retnet": retnet,
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    "mamba2": mamba2,
    "ttt_linear": ttt,
    "ttt_mlp": ttt,
}


# 2. laws; three compilations a mixer: all tokens with gradients, six tokens with segments, one


class Built(NamedTuple):
    """One mixer and its compiled functions."""

    name: str
    mixer: nnx.Module
    params: nnx.State
    x: jax.Array
    start: object  # the state before the first token
    apply: object  # (x, state, segment_ids) -> (y, state)
    gradient: object  # (params, x, weight [b, t]) -> ((weighted sum of y, y), gradients)
    y: jax.Array  # of all tokens, from no state


@pytest.fixture(scope="module", params=MIXERS)
def built(request):
    with jax.enable_x64(True):
        mixer, x = make(request.param), random(2, LENGTH, 8)
        graphdef, params = nnx.split(mixer)

        def total(params, x, weight):
            y, _ = nnx.merge(graphdef, params)(x)
            return jnp.einsum("bt,btd,d->", weight, y, jnp.cos(jnp.arange(8.0))), y

        gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, y), _ = gradient(params, x, jnp.ones((2, LENGTH)))
        apply = jax.jit(lambda x, state, ids: mixer(x, state, ids))
        start = mixer.init_state(2, LENGTH)
        yield Built(request.param, mixer, params, x, start, apply, gradient, y)


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


def test_mixer_is_the_paper(built):
    for row in range(2):
        close(built.y[row], NUMPY[built.name](built.mixer, np.asarray(built.x[row])))


def test_mixer_is_its_nest(built):
    """Every head, tick by tick."""
    mixer = built.mixer
    if built.name == "window":
        return  # a level, in test_mixers.py
    asked, _ = mixer.ask(built.x[:1], None, None)
    nest = mixer.nest()
    deep = built.name.startswith("ttt")
    weights = mixer.weights() if deep else built.start.memory[0]
    heads = jax.tree.map(lambda a: jnp.swapaxes(a[0], 0, 1), asked)

    @jax.jit
    @jax.vmap
    def ticks(weights, tokens):
        return jax.lax.scan(nest.step, nest.start({"memory": weights}, jnp.int32(0)), tokens)[1]

    o = jnp.swapaxes(ticks(weights, heads), 0, 1)[None]
    y = mixer.out(built.x[:1], o) if deep else mixer.read_out(built.x[:1], asked, o)
    close(y, built.y[:1])


def test_any_split_is_the_whole(built):
    by_six, after_six = six(built, built.x, built.start)
    by_one, after_one = one(built, built.x, built.start)
    close(by_six, built.y)
    close(by_one, built.y)
    close(after_six, after_one)


def test_state_keeps_structure_shapes_and_dtypes(built):
    like = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert like(six(built, built.x, built.start)[1]) == like(built.start)
    assert like(built.mixer.init_state(2, 10**6)) == like(built.start)


def test_rows_stand_at_positions_of_their_own(built):
    _, early = one(built, built.x[:, :1], built.start)
    _, late = six(built, built.x[:, :6], built.start)
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), early, late)
    x = jnp.stack([built.x[0, 1:7], built.x[1, 6:12]])
    y, _ = six(built, x, mixed)
    close(y, jnp.stack([built.y[0, 1:7], built.y[1, 6:12]]))


def test_packed_segments_are_what_they_would_be_alone(built):
    """A segment goes on from the call before, fills a chunk, is one token, begins with a chunk."""
    cuts = [[0, 2, 7, 11, 12], [0, 4, 8, 9, 12]]
    ids = [jnp.repeat(jnp.array([3, 7, 3, 5]), jnp.diff(jnp.array(c))) for c in cuts]
    packed, state = six(built, built.x, built.start, jnp.stack(ids))
    more = random(2, 2, 8, seed=5)
    later, _ = one(built, more, state)
    for row in range(2):
        for begin, stop in zip(cuts[row][:-1], cuts[row][1:], strict=True):
            alone, end = one(built, built.x[:, begin:stop], built.start)
            close(packed[row, begin:stop], alone[row])
        close(later[row], one(built, more, end)[0][row])


def test_causal_and_no_leak_across_the_batch(built):
    window = getattr(built.mixer, "window", None) or LENGTH
    for at in (4, 6):
        weight = jnp.zeros((2, LENGTH)).at[0, at].set(1.0)
        _, (_, slope) = built.gradient(built.params, built.x, weight)
        seen = jnp.abs(slope).max(-1)
        first = max(0, at + 1 - window)
        assert jnp.all(seen[0, first : at + 1] > 0)
        assert jnp.all(seen[0, :first] == 0)
        assert jnp.all(seen[0, at + 1 :] == 0)
        assert jnp.all(seen[1] == 0)


def test_gradients_reach_every_parameter_and_are_finite_differences(built):
    """Along a random direction of each parameter, and of the inputs."""
    weight = random(2, LENGTH, seed=2)
    floats = built.params, built.x
    _, slopes = built.gradient(*floats, weight)
    leaves, tree = jax.tree.flatten(floats)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(floats)]
    for n, (path, slope) in enumerate(zip(paths, jax.tree.leaves(slopes), strict=True)):
        assert jnp.all(jnp.isfinite(slope)), path
        assert jnp.abs(slope).max() > 1e-9, path
        direction = random(*slope.shape, seed=n)

        def moved(step, n=n, direction=direction):
            changed = [*leaves[:n], leaves[n] + step * direction, *leaves[n + 1 :]]
            return built.gradient(*jax.tree.unflatten(tree, changed), weight)[0][0]

        wide, narrow = ((moved(h) - moved(-h)) / (2 * h) for h in (2e-5, 1e-5))
        np.testing.assert_allclose(
            (4 * narrow - wide) / 3,
            jnp.sum(slope * direction),
            rtol=1e-6,
            atol=1e-8,
            err_msg=path,
        )


# 3. what some have alone


def test_retnet_does_not_mind_how_late_it_is():
    """The state's angle turns queries and keys alike."""
    mixer = make("retnet")
    start = mixer.init_state(2)
    late = start._replace(before=start.before + 5)
    run = jax.jit(lambda state: mixer(random(2, 3, 8), state))
    (y, _), (later, state) = run(start), run(late)
    close(later, y)
    assert jnp.all((state.before >= 0) & (state.before < 2 * jnp.pi))


def test_deltanet_may_have_negative_eigenvalues():
    mixer = nn.DeltaNet(8, heads=HEADS, negative_eigenvalues=True, rngs=nnx.Rngs(0))
    x = random(1, 6, 8)
    close(jax.jit(lambda x: mixer(x))(x)[0][0], deltanet(mixer, np.asarray(x[0])))
    beta = mixer.ask(x, None, None)[0].stored.rate
    assert beta.max() > 1.2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda r: nn.RetNet(6, heads=2, rngs=r), "`width` is 6; it must be a multiple of 2 heads"),
        (lambda r: nn.DeltaNet(8, heads=3, rngs=r), "`heads` is 3; it must be a divisor of width"),
        (lambda r: nn.GatedDeltaNet(8, heads=0, rngs=r), "`heads` is 0; it must be an integer >="),
        (lambda r: nn.Mamba2(8, heads=3, rngs=r), "`heads` is 3; it must be a divisor of 2 width"),
        (lambda r: nn.Mamba2(8, heads=2, state_dim=0, rngs=r), "`state_dim` is 0; it must be an"),
        (lambda r: nn.TTTLinear(8, heads=3, rngs=r), "`heads` is 3; it must be a divisor of width"),
        (lambda r: nn.TTTMLP(8, heads=2, chunk_size=0, rngs=r), "`chunk_size` is 0; it must be an"),
        (lambda r: nn.RetNet(8, heads=2, rngs=r).init_state(0), "`batch` is 0; it must be an int"),
    ],
)
def test_bad_input_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(nnx.Rngs(0))
