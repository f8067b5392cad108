# SPDX-License-Identifier: Apache-2.0
"""How much faster blocks are than ticks: the gradient of `Nest.scan` against `Nest.step` scanned.

A chain of three MLPs on clocks 64, 256 and 1,024 with one shared loss, and a gated memory on the
fastest clock, over 4,096 ticks. Command: `python -m nlx_experiments.bench_core`; about a minute on
two cores. Timings of the two are interleaved; the medians and their ratio are printed.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import nlx

PERIODS = (64, 256, 1024)
TICKS = 4096


def continuum(width: int = 64) -> nlx.Nest:
    """A gated memory followed by three MLPs of slower and slower clocks that share one loss."""
    store = nlx.memories.mlp((width, width, width))
    part = nlx.memories.mlp((width, 2 * width, width))
    levels = {
        "memory": nlx.associative_memory(
            store, nlx.objectives.l2, nlx.writes.gated(), nlx.Clock(PERIODS[0])
        )
    }
    for period in PERIODS:
        write = nlx.writes.summed(optax.sgd(0.01, momentum=0.9))
        levels[f"mlp_{period}"] = nlx.Level(part.init, None, write, nlx.Clock(period))

    def forward(params, context):
        hidden = store.read(params["memory"], context["x"])
        gates = {name: context[name] for name in ("rate", "retain", "momentum")}
        association = nlx.Association(context["x"], context["target"], **gates)
        for period in PERIODS:
            hidden = part.read(params[f"mlp_{period}"], hidden)
        return hidden, {"memory": association}

    def loss(params, context):
        return nlx.objectives.l2(forward(params, context)[0], context["target"])

    return nlx.Nest(levels, forward, loss)


def contexts(ticks: int = TICKS, width: int = 64) -> dict:
    """Random inputs and targets, and gates under which nothing grows."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, target = (jax.random.normal(key, (ticks, width)) / width**0.5 for key in keys[:2])
    rate = 0.01 * jax.random.uniform(keys[2], (ticks,))
    return {"x": x, "target": target, "rate": rate, "retain": 1 - rate, "momentum": 50 * rate}


def gradient(nest: nlx.Nest, run, tick=0):
    """Compiles the gradient of a sequence's loss, through all writes, in every initial value."""

    def total(params, context):
        _, outputs = run(nest.start(params, tick), context)
        return jnp.mean(jnp.square(outputs - context["target"]))

    return jax.jit(jax.grad(total, (0, 1)))


def main() -> None:
    """Prints the median seconds of each form and how many times faster blocks are."""
    nest, data = continuum(), contexts()
    params = nest.init(jax.random.key(1))
    forms = {
        "ticks": gradient(nest, lambda s, c: jax.lax.scan(nest.step, s, c), jnp.int32(0)),
        "blocks, nested": gradient(nest, nest.scan),
        "blocks, masked": gradient(nest, nest.scan, jnp.int32(0)),
    }
    times = {name: [] for name in forms}
    for name, form in forms.items():
        start = time.perf_counter()
        jax.block_until_ready(form(params, data))
        print(f"{name:16} first call {time.perf_counter() - start:8.2f} s")
    for _ in range(5):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form(params, data))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name:16} median {seconds:10.4f} s  {medians['ticks'] / seconds:6.1f} x")


if __name__ == "__main__":
    main()
