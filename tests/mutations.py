# SPDX-License-Identifier: Apache-2.0
"""Breaks nlx on purpose and records which test notices: `python tests/mutations.py [WORDS ...]`.

Each row edits one place in a copy of the sources and runs one test file against the copy. Rows that
no test notices make it fail. It writes tests/mutations.md; about 20 minutes on two cores. With
words only the rows run whose names hold one of them, and the others stay as they are.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One edit, and the tests that should notice it."""

    removes: str
    file: str
    old: str
    new: str
    tests: str


CHUNK, SOLVE = "kernels/nlx_kernels/_chunk.py", "kernels/nlx_kernels/_solve.py"
WINDOWS = "kernels/nlx_kernels/_windows.py"
HOPE = "kernels/nlx_kernels/self_modifying_memory/xla.py"
OF_MLP, OF_HOPE = "kernels/test_mlp_memory.py", "kernels/test_self_modifying_memory.py"
TRACES = "nlx/inspect/traces.py"
DIAGRAM, HEATMAP, WHITEBOX = (
    f"experiments/nlx_experiments/{name}.py" for name in ("diagram", "heatmap", "whitebox")
)
OF_PICTURES = "experiments/test_pictures.py"
CMS, STREAM, OF_CMS = "nlx/nn/cms.py", "nlx/nn/continuum.py", "nlx/nn/test_continuum.py"
LEARNER, LOOP, RECORD = (
    f"experiments/nlx_experiments/{name}.py" for name in ("learner", "loop", "record")
)
PLACEMENT, STEP = "kernels/nlx_kernels/placement.py", "nlx/train.py"
CHECKPOINTS = "experiments/nlx_experiments/checkpoints.py"
OF_STEP, OF_CHECKPOINTS = "nlx/test_train.py", "experiments/test_checkpoints.py"
OF_TRAIN = "experiments/test_train.py"
SCAN_TPU = "kernels/nlx_kernels/_chunk_scan_tpu.py"
SPLIT = "kernels/nlx_kernels/linear_memory/split.py"
OF_SPLIT = "kernels/test_linear_memory_split.py"
OF_SHARDED = "kernels/test_sharded.py"
OF_STEPS = "nlx/nn/test_training_steps.py"
WINDOWS_TPU = "kernels/nlx_kernels/_windows_tpu.py"
OF_LINEAR_TPU = "kernels/test_linear_memory_tpu.py"
OF_HOPE_TPU, OF_MLP_TPU = (
    f"kernels/test_{op}_tpu.py" for op in ("self_modifying_memory", "mlp_memory")
)
CHECKS, OF_CHECKS = "nlx/nn/checks.py", "nlx/nn/test_checks.py"
MIXER, OF_CONFIG, OF_PRECISION = (
    "nlx/nn/mixer.py",
    "nlx/nn/test_configuration.py",
    "nlx/nn/test_precision.py",
)
EXPERIMENTS = "experiments/nlx_experiments"
OF_LEVELS, OF_REASONING = (f"experiments/test_reasoning{part}.py" for part in ("", "_tasks"))
WIDE = "wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))"
LANGUAGES = "experiments/nlx_experiments/formal_languages.py"
OF_TASKS, OF_CONTEST, OF_TABLES = (
    f"experiments/test_sequence_{name}.py" for name in ("tasks", "contest", "experiment")
)
CONTEST = "experiments/nlx_experiments/sequence_contest.py"
RECALL = "experiments/nlx_experiments/recall_tasks.py"
TOKENS, FORMATS, CHOICES, HARNESS, LANGUAGE = (
    f"experiments/nlx_experiments/{name}.py"
    for name in ("tokenization", "choice_formats", "multiple_choice", "harness", "language")
)
OF_TOKENS, OF_FORMATS, OF_CHOICES, OF_HARNESS, OF_LANGUAGE = (
    f"experiments/test_{name}.py"
    for name in ("tokenization", "choice_formats", "multiple_choice", "harness", "language")
)
CONTINUAL, OF_CONTINUAL = f"{EXPERIMENTS}/continual", "experiments/test_continual.py"
OF_METRICS, OF_STREAMS = (f"experiments/test_continual_{name}.py" for name in ("metrics", "tasks"))

MUTATIONS = (
    Mutation(
        "the momentum carried into a chunk",
        CHUNK,
        "    out += kept(decay.B0) * momentum\n",
        "",
        OF_MLP,
    ),
    Mutation(
        "the momentum in what is erased",
        CHUNK,
        "        target += decay.before_B0[..., None] * (z @ momentum)\n",
        "        pass\n",
        OF_MLP,
    ),
    Mutation("the erase", CHUNK, "    if erase is None:\n", "    if True:\n", OF_HOPE),
    Mutation(
        "the residual in the inner gradient",
        CHUNK,
        "error = hidden + key - value if residual else hidden - value",
        "error = hidden - value",
        OF_MLP,
    ),
    Mutation(
        "the residual of the memories",
        "nlx/memories.py",
        "return key + output if residual else output",
        "return output",
        "nlx/test_memories.py",
    ),
    Mutation(
        "the clip of a token's gradient",
        HOPE,
        "trace.errors[layer], form.clip)",
        "trace.errors[layer], None)",
        OF_HOPE,
    ),
    Mutation("the bound at a firing", HOPE, "_chunk.bound_norm(w, bound)", "w", OF_HOPE),
    Mutation(
        "the second clock of Hope",
        HOPE,
        'of_memory if box == "memory" else of_others',
        "of_memory",
        OF_HOPE,
    ),
    Mutation(
        "the gradient through the writes",
        HOPE,
        "    written = memory._replace(weights=tuple(weights))\n",
        "    written = memory._replace(weights=jax.lax.stop_gradient(tuple(weights)))\n",
        OF_HOPE,
    ),
    Mutation(
        "the mask after a piece's last token",
        WINDOWS,
        "valid = (index[None] >= done[:, None]) & (index[None] < end[:, None])",
        "valid = index[None] >= done[:, None]",
        OF_MLP,
    ),
    Mutation(
        "the reset of a row's position by a segment",
        WINDOWS,
        "        position = jnp.where(any_start, 0, memory.position)\n",
        "        position = memory.position\n",
        OF_MLP,
    ),
    Mutation(
        "exactness of the inverse (Neumann series instead of blocks)",
        SOLVE,
        "        x = x - (exact_product(x, exact_product(between, x)) if level else between)\n",
        "        x = x - between\n",
        "kernels/test_solve.py",
    ),
    Mutation(
        "the phase of a clock",
        "nlx/clock.py",
        "self._since(tick, 1 - self.phase) == 0",
        "self._since(tick, 1) == 0",
        "nlx/test_clock.py",
    ),
    Mutation(
        "the learning of DMGD's memory",
        "nlx/optim/deep_momentum.py",
        "deep.inner_lr / _power(",
        "0 * deep.inner_lr / _power(",
        "nlx/optim/test_deep_momentum.py",
    ),
    Mutation(
        "what pads a block of ticks",
        "nlx/blocks.py",
        "return jnp.where(valid.reshape(size, *[1] * (x.ndim - 1)), piece, last)",
        "return piece",
        "nlx/test_nest.py",
    ),
    Mutation(
        "the refusal of gates below float32",
        "nlx/writes.py",
        "jnp.finfo(dtype).bits < 32",
        "jnp.finfo(dtype).bits < 0",
        "nlx/test_writes.py",
    ),
    Mutation(
        "the taking out of tokens that are not finite",
        "kernels/nlx_kernels/_finite.py",
        "_clear(bad, tokens), state, mark",
        "tokens, state, mark",
        "kernels/test_finite.py",
    ),
    Mutation(
        "the rematerialisation of a chunk",
        WINDOWS,
        "jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, tokens)",
        "jax.lax.scan(body, carry, tokens)",
        "kernels/test_laws.py",
    ),
    Mutation(
        "the gradient of zero for a zero matrix in newton_schulz",
        "kernels/nlx_kernels/newton_schulz/xla.py",
        "jnp.sqrt(jnp.where(present, square, 1))",
        "jnp.sqrt(square)",
        "kernels/test_newton_schulz.py",
    ),
    Mutation(
        "the erase of delta momentum",
        "nlx/optim/momentum.py",
        " + erase * l2(recalled, jnp.zeros_like(recalled))",
        "",
        "nlx/optim/test_momentum.py",
    ),
    Mutation(
        "the slow memory of M3",
        "nlx/optim/m3.py",
        'orthogonal(fast) + alpha * before["slow"]',
        "orthogonal(fast)",
        "nlx/optim/test_m3.py",
    ),
    Mutation(
        "that M3's slow memory waits for the next block",
        "nlx/optim/m3.py",
        'alpha * before["slow"]',
        'alpha * after["slow"]',
        "nlx/optim/test_m3.py",
    ),
    Mutation(
        "the second moment of M3",
        "nlx/optim/m3.py",
        '(jnp.sqrt(after["second"]) + eps)',
        "1.0",
        "nlx/optim/test_m3.py",
    ),
    Mutation(
        "the ridge of Adam's memory",
        "nlx/optim/adam_memory.py",
        "second + ridge, 1)",
        "second, 1)",
        "nlx/optim/test_adam_memory.py",
    ),
    Mutation(
        "what DGD forgets",
        "nlx/optim/dgd.py",
        " + gamma * forgotten",
        "",
        "nlx/optim/test_dgd.py",
    ),
    Mutation(
        "DGD's rate for inputs of any norm",
        "nlx/optim/dgd.py",
        "+ rate * gram\n",
        "+ rate * jnp.eye(len(gram), dtype=gram.dtype)\n",
        "nlx/optim/test_dgd.py",
    ),
    Mutation(
        "the eigenbasis of SOAP",
        "nlx/optim/shampoo.py",
        "clock, eigenvectors, project",
        "clock, jnp.ones_like, project",
        "nlx/optim/test_shampoo.py",
    ),
    Mutation(
        "the splitting of memories over devices",
        "nlx/optim/sharding.py",
        "name if m == p else None",
        "None",
        "nlx/optim/test_sharding.py",
    ),
    Mutation(
        "the restart of a nested level",
        "nlx/writes.py",
        "jnp.where(count == 0, a, b), anew",
        "jnp.where(count < 0, a, b), anew",
        OF_CMS,
    ),
    Mutation(
        "what slower levels learned of where a block starts",
        CMS,
        "*[level[n] for level in shares[n:]]",
        "*[level[n] for level in (shares[n], shares[-1])][: len(shares) - n]",
        OF_CMS,
    ),
    Mutation(
        "the weights of the independent variant's sum",
        CMS,
        "[w * block.down for w",
        "[block.down for w",
        OF_CMS,
    ),
    Mutation(
        "the successor of a chunk's last token",
        STREAM,
        "cut(tokens[:, 1:])",
        "cut(tokens[:, :-1])",
        OF_CMS,
    ),
    Mutation(
        "the clocks of the levels in context",
        STREAM,
        "None, own, by_name[name])",
        "None, own, Clock(1))",
        OF_CMS,
    ),
    Mutation(
        "the cut of outer gradients at a window's end",
        STREAM,
        "jax.tree.map(_as_if, first[name], params)",
        "params",
        OF_CMS,
    ),
    Mutation(
        "the momentum of fast_update",
        "kernels/nlx_kernels/fast_update/xla.py",
        "step = wide(momentum) * buffer + step",
        "step = wide(momentum) * step + step",
        "kernels/test_fast_update.py",
    ),
    Mutation(
        "the residual of the chain",
        "kernels/nlx_kernels/cms_chain/xla.py",
        "x = x + hidden @ down",
        "x = hidden @ down",
        "kernels/test_cms_chain.py",
    ),
    Mutation(
        "the erasing of a memory's own gradient in its eigenvalues",
        TRACES,
        "            if moves:\n                erased",
        "            if False:\n                erased",
        "nlx/inspect/test_traces.py",
    ),
    Mutation(
        "what an arrow of the white box says",
        DIAGRAM,
        "                parts.append(what)",
        '                parts.append("wrong")',
        OF_PICTURES,
    ),
    Mutation(
        "the order of the white box's bands",
        DIAGRAM,
        "key=_pace)",
        "key=_pace, reverse=True)",
        OF_PICTURES,
    ),
    Mutation(
        "the order of the white box's heat map",
        HEATMAP,
        "grid[tuple(places.T)] = values",
        "grid[tuple(places.T)] = values[::-1]",
        OF_PICTURES,
    ),
    Mutation(
        "the retention that the white box draws",
        HEATMAP,
        "lambda t: t.retain",
        "lambda t: t.age",
        OF_PICTURES,
    ),
    Mutation(
        "the inner surprise that the white box draws",
        WHITEBOX,
        "np.asarray(t.surprise)[0, 1:]",
        "np.asarray(t.retain)[0, 1:]",
        OF_PICTURES,
    ),
    Mutation(
        "the order of the white box's columns",
        WHITEBOX,
        "(t.surprise, t.update, t.retain)",
        "(t.update, t.surprise, t.retain)",
        OF_PICTURES,
    ),
    Mutation(
        "the least eigenvalue of the white box's table",
        WHITEBOX,
        "t.eigenvalues.low.min()",
        "t.eigenvalues.low.max()",
        OF_PICTURES,
    ),
    Mutation(
        "where the white box's arrows end",
        "experiments/nlx_experiments/arrows.py",
        "bottom = boxes[key].y - HEIGHT / 2",
        "pass",
        OF_PICTURES,
    ),
    Mutation(
        "that the white box follows what attention gives",
        "nlx/inspect/tracing.py",
        "results = [attention] if name == GIVEN else marks",
        "results = marks",
        "nlx/inspect/test_wiring.py",
    ),
    Mutation(
        "the stages before a memory in an optimizer's chain",
        "nlx/inspect/wiring.py",
        "zip(chain[:at], states, strict=True)",
        "zip(chain[:0], states, strict=False)",
        "nlx/inspect/test_wiring.py",
    ),
    Mutation(
        "the momentum in the age of a memory",
        TRACES,
        "moving = carry_on * moving + step",
        "moving = step",
        "nlx/inspect/test_traces.py",
    ),
    Mutation(
        "the tick that passes for what is held",
        TRACES,
        "keep * (held_age + held)",
        "keep * held_age",
        "nlx/inspect/test_traces.py",
    ),
    Mutation(
        "the updates that are shown",
        TRACES,
        "for state in (before, after))",
        "for state in (before, before))",
        "nlx/inspect/test_reading.py",
    ),
    Mutation(
        "the persistent tokens before a text that is watched",
        "nlx/nn/neural_memory.py",
        'return Ticks({"memory": self.begin()[1]}',
        'return Ticks({"memory": self.memory.weights()}',
        "nlx/inspect/test_reading.py",
    ),
    Mutation(
        "the surprise in bits, not nats",
        TRACES,
        "[..., 0] / math.log(2)",
        "[..., 0]",
        "nlx/inspect/test_traces.py",
    ),
    Mutation(
        "the steps into functions when a wiring is traced",
        "nlx/inspect/tracing.py",
        "results = _reading(inner, marks, attention, met)",
        "results = [False] * len(equation.outvars)",
        "nlx/inspect/test_wiring.py",
    ),
    Mutation(
        "the gates of every token's own",
        "kernels/nlx_kernels/mlp_memory/api.py",
        '"rate": rate, ',
        '"rate": 0 * rate + rate.mean((0, 1), keepdims=True), ',
        "test_peers.py",
    ),
    Mutation(
        "the move of the weights at which surprise is taken",
        "kernels/nlx_kernels/mlp_memory/xla.py",
        "return memory._replace(weights=_Carried(layers, kept), chunk_start=start)",
        "return memory._replace(weights=_Carried(layers, kept))",
        "test_peers.py",
    ),
    Mutation(
        "the state that a stream goes on from",
        "experiments/nlx_experiments/stream.py",
        'reading.state, reading.position = saved.trees["state"], saved.position',
        "reading.position = saved.position",
        "experiments/test_stream.py",
    ),
    Mutation(
        "that injected gates are at least float32",
        "nlx/optim/gradient_memory.py",
        "return gate.astype(jnp.promote_types(gate.dtype, jnp.float32))",
        "return gate",
        "nlx/optim/test_compositions.py",
    ),
    Mutation(
        "the shortened rows of robust DMGD",
        "nlx/optim/deep_momentum.py",
        "gradient = _shortened(",
        "_shortened(",
        "nlx/optim/test_deep_momentum.py",
    ),
    Mutation(
        "that a preconditioner learns from the gradients, not from the memory",
        "nlx/optim/preconditioned.py",
        "_, seen = scales.update(updates, ",
        "_, seen = scales.update(said, ",
        "nlx/optim/test_preconditioned.py",
    ),
    Mutation(
        "the average in the scale of deep momentum",
        "nlx/optim/deep_momentum.py",
        "Share(slow, 1 - slow))",
        "Share(jnp.ones_like(slow), 0 * slow))",
        "nlx/optim/test_deep_momentum.py",
    ),
    Mutation(
        "the reset inside a block of linear_memory",
        "kernels/nlx_kernels/linear_memory/xla.py",
        "jnp.where(kept[..., None] > 0, products[..., :-1, :], 0)",
        "products[..., :-1, :]",
        "kernels/test_linear_memory.py",
    ),
    Mutation(
        "the gates between a write and a later token of its block",
        "kernels/nlx_kernels/linear_memory/xla.py",
        "erase[..., None] * before[..., 1:] * rows_by_rows",
        "erase[..., None] * rows_by_rows",
        "kernels/test_linear_memory.py",
    ),
    Mutation(
        "that a fixed projection of Hope stands still",
        "nlx/nn/hope.py",
        "zeros((self.heads, self.hidden, self.head_dim))",
        "1 + zeros((self.heads, self.hidden, self.head_dim))",
        "nlx/nn/test_ablation.py",
    ),
    Mutation(
        "that Hope without weight decay forgets nothing",
        "nlx/nn/hope.py",
        "rest.rate_bias + SATURATED",
        "rest.rate_bias",
        "nlx/nn/test_ablation.py",
    ),
    Mutation(
        "the weight decay of M3's alias",
        "nlx/optim/m3.py",
        "scaled, weight_decay=weight_decay, mask=mask)",
        "scaled)",
        "nlx/optim/test_compositions.py",
    ),
    Mutation(
        "that a model is scored on bytes that it does not see",
        LEARNER,
        "(tokens[:, :-1])",
        "(tokens[:, 1:])",
        OF_TRAIN,
    ),
    Mutation(
        "bits, not nats, in a run's score",
        LEARNER,
        "return -chosen[..., 0] / math.log(2)",
        "return -chosen[..., 0]",
        OF_TRAIN,
    ),
    Mutation(
        "bits, not nats, in a run's metrics",
        RECORD,
        "loss / math.log(2) / self",
        "loss / self",
        OF_TRAIN,
    ),
    Mutation(
        "the trained weights in a run's score",
        LOOP,
        "functions.bits(state.params, tokens)",
        "functions.bits(functions.init().params, tokens)",
        OF_TRAIN,
    ),
    Mutation(
        "that n-gram models learn only what a run has seen",
        LOOP,
        "evaluate.ngram_bits(corpus, n, scored, seen)",
        "evaluate.ngram_bits(corpus, n, scored)",
        OF_TRAIN,
    ),
    Mutation(
        "the rate of a slow level's own step",
        "experiments/nlx_experiments/optimizers.py",
        "curve((firing + 1) * period)",
        "curve(firing + 1)",
        "experiments/test_optimizers.py",
    ),
    Mutation(
        "the deep optimizer of a run",
        "experiments/nlx_experiments/optimizers.py",
        'if config.optimizer == "adamw":',
        "if True:",
        "experiments/test_optimizers.py",
    ),
    Mutation(
        "the clipping of a run's gradients",
        "experiments/nlx_experiments/optimizers.py",
        "optax.clip_by_global_norm(config.clip), ",
        "",
        "experiments/test_optimizers.py",
    ),
    Mutation(
        "a draw of its own for every byte that is generated",
        "experiments/nlx_experiments/generate.py",
        "jax.random.fold_in(key, i)",
        "key",
        OF_TRAIN,
    ),
    Mutation(
        "that a reader leaves half-written checkpoints alone",
        "experiments/nlx_experiments/checkpoints.py",
        "            cleanup_tmp_directories=not self.reads,\n            read_only=self.reads,\n",
        "            cleanup_tmp_directories=True,\n",
        "experiments/test_checkpoints.py",
    ),
    Mutation(
        "that a whole checkpoint of other code is refused",
        "experiments/nlx_experiments/checkpoints.py",
        "if hosts.any_of(self._is_whole(step, like)):",
        "if False:",
        "experiments/test_checkpoints.py",
    ),
    Mutation(
        "the mark of a full cache",
        "nlx/nn/attention.py",
        "jnp.where(lost[:, :, None], jnp.nan, y)",
        "y",
        "nlx/nn/test_model.py",
    ),
    Mutation(
        "the reset of a segment in the TPU kernels",
        "kernels/nlx_kernels/linear_memory/pallas_tpu.py",
        "erase, rate, kept[:, 0]",
        "erase, rate, jnp.ones_like(kept[:, 0])",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "the state before the first chunk of the TPU kernels",
        SCAN_TPU,
        "        _put(state, _get(first))\n",
        "        pass\n",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "the place of a state found once more in the TPU kernels",
        SCAN_TPU,
        "_put_at(states, n + 1, after)",
        "_put_at(states, n, after)",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "the way back through the groups in the TPU kernels",
        SCAN_TPU,
        "at = (lambda g: groups - 1 - g) if reverse",
        "at = (lambda g: g) if reverse",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "the cotangent carried from chunk to chunk in the TPU kernels",
        SCAN_TPU,
        "        _put(by_state, state)\n",
        "",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "the sign of a state's cotangent in the TPU kernels",
        SCAN_TPU,
        "        _put(by_state, state)\n",
        "        _put(by_state, jax.tree.map(jnp.negative, state))\n",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "the sum over chunks of the read-outs' gradients in the TPU kernels",
        SCAN_TPU,
        "jax.tree.map(jnp.add, _get(by_constants), constant)",
        "constant",
        OF_HOPE_TPU,
    ),
    Mutation(
        "the second clock of Hope in the TPU kernels",
        "kernels/nlx_kernels/self_modifying_memory/pallas_tpu.py",
        "marks[4:5, :1]",
        "marks[3:4, :1]",
        OF_HOPE_TPU,
    ),
    Mutation(
        "the mask of tokens past the end in the TPU kernels",
        WINDOWS_TPU,
        "there = (token >= 0) & (token < t)",
        "there = token >= 0",
        OF_MLP_TPU,
    ),
    Mutation(
        "where inside a chunk each row goes on in the TPU kernels",
        WINDOWS_TPU,
        "    token = place - at % c\n",
        "    token = place - at[:1] % c\n",
        OF_MLP_TPU,
    ),
    Mutation(
        "the ends of the longer chunk of a row that goes on in Hope's TPU kernels",
        WINDOWS_TPU,
        "((at + token + 1) % n == 0)",
        "((place + 1) % n == 0)",
        OF_HOPE_TPU,
    ),
    Mutation(
        "the weights of the chunk's start of a state in the TPU kernels",
        "kernels/nlx_kernels/mlp_memory/pallas_tpu.py",
        "state.start or state.weights",
        "state.weights",
        OF_MLP_TPU,
    ),
    Mutation(
        "the momentum that a state hands to Hope's TPU kernels",
        "kernels/nlx_kernels/self_modifying_memory/pallas_tpu.py",
        "state = _State._make(_stack(form, leaf) for leaf in begin[:3])",
        "state = _State._make(_stack(form, leaf) for leaf in begin[:3])\n"
        "        state = state._replace(momentum=jax.tree.map(jnp.zeros_like, state.momentum))",
        OF_HOPE_TPU,
    ),
    Mutation(
        "that derivatives of derivatives stay out of the TPU kernels",
        "kernels/nlx_kernels/_derivative.py",
        "result, kept = both(*arrays)",
        "result, kept = forward(*arrays)",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "that segments are an argument of the TPU kernels' derivative",
        "kernels/nlx_kernels/linear_memory/pallas_tpu.py",
        "    return run(q, k, v, retain, erase, rate, state, numbered(segment_ids, retain))\n",
        "    ids = numbered(segment_ids, retain)\n"
        "    run = differentiable(\n"
        "        lambda *a: _forward(settings, *a, ids),\n"
        "        lambda a, *rest: _backward(settings, (*a, ids), *rest)[:-1],\n"
        "        lambda *a: plain(*a, ids),\n"
        "    )\n"
        "    return run(q, k, v, retain, erase, rate, state)\n",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "what the GPU kernels' second derivative is of",
        "kernels/nlx_kernels/linear_memory/mosaic_gpu.py",
        "xla.linear_memory, call),\n    )\n    return run(q, k, v, retain, erase, rate, state, n",
        "xla.linear_memory, call._replace(read='chunk_start')),\n    )\n"
        "    return run(q, k, v, retain, erase, rate, state, n",
        "kernels/test_linear_memory_gpu.py",
    ),
    Mutation(
        "block sizes that were measured",
        "kernels/nlx_kernels/_tuned.py",
        "DEFAULT if entry is None else",
        "DEFAULT if True else",
        "kernels/test_tuned.py",
    ),
    Mutation(
        "the kind of the device that is compiled for in the choice of a block size",
        "kernels/nlx_kernels/_dispatch.py",
        "(_absent_device() or jax.devices()[0])",
        "jax.devices()[0]",
        "kernels/test_tuned.py",
    ),
    Mutation(
        "the refusal of what does not fit a TPU core",
        "kernels/nlx_kernels/_tpu.py",
        "    if size <= VMEM_LIMIT:\n",
        "    if True:\n",
        OF_LINEAR_TPU,
    ),
    Mutation(
        "that a mesh of TPUs gets their kernels",
        "kernels/nlx_kernels/_dispatch.py",
        "        return device.platform\n",
        "        return jax.default_backend()\n",
        "kernels/test_arguments.py",
    ),
    Mutation(
        "the initial state of a split sequence",
        SPLIT,
        "jnp.where(bad, 0, first), bad, own.cut)",
        "jnp.zeros_like(first), bad, own.cut)",
        OF_SPLIT,
    ),
    Mutation(
        "the order of two pieces of a split sequence",
        SPLIT,
        "_Map(through(before.carry),",
        "_Map(jnp.matmul(before.carry, own.carry),",
        OF_SPLIT,
    ),
    Mutation(
        "the rounds after the first over a split sequence",
        SPLIT,
        "    while shift < line.size:\n",
        "    while shift < 2:\n",
        OF_SPLIT,
    ),
    Mutation(
        "a segment that begins with a piece of a split sequence",
        SPLIT,
        "inside.at[:, 0].set(begins)",
        "inside.at[:, 0].set(False)",
        OF_SPLIT,
    ),
    Mutation(
        "what comes from before the first piece of a split sequence",
        SPLIT,
        "        there = self.rank >= shift\n",
        "        there = self.rank >= 0\n",
        OF_SPLIT,
    ),
    Mutation(
        "that a later piece is not finite where an earlier one is not",
        SPLIT,
        "    y = _spoilt(jnp.swapaxes(bad, 1, 2) & ~since[..., None, None], y)\n",
        "",
        OF_SPLIT,
    ),
    Mutation(
        "that slopes stay finite beyond what a segment ends",
        SPLIT,
        "_Map(jnp.where(bad[..., :1] | cut, 0, carry), jnp.where(bad, 0, made), bad, cut)",
        "_Map(jnp.where(cut, 0, carry), made, bad, cut)",
        OF_SPLIT,
    ),
    Mutation(
        "the last piece's state of a split sequence",
        SPLIT,
        "jnp.where(line.rank == size - 1, after, 0)",
        "jnp.where(line.rank == 0, after, 0)",
        OF_SPLIT,
    ),
    Mutation(
        "a split sequence's types on a mesh",
        SPLIT,
        "    first = _varying(first, q, k, v, retain, erase, rate)\n",
        "",
        OF_SPLIT,
    ),
    Mutation(
        "that each device of a mesh runs the kernels on its part",
        PLACEMENT,
        "    if math.prod(free.values()) == 1:\n",
        "    if True:\n",
        OF_SHARDED,
    ),
    Mutation(
        "the heads that a device of a mesh has",
        PLACEMENT,
        '"h": HEADS,',
        '"h": (),',
        OF_SHARDED,
    ),
    Mutation(
        "rows that a mesh does not divide",
        PLACEMENT,
        "if several and length % math.prod(sizes[n] for n in (*found, name)) == 0:",
        "if several:",
        OF_SHARDED,
    ),
    Mutation(
        "the kernels in a training step for a GPU",
        "kernels/nlx_kernels/linear_memory/api.py",
        '    "mosaic_gpu": Kernel(mosaic_gpu.linear_memory, mosaic_gpu.refusal),\n',
        "",
        OF_STEPS,
    ),
    Mutation(
        "a kernel in a CMS's training step for TPUs",
        "kernels/nlx_kernels/cms_chain/pallas_tpu.py",
        '    if axes(("tensor",), 0):\n',
        "    if True:\n",
        OF_STEPS,
    ),
    Mutation(
        "the refusal of a state without its attention",
        CHECKS,
        "if found.get(path) != own.get(path):",
        "if path in found and found[path] != own.get(path):",
        OF_CHECKS,
    ),
    Mutation(
        "the check of a mixer's state in a model",
        "nlx/nn/model.py",
        "            check_state(name, block.mixer, cache, len(x), x.dtype, capacity)\n",
        "",
        OF_CHECKS,
    ),
    Mutation(
        "the refusal of clocks that fall in context",
        STREAM,
        "        check_clocks(clocks, variants[0])\n",
        "",
        OF_CHECKS,
    ),
    Mutation(
        "the refusal of what is no write in context",
        STREAM,
        "or not all(isinstance(w, Write) for w in several)",
        "",
        OF_CHECKS,
    ),
    Mutation(
        "the limits of Titans' deep memory",
        "nlx/nn/neural_memory.py",
        "        axes = (None, *",
        "        self.clip = self.bound = None\n        axes = (None, *",
        OF_PRECISION,
    ),
    Mutation(
        "the clip of Titans' gradients",
        "nlx/nn/neural_memory.py",
        "self.clip = self.head_dim**0.5",
        "self.clip = None",
        OF_PRECISION,
    ),
    Mutation(
        "the bound of Titans' weights",
        "nlx/nn/neural_memory.py",
        "self.bound = LARGEST_WEIGHTS * max(self.sizes) ** 0.5",
        "self.bound = None",
        OF_PRECISION,
    ),
    Mutation(
        "the configuration's read in Hope",
        MIXER,
        "                read=config.read,\n",
        "",
        OF_CONFIG,
    ),
    Mutation(
        "the configuration's depth in Titans",
        MIXER,
        "        depth=config.memory_depth,\n",
        "",
        OF_CONFIG,
    ),
    Mutation(
        "the configuration's momentum in Titans",
        MIXER,
        "        persistent=config.persistent,\n        momentum=config.momentum,\n",
        "        persistent=config.persistent,\n",
        OF_CONFIG,
    ),
    Mutation(
        "the configuration's read in Titans",
        MIXER,
        "        read=config.read,\n    )\n",
        "    )\n",
        OF_CONFIG,
    ),
    Mutation(
        "the configuration's negative eigenvalues",
        MIXER,
        "negative_eigenvalues=negative, ",
        "",
        OF_CONFIG,
    ),
    Mutation(
        "float32 inside of a norm",
        "nlx/nn/norm.py",
        WIDE,
        "wide = x",
        OF_PRECISION,
    ),
    Mutation(
        "float32 inside of a gate",
        "nlx/nn/gate.py",
        WIDE,
        "wide = x",
        OF_PRECISION,
    ),
    Mutation(
        "float32 inside of a decay",
        "nlx/nn/decay.py",
        WIDE,
        "wide = x",
        OF_PRECISION,
    ),
    Mutation(
        "float32 in rotary angles",
        "nlx/nn/rotary.py",
        "wide = jnp.promote_types(jnp.float32, x.dtype)",
        "wide = x.dtype",
        OF_PRECISION,
    ),
    Mutation(
        "float32 in attention's softmax",
        "nlx/nn/attention.py",
        "    wide = jnp.promote_types(jnp.float32, dtype)\n",
        "    wide = dtype\n",
        OF_PRECISION,
    ),
    Mutation(
        "the evenness of bracket words",
        LANGUAGES,
        "up = (height + 2) * (rest - height) / (2 * rest * (height + 1))",
        "up = np.where(height == 0, 1, np.where(height == rest, 0, 0.5))",
        OF_TASKS,
    ),
    Mutation(
        "the order of a product of permutations",
        LANGUAGES,
        "after = lambda g, e: tuple(g[i] for i in e)",
        "after = lambda g, e: tuple(e[i] for i in g)",
        OF_TASKS,
    ),
    Mutation(
        "the end of a counting word",
        LANGUAGES,
        "np.minimum(1 + (place + 1) // n - 1, letters)",
        "np.minimum(1 + place // n - 1, letters)",
        OF_TASKS,
    ),
    Mutation(
        "the split of the text that is examined",
        "experiments/nlx_experiments/sequence_tasks.py",
        "test=draw(test)",
        "test=draw(train)",
        OF_TASKS,
    ),
    Mutation(
        "that a key stood before",
        RECALL,
        "seen, keys[:, :, None], 2)[:, :, 0] > 1",
        "seen, keys[:, :, None], 2)[:, :, 0] > 0",
        OF_TASKS,
    ),
    Mutation(
        "the power law of gaps",
        RECALL,
        "likely = np.arange(1, room + 1) ** (0.1 - 1)",
        "likely = np.ones(room)",
        OF_TASKS,
    ),
    Mutation(
        "the weights of the best validation",
        CONTEST,
        "kept = sequence_learner.better((state.params, value), kept)",
        "kept = state.params, value",
        OF_CONTEST,
    ),
    Mutation(
        "rows of the last examination that were seen by no one",
        CONTEST,
        "exams = {b: rows(task, plan, TESTED, b)",
        "exams = {b: rows(task, plan, VALIDATED, b)",
        OF_CONTEST,
    ),
    Mutation(
        "a rate of each training's own",
        "experiments/nlx_experiments/sequence_learner.py",
        "jax.vmap(learn, in_axes=(0, 0, 0, None))",
        "jax.vmap(lambda s, r, k, b: learn(s, jnp.float32(1e-2), k, b), in_axes=(0, 0, 0, None))",
        OF_CONTEST,
    ),
    Mutation(
        "the decoder's blindness",
        "experiments/nlx_experiments/sequence_learner.py",
        "self.model.norm(x[:, -1])",
        "self.model.norm(x[:, 0])",
        OF_CONTEST,
    ),
    Mutation(
        "attention without positions",
        "nlx/nn/rotary.py",
        "    if theta is None:\n        return x\n",
        "    theta = 10_000.0 if theta is None else theta\n",
        "nlx/nn/test_mixers.py",
    ),
    Mutation(
        "that a segment in the last piece ends what was spoilt",
        SPLIT,
        "_spoilt(bad & ~own.cut, after)",
        "_spoilt(bad, after)",
        OF_SPLIT,
    ),
    Mutation(
        "the mark of an initial state that is not finite",
        SPLIT,
        "jnp.where(bad, 0, first), bad, own.cut)",
        "jnp.where(bad, 0, first), bad & False, own.cut)",
        OF_SPLIT,
    ),
    Mutation(
        "XLA where shard_map checks what varies",
        "kernels/nlx_kernels/_dispatch.py",
        "why = _checked_by_shard_map(arguments)",
        "why = None",
        OF_SPLIT,
    ),
    Mutation(
        "positions that float32 does not hold",
        "kernels/nlx_kernels/mlp_memory/pallas_tpu.py",
        "(state.position % form.chunk_size)",
        "(state.position)",
        OF_MLP_TPU,
    ),
    Mutation(
        "the sum of the slopes of a key over the parts of its values",
        "kernels/nlx_kernels/linear_memory/mosaic_gpu.py",
        "total = lambda parts: sum(x.astype(jnp.float32) for x in parts)",
        "total = lambda parts: parts[0].astype(jnp.float32)",
        "kernels/test_linear_memory_gpu.py",
    ),
    Mutation(
        "the checks of what blocks are given",
        "nlx/nn/model.py",
        "        self._check(x, state, segment_ids)\n",
        "",
        "nlx/nn/test_model.py",
    ),
    Mutation(
        "that held-out bins choose no weights",
        f"{EXPERIMENTS}/sequence_contest.py",
        "for b in plan.bins if b not in task.examined}",
        "for b in plan.bins}",
        OF_LEVELS,
    ),
    Mutation(
        "the gradients through a row's writes in the levels experiment",
        f"{EXPERIMENTS}/sequence_levels.py",
        "chunk_size=size, window=window)",
        "chunk_size=size, window=1)",
        OF_LEVELS,
    ),
    Mutation(
        "the clocks of blocks that learn in the context of a task",
        f"{EXPERIMENTS}/sequence_levels.py",
        "[Clock(period) for period in config.periods]",
        "[Clock(1) for period in config.periods]",
        OF_LEVELS,
    ),
    Mutation(
        "the moving of answers in the control",
        f"{EXPERIMENTS}/sequence_tasks.py",
        "generator.permutation(answers[scored])",
        "answers[scored]",
        OF_REASONING,
    ),
    Mutation(
        "the third validation before a cell ends",
        f"{EXPERIMENTS}/sequence_contest.py",
        "_by_rate(perfect > 2, plan)",
        "_by_rate(perfect > 1, plan)",
        OF_CONTEST,
    ),
    Mutation(
        "that all seeds of a rate are right before a cell ends",
        f"{EXPERIMENTS}/sequence_contest.py",
        ".all(1).any()",
        ".any(1).any()",
        OF_CONTEST,
    ),
    Mutation(
        "that a loss which is not finite is worth nothing",
        f"{EXPERIMENTS}/sequence_contest.py",
        "return np.where(np.isfinite(loss), value, WORTHLESS)",
        "return value",
        OF_CONTEST,
    ),
    Mutation(
        "the shorter rows to choose by",
        f"{EXPERIMENTS}/sequence_contest.py",
        "lengths = plan.chosen.get(name, lengths)",
        "pass",
        OF_CONTEST,
    ),
    Mutation(
        "the rows of a task in what decides a cell",
        f"{EXPERIMENTS}/sequence_experiment.py",
        "fields += contest.digest(row.task, row.plan)",
        "pass",
        OF_TABLES,
    ),
    Mutation(
        "the decoder among a model's parameters",
        f"{EXPERIMENTS}/sequence_learner.py",
        "SequenceModel(config, decoded, rngs=nnx.Rngs(0))\n    return nn",
        "SequenceModel(config, 0, rngs=nnx.Rngs(0))\n    return nn",
        OF_CONTEST,
    ),
    Mutation(
        "that a state is counted once",
        f"{EXPERIMENTS}/recall.py",
        'return ".chunk_start" not in path and ',
        "return ",
        "experiments/test_recall.py",
    ),
    Mutation(
        "that held-out functions are in no class trained on",
        f"{EXPERIMENTS}/function_tasks.py",
        'None if name == "xor" else True, names)',
        "None)",
        OF_REASONING,
    ),
    Mutation(
        "that all xors are examined",
        f"{EXPERIMENTS}/function_tasks.py",
        'None if name == "xor" else True',
        "True",
        OF_REASONING,
    ),
    Mutation(
        "what is examined, from Bayes' prior",
        f"{EXPERIMENTS}/function_tasks.py",
        "count, bits, outside=outside) for name in names",
        "count, bits) for name in names",
        OF_REASONING,
    ),
    Mutation(
        "Student's t in the ablation's verdicts",
        f"{EXPERIMENTS}/ablation.py",
        "stats.t.ppf(0.975, seeds - 1)",
        "2",
        "experiments/test_ablation.py",
    ),
    Mutation(
        "that a run tells which cells it leaves out",
        f"{EXPERIMENTS}/sequence_experiment.py",
        "before.keys() - records(results).keys()",
        "set()",
        OF_TABLES,
    ),
    Mutation(
        "the mean of trainings that tie",
        f"{EXPERIMENTS}/sequence_table.py",
        "for value, seed, found in trainings if value == most]",
        "for value, seed, found in trainings if value == most][:1]",
        OF_TABLES,
    ),
    Mutation(
        "that a training must be right in all bins to have solved a task",
        f"{EXPERIMENTS}/sequence_table.py",
        "min(shares) == 1\n        for record",
        "max(shares) == 1\n        for record",
        OF_TABLES,
    ),
    Mutation(
        "the rows of a table that are not run",
        f"{EXPERIMENTS}/sequence_experiment.py",
        "rows if table is None else table)",
        "rows)",
        OF_TABLES,
    ),
    Mutation(
        "memories that stand still, in the bytes of a state",
        f"{EXPERIMENTS}/recall.py",
        '(".weights" not in path or not path & still)',
        "True",
        "experiments/test_recall.py",
    ),
    Mutation(
        "the streams' convolutions in the bytes of a state",
        f"{EXPERIMENTS}/recall.py",
        '(".weights" not in path or not path & still)',
        "not path & still",
        "experiments/test_recall.py",
    ),
    Mutation(
        "the sign of the paper's accuracy in the ablation",
        f"{EXPERIMENTS}/ablation.py",
        'PAPER["Hope"][1] - accuracy',
        'accuracy - PAPER["Hope"][1]',
        "experiments/test_ablation.py",
    ),
    Mutation(
        "cells after a damaged line",
        f"{EXPERIMENTS}/runs.py",
        "                if not past_damage:\n                    break",
        "                break",
        "experiments/test_compare_optimizers.py",
    ),
    Mutation(
        "the shuffled answers of the control",
        f"{EXPERIMENTS}/sequence_experiment.py",
        "task=shuffled(row.task)",
        "task=row.task",
        OF_TABLES,
    ),
    Mutation(
        "that training leaves functions out",
        f"{EXPERIMENTS}/function_tasks.py",
        "drawing(names, False)",
        "drawing(names, None)",
        OF_REASONING,
    ),
    Mutation(
        "the drawing anew of nearly constant functions",
        f"{EXPERIMENTS}/function_tasks.py",
        "(ones < LEAST) | (ones > 1 - LEAST)",
        "ones < 0",
        OF_REASONING,
    ),
    Mutation(
        "from where a thing came",
        f"{EXPERIMENTS}/facts_tasks.py",
        "self.came[carried, thing, to] = self.lies[carried, thing]",
        "self.came[carried, thing, to] = to",
        OF_REASONING,
    ),
    Mutation(
        "that a thing is taken where it lies",
        f"{EXPERIMENTS}/facts_tasks.py",
        "takes = here & ",
        "takes = ",
        OF_REASONING,
    ),
    Mutation(
        "the depth of a needle in its haystack",
        f"{EXPERIMENTS}/needle_tasks.py",
        "depths[:, 0] = depth",
        "pass",
        "experiments/test_needle.py",
    ),
    Mutation(
        "that other needles have other keys",
        f"{EXPERIMENTS}/needle_tasks.py",
        "        if not clash.any():\n            break",
        "        break",
        "experiments/test_needle.py",
    ),
    Mutation(
        "that the keys of a row are different",
        f"{EXPERIMENTS}/needle_tasks.py",
        "        if not again.any():\n            return drawn",
        "        return drawn",
        "experiments/test_needle.py",
    ),
    Mutation(
        "the order in which the values of a key stand",
        f"{EXPERIMENTS}/needle_tasks.py",
        "return told[whose == key[:, None]].reshape(rows, values, size)",
        "return told[whose == key[:, None]].reshape(rows, values, size)[:, ::-1]",
        "experiments/test_needle.py",
    ),
    Mutation(
        "that a needle stands before a line",
        f"{EXPERIMENTS}/needle_writing.py",
        'hay == ord("\\n")',
        "hay == hay",
        "experiments/test_needle.py",
    ),
    Mutation(
        "that all symbols of a value must be right",
        f"{EXPERIMENTS}/needle_tasks.py",
        "-1, size).all(-1)",
        "-1, size).any(-1)",
        "experiments/test_needle.py",
    ),
    Mutation(
        "the state from one piece of a row to the next",
        f"{EXPERIMENTS}/sequence_reading.py",
        "right, loss, state = go(",
        "right, loss, _ = go(",
        "experiments/test_needle.py",
    ),
    Mutation(
        "the end of a row among the examined ones",
        f"{EXPERIMENTS}/needle.py",
        "read(model, weights, cut(whole, piece)",
        "read(model, weights, [next(cut(whole, piece))]",
        "experiments/test_needle.py",
    ),
    Mutation(
        "the text behind a sentence of a scattered story",
        f"{EXPERIMENTS}/scattered_tasks.py",
        "place - SENTENCE * before",
        "place",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that sentences of a story stand anywhere",
        f"{EXPERIMENTS}/scattered_tasks.py",
        "most)) * (room + 1)",
        "most)) * (room + 1) / 2",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that BABILong asks at the end alone",
        f"{EXPERIMENTS}/scattered_tasks.py",
        "test=row_by_row(drawing(test, 0.0))",
        "test=row_by_row(drawing(test, ASKED))",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that a story has a number of facts of its own",
        f"{EXPERIMENTS}/scattered_tasks.py",
        "SENTENCE * (fewest + 1), SENTENCE",
        "SENTENCE * (most + 1), SENTENCE",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that every length is examined on stories of its own",
        f"{EXPERIMENTS}/babilong.py",
        "default_rng((supporting, length))",
        "default_rng(supporting)",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "the bytes that a stream carries on",
        f"{EXPERIMENTS}/sequence_reading.py",
        "right, loss, carried)",
        "right, loss)",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that a stream has room for a piece alone",
        f"{EXPERIMENTS}/babilong.py",
        "given, capacity=piece",
        "given, capacity=streamed",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that longer rows are read by the first seed",
        f"{EXPERIMENTS}/babilong.py",
        "weights if length <= BY_ALL else one",
        "weights",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that chance is of a length's own rows",
        f"{EXPERIMENTS}/babilong_table.py",
        'some[n]["lines"][n][name]',
        'some[n]["lines"][lengths[0]][name]',
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that a value once said is not guessed again",
        f"{EXPERIMENTS}/needle_tasks.py",
        "1 / (needles - said)",
        "1 / needles",
        "experiments/test_needle.py",
    ),
    Mutation(
        "the larger memory of Titans' second variant",
        f"{EXPERIMENTS}/needle.py",
        "4 * sizes[",
        "1 * sizes[",
        "experiments/test_needle.py",
    ),
    Mutation(
        "that perplexity is compared beyond the length trained on",
        f"{EXPERIMENTS}/context.py",
        " * (ends > trained)",
        "",
        "experiments/test_context.py",
    ),
    Mutation(
        "that controls are judged by how many answers they gave",
        f"{EXPERIMENTS}/sequence_table.py",
        'task.get("scored", dict',
        'task.get("rows", dict',
        OF_TABLES,
    ),
    Mutation(
        "that fewer bits per byte are ahead",
        f"{EXPERIMENTS}/language_table.py",
        ", less=True)",
        ")",
        OF_LANGUAGE,
    ),
    Mutation(
        "the quantile of Student's t",
        f"{EXPERIMENTS}/paired.py",
        "stats.t.ppf(SURE, self.freedom)",
        "1.96",
        "experiments/test_paired.py",
    ),
    Mutation(
        "the error of rows where seeds agree",
        f"{EXPERIMENTS}/paired.py",
        "for x in of_rows]",
        "for x in of_rows[:0]]",
        "experiments/test_paired.py",
    ),
    Mutation(
        "that drills ask more than once",
        f"{EXPERIMENTS}/needle_mixture.py",
        "max(1, int(QUESTIONS * left) // question)",
        "1",
        "experiments/test_needle.py",
    ),
    Mutation(
        "that rows of an examination have lengths of their own",
        f"{EXPERIMENTS}/sequence_tasks.py",
        "joined([draw(generator, 1, shortest, longest) for _ in range(rows)])",
        "draw(generator, rows, shortest, longest)",
        "experiments/test_needle.py",
    ),
    Mutation(
        "that scores which are not finite are not right",
        f"{EXPERIMENTS}/sequence_reading.py",
        " & jnp.isfinite(loss)",
        "",
        "experiments/test_needle.py",
    ),
    Mutation(
        "how far attention is examined",
        f"{EXPERIMENTS}/babilong.py",
        "if n <= limit)",
        "if True)",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "that memory is noted anew at every mark",
        f"{EXPERIMENTS}/babilong.py",
        "done >= due[0]",
        "done >= due[-1]",
        "experiments/test_babilong.py",
    ),
    Mutation(
        "the stretches of positions that perplexity is told of",
        f"{EXPERIMENTS}/context.py",
        "zip([0, *ends[:-1]], ends, strict=True)",
        "zip([0] * len(ends), ends, strict=True)",
        "experiments/test_context.py",
    ),
    Mutation(
        "that months to report on are no months to train on",
        f"{EXPERIMENTS}/forecasting_tasks.py",
        "begin = max(first - context, 0)",
        "begin = 0",
        "experiments/test_forecasting.py",
    ),
    Mutation(
        "that a series is standardised by what is trained on",
        f"{EXPERIMENTS}/forecasting_tasks.py",
        "known = series[:, : ends[1]]",
        "known = series",
        "experiments/test_forecasting.py",
    ),
    Mutation(
        "the ridge that is chosen on validation windows",
        f"{EXPERIMENTS}/forecasting_tasks.py",
        "if missed < lowest:",
        "if ridge == RIDGES[-1]:",
        "experiments/test_forecasting.py",
    ),
    Mutation(
        "the exam of the best rate",
        f"{EXPERIMENTS}/sequence_contest.py",
        "seeds = slice(chosen * plan.seeds, (chosen + 1) * plan.seeds)",
        "seeds = slice(0, plan.seeds)",
        OF_CONTEST,
    ),
    Mutation(
        "an exam in what decides a cell",
        f"{EXPERIMENTS}/sequence_experiment.py",
        'fields += "" if row.exam is None else row.exam.what',
        "pass",
        OF_TABLES,
    ),
    Mutation(
        "what blocks do not keep for the backward pass",
        "nlx/nn/model.py",
        "        if self.config.remat:\n",
        "        if False:\n",
        "nlx/nn/test_model.py",
    ),
    Mutation(
        "the length of a choice in acc_norm",
        CHOICES,
        "by = (np.ones(len(sums)), np.maximum(lengths, 1),",
        "by = (np.ones(len(sums)), np.ones(len(sums)),",
        OF_FORMATS,
    ),
    Mutation(
        "that the space before a choice is not part of its length",
        CHOICES,
        "lengths = [len(choice) for choice in one.choices]",
        "lengths = [len(choice) + 1 for choice in one.choices]",
        OF_FORMATS,
    ),
    Mutation(
        "the context of a choice",
        CHOICES,
        "before = np.concatenate([[tokenizer.separator], whole[:count]])",
        "before = np.array([tokenizer.separator])",
        OF_CHOICES,
    ),
    Mutation(
        "that white space at a context's end is scored",
        CHOICES,
        "continuation, context = context[len(kept) :] + continuation, kept",
        "continuation = continuation",
        OF_CHOICES,
    ),
    Mutation(
        "that greedy means every token",
        CHOICES,
        "bool((best == wanted).all())",
        "bool((best == wanted).any())",
        OF_FORMATS,
    ),
    Mutation(
        "that tokens beyond the tokenizer are no rivals",
        CHOICES,
        "best = np.argmax(scores[place, at, :size], axis=-1)",
        "best = np.argmax(scores[place, at], axis=-1)",
        OF_CHOICES,
    ),
    Mutation(
        "the end of a long text rather than its beginning",
        CHOICES,
        "[-longest - 1 :]",
        "[: longest + 1]",
        OF_CHOICES,
    ),
    Mutation(
        "WinoGrande's partial evaluation",
        FORMATS,
        'contexts = (before + record["option1"], before + record["option2"])',
        'contexts = (before + record["option1"], before + record["option1"])',
        OF_FORMATS,
    ),
    Mutation(
        "that SocialIQA's labels begin at 1",
        FORMATS,
        'int(record["label"]) - 1',
        'int(record["label"]) % 3',
        OF_FORMATS,
    ),
    Mutation(
        "that a label file goes with its lines",
        FORMATS,
        "beside.read_text().split()",
        "beside.read_text().split()[::-1]",
        OF_FORMATS,
    ),
    Mutation(
        "the bytes of a token in bits per byte",
        LOOP,
        "evaluate.bits_per_byte(bits, scored.size)",
        "evaluate.bits_per_byte(bits, bits.size)",
        OF_TOKENS,
    ),
    Mutation(
        "the words in word perplexity",
        LOOP,
        "evaluate.word_perplexity(bits, words)",
        "evaluate.word_perplexity(bits, bits.size)",
        OF_TOKENS,
    ),
    Mutation(
        "that a word is counted where it begins",
        "experiments/nlx_experiments/evaluate.py",
        "np.concatenate([[True], space[:-1]])",
        "np.concatenate([space[1:], [True]])",
        OF_TOKENS,
    ),
    Mutation(
        "the bytes of a token in a run's metrics",
        RECORD,
        "loss / math.log(2) / self.bytes_a_token",
        "loss / math.log(2)",
        OF_TOKENS,
    ),
    Mutation(
        "that a run keeps its tokenizer",
        LOOP,
        'if before is not None and before.get("tokenizer") != tokenizer.sha256:',
        "if False:",
        OF_TOKENS,
    ),
    Mutation(
        "what a run from before there were tokenizers stands for",
        LOOP,
        'new={"tokenizer": "bytes"}',
        "new=None",
        OF_TOKENS,
    ),
    Mutation(
        "bytes that are no UTF-8",
        TOKENS,
        "numbers.append(alone[ord(part) - 0xDC00])",
        "pass",
        OF_TOKENS,
    ),
    Mutation(
        "that a text spelling a special token is text",
        TOKENS,
        "made.encode_special_tokens = True",
        "made.encode_special_tokens = False",
        OF_TOKENS,
    ),
    Mutation(
        "that tokens beyond the tokenizer are never drawn",
        "experiments/nlx_experiments/generate.py",
        "known = logits[: tokenizer.size]",
        "known = logits",
        OF_TOKENS,
    ),
    Mutation(
        "that the last window of a long text is full",
        HARNESS,
        "whole[max(0, stop - longest) : start + 1]",
        "whole[start : start + 1]",
        OF_HARNESS,
    ),
    Mutation(
        "that what ends a continuation is left out",
        HARNESS,
        "return written[: min(ends, default=len(written))]",
        "return written",
        OF_HARNESS,
    ),
    Mutation(
        "that the pilot's loss decides the rate",
        LANGUAGE,
        "rate = min(rates, key=lambda r: numbers.get(r, math.inf))",
        "rate = rates[0]",
        OF_LANGUAGE,
    ),
    Mutation(
        "that a pilot's seed counts for nothing else",
        LANGUAGE,
        "SEEDS, PILOT = (0, 1, 2), 1000",
        "SEEDS, PILOT = (0, 1, 2), 0",
        OF_LANGUAGE,
    ),
    Mutation(
        "that a text is seen once",
        LANGUAGE,
        "max(2, min(once, ",
        "max(2, max(1, ",
        OF_LANGUAGE,
    ),
    Mutation(
        "that a pilot may diverge",
        LANGUAGE,
        "if chosen.seed != PILOT:",
        "if True:",
        OF_LANGUAGE,
    ),
    Mutation(
        "that an experiment's folder is no text",
        "experiments/nlx_experiments/data.py",
        ' or there(".lock", "environment.json")',
        "",
        OF_LANGUAGE,
    ),
    Mutation(
        "that a tokenizer keeps every byte",
        TOKENS,
        'if (back := known.decode(encode(PROBE)).decode(errors="replace")) != PROBE:',
        "if not (back := PROBE):",
        OF_TOKENS,
    ),
    Mutation(
        "that a score that is no number is never the best",
        CHOICES,
        "nan=-math.inf)",
        "nan=0.0)",
        OF_CHOICES,
    ),
    Mutation(
        "that a stem may hold letters in brackets",
        FORMATS,
        'question.rpartition(f"({first})")',
        'question.partition(f"({first})")',
        OF_FORMATS,
    ),
    Mutation(
        "that forgetting counts from the best, not from the first",
        f"{CONTINUAL}_metrics.py",
        "matrix[j:-1, j].max() - matrix[-1, j]",
        "matrix[j, j] - matrix[-1, j]",
        OF_METRICS,
    ),
    Mutation(
        "what an untrained model knows, from forward transfer",
        f"{CONTINUAL}_metrics.py",
        "_mean(above - before[1:])",
        "_mean(above)",
        OF_METRICS,
    ),
    Mutation(
        "the age of keys in a level's least squares",
        f"{CONTINUAL}_write.py",
        "(1 - 1 / horizon) * held.gram + pair.gram",
        "held.gram + pair.gram",
        OF_CONTINUAL,
    ),
    Mutation(
        "the clocks of Hope's levels in continual learning",
        f"{CONTINUAL}_rules.py",
        "clock=clocks[name],",
        "clock=Clock(clocks[name].period and 1),",
        OF_CONTINUAL,
    ),
    Mutation(
        "that what belongs to no level stands still",
        f"{CONTINUAL}_rules.py",
        ' | {"outer": Clock(None)}',
        "",
        OF_CONTINUAL,
    ),
    Mutation(
        "that only the last layer's values are written",
        f"{CONTINUAL}_rules.py",
        "there = layer == last and",
        "there =",
        OF_CONTINUAL,
    ),
    Mutation(
        "the keys that a level's least squares remembers",
        f"{CONTINUAL}_rules.py",
        "gram = k.T @ k / jnp.maximum(read, 1)",
        "gram = jnp.eye(k.shape[1])",
        OF_CONTINUAL,
    ),
    Mutation(
        "the answers of examples in a prompt",
        f"{CONTINUAL}_prompt.py",
        "held[n] + ends[known.labels[n]]",
        "held[n] + ends[0]",
        OF_CONTINUAL,
    ),
    Mutation(
        "the one setting of all levels",
        f"{CONTINUAL}.py",
        "method = CHOSEN_AS.get(method, method)",
        "",
        "experiments/test_continual_run.py",
    ),
    Mutation(
        "half of what fine-tuning forgets, in the verdict",
        f"{CONTINUAL}_table.py",
        "(lost <= plain / 2,",
        "(lost <= plain,",
        "experiments/test_continual_run.py",
    ),
    Mutation(
        "what EWC ends at, in the verdict",
        f"{CONTINUAL}_table.py",
        'max(mean(FT, "final"), mean(EWC, "final"))',
        'mean(FT, "final")',
        "experiments/test_continual_run.py",
    ),
    Mutation(
        "that levels on one clock are on one",
        f"{CONTINUAL}_methods.py",
        'if "one clock" in method.learns else PERIODS',
        'if "no clock" in method.learns else PERIODS',
        OF_CONTINUAL,
    ),
    Mutation(
        "that values by Adam have no taps",
        f"{CONTINUAL}_rules.py",
        'taps=held == "values")',
        "taps=True)",
        OF_CONTINUAL,
    ),
    Mutation(
        "Gram matrices from the bytes that levels carry",
        f"{CONTINUAL}_rules.py",
        "for x in jax.tree.leaves(memories))",
        "for x in jax.tree.leaves(memories) if len(set(x.shape)) != 1)",
        OF_CONTINUAL,
    ),
    Mutation(
        "where EWC's penalties pull to",
        f"{CONTINUAL}_rules.py",
        "jnp.sum(0.5 * f * p * p - a * p)",
        "jnp.sum(0.5 * f * p * p)",
        OF_CONTINUAL,
    ),
    Mutation(
        "that Fisher's answers are drawn from the model, a key a row",
        f"{CONTINUAL}_rules.py",
        "total, squared(row._replace(seen=batch.seen), key))",
        "total, squared(row._replace(seen=batch.seen), keys[0]))",
        OF_CONTINUAL,
    ),
    Mutation(
        "half of replay's batch",
        f"{CONTINUAL}_learner.py",
        "half = len(rows) // 2",
        "half = len(rows)",
        OF_CONTINUAL,
    ),
    Mutation(
        "that an examination is among classes seen",
        f"{CONTINUAL}_learner.py",
        "seen = self.seen.copy()",
        "seen = np.ones_like(self.seen)",
        OF_CONTINUAL,
    ),
    Mutation(
        "that translations alone are scored",
        f"{CONTINUAL}_language.py",
        "[len((a + ARROW).encode()) for a, _ in pairs]",
        "()",
        OF_STREAMS,
    ),
    Mutation(
        "that a text is trained on or tested on, by its hash",
        f"{CONTINUAL}_tasks.py",
        'splits["train"][label] = texts[second:]',
        'splits["train"][label] = texts',
        OF_STREAMS,
    ),
    Mutation(
        "that Banking77's test rows are never trained on",
        f"{CONTINUAL}_tasks.py",
        "[text for text in texts if text not in asked]",
        "list(texts)",
        OF_STREAMS,
    ),
    Mutation(
        "the order of pixels of a permuted task",
        f"{CONTINUAL}_digits.py",
        "generator.permutation(64) if n else np.arange(64)",
        "np.arange(64)",
        OF_STREAMS,
    ),
    Mutation(
        "rows apart in the parts of a batch",
        STEP,
        "jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)",
        "x.reshape(count, x.shape[0] // count, *x.shape[1:])",
        OF_STEP,
    ),
    Mutation(
        "what the parts of a batch count",
        STEP,
        "jnp.float32(1) if weigh is None else weigh(params, some)",
        "jnp.float32(1)",
        OF_STEP,
    ),
    Mutation(
        "that few steps tell no spike",
        STEP,
        "return enough & (norm >",
        "return (norm >",
        OF_STEP,
    ),
    Mutation(
        "that a spike does not count as usual",
        STEP,
        "recent = jnp.where(taken, newest, state.recent)",
        "recent = newest",
        OF_STEP,
    ),
    Mutation(
        "that checkpoints are read back",
        CHECKPOINTS,
        "self._guarded(step, lambda: hosts.by_first(lambda: self._read_back(step)))",
        "pass",
        OF_CHECKPOINTS,
    ),
    Mutation(
        "checkpoints that stay for ever",
        CHECKPOINTS,
        "if self.keep_every is None or old % self.keep_every:",
        "if True:",
        OF_CHECKPOINTS,
    ),
    Mutation(
        "the place of an entry in its checksum",
        "experiments/nlx_experiments/checksums.py",
        "weight = (place * u32(2) + u32(1)) * u32(FACTOR + 2 * n)",
        "weight = u32(FACTOR + 2 * n)",
        "experiments/test_checksums.py",
    ),
    Mutation(
        "which rows a process reads",
        "experiments/nlx_experiments/data.py",
        "self.windows[int(index) * self.batch + row]",
        "self.windows[int(index) * self.batch]",
        "experiments/test_hosts.py",
    ),
    Mutation(
        "the turns of a loop in what is sent",
        "experiments/nlx_experiments/collectives.py",
        "often * turns if loop else often",
        "often",
        "experiments/test_collectives.py",
    ),
    Mutation(
        "the turns of a loop in what is counted",
        "nlx/inspect/flops.py",
        'return given["length"] * inner',
        "return inner",
        "nlx/inspect/test_flops.py",
    ),
    Mutation(
        "weights to begin with",
        LEARNER,
        "        if config.init_from is None:\n",
        "        if True:\n",
        "experiments/test_export.py",
    ),
    Mutation(
        "that time that is over stops a run",
        "experiments/nlx_experiments/console.py",
        " or time.monotonic() > self.end",
        "",
        OF_TRAIN,
    ),
    Mutation(
        "that a probe looks every so many steps",
        LOOP,
        "done % config.probe_every == 0",
        "True",
        "experiments/test_record.py",
    ),
)


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails on the edited copy, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for part in ("nlx", "kernels", "experiments", "tests", "pyproject.toml", "README.md"):
            source = ROOT / part
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "runs")
                shutil.copytree(source, copy / part, ignore=ignore)
            else:
                shutil.copy(source, copy / part)
        edited = copy / mutation.file
        text = edited.read_text()
        if mutation.old not in text:
            raise SystemExit(f"{mutation.file} no longer holds {mutation.old!r}.")
        edited.write_text(text.replace(mutation.old, mutation.new, 1))
        paths = (copy, copy / "kernels", copy / "experiments")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider",
             f"tests/{mutation.tests}"],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
            capture_output=True,
            text=True,
        )  # fmt: skip
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return found.group(1) if found else None


def main() -> None:
    """Runs all mutations, or those that are asked for, and writes the table."""
    path, words = ROOT / "tests" / "mutations.md", sys.argv[1:]
    lines = path.read_text().splitlines() if path.exists() else []
    known = {line.split(" | ")[0]: line for line in lines}
    rows, missed = [], 0
    for mutation in MUTATIONS:
        row = f"| {mutation.removes}"
        if words and row in known and not any(word in mutation.removes for word in words):
            rows.append(known[row])
            continue
        test = caught_by(mutation)
        missed += test is None
        rows.append(f"{row} | `{mutation.file}` | {test or '**no test**'} |")
        print(rows[-1], flush=True)
    table = "\n".join(["| removed | where | caught by |", "|---|---|---|", *rows])
    path.write_text(
        "# Mutations\n\nEdits that remove a feature, and the first test that failed. Written by "
        f"`python tests/mutations.py`, which holds the edits.\n\n{table}\n"
    )
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
