# SPDX-License-Identifier: Apache-2.0
"""What an op does with a call: which implementation runs, and a sentence for each bad argument."""

import re

import jax
import jax.numpy as jnp
import nlx_kernels
import pytest
from nlx_kernels import (
    cms_chain,
    fast_update,
    linear_memory,
    mlp_memory,
    self_modifying_memory,
)
from nlx_kernels._dispatch import choose
from nlx_kernels.cms_chain.api import OFFERED as OF_CHAIN
from nlx_kernels.fast_update.api import OFFERED as OF_UPDATE
from nlx_kernels.linear_memory.api import OFFERED as OF_LINEAR
from nlx_kernels.mlp_memory.api import OFFERED as OF_MLP
from nlx_kernels.self_modifying_memory.api import OFFERED as OF_HOPE

TOKEN, GATE = jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 5, 3))
LAYERS = (jnp.zeros((3, 4, 6)), jnp.zeros((3, 6, 4)))
BOXES = ("key", "value", "rate", "retain", "memory")
STATE = nlx_kernels.MLPMemoryState(
    *[tuple(jnp.zeros((2, *w.shape)) for w in LAYERS)] * 3, position=jnp.zeros(2, jnp.int32)
)
PARAMETERS = nlx_kernels.SelfModifyingParameters(
    memories=dict.fromkeys(BOXES, LAYERS),
    rate_readout=dict.fromkeys(BOXES, jnp.zeros((3, 4))),
    rate_bias=dict.fromkeys(BOXES, jnp.zeros(3)),
    retain_readout=jnp.zeros((3, 4)),
    retain_bias=jnp.zeros(3),
)
HOPE_STATE = nlx_kernels.SelfModifyingState(
    *[jax.tree.map(lambda w: jnp.zeros((2, *w.shape)), PARAMETERS.memories)] * 2,
    momentum=None,
    position=jnp.zeros(2, jnp.int32),
)
X = TOKEN[:, :, 0]
BLOCK = nlx_kernels.ChainBlock(jnp.ones(4), jnp.zeros((4, 6)), jnp.zeros((6, 4)))
CARRY = nlx_kernels.FastCarry((jnp.zeros((2, 4)),), jnp.zeros(2, jnp.int32), None)
CALLS = {
    cms_chain: dict(x=X, weights=(BLOCK,)),
    fast_update: dict(
        weights=(jnp.zeros((2, 4)),),
        carry=CARRY,
        gradient=(jnp.ones((2, 4)),),
        fires=jnp.array([True, False]),
        rate=0.1,
    ),
    linear_memory: dict(q=TOKEN, k=TOKEN, v=TOKEN, retain=GATE, erase=GATE, rate=GATE),
    mlp_memory: dict(
        q=TOKEN, k=TOKEN, v=TOKEN, weights=LAYERS, rate=GATE, retain=GATE, chunk_size=2
    ),
    self_modifying_memory: dict(
        x=TOKEN, q=TOKEN, parameters=PARAMETERS, chunk_size=2, projection_chunk_size=4
    ),
}
OFFERED = dict.fromkeys(CALLS, ()) | {
    cms_chain: OF_CHAIN,
    fast_update: OF_UPDATE,
    linear_memory: OF_LINEAR,
    mlp_memory: OF_MLP,
    self_modifying_memory: OF_HOPE,
}
HALF = GATE.astype(jnp.bfloat16)
NARROW = TOKEN[..., :3]
DEEP = (jnp.zeros((3, 4, 4)),) * 5


# Which implementation runs


def named(*names):
    return {name: lambda name=name: name for name in names}


def test_none_takes_the_first_offered_and_a_name_is_obeyed():
    assert choose("op", None, False, named("xla", "reference"))() == "xla"
    assert choose("op", "reference", False, named("xla", "reference"))() == "reference"
    assert choose("op", "mosaic_gpu", True, named("xla", "mosaic_gpu"))() == "mosaic_gpu"


@pytest.mark.parametrize(
    ("implementation", "interpret", "sentence"),
    [
        ("pallas", False, "op: implementation='pallas' is unknown; it must be None or one of "),
        ("pallas_tpu", False, "op: implementation='pallas_tpu' does not exist for this op; it "),
        ("xla", True, "op: interpret=True runs a kernel on the CPU, but 'xla' is no kernel; "),
        (None, True, "op: interpret=True runs a kernel on the CPU, but 'xla' is no kernel; "),
    ],
)
def test_what_is_refused(implementation, interpret, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        choose("op", implementation, interpret, named("xla", "reference"))


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_every_op_runs_what_it_is_told_to(op):
    calls = {}
    for implementation in (None, "xla", "reference"):
        jaxpr = jax.make_jaxpr(lambda i=implementation: op(**CALLS[op], implementation=i))()
        calls[implementation] = str(jaxpr)
    assert calls[None] == calls["xla"] != calls["reference"]
    for implementation in ("pallas_tpu", "mosaic_gpu"):
        run = lambda i=implementation: op(**CALLS[op], implementation=i, interpret=True)
        if implementation == "mosaic_gpu" and op is linear_memory:
            with pytest.raises(ValueError, match="q, k and v must be bfloat16"):
                run()
        elif implementation in OFFERED[op]:
            assert "pallas_call" in str(jax.make_jaxpr(run)())
        else:
            with pytest.raises(ValueError, match="does not exist for this op"):
                run()


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_none_takes_the_kernel_of_the_platform(op):
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = str(jax.make_jaxpr(lambda: op(**CALLS[op]))())
    assert ("pallas_call" in jaxpr) == ("pallas_tpu" in OFFERED[op])


# One sentence for each bad argument

BAD = [
    (cms_chain, dict(x=TOKEN), r"x has shape \(2, 5, 3, 4\); it must be \[b, t, d\]"),
    (cms_chain, dict(weights=()), "weights is a tuple of 0; it must be a tuple of one or more Cha"),
    (cms_chain, dict(weights=BLOCK), "weights is a ChainBlock; it must be a tuple of one or more"),
    (cms_chain, dict(weights=(LAYERS,)), r"weights\[0\] is a tuple; it must be a ChainBlock"),
    (
        cms_chain,
        dict(weights=(BLOCK, BLOCK._replace(down=jnp.zeros((5, 4))))),
        r"weights\[1\].down has shape \(5, 4\); it must be \[f1, d\] with f1=6, d=4",
    ),
    (
        cms_chain,
        dict(weights=(BLOCK._replace(up=jnp.zeros((2, 4, 6))),)),
        r"weights\[0\].scale has shape \(4,\); it must be \[b, d\] with b=2, d=4",
    ),
    (cms_chain, dict(activation="relu"), "activation is 'relu'; it must be gelu or silu"),
    (fast_update, dict(weights=()), r"weights has the shapes \[\]; it must be one or more arrays"),
    (fast_update, dict(weights=(X, GATE[0])), r"weights has the shapes \[.*\[b, ...\] with one b"),
    (fast_update, dict(weights=(X.astype(int),)), r"weights has the dtypes \['int32'\]; it must b"),
    (fast_update, dict(carry=()), "carry is a tuple; it must be a FastCarry"),
    (
        fast_update,
        dict(gradient=(jnp.ones((2, 3)),)),
        r"gradient is \('float32\[2, 3\]',\); it must be \('float32\[2, 4\]',\)",
    ),
    (
        fast_update,
        dict(momentum=0.9),
        r"carry.momentum is None; it must be \('float32\[2, 4\]',\)",
    ),
    (
        fast_update,
        dict(carry=CARRY._replace(ticks=jnp.zeros(3, jnp.int32))),
        r"carry.ticks is int32\[3\]; it must be int32\[2\]",
    ),
    (fast_update, dict(fires=1), r"fires is int32\[\]; it must be one bool, or \[b\] with b=2"),
    (fast_update, dict(rate=jnp.ones(3)), r"rate is float32\[3\]; it must be one floating number"),
    (linear_memory, dict(q=TOKEN[0]), r"q has shape \(5, 3, 4\); it must be \[b, t, h, k\]"),
    (linear_memory, dict(q=TOKEN[:, :0]), r"q has shape \(2, 0, 3, 4\); it must .* no axis empty"),
    (linear_memory, dict(q="text"), r"q is 'text'; it must be an array \[b, t, h, k\]"),
    (linear_memory, dict(q=TOKEN.astype(int)), "q has dtype int32; it must be float64, float32 or"),
    (linear_memory, dict(k=NARROW), r"k has shape \(2, 5, 3, 3\); .* with b=2, t=5, h=3, k=4"),
    (linear_memory, dict(k=TOKEN.astype(jnp.bfloat16)), "k has dtype bfloat16; it must be float32"),
    (linear_memory, dict(retain=HALF), "retain has dtype bfloat16; it must be float32"),
    (linear_memory, dict(erase=0.5), r"erase is 0.5; it must be an array \[b, t, h\]"),
    (linear_memory, dict(rate=GATE[:1]), r"rate has shape \(1, 5, 3\); it must be \[b, t, h\] wi"),
    (linear_memory, dict(state=GATE), r"state has shape \(2, 5, 3\); it must be \[b, h, k, v\]"),
    (
        linear_memory,
        dict(state=jnp.zeros((2, 3, 4, 4), jnp.bfloat16)),
        "state has dtype bfloat16; it must be float32",
    ),
    (linear_memory, dict(read="before"), "read is 'before'; it must be after_write or chunk_start"),
    (linear_memory, dict(segment_ids=GATE[..., 0]), "segment_ids has dtype float32; it must be in"),
    (linear_memory, dict(block_size=0), "block_size is 0; it must be an integer >= 1"),
    (mlp_memory, dict(v=NARROW), "v has 3 channels and k 4; with residual=True they must be equal"),
    (mlp_memory, dict(weights=None), "weights is None; it must be given without state"),
    (mlp_memory, dict(weights=LAYERS[0]), "weights is a ArrayImpl; it must be a tuple of 1 to 4"),
    (mlp_memory, dict(weights=DEEP), r"weights has 5 layers; it must be a tuple of 1 to 4 arrays"),
    (
        mlp_memory,
        dict(weights=LAYERS[::-1]),
        r"weights\[0\] has shape \(3, 6, 4\); it must be \[h, k, f1\] with h=3, k=4",
    ),
    (mlp_memory, dict(state=STATE, momentum=GATE), "weights and state are both given; without seg"),
    (
        mlp_memory,
        dict(weights=None, state=STATE, momentum=GATE, segment_ids=jnp.zeros((2, 5), int)),
        "weights is None; it must be given with segment_ids, whose segments start from it",
    ),
    (
        mlp_memory,
        dict(weights=None, state=STATE),
        "momentum is None, but state.momentum is not; mo",
    ),
    (
        mlp_memory,
        dict(weights=None, state=STATE._replace(momentum=None), momentum=GATE),
        "momentum is given, but state.momentum is None; momentum must be given in all calls or no",
    ),
    (
        mlp_memory,
        dict(weights=None, state=STATE[0]),
        "state is a tuple; it must be a MLPMemoryState",
    ),
    (
        mlp_memory,
        dict(weights=None, state=STATE._replace(position=GATE), momentum=GATE),
        r"state.position has shape \(2, 5, 3\); it must be \[b\] with b=2",
    ),
    (mlp_memory, dict(chunk_size=2.5), "chunk_size is 2.5; it must be an integer >= 1"),
    (mlp_memory, dict(activation="relu"), "activation is 'relu'; it must be gelu or silu"),
    (mlp_memory, dict(norm="layer"), "norm is 'layer'; it must be True or False"),
    (mlp_memory, dict(clip=0.0), "clip is 0.0; it must be a number > 0, or None"),
    (mlp_memory, dict(bound="none"), "bound is 'none'; it must be a number > 0, or None"),
    (mlp_memory, dict(momentum=HALF), "momentum has dtype bfloat16; it must be float32"),
    (self_modifying_memory, dict(x=(TOKEN,) * 3), r"x is \(.*; it must be an array \[b, t, h, d\]"),
    (
        self_modifying_memory,
        dict(x=nlx_kernels.Streams(TOKEN, NARROW, TOKEN)),
        r"x.value has shape \(2, 5, 3, 3\); it must be \[b, t, h, d\] with b=2, t=5, h=3, d=4",
    ),
    (self_modifying_memory, dict(parameters={}), "parameters is a dict; it must be a SelfModifyin"),
    (
        self_modifying_memory,
        dict(parameters=PARAMETERS._replace(memories={"key": LAYERS})),
        r"parameters.memories has the keys \['key'\]; it must be a dict of \['key', 'memory', ",
    ),
    (
        self_modifying_memory,
        dict(parameters=PARAMETERS._replace(memories=dict.fromkeys(BOXES, LAYERS[:1]))),
        r"parameters.memories\['key'\] is no pair; it must be two arrays \(W_1, W_2\)",
    ),
    (
        self_modifying_memory,
        dict(parameters=PARAMETERS._replace(rate_bias=GATE)),
        "parameters.rate_bias has the type ArrayImpl; it must be a dict of ",
    ),
    (
        self_modifying_memory,
        dict(parameters=PARAMETERS._replace(retain_bias=GATE)),
        r"parameters.retain_bias has shape \(2, 5, 3\); it must be \[h\] with h=3",
    ),
    (self_modifying_memory, dict(state=STATE), "state is a MLPMemoryState; it must be a SelfModif"),
    (
        self_modifying_memory,
        dict(state=HOPE_STATE, momentum=GATE),
        "momentum is given, but state.momentum is None; momentum must be given in all calls or no",
    ),
    (
        self_modifying_memory,
        dict(projection_chunk_size=0),
        "projection_chunk_size is 0; it must be",
    ),
    (
        self_modifying_memory,
        dict(erase=GATE),
        r"erase is an array of shape \(2, 5, 3\); it must be True or F",
    ),
    (self_modifying_memory, dict(clip=-1), "clip is -1; it must be a number > 0, or None"),
    (self_modifying_memory, dict(bound="no"), "bound is 'no'; it must be a number > 0, or None"),
]


@pytest.mark.parametrize(("op", "wrong", "sentence"), BAD)
def test_bad_argument_gets_a_sentence(op, wrong, sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        op(**CALLS[op] | wrong)
    text = str(caught.value)
    assert re.match(f"{op.__name__}: {sentence}", text, re.DOTALL), text
    assert text.endswith(".")


def test_wider_arguments_than_the_inputs_are_refused(x64):
    call = dict(CALLS[linear_memory], rate=GATE.astype(jnp.float64))
    call = jax.tree.map(lambda x: x.astype(jnp.float32), call) | dict(rate=call["rate"])
    with pytest.raises(TypeError, match="rate has dtype float64; it must be float32"):
        linear_memory(**call)


def test_good_states_are_taken():
    call = {name: x for name, x in CALLS[mlp_memory].items() if name != "weights"}
    jax.eval_shape(lambda: mlp_memory(**call, state=STATE, momentum=GATE))
    jax.eval_shape(lambda: self_modifying_memory(**CALLS[self_modifying_memory], state=HOPE_STATE))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(chunk_size=0), "chunk_size is 0; it must be an integer >= 1"),
        (dict(weights=None), "weights is None; it must be given without state"),
        (dict(weights=None, state=STATE), "momentum is None, but state.momentum is not; mo"),
        (dict(bound=-1.0), "bound is -1.0; it must be a number > 0, or None"),
        (dict(read="before"), "read is 'before'; it must be after_write or chunk_start"),
    ],
)
def test_generated_memory_says_what_is_wrong(change, sentence):
    call = dict(weights=LAYERS, momentum=False, chunk_size=2) | change
    with pytest.raises(ValueError, match=f"^generated_memory: {sentence}"):
        nlx_kernels.generated_memory(None, TOKEN, None, **call)
