import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from lesionbench.errors import SuiteError
from lesionbench.maps import MapStore, read_box


def cube(value, shape=(4, 5, 6), dtype=np.float32):
    return np.full(shape, value, dtype)


def test_a_pending_map_is_seen_only_after_commit(tmp_path):
    store = MapStore(tmp_path / "maps")
    assert store.version("pseudo") == 0
    store.write("pseudo", "a", cube(1))
    assert not store.has("pseudo", "a")
    assert store.commit("pseudo") == 1
    store.write("pseudo", "a", cube(2))
    assert np.array_equal(store.read("pseudo", "a"), cube(1))
    assert store.commit("pseudo") == 2
    assert np.array_equal(MapStore(tmp_path / "maps").read("pseudo", "a"), cube(2))
    assert store.commit("pseudo") == 2  # nothing pending


def test_cases_that_were_not_rewritten_carry_over(tmp_path):
    store = MapStore(tmp_path)
    store.write("m", "a", cube(1))
    store.write("m", "b", cube(10))
    store.commit("m")
    for value in (2, 3, 4):
        store.write("m", "a", cube(value))
        store.commit("m")
    assert store.read("m", "a")[0, 0, 0] == 4
    assert store.read("m", "b")[0, 0, 0] == 10
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["CURRENT", "v0003", "v0004"]


def test_rewriting_a_carried_case_leaves_the_earlier_version_alone(tmp_path):
    store = MapStore(tmp_path)
    for name, value in [("a", 1), ("b", 2), ("a", 3), ("b", 4)]:
        store.write("m", name, cube(value))
        store.commit("m")
    assert store.read("m", "b")[0, 0, 0] == 4
    store.restore("m", 3)
    assert (store.read("m", "a")[0, 0, 0], store.read("m", "b")[0, 0, 0]) == (3, 2)


def test_restore_discards_what_came_later(tmp_path):
    store = MapStore(tmp_path)
    store.write("m", "a", cube(1))
    store.commit("m")
    state = json.loads(json.dumps(store.state_dict()))
    assert state == {"m": 1}
    store.write("m", "a", cube(2))
    store.commit("m")
    store.write("m", "b", cube(3))  # pending when the run was killed
    store.write("late", "a", cube(4))
    store.commit("late")
    resumed = MapStore(tmp_path)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.read("m", "a")[0, 0, 0] == 1
    assert not resumed.has("late", "a")
    assert not (tmp_path / "m" / "v0002").exists()
    resumed.write("m", "a", cube(5))
    assert resumed.commit("m") == 2
    assert not resumed.has("m", "b")
    with pytest.raises(SuiteError, match=r"'m' has no version 7.*v0001, v0002"):
        resumed.restore("m", 7)


def test_box_is_padded_with_zeros(tmp_path):
    store = MapStore(tmp_path)
    array = np.arange(1, 2 * 4 * 5 * 6 + 1, dtype=np.int32).reshape(2, 4, 5, 6)
    store.write("m", "a", array)
    store.commit("m")
    assert np.array_equal(store.read("m", "a", ((1, 3), (0, 5), (2, 6))), array[:, 1:3, :, 2:6])
    padded = np.pad(array, ((0, 0), (2, 3), (1, 0), (0, 4)))
    found = store.read("m", "a", ((-2, 7), (-1, 5), (0, 10)))
    assert found.dtype == np.int32
    assert np.array_equal(found, padded)
    assert not store.read("m", "a", ((10, 14), (0, 5), (0, 6))).any()
    assert store.read("m", "a", ((-9, -4), (0, 5), (0, 6))).shape == (2, 5, 5, 6)
    store.read("m", "a")[...] = -1  # a copy
    assert store.read("m", "a")[0, 0, 0, 0] == 1


def test_only_the_box_is_touched():
    class Recorder:
        shape, dtype, taken = (4, 100, 100, 100), np.dtype(np.int16), []

        def __getitem__(self, index):
            part = np.zeros(self.shape, np.int16)[index]
            self.taken.append(part.shape)
            return part

    recorder = Recorder()
    assert read_box(recorder, ((5, 15), (0, 10), (90, 100))).shape == (4, 10, 10, 10)
    assert read_box(recorder, ((-5, 5), (0, 10), (95, 105)), fill=3)[0, 0, 0, 0] == 3
    assert recorder.taken == [(4, 10, 10, 10), (4, 5, 10, 5)]


def test_any_case_id_is_a_safe_file_name(tmp_path):
    store = MapStore(tmp_path / "maps")
    for value, name in enumerate(("a/b", "..", ".hidden", "über 1", "a%2Fb")):
        store.write("x/y", name, cube(value))
    store.commit("x/y")
    for value, name in enumerate(("a/b", "..", ".hidden", "über 1", "a%2Fb")):
        assert store.read("x/y", name)[0, 0, 0] == value
    assert store.state_dict() == {"x/y": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]


def test_errors_name_map_and_case(tmp_path):
    store = MapStore(tmp_path)
    store.write("certainty", "a", cube(1))
    store.commit("certainty")
    with pytest.raises(SuiteError, match="did you mean 'certainty'"):
        store.read("certanty", "a")
    with pytest.raises(SuiteError, match=r"'certainty' \(version 1\) has nothing for case b"):
        store.read("certainty", "b")
    with pytest.raises(ValueError, match=r"case b: expected .* got shape \(4, 5\)"):
        store.write("certainty", "b", np.zeros((4, 5)))
    path = tmp_path / "certainty" / "v0001" / "a.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SuiteError, match=r"a\.npy: damaged map"):
        store.read("certainty", "a")


def _write_many(folder, names, value):
    store = MapStore(folder)
    for name in names:
        store.write("m", name, cube(value))


def test_several_processes_write_one_version(tmp_path):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_write_many, args=(tmp_path, [f"{i}-{k}" for k in range(20)] + ["shared"], i)) for i in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    store = MapStore(tmp_path)
    store.commit("m")
    assert len(list((tmp_path / "m" / "v0001").iterdir())) == 61
    assert all(store.read("m", f"{i}-{k}")[0, 0, 0] == i for i in range(3) for k in range(20))
    assert len(np.unique(store.read("m", "shared"))) == 1


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("moment", ["pathlib.Path.rename", "os.replace"])
def test_a_commit_killed_halfway_leaves_the_old_version(tmp_path, monkeypatch, moment, resume):
    store = MapStore(tmp_path)
    store.write("m", "a", cube(1))
    store.commit("m")
    store.write("m", "a", cube(2))

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=store.commit, args=("m",))
    with monkeypatch.context() as patch:
        patch.setattr(moment, die)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert store.read("m", "a")[0, 0, 0] == 1
    if resume:
        store.load_state_dict({"m": 1})
    store.write("m", "a", cube(3))
    assert store.commit("m") == 2
    assert store.read("m", "a")[0, 0, 0] == 3
