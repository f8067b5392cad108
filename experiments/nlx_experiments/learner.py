# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the pure functions of its training: start, step, score."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Integer, PyTree

from nlx import inspect, nn, optim, parallel, train
from nlx.train import TrainState
from nlx_experiments import hosts, optimizers, weights
from nlx_experiments.checkpoints import Checkpoints
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import say
from nlx_experiments.errors import Refused, as_sentence

Measured = dict[str, Float[Array, ""]]
Batch = Mapping[str, Integer[Array, "b t+1"]]


class Learner(NamedTuple):
    """The functions of one training, pure; nothing is compiled before it is first called.

    init() -> state: weights drawn from the seed, or those of `init_from`, and the optimizer's
        memories of nothing.
    step(state, start, batch) -> (state, measured): one update; `start` are the initial weights;
        a batch has "tokens" [b, t + 1] and, if rows are packed, "segment_ids"; measured are the
        metrics of `nlx.train.make_train_step` and "moved/<level>"; the state is donated.
    bits(params, tokens [b, t + 1], segment_ids) -> [b, t]: what each token but the first costs;
        segment_ids as a batch has them, or None.
    rows: those of every batch that this process must be given; None: all, in one process.
    whole(value): a number, or a tree of them, as all devices hold it.
    """

    init: Callable[[], TrainState]
    step: Callable[[TrainState, PyTree, Batch], tuple[TrainState, Measured]]
    bits: Callable[..., Float[Array, "b t"]]
    parameters: int
    rows: tuple[int, ...] | None
    whole: Callable[[Any], Any]


def mesh_of(config: TrainConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of all devices, or of these; None for one alone.

    Raises Refused where it cannot be made, or does not divide what it would split.
    """
    with as_sentence():
        mesh = parallel.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
        rows = config.batch // config.accumulate
        parallel.check_sizes(mesh, batch=rows, length=config.length, heads=config.model.heads)
    return mesh if mesh.size > 1 else None


def build(config: TrainConfig) -> nn.LanguageModel:
    """The model, its weights drawn from the seed."""
    with as_sentence():
        return nn.LanguageModel(config.model, rngs=nnx.Rngs(config.seed))


def abstract(config: TrainConfig) -> nn.LanguageModel:
    """The model with shapes in place of its weights."""
    return nnx.eval_shape(lambda: build(config))


def levels(config: TrainConfig) -> str:
    """The model's levels as a table."""
    return inspect.table(inspect.levels(abstract(config)))


class Parts(NamedTuple):
    """The functions of `Learner` as they are compiled, and where their arrays live on a mesh."""

    init: Callable[[], TrainState]
    step: Callable[[TrainState, PyTree, Batch], tuple[TrainState, Measured]]
    bits: Callable[..., Float[Array, "b t"]]
    loss: train.Loss
    placed: TrainState | None  # of shardings; None: one device
    rows: NamedSharding | None  # of tokens
    whole: NamedSharding | None  # of all else


def make(config: TrainConfig) -> Learner:
    """The functions of `nlx train` for a configuration, on all devices."""
    mesh, shapes = mesh_of(config), abstract(config)
    made = parts(config, shapes, mesh)

    def place(numbers: Any) -> Any:
        if made.rows is None:
            return numbers
        numbers = np.asarray(numbers)
        return jax.make_array_from_callback(numbers.shape, made.rows, lambda part: numbers[part])

    begin = jax.jit(made.init, out_shardings=made.placed)
    learned = None if mesh is None else (made.placed, made.whole)
    learn = jax.jit(made.step, donate_argnums=0, out_shardings=learned)
    score = jax.jit(made.bits, out_shardings=made.whole)

    def on_mesh(run: Callable) -> Callable:
        def call(*given: Any) -> Any:
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                return run(*given)

        return call

    def first() -> TrainState:
        # Committed to their device, as what is restored is: a step is compiled for either kind.
        state = begin() if mesh else jax.device_put(begin(), jax.devices()[0])
        if config.init_from is None:
            return state
        place = lambda array, leaf: jax.make_array_from_callback(
            array.shape, leaf.sharding, lambda part: array[part]
        )
        return state._replace(params=weights.read(config.init_from, state.params, place))

    return Learner(
        on_mesh(first),
        on_mesh(lambda state, start, batch: learn(state, start, jax.tree.map(place, batch))),
        on_mesh(lambda params, *rows: score(params, *jax.tree.map(place, rows))),
        nn.parameter_count(shapes),
        _own_rows(config, made.rows),
        lambda value: jax.device_put(value, made.whole or jax.devices()[0]),
    )


def _own_rows(config: TrainConfig, sharding: NamedSharding | None) -> tuple[int, ...] | None:
    """Rows of a batch that lie on this process's devices; None: it is the only process."""
    if sharding is None or hosts.count() == 1:
        return None
    shape = (config.batch, config.length + 1)
    parts = sharding.addressable_devices_indices_map(shape).values()
    held = [range(config.batch)[part[0]] for part in parts if part is not None]
    return tuple(sorted({row for rows in held for row in rows}))


def parts(config: TrainConfig, shapes: nn.LanguageModel, mesh: Mesh | None) -> Parts:
    """What a training is made of. shapes: see `abstract`. mesh: None for one device."""
    labels, clocks = nn.labels_by_level(shapes), nn.clocks_by_level(shapes)
    rule = optimizers.make(config, labels, clocks, nn.restarts_by_level(shapes))
    graph = nnx.graphdef(shapes)
    loss = train.language_model_loss(graph)
    advance = train.make_train_step(
        loss,
        rule,
        labels,
        accumulate=config.accumulate,
        weigh=train.scored,
        spike=config.spike,
    )

    def init() -> TrainState:
        return train.init_train_state(nnx.split(build(config))[1], rule)

    def step(state: TrainState, start: PyTree[Array], batch: Batch) -> tuple[TrainState, Measured]:
        state, metrics = advance(state, batch)
        return state, metrics | _distances(state.params, start, labels)

    def bits(
        params: PyTree[Array],
        tokens: Integer[Array, "b t+1"],
        segment_ids: Integer[Array, "b t+1"] | None = None,
    ) -> Float[Array, "b t"]:
        read = None if segment_ids is None else segment_ids[:, :-1]
        logits, _ = nnx.merge(graph, params)(tokens[:, :-1], segment_ids=read)
        wanted = tokens[:, 1:, None].astype(jnp.int32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted, -1)
        return -chosen[..., 0] / math.log(2)

    if mesh is None:
        return Parts(init, step, bits, loss, None, None, None)
    whole = NamedSharding(mesh, PartitionSpec())
    placed = shardings(shapes, rule, mesh)
    return Parts(init, step, bits, loss, placed, parallel.batch_sharding(mesh), whole)


def shardings(
    model: nn.LanguageModel, rule: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where every array of the state of a training lives. model: made, or shapes alone."""
    whole = NamedSharding(mesh, PartitionSpec())
    with as_sentence():
        params = parallel.parameter_shardings(model, mesh)
    memories = optim.state_sharding(rule, params, nnx.state(model, nnx.Param))
    return TrainState._make((whole, params, memories, whole, whole))


def flops_a_token(config: TrainConfig) -> float:
    """Operations of a step's products, of a model that keeps all it needs for the backward pass."""
    kept = dataclasses.replace(config.model, remat=False)
    graph, params = nnx.split(nnx.eval_shape(lambda: nn.LanguageModel(kept, rngs=nnx.Rngs(0))))
    row = {"tokens": jax.ShapeDtypeStruct((1, config.length + 1), jnp.int32)}
    slopes = jax.grad(train.language_model_loss(graph))
    return inspect.flops(slopes, params, row) / config.length


def load(config: TrainConfig) -> nn.LanguageModel:
    """The model of a run with the weights of its newest good checkpoint.

    Raises:
      Refused: there is none.
    """
    return nnx.merge(nnx.graphdef(abstract(config)), restored(config)[0])


def restored(config: TrainConfig) -> tuple[PyTree[Array], int]:
    """The weights of a run's newest good checkpoint, and its step. Raises as `load` does."""
    like = nnx.split(build(config))[1]
    folder = config.folder / "checkpoints"
    if folder.exists():
        with Checkpoints(folder, keep=None, say=say) as checkpoints:
            saved = checkpoints.restore({"weights": like})
        if saved is not None:
            return saved.trees["weights"], saved.step
    raise Refused(f"{config.folder} holds no checkpoint yet; train it first.")


def _distances(
    params: PyTree[Array], start: PyTree[Array], labels: PyTree[str]
) -> dict[str, Float[Array, ""]]:
    """ "moved/<level>": |params - start| / |start|, Euclidean, over a level's arrays."""
    squares: dict[str, list[Any]] = {}
    leaves = (jax.tree.leaves(tree) for tree in (labels, params, start))
    for label, now, then in zip(*leaves, strict=True):
        moved, length = squares.setdefault(label, [0.0, 0.0])
        squares[label] = [moved + jnp.sum(jnp.square(now - then)), length + jnp.sum(then**2)]
    return {f"moved/{k}": jnp.sqrt(a / jnp.maximum(b, 1e-30)) for k, (a, b) in squares.items()}
