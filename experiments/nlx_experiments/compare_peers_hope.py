# SPDX-License-Identifier: Apache-2.0
"""nested-learning's SelfModifyingTitans beside ours: part of `compare_peers`.

Its weights are copied into levels of the ground floor, wired its way: five memories on two clocks,
each writing (key, its own answer to the value) from boundary weights. Outputs and all memories must
agree in float64. That wiring and not our op, since the op fixes our readings; a test of ours holds
the op to the levels that `nlx.self_modifying` wires. `DIFFERENCES` says where the readings part.
"""

import jax
import jax.numpy as jnp
import numpy as np

import nlx
from nlx import memories, objectives, writes
from nlx.memories import unit
from nlx_experiments import peers
from nlx_experiments.peers import Errors, error

ROWS, WIDTH = 2, 16
BOXES = {"key": "k", "value": "v", "rate": "eta", "retain": "alpha", "memory": "memory"}

DIFFERENCES = """\
nested-learning 0.2.0, SelfModifyingTitans: where its reading is not ours, and what was done here
 1. Gradient of |M(k) - M(v)|^2, ours of half of it: our rate is twice its eta, our erase its eta.
 2. One eta and one alpha per token, made by memories d -> 1 and shared by all memories; ours reads
    each memory's rate off a vector by a slow read-out. Here: a nest wired their way.
 3. eta = softplus(.) / 1000, unbounded; ours fills the range in which a memory is stable, which
    allows the eigenvalue -1. Here: theirs.
 4. Hidden units are the erf form of gelu as they are; ours the tanh form, softly normalised, since
    raw ones let both layers drive each other up until they overflow. Here: theirs.
 5. Erases the first layer only, along the key; ours every layer along its own input (Eq. 57 holds
    for a layer's input). Here: theirs, by directions that are 0 for the second layer.
 6. Reads from the chunk's start (Eq. 90); ours after every write unless asked. Here: theirs.
 7. No limit on gradients or weights; ours has `clip` and `bound`. Here: none.
 8. Momentum: eta times a sum of gradients; ours a sum of eta times gradients (Titans, Eq. 14):
    equal for constant rates only. Here: none.
 9. One head as wide as the model, memories as wide inside; one convolution for all streams, before
    the query's map. Here: one head, no convolution.
10. Every call begins a chunk, and writes an unfinished one at its end, so a sequence in two calls
    is not the sequence in one, and the convolution starts anew. Ours counts positions. Here: whole
    chunks.
11. All writes are under no_grad: no outer gradient reaches M_k, M_v, M_eta, M_alpha (M_q unless
    adaptive). Ours flows through every write. Here: values only.
12. `apply_updates_inplace` averages memories over the batch into the module: rows leak into each
    other. Not used."""


def hope(chunk_size: int = 24, projection_chunk_size: int = 8) -> Errors:
    """nested-learning's SelfModifyingTitans, all five memories, as a nest wired their way."""
    torch = peers.torch()
    theirs = peers.load("nested_learning.titan.self_modifying")
    torch.manual_seed(0)
    config = theirs.SelfModifyingTitansConfig(
        dim=WIDTH, eta_scale=0.1, chunk_size_other=projection_chunk_size,
        chunk_size_memory=chunk_size, use_skip=False, local_conv_window=None,
    )  # fmt: skip
    module = theirs.SelfModifyingTitans(config).double()
    x = torch.randn(ROWS, 4 * chunk_size, WIDTH, dtype=torch.float64)
    their_y, after = module.forward_with_updates(x, module.init_fast_state())
    cut = 2 * chunk_size - 4
    early, state = module.forward_with_updates(x[:, :cut], module.init_fast_state())
    late, _ = module.forward_with_updates(x[:, cut:], state)
    with jax.enable_x64(True):
        nest = _their_nest(config)
        copied = {box: _layers(getattr(module, f"m_{name}")) for box, name in BOXES.items()}
        copied["query"] = module.w_q.weight.detach().numpy().T
        run = jax.jit(jax.vmap(lambda x: nest.scan(nest.start(copied), x)))
        states, y = run(x.numpy())
        written = {box: states[box].params for box in BOXES}
        want = {box: _layers(getattr(after, name)) for box, name in BOXES.items()}
        found = {"output": error(y, their_y.numpy()), "memories": error(written, want)}
    split = torch.cat([early, late], dim=1).numpy()
    return found | {"(theirs in two calls against theirs in one)": error(split, their_y.numpy())}


def _layers(module) -> tuple[np.ndarray, np.ndarray]:
    """Both layers [.., in, out]: theirs count from the outside in, and are stored [out, in]."""
    weights = (getattr(w, "weight", w).detach().numpy() for w in (module.w2, module.w1))
    first, second = (np.swapaxes(w, -1, -2) for w in weights)
    return first, second


def _their_nest(config) -> nlx.Nest:
    """Their loop out of our ground floor: two clocks, five memories, boundary reads."""
    gelu = lambda z: jax.nn.gelu(z, approximate=False)
    square = memories.mlp((WIDTH, WIDTH, WIDTH), gelu)
    scalar = memories.mlp((WIDTH, WIDTH, 1), gelu, residual=False)
    forms = {box: scalar if box in ("rate", "retain") else square for box in BOXES}
    periods = dict.fromkeys(BOXES, config.chunk_size_other) | {"memory": config.chunk_size_memory}
    first_only = lambda params, key: (unit(key), jnp.zeros(WIDTH))
    levels = {
        box: nlx.associative_memory(
            form, objectives.l2, writes.gated(first_only, False), nlx.Clock(periods[box])
        )
        for box, form in forms.items()
    }
    levels["query"] = nlx.Level(lambda key: jnp.zeros((WIDTH, WIDTH)))

    def forward(params, x):
        made = {box: forms[box].read(params[box], x) for box in BOXES if box != "memory"}
        eta = config.eta_scale * jax.nn.softplus(made["rate"][0])
        alpha = jax.nn.sigmoid(made["retain"][0])
        stored = {
            box: nlx.Association(
                unit(made["key"]), form.read(params[box], made["value"]),
                rate=2 * eta, retain=alpha, erase=eta,
            )
            for box, form in forms.items()
        }  # fmt: skip
        return square.read(params["memory"], unit(x @ params["query"])), stored

    return nlx.Nest(levels, forward)
