# SPDX-License-Identifier: Apache-2.0
"""What `nlx bench` times: each op on its named shapes, and what the shape costs at the least.

Floating-point operations count a multiplication and an addition as two, and are those of the form
in blocks of 64 tokens; bytes are those of every token read and written once. With P weights in a
memory, k and v channels, 2 bytes a number:

    linear_memory          6 k v + 256 (k + v), backward 16 k v + 768 (k + v)
    mlp_memory             7 P, backward twice that: K forward 2, its slope 1, dW 2, Q forward 2
    self_modifying_memory  9 P for each of five boxes, which make a value as well; backward twice
    cms_chain              2 P, backward twice that
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nlx_kernels
from nlx_kernels.cms_chain import shapes as of_chain
from nlx_kernels.linear_memory import shapes as of_linear
from nlx_kernels.mlp_memory import shapes as of_mlp
from nlx_kernels.self_modifying_memory import shapes as of_hope

Form = nlx_kernels.Implementation | None
BOXES = ("key", "value", "rate", "retain", "memory")
PASSES = ("forward", "forward+backward")


class Cost(NamedTuple):
    """Of one token and head: floating-point operations and bytes, of each of PASSES."""

    flops: tuple[int, int]
    bytes: tuple[int, int]


class Workload(NamedTuple):
    """One op on one shape.

    Attributes:
      make: () -> arguments, random, tokens in bfloat16.
      call: (arguments, implementation) -> y.
      tokens: tokens times heads.
      cost: of each of them.
    """

    make: Callable[[], dict[str, Any]]
    call: Callable[[dict[str, Any], Form], jax.Array]
    tokens: int
    cost: Cost


def workloads() -> dict[str, dict[str, Workload]]:
    """op -> shape -> workload."""
    ops = {
        "linear_memory": (of_linear.BENCH, linear),
        "mlp_memory": (of_mlp.BENCH, mlp),
        "self_modifying_memory": (of_hope.BENCH, hope),
        "cms_chain": (of_chain.BENCH, chain),
    }
    return {op: {n: make(s) for n, s in shapes.items()} for op, (shapes, make) in ops.items()}


def linear(shape: of_linear.Shape) -> Workload:
    """The gated delta rule, unit keys and queries."""
    b, t, h, k, v, block_size = shape

    def make() -> dict[str, Any]:
        draw = _Draw()
        named = {"q": draw.unit(b, t, h, k), "k": draw.unit(b, t, h, k), "v": draw.low(b, t, h, v)}
        return (
            named
            | draw.gates(("erase", "rate"), 0.0, b, t, h)
            | draw.gates(("retain",), 0.9, b, t, h)
        )

    def call(arguments: dict[str, Any], implementation: Form) -> jax.Array:
        return nlx_kernels.linear_memory(
            **arguments, block_size=block_size, implementation=implementation
        )[0]

    flops = 6 * k * v + 256 * (k + v), 22 * k * v + 1024 * (k + v)
    return Workload(make, call, b * t * h, Cost(flops, (4 * (k + v), 12 * k + 10 * v)))


def mlp(shape: of_mlp.Shape) -> Workload:
    """Titans' memory with momentum."""
    b, t, h, k, _, v, chunk_size = shape

    def make() -> dict[str, Any]:
        draw = _Draw()
        named = {"q": draw.unit(b, t, h, k), "k": draw.unit(b, t, h, k), "v": draw.low(b, t, h, v)}
        weights = tuple(draw(*w) / w[1] ** 0.5 for w in shape.weights)
        gates = draw.gates(("retain", "momentum"), 0.9, b, t, h)
        rate = {"rate": 0.01 * draw.gates(("rate",), 0.0, b, t, h)["rate"]}
        return named | gates | rate | {"weights": weights}

    def call(arguments: dict[str, Any], implementation: Form) -> jax.Array:
        return nlx_kernels.mlp_memory(
            **arguments, chunk_size=chunk_size, implementation=implementation
        )[0]

    count = sum(i * o for _, i, o in shape.weights)
    cost = Cost((7 * count, 21 * count), (4 * (k + v), 12 * k + 10 * v))
    return Workload(make, call, b * t * h, cost)


def hope(shape: of_hope.Shape) -> Workload:
    """Hope's inner loop: five memories that make their own values."""
    b, t, h, d, f, chunk_size, projection_chunk_size = shape

    def make() -> dict[str, Any]:
        draw = _Draw()
        box = lambda: (draw(h, d, f) / d**0.5, 0.1 * draw(h, f, d) / f**0.5)
        parameters = nlx_kernels.SelfModifyingParameters(
            memories={name: box() for name in BOXES},
            rate_readout={name: 0.1 * draw(h, d) for name in BOXES},
            rate_bias={name: jnp.full(h, -6.0) for name in BOXES},
            retain_readout=0.1 * draw(h, d),
            retain_bias=jnp.full(h, 5.0),
        )
        return {"x": draw.unit(b, t, h, d), "q": draw.unit(b, t, h, d), "parameters": parameters}

    def call(arguments: dict[str, Any], implementation: Form) -> jax.Array:
        return nlx_kernels.self_modifying_memory(
            **arguments,
            chunk_size=chunk_size,
            projection_chunk_size=projection_chunk_size,
            implementation=implementation,
        )[0]

    count = 9 * len(BOXES) * 2 * d * f
    return Workload(make, call, b * t * h, Cost((count, 3 * count), (6 * d, 16 * d)))


def chain(shape: of_chain.Shape) -> Workload:
    """Residual MLP blocks, their weights shared or one set a row."""
    b, t, d, hidden, by_row, gated = shape
    lead = (b,) if by_row else ()

    def make() -> dict[str, Any]:
        draw = _Draw()
        blocks = tuple(
            nlx_kernels.ChainBlock(
                jnp.ones((*lead, d)),
                draw(*lead, d, f) / d**0.5,
                draw(*lead, f, d) / f**0.5,
                draw(*lead, d, f) / d**0.5 if gated else None,
            )
            for f in hidden
        )
        return {"x": draw.low(b, t, d), "weights": blocks}

    def call(arguments: dict[str, Any], implementation: Form) -> jax.Array:
        return nlx_kernels.cms_chain(**arguments, implementation=implementation)

    count = (3 if gated else 2) * d * sum(hidden)
    return Workload(make, call, b * t, Cost((2 * count, 6 * count), (4 * d, 10 * d)))


def passes(workload: Workload, implementation: Form) -> dict[str, Callable[..., Any]]:
    """Of arguments: y; and of arguments and y's slope: y and the slope of every argument."""
    forward = lambda arguments: workload.call(arguments, implementation)

    def both(arguments: dict[str, Any], slope: jax.Array) -> Any:
        y, pull = jax.vjp(forward, arguments)
        return y, pull(slope)

    return dict(zip(PASSES, (jax.jit(forward), jax.jit(both)), strict=True))


def milliseconds(run: Callable[..., Any], *arguments: Any, seconds: float = 0.3) -> list[float]:
    """Times of a call, five means: many calls are under way at once, the last one is awaited."""
    jax.block_until_ready(run(*arguments))  # compiles
    begun = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    calls = max(1, min(60, int(seconds / 5 / (time.perf_counter() - begun))))
    found = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(calls):
            last = run(*arguments)
        jax.block_until_ready(last)
        found.append(1e3 * (time.perf_counter() - begun) / calls)
    return found


def ceilings(side: int = 8192, numbers: int = 1 << 30) -> dict[str, float]:
    """What the device reaches: TFLOP/s of a bfloat16 product, GB/s of a copy, random numbers."""
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = statistics.median(milliseconds(jax.jit(lambda x: x @ x), x))
    y = jnp.tile(x.reshape(-1), -(-numbers // x.size))
    copy = statistics.median(milliseconds(jax.jit(lambda y: y + jnp.bfloat16(1)), y))
    return {"TFLOP/s": 2 * side**3 / product / 1e9, "GB/s": 4 * y.size / copy / 1e6}


def rates(
    workload: Workload, which: str, median: float, best: Mapping[str, float]
) -> dict[str, float]:
    """What a time in milliseconds means."""
    number = PASSES.index(which)
    flops = workload.cost.flops[number] * workload.tokens / median / 1e9
    moved = workload.cost.bytes[number] * workload.tokens / median / 1e6
    return {
        "ns/token/head": 1e6 * median / workload.tokens,
        "TFLOP/s": flops,
        "GB/s": moved,
        "% of product": 100 * flops / best["TFLOP/s"],
        "% of copy": 100 * moved / best["GB/s"],
    }


class _Draw:
    """Random arrays; a long one repeats its first 1,024 tokens, which is quicker to make."""

    def __init__(self) -> None:
        self.keys = iter(jax.random.split(jax.random.key(0), 64))

    def __call__(self, *shape: int) -> jax.Array:
        return jax.random.normal(next(self.keys), shape)

    def low(self, b: int, t: int, *rest: int) -> jax.Array:
        return self._long(self(b, min(t, 1024), *rest), t).astype(jnp.bfloat16)

    def unit(self, b: int, t: int, *rest: int) -> jax.Array:
        x = self(b, min(t, 1024), *rest)
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return self._long(x, t).astype(jnp.bfloat16)

    def gates(self, names: tuple[str, ...], low: float, *shape: int) -> dict[str, jax.Array]:
        draw = lambda: jax.random.uniform(next(self.keys), shape, minval=low)
        return {name: draw() for name in names}

    def _long(self, x: jax.Array, t: int) -> jax.Array:
        return jnp.concatenate([x] * -(-t // x.shape[1]), 1)[:, :t]
