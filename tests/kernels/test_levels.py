# SPDX-License-Identifier: Apache-2.0
"""The op law: an op's reference is its level or nest, tick by tick, in values and gradients."""

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest

import nlx
from nlx import memories, objectives, writes
from nlx.self_modifying import Readouts, Token, self_modifying_nest


def rows_and_heads(function, tokens, *memory):
    """function(tokens [t, ...], *memory) -> (state, y [t, v]) for every row and head of an op.

    The memory [h, ...] is where every row starts. Returns y and state as the op does.
    """
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), tokens)
    heads = jax.vmap(function)
    state, y = jax.vmap(heads, in_axes=(0, *[None] * len(memory)))(tokens, *memory)
    return jnp.moveaxis(y, 1, 2), state


def ticks(nest, params, contexts):
    """The specification: one tick after the other, each firing when its clock says so."""
    return jax.lax.scan(nest.step, nest.start(params, jnp.int32(0)), contexts)


def nest_of(memory, level, read):
    """One memory, asked at every tick; contexts are (query, association)."""

    def forward(params, context):
        query, association = context
        return memory.read(params["memory"], query), {"memory": association}

    def read_working(working, output, context):
        return memory.read(working["memory"], context[0])

    return nlx.Nest({"memory": level}, forward, read=read_working if read else None)


@pytest.mark.parametrize("read", ["after_write", "chunk_start"])
def test_linear_memory(read, draw, gradients, x64, agree):
    b, t, h, k, v = 2, 6, 2, 4, 3
    memory = memories.linear(k, v)
    write = writes.gated(erase=memory.inputs, momentum=False)
    level = nlx.associative_memory(memory, objectives.dot_product, write, nlx.Clock(1))
    nest = nest_of(memory, level, read == "after_write")
    given = dict(q=draw.normal(b, t, h, k), k=draw.normal(b, t, h, k), v=draw.normal(b, t, h, v))
    given |= {name: draw.gate(b, t, h) for name in ("rate", "retain", "erase")}

    def one(tokens):
        association = nlx.Association(
            tokens["k"],
            tokens["v"],
            rate=tokens["rate"],
            retain=tokens["retain"],
            erase=tokens["erase"],
        )
        states, y = ticks(nest, {"memory": jnp.zeros((k, v))}, (tokens["q"], association))
        return states["memory"].params, y

    def op(given):
        return nlx_kernels.linear_memory(**given, read=read, implementation="reference")

    agree(gradients(op)(given), gradients(lambda given: rows_and_heads(one, given))(given), 1e-12)


def test_mlp_memory(draw, gradients, x64, agree):
    b, t, h, d, f, chunk = 2, 7, 2, 4, 3, 3
    memory = memories.mlp((d, f, d), "silu")
    limits = dict(clip=0.5, bound=1.5)  # low enough to be met
    write = writes.gated(erase=memory.inputs, **limits)
    level = nlx.associative_memory(memory, objectives.l2, write, nlx.Clock(chunk))
    nest = nest_of(memory, level, read=True)
    tokens = {name: draw.normal(b, t, h, d) for name in ("q", "k", "v")}
    gates = ("rate", "retain", "momentum", "erase")
    tokens |= {name: draw.gate(b, t, h) for name in gates}
    given = tokens, (draw.normal(h, d, f) / 2, draw.normal(h, f, d) / 2)

    def one(tokens, weights):
        association = nlx.Association(tokens["k"], tokens["v"], *(tokens[name] for name in gates))
        states, y = ticks(nest, {"memory": weights}, (tokens["q"], association))
        params, carry, _ = states["memory"]
        return (carry.weights, params, carry.momentum), y

    def op(given):
        options = dict(chunk_size=chunk, activation="silu", implementation="reference")
        y, state = nlx_kernels.mlp_memory(**given[0], weights=given[1], **options, **limits)
        return y, state[:3]

    agree(gradients(op)(given), gradients(lambda given: rows_and_heads(one, *given))(given), 1e-12)


@pytest.mark.parametrize(
    ("chunks", "options", "momentum", "query", "slopes"),
    [
        ((1, 1), {}, False, False, False),
        ((3, 2), dict(clip=0.5, bound=1.5), True, True, False),
        ((2, 3), dict(read="chunk_start", erase=False, clip=None), True, False, True),
        pytest.param((3, 2), dict(clip=0.5, bound=1.5), True, True, True, marks=pytest.mark.slow),
    ],
)
def test_self_modifying_memory(
    chunks, options, momentum, query, slopes, draw, gradients, x64, agree
):
    b, t, h, d, f = 1, 7, 1 if slopes else 2, 3, 4
    options = options | dict(chunk_size=chunks[0], projection_chunk_size=chunks[1])
    nest = self_modifying_nest(d, f, momentum=momentum, adaptive_query=query, **options)
    boxes = tuple(box for box in nest.levels if box != "readouts")
    streams = nlx_kernels.Streams(*(2 * draw.normal(b, t, h, d) for _ in range(3)))
    given = dict(
        x=streams,
        q=draw.normal(b, t, h, d),
        momentum=draw.gate(b, t, h) if momentum else None,
        parameters=nlx_kernels.SelfModifyingParameters(
            {box: (draw.normal(h, d, f), draw.normal(h, f, d)) for box in boxes},
            {box: draw.normal(h, d) for box in boxes},
            {box: draw.normal(h) for box in boxes},
            draw.normal(h, d),
            draw.normal(h) + 2,
        ),
    )

    def one(token, parameters):
        params = parameters.memories | {"readouts": Readouts(*parameters[1:])}
        states, y = ticks(nest, params, token)
        boxed = {box: states[box] for box in boxes}
        buffer = {box: s.carry.momentum for box, s in boxed.items()} if momentum else None
        seen = {box: s.params for box, s in boxed.items()}
        return ({box: s.carry.weights for box, s in boxed.items()}, seen, buffer), y

    def levels(given):
        token = Token(*given["x"], given["q"], given["momentum"])
        if not slopes:
            return rows_and_heads(one, token, given["parameters"])
        head = jax.tree.map(lambda x: x[0, :, 0], token)  # alone: a third less to compile
        state, y = one(head, jax.tree.map(lambda x: x[0], given["parameters"]))
        return y[None, :, None], jax.tree.map(lambda x: x[None, None], state)

    def op(given):
        y, state = nlx_kernels.self_modifying_memory(**given, **options, implementation="reference")
        return y, state[:3]

    run = gradients if slopes else jax.jit
    agree(run(op)(given), run(levels)(given), 1e-11)
