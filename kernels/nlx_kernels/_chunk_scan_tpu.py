# SPDX-License-Identifier: Apache-2.0
"""A scan over chunks as two Pallas TPU kernels: one forward, one backward, states in VMEM.

    state_0 given;   state_{n+1}, y_n = step(constants, state_n, tokens_n, marks_n)

Time is the last axis of the grid, which a TPU core walks in order, so the state stays in a scratch
buffer from one grid step to the next. A grid step takes a group of `every` chunks, and the forward
kernel writes out the state with which each group begins. The backward kernel walks the groups from
the last to the first: it starts from the group's checkpoint, finds the states of its chunks once
more, and pulls the cotangents back through one chunk after the other. That pull is `jax.vjp` of
`step`, taken while the kernel is traced: one source for the forward and the backward mathematics,
and everything between the two products of a chunk stays in VMEM.

What Mosaic (jax 0.11) asks of `step`: no constant arrays (use iota), no cumprod, no integer
division; float32 products. Blocks are [heads, every, ...] with whole trailing axes, which any size
is allowed to be, and chunks are taken along a leading axis, so that nothing needs to be aligned.

Learned from: Pallas documentation, "TPU details" (grid order, VMEM); the gated delta rule kernels
of MaxText (Apache-2.0) for keeping a checkpoint every few chunks and a reversed index map.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nlx_kernels import _tpu

Step = Callable[[Any, Any, Any, Any], tuple[Any, jax.Array]]


class Plan(NamedTuple):
    """What is known at trace time.

    Attributes:
      name: of the kernels, in profiles and in lowered text; the backward's ends in "_backward".
      step: (constants, state, tokens, marks) -> (state, y) of one chunk and some heads.
      every: chunks per group, the distance of checkpoints.
      heads: heads per grid step, a divisor of the number of heads.
      precision: of products that do not say their own.
      work: bytes of VMEM that `step` and its derivative take beside state and tokens, as compilers
        were seen to take.
      interpret: run on the CPU, on memory that is NaN until written.
      holds: marks of a chunk -> whether it has tokens; those that have none come last, and are left
        out. None: all have some.
    """

    name: str
    step: Step
    every: int
    heads: int
    precision: str
    work: int
    interpret: bool
    holds: Callable[[Any], jax.Array] | None = None


def forward(plan: Plan, constants: Any, state: Any, tokens: Any, marks: Any):
    """Runs the chunks.

    Args:
      plan: as above.
      constants: arrays [h, ...], the same for all rows and chunks.
      state: arrays [b, h, ...], float32.
      tokens: arrays [b, h, n, ...], n a multiple of `every`.
      marks: like tokens, not differentiated by; an axis b or h of size 1 is for all.

    Returns:
      y [b, h, n, ...], the last state, and the states at the groups' starts [b, h, n / every, ...].
    """
    grid, specs = _layout(plan, state, tokens)
    y = _reads(plan, constants, state, tokens, marks)
    kept = jax.tree.map(lambda s: _like(s, s.shape[:2] + grid[2:] + s.shape[2:]), state)
    return _call(
        plan,
        functools.partial(_forward_kernel, plan),
        plan.name,
        grid,
        inputs=(constants, state, tokens, marks),
        in_specs=(specs.constants, specs.states, specs.tokens, specs.marks),
        outputs=(y, jax.tree.map(lambda s: _like(s, s.shape), state), kept),
        out_specs=(specs.tokens, specs.states, specs.checkpoints),
        scratch=(jax.tree.map(lambda s: _like(s, (plan.heads, *s.shape[2:])), state),),
    )


def backward(plan: Plan, constants: Any, kept: Any, tokens: Any, marks: Any, slopes: Any):
    """Cotangents of constants, first state and tokens.

    Args:
      plan, constants, tokens, marks: as given to `forward`.
      kept: the checkpoints it returned.
      slopes: cotangents of y and of the last state.
    """
    by_y, by_last = slopes
    grid, specs = _layout(plan, kept, tokens, reverse=True)
    every = lambda tree: jax.tree.map(lambda x: _like(x, x.shape), tree)
    rows = jax.tree.leaves(tokens)[0].shape[0]
    per_row = jax.tree.map(lambda c: _like(c, (rows, *c.shape)), constants)
    first = jax.tree.map(lambda s: _like(s, s.shape[:2] + s.shape[3:]), kept)
    chunk = jax.tree.map(lambda s: _like(s, (plan.heads, *s.shape[3:])), kept)
    group = jax.tree.map(lambda s: _like(s, (plan.every, *s.shape)), chunk)
    by_constants, *rest = _call(
        plan,
        functools.partial(_backward_kernel, plan),
        f"{plan.name}_backward",
        grid,
        inputs=(constants, kept, tokens, marks, by_y, by_last),
        in_specs=(
            specs.constants, specs.checkpoints, specs.tokens, specs.marks, specs.tokens,
            specs.states,
        ),
        outputs=(per_row, first, every(tokens)),
        out_specs=(specs.states, specs.states, specs.tokens),
        scratch=(chunk, group),
    )  # fmt: skip
    return jax.tree.map(lambda c: c.sum(0), by_constants), *rest


def _forward_kernel(plan, constants, first, tokens, marks, y, last, kept, state):
    group = pl.program_id(2)

    @pl.when(group == 0)
    def _():
        _put(state, _get(first))

    _put(kept, _get(state))

    def chunk(n):
        after, read = plan.step(_get(constants), _get(state), _at(tokens, n), _at(marks, n))
        _put(state, after)
        y[:, n] = read

    _loop(plan, plan.every, marks, chunk)

    @pl.when(group == pl.num_programs(2) - 1)
    def _():
        _put(last, _get(state))


def _backward_kernel(
    plan, constants, kept, tokens, marks, by_y, by_last,
    by_constants, by_first, by_tokens, by_state, states,
):  # fmt: skip
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        _put(by_state, _get(by_last))
        _put(by_constants, jax.tree.map(lambda ref: jnp.zeros(ref.shape, ref.dtype), by_constants))

    _put_at(states, 0, _get(kept))

    def again(n):
        state = _row(states, n)
        after, _ = plan.step(_get(constants), state, _at(tokens, n), _at(marks, n))
        _put_at(states, n + 1, after)

    _loop(plan, plan.every - 1, marks, again)

    def pull(n):
        run = lambda *parts: plan.step(*parts, _at(marks, n))
        _, back = jax.vjp(run, _get(constants), _row(states, n), _at(tokens, n))
        constant, state, token = back((_get(by_state), by_y[:, n]))
        _put(by_constants, jax.tree.map(jnp.add, _get(by_constants), constant))
        _put(by_state, state)
        for ref, value in zip(jax.tree.leaves(by_tokens), jax.tree.leaves(token), strict=True):
            ref[:, n] = value

    _loop(plan, plan.every, marks, pull, reverse=True)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        _put(by_first, _get(by_state))


def _loop(plan: Plan, count: int, marks: Any, body: Callable, reverse: bool = False) -> None:
    """Over those of a group's first `count` chunks that have tokens.

    Indices have 32 bits, whatever `jax_enable_x64` says.
    """

    def one(n, carry):
        n = count - 1 - n if reverse else n
        there = True if plan.holds is None else plan.holds(_at(marks, n))
        pl.when(there)(lambda: body(n))
        return carry

    if count == 1:
        one(0, None)
    elif count:
        jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), one, None)


def _get(tree: Any) -> Any:
    return jax.tree.map(lambda ref: ref[...], tree)


def _put(tree: Any, values: Any) -> None:
    for ref, value in zip(jax.tree.leaves(tree), jax.tree.leaves(values), strict=True):
        ref[...] = value


def _at(tree: Any, n: Any) -> Any:
    """Chunk n of blocks [heads, every, ...]."""
    return jax.tree.map(lambda ref: ref[:, n], tree)


def _row(tree: Any, n: Any) -> Any:
    """Row n of scratch [every, heads, ...]."""
    return jax.tree.map(lambda ref: ref[n], tree)


def _put_at(tree: Any, n: Any, values: Any) -> None:
    for ref, value in zip(jax.tree.leaves(tree), jax.tree.leaves(values), strict=True):
        ref[n] = value


def _reads(plan: Plan, constants: Any, state: Any, tokens: Any, marks: Any):
    """Shape and dtype of y, over all heads and chunks."""
    b, h, n = jax.tree.leaves(tokens)[0].shape[:3]

    def cut(tree, heads, lead):
        return jax.tree.map(
            lambda x: _like(x, (min(plan.heads, x.shape[heads]), *x.shape[lead:])), tree
        )

    parts = cut(constants, 0, 1), cut(state, 1, 2), cut(tokens, 1, 3), cut(marks, 1, 3)
    _, y = jax.eval_shape(plan.step, *parts)
    return _like(y, (b, h, n, *y.shape[1:]))


class _Specs(NamedTuple):
    """Block specifications as functions of an array."""

    constants: Callable
    states: Callable
    tokens: Callable
    marks: Callable
    checkpoints: Callable


def _layout(plan: Plan, state: Any, tokens: Any, reverse: bool = False):
    """The grid (rows, groups of heads, groups of chunks), and how it cuts the arrays."""
    b, h, n = jax.tree.leaves(tokens)[0].shape[:3]
    groups = n // plan.every
    at = (lambda g: groups - 1 - g) if reverse else (lambda g: g)
    heads, every = plan.heads, plan.every

    def spec(block, index, x, **how):
        rest = x.shape[len(block) :]
        zeros = (0,) * len(rest)
        return pl.BlockSpec((*block, *rest), lambda i, j, g: (*index(i, j, g), *zeros), **how)

    def mark(x):
        row, head = (size > 1 for size in x.shape[:2])
        index = lambda i, j, g: (i if row else 0, j if head else 0, at(g))
        return spec((None, heads if head else 1, every), index, x)

    cut = functools.partial
    return (b, h // heads, groups), _Specs(
        constants=cut(spec, (heads,), lambda i, j, g: (j,)),
        states=cut(spec, (None, heads), lambda i, j, g: (i, j), pipeline_mode=pl.Buffered(1)),
        tokens=cut(spec, (None, heads, every), lambda i, j, g: (i, j, at(g))),
        marks=mark,
        checkpoints=cut(spec, (None, heads, None), lambda i, j, g: (i, j, at(g))),
    )


def _call(plan, kernel, name, grid, *, inputs, in_specs, outputs, out_specs, scratch):
    """One `pallas_call` on tuples of pytrees, which `kernel` is given as trees of references."""
    cut = lambda specs, trees: [
        spec(x) for spec, tree in zip(specs, trees, strict=True) for x in jax.tree.leaves(tree)
    ]
    everything = (inputs, outputs, scratch)
    structure = jax.tree.structure(everything)

    def body(*refs):
        given, made, own = structure.unflatten(refs)
        with jax.default_matmul_precision(plan.precision):
            kernel(*given, *made, *own)

    run = pl.pallas_call(
        body,
        name=name,
        grid=grid,
        in_specs=cut(in_specs, inputs),
        out_specs=cut(out_specs, outputs),
        out_shape=jax.tree.leaves(outputs),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in jax.tree.leaves(scratch)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_tpu.VMEM_LIMIT,
        ),
        interpret=_tpu.interpreter(everything) if plan.interpret else False,
    )
    return jax.tree.unflatten(jax.tree.structure(outputs), run(*jax.tree.leaves(inputs)))


def _like(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype)
