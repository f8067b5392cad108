# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written in the background, kept rolling, never believed without their checksums.

A checkpoint holds named trees of arrays ("weights", "memories", ...), the position in the data and
checksums of every array (`checksums`). It becomes visible under its step's name only when it is
whole (Orbax renames it there), so a killed save leaves nothing to mistake for one. Older ones are
removed only when a newer one was read back from the disk and found to be what was saved. A visible
checkpoint that was damaged afterwards fails to load or fails its checksums, is moved aside, and the
one before it is used. One that is whole and doesn't fit was made by other code: it stays, and is
refused. Who only reads moves nothing, so that a training under way isn't disturbed. Arrays are read
by TensorStore and the rest as JSON: loading never unpickles. Any mesh can read them, and any number
of processes.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from nlx_experiments import checksums, hosts, runs
from nlx_experiments.errors import Refused
from nlx_experiments.hushed import hush

PROGRESS = "progress"


class Saved(NamedTuple):
    """One checkpoint, restored."""

    step: int
    trees: dict[str, PyTree]
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them; a context manager."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int | None,
        say: Callable[[str], None],
        keep_every: int | None = None,
    ):
        """Opens `folder`.

        keep: newest checkpoints to keep, >= 1; None: only to read, and nothing in the folder is
        changed. say: receives one sentence for each checkpoint that is passed over. keep_every:
        those of steps that are a multiple of it stay for ever; None: none does.
        """
        hush()
        self.folder, self.say, self.reads = folder.absolute(), say, keep is None
        self.keep, self.keep_every = keep, keep_every
        self._saved: int | None = None  # a step that is not known to be whole on the disk
        self._good: int | None = None  # the last that is
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=not self.reads,
            cleanup_tmp_directories=not self.reads,
            read_only=self.reads,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def _newest(self) -> pathlib.Path:
        """Which was the newest one: outside of the folder, so that it is missed when it is gone."""
        return self.folder.parent / "saved.json"

    @property
    def _damaged(self) -> pathlib.Path:
        return self.folder.parent / "damaged"

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the save under way."""
        try:
            if error is None or hosts.count() == 1:  # others may be gone
                self.wait()
        except Refused as refused:
            if error is None:
                raise
            self.say(str(refused))
        finally:
            self.manager.close()

    def save(self, step: int, trees: Mapping[str, PyTree], position: dict[str, Any]) -> None:
        """Copies everything and writes it in the background; a step already saved is left alone.

        Raises:
          Refused: this or the previous save failed (a full disk, a folder taken away), or what was
          read back is not what was saved.
        """
        self.wait()
        if step in self.manager.all_steps():
            return
        self._guarded(step, lambda: hosts.by_first(lambda: self._check_space(trees)))
        sums = {name: checksums.of_tree(_plain(tree)) for name, tree in trees.items()}
        items = {name: ocp.args.StandardSave(_plain(tree)) for name, tree in trees.items()}
        told = {"step": step, "position": position, "sums": sums}
        progress = ocp.args.JsonSave(told | {"sum": _sum(told)})
        self._guarded(
            step,
            lambda: self.manager.save(
                step, args=ocp.args.Composite(**items, **{PROGRESS: progress}), force=True
            ),
        )
        self._saved = step

    def wait(self) -> None:
        """Returns when the save under way, if any, is on the disk and was read back.

        Raises Refused as `save` does.
        """
        step, self._saved = self._saved, None  # what fails is told once
        self._guarded(step or self.manager.latest_step(), self.manager.wait_until_finished)
        if step is None or self.keep is None:
            return
        self._guarded(step, lambda: hosts.by_first(lambda: self._read_back(step)))
        self._good = step
        hosts.by_first(lambda: runs.write_json(self._newest, {"step": step}))
        kept = sorted(self.manager.all_steps())
        for old in kept[: -self.keep]:
            if self.keep_every is None or old % self.keep_every:
                self.manager.delete(old)

    def last(self) -> int | None:
        """The step of the newest one that was restored, or saved and read back; waits for that.

        Raises Refused as `save` does.
        """
        self.wait()
        return self._good

    def restore(self, like: Mapping[str, PyTree]) -> Saved | None:
        """The newest whole checkpoint, or None if there never was one.

        Args:
          like: the trees wanted, with the structure, shapes, dtypes and places they must have.

        Raises:
          Refused: one is whole, but of other trees; or there were some, and all are damaged or
          gone.
        """
        newest = (runs.read_json(self._newest) or {}).get("step", -1)
        steps = sorted(self.manager.all_steps(), reverse=True)
        for n, step in enumerate(steps):
            saved, error = None, self._damage(step)
            if not hosts.any_of(error is not None):  # then no process stops in the middle of it
                try:
                    saved = self._read(step, like)
                except Refused:
                    raise
                except Exception as found:  # whatever damage makes the readers raise
                    error = found
            if not hosts.any_of(saved is None):
                self._good = step
                if max(steps[0], step) < newest:
                    self.say(f"The checkpoint of step {newest}, which was saved, is gone.")
                return saved
            error = error or ValueError("another process cannot read it")
            if hosts.any_of(self._is_whole(step, like)):
                raise Refused(
                    f"the checkpoint of step {step} in {self.folder} is whole, but holds other "
                    f"arrays than are wanted now ({_reason(error, 300)}). It was made by other "
                    "code or another version of a library: go on with that one, or begin anew "
                    "in another folder."
                ) from error
            self._pass_over(step, error, steps[n + 1 :])
        if steps or self._damaged.exists():
            raise Refused(
                f"no checkpoint in {self.folder} is whole any more; to begin anew, choose another "
                "folder."
            )
        if newest >= 0:
            raise Refused(
                f"{self.folder} holds no checkpoint any more, though one of step {newest} was "
                "saved there; bring it back, or begin anew in another folder."
            )
        return None

    def _damage(self, step: int) -> Exception | None:
        """What is wrong with it on the disk: asked by the first of several processes, ahead of all.

        Together they could not go on if one of them alone failed to read its part.
        """
        if hosts.count() == 1 or not hosts.first():
            return None
        try:
            self._read_back(step)
        except Exception as error:  # whatever damage makes the readers raise
            return error
        return None

    def _read(self, step: int, like: Mapping[str, PyTree]) -> Saved:
        templates = {
            name: ocp.args.StandardRestore(
                jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(tree))
            )
            for name, tree in like.items()
        }
        composite = ocp.args.Composite(**templates, **{PROGRESS: ocp.args.JsonRestore()})
        found = self.manager.restore(step, args=composite)
        progress = found[PROGRESS]
        if "sums" not in progress:
            raise Refused(
                f"the checkpoint of step {step} in {self.folder} was saved by an nlx that is too "
                "old to be gone on from; begin anew in another folder."
            )
        _check_sum(progress, step)
        for name in like:
            if checksums.of_tree(found[name]) != progress["sums"][name]:
                raise ValueError(f"its {name} do not match their checksums")
        trees = {name: _restored(tree, found[name]) for name, tree in like.items()}
        return Saved(step, trees, progress["position"])

    def _is_whole(self, step: int, like: Mapping[str, PyTree]) -> bool:
        """Whether it can be read as it is, with the checksums it was saved with; first process."""
        if not hosts.first():
            return False
        try:
            saved = self._sums(step)
            return all(
                _values(self._from_disk(step, name)) == _values(saved[name]) for name in like
            )
        except Exception:  # whatever damage makes the readers raise
            return False

    def _read_back(self, step: int) -> None:
        """Raises ValueError unless what is on the disk is what was saved; first process."""
        for name, sums in self._sums(step).items():
            if _values(self._from_disk(step, name)) != _values(sums):
                raise ValueError(f"its {name}, read back from the disk, are not what was saved")

    def _sums(self, step: int) -> dict[str, dict[str, str]]:
        """The checksums that it was saved with."""
        handler = ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=_alone())
        with handler as reader:
            progress = reader.restore(self.folder / str(step) / PROGRESS)
        _check_sum(progress, step)
        return progress["sums"]

    def _from_disk(self, step: int, name: str) -> dict[str, str]:
        """The checksums of one tree as it lies on the disk."""
        path = self.folder / str(step) / name
        handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone())
        with handler as reader:
            there: Any = reader.metadata(path)
            as_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
            wanted = jax.tree.map(as_numpy, there.item_metadata.tree)
            found = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
        return checksums.of_tree(found)

    def _pass_over(self, step: int, error: Exception, rest: list[int]) -> None:
        where = ""
        if not self.reads:

            def move() -> pathlib.Path:
                target = self._damaged / str(step)
                while target.exists():
                    target = target.with_name(target.name + "+")
                target.parent.mkdir(exist_ok=True)
                os.replace(self.folder / str(step), target)
                return target

            where = f"it now lies in {hosts.by_first(move)}, and "
            self.manager.reload()
        self.say(
            f"The checkpoint of step {step} is damaged ({_reason(error, 160)}); {where}"
            + (f"the one of step {rest[0]} is used." if rest else "none is left.")
        )

    def _check_space(self, trees: Mapping[str, PyTree]) -> None:
        needed = sum(np.dtype(x.dtype).itemsize * x.size for x in jax.tree.leaves(_plain(trees)))
        free = shutil.disk_usage(self.folder).free
        if free < 2 * needed:  # the background writer would fail minutes later, and less clearly
            raise OSError(f"its arrays take {needed} bytes and {free} are free")

    def _guarded(self, step: int | None, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            good = [s for s in self.manager.all_steps() if s != step]
            last = f"the last good one is of step {max(good)}" if good else "there is no other"
            raise Refused(
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({reason}); {last}."
            ) from error


def digest(trees: Mapping[str, PyTree]) -> dict[str, dict[str, str]]:
    """The checksum of every array, by tree and path: equal if and only if the bits are."""
    return {name: checksums.of_tree(_plain(tree)) for name, tree in trees.items()}


def _sum(told: Mapping[str, Any]) -> str:
    """The checksum of all that a checkpoint holds beside arrays, and so of theirs."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _check_sum(progress: Mapping[str, Any], step: int) -> None:
    """Raises ValueError where it is damaged; checkpoints of before there was one have none."""
    told = {name: value for name, value in progress.items() if name != "sum"}
    if "sum" in progress and progress["sum"] != _sum(told):
        raise ValueError("its position in the data does not match its checksum")
    if progress.get("step", step) != step:
        raise ValueError(f"it is of step {progress['step']}")


def _alone() -> Any:
    """For what one process reads by itself."""
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix="alone"
    )


def _values(sums: Mapping[str, str]) -> list[str]:
    """Without the names of paths, which depend on the code."""
    return sorted(sums.values())


def _reason(error: Exception, limit: int) -> str:
    return " ".join(str(error).split())[:limit] or type(error).__name__


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(tree: PyTree) -> PyTree:
    """The tree under a name, as Orbax wants it, with random keys as the integers behind them."""
    numbers = lambda x: np.asarray(jax.random.key_data(x)) if _is_key(x) else x
    return {"tree": jax.tree.map(numbers, tree)}


def _restored(like: PyTree, tree: PyTree) -> PyTree:
    def wrap(old: Any, new: Any) -> Any:
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new

    return jax.tree.map(wrap, like, tree["tree"])
