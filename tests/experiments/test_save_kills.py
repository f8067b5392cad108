# SPDX-License-Identifier: Apache-2.0
"""Who saves memories is killed at any moment: nothing is lost, and a loss would be noticed."""

import numpy as np
from nlx_experiments import save_kills, user_files
from nlx_experiments.users import Users


def test_a_killed_writer_loses_nothing_that_it_told(tmp_path):
    wrong, within = save_kills.kill_writers(tmp_path / "kills", 60, seed=1)
    assert wrong == []
    assert within > 3


def test_a_file_that_is_not_an_undisturbed_one_is_noticed(tmp_path):
    start = save_kills.of_count(0)
    state = start.state.copy()
    state[1] = np.nextafter(state[1], np.float32(1))
    with Users(tmp_path, start, save_kills.MODEL) as users:
        tokens = [users.create() for _ in range(3)]
        for token in tokens[:2]:
            users.save(users.named(token), start)
        files = [save_kills.saved(tmp_path, token) for token in tokens]
        users.save(users.named(tokens[0]), start._replace(state=state))
        now = [save_kills.saved(tmp_path, token) for token in tokens]
    assert files[0] == files[1] is not None
    assert files[2] is None
    assert save_kills.differing(files, files) == []
    assert save_kills.differing(now, files) == ["user 0: the file is not an undisturbed one's"]
    assert len(save_kills.differing(files[1:], files[:0:-1])) == 2


def test_a_file_that_was_not_told_or_is_lost_is_noticed(tmp_path):
    for n in range(4):
        user_files.write(tmp_path / f"{n}.memory", save_kills.of_count(n), save_kills.MODEL)
    assert [save_kills.damage(tmp_path, n, 3) for n in range(4)] == [None] * 4
    assert save_kills.damage(tmp_path, 3, 2) is None  # done, and not yet told
    assert "save 1, told of 5" in save_kills.damage(tmp_path, 1, 6)
    (tmp_path / "1.memory").unlink()
    assert "save -1, told of 1" in save_kills.damage(tmp_path, 1, 3)
    path = tmp_path / "2.memory"
    path.write_bytes(path.read_bytes()[:-9])
    assert "damaged" in save_kills.damage(tmp_path, 2, 3)
