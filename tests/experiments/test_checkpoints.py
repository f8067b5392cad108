# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact round trips, rolling, and the last good one after any damage."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nlx_experiments.checkpoints import Checkpoints, digest
from nlx_experiments.errors import Refused


def trees(value):
    weights = {"a": jnp.full((300, 40), value, jnp.float32), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
    rule = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    return {
        "weights": weights,
        "memories": (rule.init(weights), jnp.int32(value)),
        "key": jax.random.key(value),
    }


@pytest.fixture
def three(tmp_path):
    """A folder with checkpoints of steps 1 to 4, of which the newest three are kept."""
    with Checkpoints(tmp_path / "checkpoints", keep=3, say=print) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, trees(step), {"next_index": step})
    return tmp_path / "checkpoints"


def restore(folder, like=None, keep=3):
    said = []
    with Checkpoints(folder, keep=keep, say=said.append) as checkpoints:
        return checkpoints.restore(like or trees(0)), said


def test_round_trip_is_exact_and_rolls(three):
    saved, said = restore(three)
    assert said == []
    assert saved.step == 4
    assert saved.position == {"next_index": 4}
    assert digest(saved.trees) == digest(trees(4))
    assert jax.tree.structure(saved.trees) == jax.tree.structure(trees(4))
    assert sorted(int(p.name) for p in three.iterdir()) == [2, 3, 4]


def test_some_trees_alone(three):
    saved, _ = restore(three, {"weights": trees(0)["weights"]})
    assert digest(saved.trees) == digest({"weights": trees(4)["weights"]})


def biggest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = biggest(folder / "weights")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    path = biggest(folder / "weights")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty_progress(folder):
    (folder / "progress" / "metadata").write_text("")


def lose_memories(folder):
    shutil.rmtree(folder / "memories")


def swap_weights(folder):
    # Whole in itself, only not what was saved: nothing but the checksums can tell.
    shutil.rmtree(folder / "weights")
    shutil.copytree(folder.parent / "2" / "weights", folder / "weights")


def move_position(folder):
    path = folder / "progress" / "metadata"
    content = path.read_text()
    assert content.count('"next_index": 4') == 1
    path.write_text(content.replace('"next_index": 4', '"next_index": 5'))


DAMAGES = [truncate, flip, empty_progress, lose_memories, swap_weights, move_position]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_and_says_so(three, damage):
    damage(three / "4")
    saved, said = restore(three)
    assert saved.step == 3
    assert digest(saved.trees) == digest(trees(3))
    assert len(said) == 1
    assert "step 4 is damaged" in said[0]
    assert "step 3 is used" in said[0]
    assert (three.parent / "damaged" / "4").exists()  # nothing is deleted
    with Checkpoints(three, keep=3, say=print) as checkpoints:
        checkpoints.save(4, trees(4), {"next_index": 4})  # and the step can be saved again
    assert restore(three)[0].step == 4


def test_all_damaged_is_refused(three):
    for step in (2, 3, 4):
        truncate(three / str(step))
    for _ in range(2):  # and again, when all have been moved aside
        with pytest.raises(Refused, match="no checkpoint in .* is whole any more"):
            restore(three)
    assert len(list((three.parent / "damaged").iterdir())) == 3


def test_checkpoints_that_are_gone_are_missed(three):
    shutil.rmtree(three / "4")
    saved, said = restore(three)
    assert saved.step == 3
    assert said == ["The checkpoint of step 4, which was saved, is gone."]
    shutil.rmtree(three)
    with pytest.raises(Refused, match="holds no checkpoint any more, though one of step 4 was"):
        restore(three)


def test_the_last_good_one_was_read_back(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=3, say=print) as checkpoints:
        assert checkpoints.last() is None
        checkpoints.save(1, trees(1), {})
        assert checkpoints.last() == 1
        shutil.rmtree(tmp_path / "checkpoints" / "1" / "memories")
        checkpoints.save(2, trees(2), {})
        assert checkpoints.last() == 2
    with Checkpoints(tmp_path / "checkpoints", keep=3, say=print) as checkpoints:
        assert checkpoints.last() is None  # nothing was looked at yet
        checkpoints.restore(trees(0))
        assert checkpoints.last() == 2


def test_none_at_all_is_none(tmp_path):
    assert restore(tmp_path / "checkpoints") == (None, [])


def test_other_trees_are_refused_and_stay(three):
    other = trees(0) | {"memories": optax.sgd(1e-3, momentum=0.9).init(trees(0)["weights"])}
    for keep in (3, None):
        with pytest.raises(Refused, match="step 4 .* is whole, but holds other arrays"):
            restore(three, other, keep)
    assert digest(restore(three)[0].trees) == digest(trees(4))


def test_a_half_written_one_is_not_seen(three):
    shutil.copytree(three / "4", three / "5.orbax-checkpoint-tmp-17")
    saved, said = restore(three)
    assert (saved.step, said) == (4, [])


def test_a_reader_changes_nothing(three):
    """Another process may be training there: its half-written checkpoint is not ours to remove."""
    shutil.copytree(three / "4", three / "5.orbax-checkpoint-tmp-17")
    truncate(three / "4")
    everything = lambda: sorted((p, p.stat().st_size) for p in three.parent.rglob("*"))
    before = everything()
    saved, said = restore(three, keep=None)
    assert saved.step == 3
    assert "step 4 is damaged" in said[0]
    assert everything() == before


def test_nothing_is_unpickled(three, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert restore(three)[0].step == 4
    names = {p.suffix for p in three.rglob("*")}
    assert not names & {".pkl", ".pickle"}


def test_values_are_copied_before_save_returns(tmp_path):
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep=2, say=print) as checkpoints:
        now = {"weights": {"a": jnp.zeros((500, 500))}}
        checkpoints.save(0, now, {})
        for _ in range(20):
            now = step(now)
    assert not np.any(restore(tmp_path / "c", now)[0].trees["weights"]["a"])


def test_every_so_many_stay_for_ever(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2, keep_every=3, say=print) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, trees(step), {})
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [3, 6, 7, 8]


def test_older_ones_stay_until_a_newer_one_was_read_back(three):
    """What is written is damaged before it is read back: nothing goes, and the run is told."""
    with Checkpoints(three, keep=1, say=print) as checkpoints:
        checkpoints.save(5, trees(5), {})
        checkpoints.manager.wait_until_finished()
        flip(three / "5")
        with pytest.raises(
            Refused, match="step 5 could not be written .*; the last good .* step 4"
        ):
            checkpoints.wait()
        assert sorted(int(p.name) for p in three.iterdir()) == [2, 3, 4, 5]
    assert restore(three)[0].step == 4


def test_swapped_weights_are_found_when_they_are_read_back(three):
    with Checkpoints(three, keep=1, say=print) as checkpoints:
        checkpoints.save(5, trees(5), {})
        checkpoints.manager.wait_until_finished()
        swap_weights(three / "5")
        with pytest.raises(Refused, match="its weights, read back from the disk, are not what was"):
            checkpoints.wait()


def test_one_of_an_older_nlx_is_refused_and_stays(three):
    path = three / "4" / "progress" / "metadata"
    path.write_text(path.read_text().replace('"sums"', '"checksums"'))
    with pytest.raises(Refused, match="step 4 .* was saved by an nlx that is too old"):
        restore(three)
    assert (three / "4").exists()


def test_a_full_disk_is_one_sentence(three, monkeypatch):
    usage = shutil.disk_usage(three)
    with Checkpoints(three, keep=3, say=print) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
        with pytest.raises(
            Refused, match=r"step 5 .* 10000 are free.*; the last good one .* step 4"
        ):
            checkpoints.save(5, trees(5), {})
    assert restore(three)[0].step == 4


def test_a_failed_write_is_one_sentence(three, monkeypatch):
    def fail():
        raise OSError(28, "No space left on device")

    with Checkpoints(three, keep=3, say=print) as checkpoints:
        checkpoints.save(5, trees(5), {})
        checkpoints.wait()
        monkeypatch.setattr(checkpoints.manager, "wait_until_finished", fail)
        with pytest.raises(Refused, match="step 5 could not be written .*No space left"):
            checkpoints.wait()
        monkeypatch.undo()
