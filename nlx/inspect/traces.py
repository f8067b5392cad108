# SPDX-License-Identifier: Apache-2.0
"""What memories do tick by tick: surprise, updates, retention, age, eigenvalues of transitions."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from nlx import memories
from nlx.level import Association, Level, LevelState
from nlx.nest import Nest


class Range(NamedTuple):
    """Smallest and largest eigenvalue of a matrix whose eigenvalues are all real."""

    low: Float[Array, "*t"]
    high: Float[Array, "*t"]


class Trace(NamedTuple):
    """What one level did at every tick; its weights W are those written so far."""

    surprise: Float[Array, "*t"]  # |g_t|: gradient of the tick's objective, before any limit
    update: Float[Array, "*t"]  # |W_t - W_{t-1}|, over all arrays of the level
    retain: Float[Array, "*t"]  # share of the weights kept, 1 where there is no such gate
    age: Float[Array, "*t"]  # in ticks, see `memory_age`
    eigenvalues: Range  # of every array's own transition, see `follow`


def surprise(logits: Float[Array, "*t s"], tokens: Int[Array, "*t"]) -> Float[Array, "*t"]:
    """-log2 softmax(logits)[token]: what each token costs, in bits.

    logits: scores of all tokens, in each place. tokens: the ones that came; integers in [0, s).
    The mean over places, times ln 2, is the model's loss.
    """
    scores = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(scores, tokens[..., None], -1)[..., 0] / math.log(2)


def transition_range(
    key: Float[Array, "*t n"], retain: Float[Array, "*t"], erase: Float[Array, "*t"]
) -> Range:
    """The eigenvalues of A_t = retain_t I - erase_t k_t k_t^T, W_t = A_t W_{t-1} + ...

    Along k_t it is retain_t - erase_t |k_t|^2, across it retain_t, n - 1 times. Within [-1, 1] a
    memory forgets; below 0 it can turn what it holds over.

    key: the direction that is erased, as it is erased. retain, erase: gates, erase >= 0.
    Source: Behrouz et al. (2025), Nested Learning, Eq. 57, 64, 65.
    """
    along = retain - erase * jnp.sum(jnp.square(key), -1)
    return Range(along, retain if key.shape[-1] > 1 else along)


def memory_age(
    written: Float[Array, "*t"],
    retain: Float[Array, "*t"],
    momentum: Float[Array, "*t"] | None = None,
) -> Float[Array, "*t"]:
    """How many ticks old what a memory holds is, on average.

        age_t = sum_{j <= t} c_tj s_j (t - j) / sum_{j <= t} c_tj s_j
        c_tj = sum_{j <= i <= t} (retain_{i+1} .. retain_t) (momentum_{j+1} .. momentum_i)

    c_tj is the share of tick j's step that stands in W_t, s_j the size of that step. 0 where
    nothing is held. Erasing, which depends on the direction, limits at a firing, and where the
    memory started, which has no age, are left out.

    Ticks are the first axis. written: s, >= 0. retain, momentum: gates in [0, 1];
    None: steps arrive at once, c_tj is the product of retain alone.
    """
    share = jnp.zeros_like(retain) if momentum is None else momentum

    def tick(carry, gates):
        moving, moving_age, held, held_age = carry  # mass, and mass times age
        step, keep, carry_on = gates
        moving_age = carry_on * (moving_age + moving)
        moving = carry_on * moving + step
        held_age = keep * (held_age + held) + moving_age
        held = keep * held + moving
        age = jnp.where(held > 0, held_age / jnp.where(held > 0, held, 1), 0)
        return (moving, moving_age, held, held_age), age

    nothing = jnp.zeros_like(written[0])
    return jax.lax.scan(tick, (nothing,) * 4, (written, retain, share))[1]


def follow(nest: Nest, params: dict[str, Any], contexts: Any) -> dict[str, Trace]:
    """Runs a nest tick by tick, and says what each of its memories did.

    Memories are levels with a gated write whose contexts are `Association`s; others are left out.
    The transitions are those of the working weights, of every array with all others held: between
    firings gradients are frozen, and it is that of `transition_range`. A memory that fires at every
    tick takes the gradient at what it writes to, so this erases too (or adds, where the loss curves
    down): A_t gets the derivative of the tick's whole step, as limited, in the array. It is exact
    for arrays W that the memory reads as z W, and for constant memories under objectives entry by
    entry, without a limit; of levels that are no `associative_memory` retention alone is shown.

    nest: `Nest`. params: where its levels start, by name. contexts: one per tick, stacked.
    Returns {level name: Trace of arrays [t]}.
    """
    states = nest.start(params, jnp.int32(0))

    def tick(states: dict[str, LevelState], context):
        visible = {name: state.params for name, state in states.items()}
        _, own = nest.forward(visible, context)
        after, _ = nest.step(states, context)
        seen = {
            name: _tick(nest.levels[name], states[name], after[name], association)
            for name, association in own.items()
            if isinstance(association, Association) and _is_memory(nest.levels[name])
        }
        return after, seen

    _, seen = jax.lax.scan(tick, states, contexts)
    return {
        name: Trace(
            found["surprise"],
            found["update"],
            found["retain"],
            memory_age(found["written"], found["retain"], found["momentum"]),
            found["eigenvalues"],
        )
        for name, found in seen.items()
    }


def norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """Euclidean length of all numbers of a tree together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _is_memory(level: Level) -> bool:
    """Whether it writes working weights in place, as `writes.gated` does."""
    return level.write is not None and level.write.view is not None


def _tick(
    level: Level, before: LevelState, after: LevelState, stored: Association
) -> dict[str, Any]:
    """What a memory did at one tick."""
    write = level.write
    assert write is not None
    assert write.view is not None
    assert level.loss is not None
    gradient = jax.grad(level.loss)(before.params, stored)
    was, now = (write.view(state.params, state.carry) for state in (before, after))
    one = jnp.ones((), jax.tree.leaves(was)[0].dtype)
    gate = lambda value, neutral: neutral * one if value is None else value * one
    nothing = jax.tree.map(jnp.zeros_like, before.carry)
    step = write.view(before.params, write.tick(before.params, nothing, gradient, stored))
    return dict(
        surprise=norm(gradient),
        update=norm(jax.tree.map(jnp.subtract, now, was)),
        written=norm(step),
        retain=gate(stored.retain, 1),
        momentum=gate(stored.momentum, 0),
        eigenvalues=_eigenvalues(level, before.params, stored, gate),
    )


def _eigenvalues(level: Level, params: PyTree[Array], stored: Association, gate) -> Range:
    """Of the transition of every array of the level, as one range."""
    retain, erase, rate = gate(stored.retain, 1), gate(stored.erase, 0), gate(stored.rate, 1)
    memory, _ = _recalled(level)
    moves = level.clock.period == 1  # so the gradient is taken at the weights it is written to
    if memory is None or memory.inputs is None:
        ranges = [Range(retain, retain)]
        if memory is not None and moves:
            ones = jax.tree.map(jnp.ones_like, params)
            slope = lambda weights: jax.grad(_loss(level))(weights, stored)
            diagonal = jax.jvp(slope, (params,), (ones,))[1]
            ends = [retain - rate * jnp.ravel(each) for each in jax.tree.leaves(diagonal)]
            ranges = [Range(jnp.min(each), jnp.max(each)) for each in ends]
    else:
        ranges = []
        for n, z in enumerate(jax.tree.leaves(memory.inputs(params, stored.key))):
            across, along = transition_range(z, retain, erase)[::-1]
            ends = Range(along, along)
            if moves:
                erased = _erased_by_gradient(level, params, stored, n, memories.unit(z))
                ends = Range(along - erased.high, along - erased.low)
            ranges += [ends, Range(across, across)] if z.shape[-1] > 1 else [ends]
    low = functools.reduce(jnp.minimum, [each.low for each in ranges])
    return Range(low, functools.reduce(jnp.maximum, [each.high for each in ranges]))


def _erased_by_gradient(
    level: Level, params: PyTree[Array], stored: Association, n: int, z: Float[Array, " i"]
) -> Range:
    """How strongly a tick's own step erases the level's n-th array W, along its unit input z.

    The loss sees W as z W alone, so its second derivative is z z^T (x) S, S [o, o] that along z. A
    step is K times the gradient, K its derivative: the rate, of a clipped gradient also its scale
    and no share along it, so a multiple c of a projection. What is erased are the eigenvalues of
    K S, which are those of the symmetric K S K / c.
    """
    leaves, structure = jax.tree.flatten(params)
    write, outputs = level.write, jnp.zeros_like(leaves[n][0])
    assert write is not None
    assert write.view is not None
    view = write.view
    swap = lambda of, new: structure.unflatten([*of[:n], new, *of[n + 1 :]])

    def pull(shift):
        moved = swap(leaves, leaves[n] + jnp.outer(z, shift))
        return z @ jax.tree.leaves(jax.grad(_loss(level))(moved, stored))[n]

    def step(pulled):
        gradient = swap([jnp.zeros_like(leaf) for leaf in leaves], jnp.outer(z, pulled))
        nothing = jax.tree.map(jnp.zeros_like, write.init(params))
        after = view(params, write.tick(params, nothing, gradient, stored))
        return -z @ jax.tree.leaves(after)[n]

    curve, share = jax.jacobian(pull)(outputs), jax.jacobian(step)(pull(outputs))
    mass = jnp.trace(share)
    scale = jnp.where(mass > 0, jnp.sum(jnp.square(share)) / jnp.where(mass > 0, mass, 1), 1)
    values = jnp.linalg.eigvalsh(share @ (curve @ share) / jnp.where(scale > 0, scale, 1))
    return Range(values[0], values[-1])


def _loss(level: Level):
    assert level.loss is not None
    return level.loss


def _recalled(level: Level) -> tuple[Any, Any]:
    """(memory, objective) of an `associative_memory`, or nothing."""
    loss = level.loss
    return loss.args[:2] if isinstance(loss, functools.partial) else (None, None)
