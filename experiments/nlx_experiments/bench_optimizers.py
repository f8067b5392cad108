# SPDX-License-Identifier: Apache-2.0
"""What the optimizers cost: a whole step of a 10-million-parameter transformer, and bytes.

Batches of 8 x 256 tokens, float32. `python -m nlx_experiments.bench_optimizers [NAME ...]`, about
ten minutes on two idle cores. One step of each optimizer in turn, so that a busy machine
slows all alike; medians over the rounds, and their ratios to AdamW and to Muon, are printed. M3 is
timed between two firings of its slow memory and at one, and counted as nine of the first and one of
the second, as its default clock has it.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nlx import Clock, nn, optim, train

ROUNDS = 9
RATE = 1e-3
MAKERS = {
    "adamw": lambda: optax.adamw(RATE),
    "dmgd": lambda: optim.dmgd(RATE),
    "muon": lambda: optax.contrib.muon(RATE, consistent_rms=0.2),
    "m3 between": lambda: optim.m3(RATE, clock=Clock(10**6)),
    "m3 firing": lambda: optim.m3(RATE, clock=Clock(1)),
    "m3 without V between": lambda: optim.m3(RATE, second_moment=False, clock=Clock(10**6)),
    "m3 without V firing": lambda: optim.m3(RATE, second_moment=False, clock=Clock(1)),
}
MORE = {
    "delta_momentum": lambda: optim.delta_momentum(RATE),
    "orthogonal_momentum": lambda: optim.orthogonal_momentum(RATE),
    "adam_memory": lambda: optim.adam_memory(RATE),
    "dmgd linear": lambda: optim.dmgd(RATE, hidden=()),
    "shampoo": lambda: optim.shampoo(RATE),
    "soap": lambda: optim.soap(RATE),
}


def model(width: int = 384, layers: int = 4, hidden: int = 1600) -> nn.LanguageModel:
    """About ten million parameters."""
    config = nn.ModelConfig(
        mixer="attention",
        feed_forward="swiglu",
        width=width,
        layers=layers,
        heads=6,
        hidden=hidden,
        context=256,
    )
    return nn.LanguageModel(config, rngs=nnx.Rngs(0))


def size(tree) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main(names: list[str]) -> None:
    """Prints seconds a step and bytes of state, and what the targets are ratios of."""
    makers = MAKERS | {name: MORE[name] for name in names}
    graph, params = nnx.split(model())
    print(f"{size(params) // 4:,} parameters")
    batch = {"tokens": jax.random.randint(jax.random.key(1), (8, 257), 0, 256)}
    steps, states, times, own = {}, {}, {}, {}
    for name, make in makers.items():
        tx = make()
        step = train.make_train_step(train.language_model_loss(graph), tx)
        steps[name] = jax.jit(step, donate_argnums=0)
        states[name] = train.init_train_state(jax.tree.map(jnp.copy, params), tx)
        own[name] = size(states[name].opt_state)
        times[name] = []
        states[name], _ = jax.block_until_ready(steps[name](states[name], batch))
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], batch))
            times[name].append(time.perf_counter() - start)
    report({name: statistics.median(seconds) for name, seconds in times.items()}, own)


def report(seconds: dict[str, float], own: dict[str, int]) -> None:
    """Prints the table; M3's two kinds of step are joined."""
    for name in ("m3", "m3 without V"):
        between, firing = seconds.pop(f"{name} between"), seconds.pop(f"{name} firing")
        seconds[name] = 0.9 * between + 0.1 * firing
        own[name] = own.pop(f"{name} between")
    print(f"{'optimizer':20} {'s a step':>9} {'/ adamw':>8} {'/ muon':>7} {'bytes / adamw':>14}")
    for name, median in seconds.items():
        print(
            f"{name:20} {median:9.3f} {median / seconds['adamw']:8.2f} "
            f"{median / seconds['muon']:7.2f} {own[name] / own['adamw']:14.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
