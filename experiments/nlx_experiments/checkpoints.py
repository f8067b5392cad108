# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written in the background, kept rolling, never believed without their checksums.

A checkpoint holds named trees of arrays ("weights", "memories", ...), the position in the data and
a CRC-32 of every array. It becomes visible under its step's name only when it is whole (Orbax
renames it there), so a killed save leaves nothing to mistake for one; a visible checkpoint that
was damaged afterwards fails to load or fails its checksums, is moved aside, and the one before it
is used. One that is whole and doesn't fit was made by other code: it stays, and is refused. Who
only reads moves nothing, so that a training under way isn't disturbed. Arrays are read by
TensorStore and the rest as JSON: loading never unpickles.
"""

import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from nlx_experiments.errors import Refused

PROGRESS = "progress"


class Saved(NamedTuple):
    """One checkpoint, restored."""

    step: int
    trees: dict[str, PyTree]
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them; a context manager."""

    def __init__(self, folder: pathlib.Path, *, keep: int | None, say: Callable[[str], None]):
        """Opens `folder`.

        keep: checkpoints to keep, >= 1; None: only to read, and nothing in the folder is changed.
        say: receives one sentence for each checkpoint that is passed over.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder, self.say, self.reads = folder.absolute(), say, keep is None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=not self.reads,
            cleanup_tmp_directories=not self.reads,
            read_only=self.reads,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

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
            self.wait()
        except Refused:
            if error is None:
                raise
        finally:
            self.manager.close()

    def save(self, step: int, trees: Mapping[str, PyTree], position: dict[str, Any]) -> None:
        """Copies everything and writes it in the background; a step already saved is left alone.

        Raises:
          Refused: this or the previous save failed (a full disk, a folder taken away).
        """
        if step in self.manager.all_steps():
            return
        self._guarded(step, lambda: self._check_space(trees))
        checksums = {name: _checksums(tree) for name, tree in trees.items()}
        items = {name: ocp.args.StandardSave(_plain(tree)) for name, tree in trees.items()}
        progress = ocp.args.JsonSave({"position": position, "checksums": checksums})
        self._guarded(
            step,
            lambda: self.manager.save(
                step, args=ocp.args.Composite(**items, **{PROGRESS: progress}), force=True
            ),
        )

    def wait(self) -> None:
        """Returns when the save under way, if any, is on the disk."""
        self._guarded(self.manager.latest_step(), self.manager.wait_until_finished)

    def restore(self, like: Mapping[str, PyTree]) -> Saved | None:
        """The newest whole checkpoint, or None if there never was one.

        Args:
          like: the trees wanted, with the structure, shapes and dtypes they must have.

        Raises:
          Refused: one is whole, but of other trees; or there were some, and all are damaged.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for n, step in enumerate(steps):
            try:
                saved = self._read(step, like)
            except Exception as error:  # whatever damage makes the readers raise
                if self._is_whole(step, like):
                    raise Refused(
                        f"the checkpoint of step {step} in {self.folder} is whole, but holds other "
                        f"arrays than are wanted now ({_reason(error, 300)}). It was made by other "
                        "code or another version of a library: go on with that one, or begin anew "
                        "in another folder."
                    ) from error
                self._pass_over(step, error, steps[n + 1 :])
            else:
                return saved
        if steps or self._damaged.exists():
            raise Refused(
                f"no checkpoint in {self.folder} is whole any more; to begin anew, choose another "
                "folder."
            )
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
        trees = {name: _restored(tree, found[name]) for name, tree in like.items()}
        for name, tree in trees.items():
            if _checksums(tree) != progress["checksums"][name]:
                raise ValueError(f"its {name} do not match their checksums")
        return Saved(step, trees, progress["position"])

    def _is_whole(self, step: int, like: Mapping[str, PyTree]) -> bool:
        """Whether it can be read as it is, with the checksums it was saved with."""
        anything = {name: ocp.args.StandardRestore() for name in like}
        wanted = ocp.args.Composite(**anything, **{PROGRESS: ocp.args.JsonRestore()})
        try:
            found = self.manager.restore(step, args=wanted)
        except Exception:  # whatever damage makes the readers raise
            return False
        values = lambda sums: sorted(sums.values())  # the names of paths depend on the code
        saved = found[PROGRESS]["checksums"]
        return all(values(_sums(found[name])) == values(saved[name]) for name in like)

    def _pass_over(self, step: int, error: Exception, rest: list[int]) -> None:
        where = ""
        if not self.reads:
            target = self._damaged / str(step)
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "+")
            os.replace(self.folder / str(step), target)
            self.manager.reload()
            where = f"it now lies in {target}, and "
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
    return {name: _checksums(tree) for name, tree in trees.items()}


def _reason(error: Exception, limit: int) -> str:
    return " ".join(str(error).split())[:limit] or type(error).__name__


def _checksums(tree: PyTree) -> dict[str, str]:
    return _sums(_plain(tree))


def _sums(plain: PyTree) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(plain)
    return {jax.tree_util.keystr(path): _checksum(np.asarray(leaf)) for path, leaf in leaves}


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(array.tobytes()):08x} {array.dtype} {list(array.shape)}"


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(tree: PyTree) -> PyTree:
    """The tree under a name, as Orbax wants it, with random keys as the integers behind them."""
    return {"tree": jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)}


def _restored(like: PyTree, tree: PyTree) -> PyTree:
    def wrap(old: Any, new: Any) -> Any:
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new

    return jax.tree.map(wrap, like, tree["tree"])
