# SPDX-License-Identifier: Apache-2.0
"""Do others, who wrote the same equations on their own, compute the same numbers?

command    python -m nlx_experiments.compare_peers [delta] [gated-delta] [retention] [ttt] [hope]
shows      the largest difference, over the largest number, of outputs, states and gradients
           between nlx and flash-linear-attention's references (naive.py), and nested-learning's
           SelfModifyingTitans with its weights copied; and where the last one reads otherwise
expects    1e-5 or less in float32 (FLA's references have no float64), 1e-9 in float64
takes      half a minute
needs      pip install torch==2.13.0 einops; pip install --no-deps fla-core nested-learning==0.2.0,
           in an environment of Python 3.11 with nlx in it

Conventions that had to be mapped, theirs on the left:

delta         [b, h, t, d]; divides queries by sqrt(d) inside; beta is our rate and our erase
gated-delta   [b, t, h, d]; divides queries by sqrt(d); g = log(retain); forgets before it erases,
              so our erase is retain * beta
retention     [b, h, t, d]; divides queries by sqrt(d); knows gamma_h by itself; no rotation, norm
              or state: our `linear_memory` with erase 0, rate 1
ttt           [b, t, h, d]; divides queries by sqrt(d) unless scale = 1; learns k + norm(f(k)) as
              ours does (it says: v - k), but reads f(q) + norm(f(q)), where the paper and ours have
              q + norm(f(q)); f has a bias that ours lacks; the norm a scale and a shift, here 1 and
              0; the rate of the token that *reads* weighs all that was written in the chunk before
              it, and that of the chunk's last token what is carried on: ours, of the token that
              *writes*, is equal where the rate is constant in a chunk. Compared twice: as a level
              with a bias, after every write; and as our op, their bias put back to 0 at each chunk
hope          see `compare_peers_hope`
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nlx
from nlx import objectives, ops, writes
from nlx.memories import Memory
from nlx_experiments import compare_peers_hope, peers
from nlx_experiments.console import say
from nlx_experiments.errors import Refused
from nlx_experiments.peers import Errors, error

ROWS, TOKENS, HEADS, WIDTH = 2, 128, 2, 16
SINGLE, DOUBLE = 1e-5, 1e-9


def normal(*shape: int, seed: int) -> np.ndarray:
    """Random numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(seed: int = 0) -> dict[str, np.ndarray]:
    """Queries, keys of unit length and values [b, t, h, d], and two gates in (0, 1) [b, t, h]."""
    shape = ROWS, TOKENS, HEADS, WIDTH
    q, k, v = (normal(*shape, seed=seed + n) for n in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    sigmoid = lambda bias, n: 1 / (1 + np.exp(-bias - normal(*shape[:3], seed=seed + n)))
    return {"q": q, "k": k, "v": v, "beta": sigmoid(0, 3), "retain": sigmoid(3, 4)}


def both(
    ours: Callable[..., Any], theirs: Callable[..., Any], inputs: Mapping[str, np.ndarray]
) -> Errors:
    """Differences of (output, state or None), and of gradients of a random sum of the outputs.

    ours, theirs: functions of the inputs by name, arrays and tensors [b, t, h, ...].
    """
    torch = peers.torch()
    weight = normal(ROWS, TOKENS, HEADS, WIDTH, seed=9)

    def total(inputs):
        y, state = ours(**inputs)
        return jnp.sum(y * weight), (y, state)

    (_, (y, state)), slopes = jax.value_and_grad(total, has_aux=True)(dict(inputs))
    tensors = {n: torch.tensor(a, requires_grad=True) for n, a in inputs.items()}
    their_y, their_state = theirs(**tensors)
    (their_y * torch.tensor(weight)).sum().backward()
    found = {"output": error(y, their_y.detach().numpy())}
    if their_state is not None:
        found["state"] = error(state, their_state.detach().numpy())
    their_slopes = {n: t.grad.numpy() for n, t in tensors.items()}
    return found | {"gradients": max(error(slopes[n], s) for n, s in their_slopes.items())}


def delta() -> Errors:
    """FLA's delta rule."""
    naive = peers.fla_naive("delta_rule")
    inputs = tokens()
    del inputs["retain"]

    def ours(q, k, v, beta):
        return ops.linear_memory(
            q * WIDTH**-0.5, k, v, retain=jnp.ones_like(beta), erase=beta, rate=beta
        )

    def theirs(q, k, v, beta):
        heads_first = [z.transpose(1, 2) for z in (q, k, v, beta)]
        y, state = naive.delta_rule_recurrence(*heads_first)
        return y.transpose(1, 2), state

    return both(ours, theirs, inputs)


def gated_delta() -> Errors:
    """FLA's gated delta rule."""
    naive = peers.fla_naive("gated_delta_rule")

    def ours(q, k, v, beta, retain):
        return ops.linear_memory(
            q * WIDTH**-0.5, k, v, retain=retain, erase=retain * beta, rate=beta
        )

    def theirs(q, k, v, beta, retain):
        return naive.naive_recurrent_gated_delta_rule(
            q, k, v, beta, retain.log(), output_final_state=True
        )

    return both(ours, theirs, tokens())


def retention() -> Errors:
    """FLA's retention."""
    naive = peers.fla_naive("retention")
    inputs = {name: array for name, array in tokens().items() if name in "qkv"}

    def ours(q, k, v):
        ones = jnp.ones(q.shape[:3])
        gamma = ones * (1 - 2.0 ** (-5 - jnp.arange(HEADS)))[None, None]
        return ops.linear_memory(q * WIDTH**-0.5, k, v, retain=gamma, erase=0 * ones, rate=ones)

    def theirs(q, k, v):
        return naive.naive_retention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2), None

    return both(ours, theirs, inputs)


def ttt(chunk_size: int = 16) -> Errors:
    """FLA's TTT-linear: as a level with their bias, and our op without it."""
    inputs = tokens()
    inputs["rate"] = np.repeat(inputs["beta"][:, ::chunk_size], chunk_size, axis=1) / WIDTH
    start = normal(ROWS, HEADS, WIDTH, WIDTH, seed=7) * WIDTH**-0.5
    return _ttt_level(inputs, start, chunk_size) | _ttt_op(inputs, start, chunk_size)


def _ttt_reference(asked, rate, weights, chunk_size: int):
    """Theirs, from these weights and a bias of 0: output, weights, bias. asked: q, k, v."""
    torch = peers.torch()
    q, k, v, rate, weights = (torch.tensor(np.array(z)) for z in (*asked, rate, weights))
    scale, shift = torch.ones(HEADS, WIDTH), torch.zeros(HEADS, WIDTH)
    found = peers.fla_naive("ttt").chunk_ttt_linear_ref(
        q, k, v, scale, shift, rate[..., None], scale=1.0, mini_batch_size=chunk_size,
        initial_state=weights, output_final_state=True,
    )  # fmt: skip
    return [each.numpy() for each in found]


def _ttt_level(inputs, start, chunk_size: int) -> Errors:
    """M(z) = z + norm(z W + b) as a level of the ground floor, read their way after every write."""

    def norm(z):
        z = z - jnp.mean(z)
        return z * jax.lax.rsqrt(jnp.mean(z**2) + 1e-6)

    def read(params, z):
        return z + norm(z @ params[0] + params[1])

    def reading(params, z):
        return read(params, z) - z + z @ params[0] + params[1]

    memory = Memory(lambda key: (jnp.zeros((WIDTH, WIDTH)), jnp.zeros(WIDTH)), read, None)
    level = nlx.associative_memory(
        memory, objectives.l2, writes.gated(momentum=False), nlx.Clock(chunk_size)
    )
    nest = nlx.Nest(
        {"memory": level},
        lambda params, token: (token[0], {"memory": token[1]}),
        read=lambda working, query, token: reading(working["memory"], query),
    )

    @jax.jit
    @jax.vmap
    @jax.vmap
    def run(weight, q, k, v, rate):
        states = nest.start({"memory": (weight, jnp.zeros(WIDTH))})
        states, y = nest.scan(states, (q, nlx.Association(k, v, rate)))
        return y, states["memory"].params

    per_head = [np.swapaxes(inputs[name], 1, 2) for name in ("q", "k", "v", "rate")]
    y, (weight, bias) = run(start, *per_head)
    theirs = _ttt_reference([inputs[n] for n in "qkv"], inputs["rate"], start, chunk_size)
    got = (np.swapaxes(y, 1, 2), weight, np.asarray(bias)[:, :, None])
    names = "output of a level with bias", "its weights", "its bias"
    return {name: error(a, b) for name, a, b in zip(names, got, theirs, strict=True)}


def _ttt_op(inputs, start, chunk_size: int) -> Errors:
    """`mlp_memory`, one chunk of theirs at a time: reads with rate 0, writes without the bias."""
    q, k, v, rate = (inputs[name] for name in ("q", "k", "v", "rate"))
    state = ops.MLPMemoryState((start,), (start,), None, jnp.zeros(ROWS, jnp.int32))
    y, state = ops.mlp_memory(
        q, k, v, state=state, rate=rate, retain=jnp.ones_like(rate), chunk_size=chunk_size,
        read="chunk_start", norm=True,
    )  # fmt: skip
    weights, outputs = start, []
    for at in range(0, TOKENS, chunk_size):
        part = [z[:, at : at + chunk_size] for z in (q, k, v)]
        now = rate[:, at : at + chunk_size]
        read = _ttt_reference(part, 0 * now, weights, chunk_size)[0]
        outputs.append(read - np.einsum("bthi,bhij->bthj", part[0], weights) + part[0])
        weights = _ttt_reference(part, now, weights, chunk_size)[1]
    return {
        "output of the op": error(y, np.concatenate(outputs, 1)),
        "its state": error(state.weights[0], weights),
    }


PARTS: dict[str, tuple[Callable[[], Errors], float]] = {
    "delta": (delta, SINGLE),
    "gated-delta": (gated_delta, SINGLE),
    "retention": (retention, SINGLE),
    "ttt": (ttt, SINGLE),
    "hope": (compare_peers_hope.hope, DOUBLE),
}


def main(names: list[str]) -> int:
    """Prints a line a comparison; returns 1 if one is above its tolerance."""
    unknown = set(names) - set(PARTS)
    if unknown:
        sys.exit(f"compare_peers knows {', '.join(PARTS)}, not {', '.join(unknown)}.")
    failed = 0
    for name in names or PARTS:
        compare, tolerance = PARTS[name]
        try:
            found = compare()
        except Refused as missing:
            say(f"{name:12s} skipped: {missing}")
            failed = 1
            continue
        for what, size in found.items():
            verdict = "" if what.startswith("(") else f" <= {tolerance:.0e} {size <= tolerance}"
            failed |= not (what.startswith("(") or size <= tolerance)
            say(f"{name:12s} {what:50s} {size:.1e}{verdict}")
    say(f"\n{compare_peers_hope.DIFFERENCES}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
