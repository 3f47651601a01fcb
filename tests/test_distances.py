"""Distance maps: exact, signed, within slices; as a stage whose maps reach training patches; killed, and on a full disk."""

import errno
import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from datamodules import Folder, Sampling, Split
from lesionbench.errors import SuiteError
from lesionbench.maps import MapStore
from lesionbench.task import Task
from lightning_modules.distance_supervised import DistanceSupervised
from lightning_modules.distances import DistanceMaps, distance_outside, signed_distance
from lightning_modules.losses import boundary_loss
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, run, run_folders, run_killed, weights

TASK = Task(("t1",), {"background": 0, "a": 1, "b": 2}, {"AB": ("a", "b"), "B": ("b",)})
STAGE = "{name: distances, run: call, function: lesionbench.jobs.distance_maps.write_distance_maps}"
STAGES = f"stages=[{STAGE},{{name: fit, run: fit}},{{name: test, run: test}}]"
MAPS = "+distance={_target_:lightning_modules.distances.DistanceMaps,of:classes}"


class Bounded(DistanceSupervised):
    """Cross-entropy and the boundary loss."""

    def compute_loss(self, batch):
        output = self(batch["image"])
        phi = self.distances(batch, 1)
        return self.supervised(output, batch) + 0.01 * boundary_loss(output.softmax(1)[:, 1:], phi, batch["label"] >= 0)


def blob(shape=(21, 17, 14), seed=0):
    return np.random.default_rng(seed).random(shape) < 0.01


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.9, 1.3, 2.5)])
def test_distances_are_exact_far_from_the_structure_and_next_to_it(spacing):
    middle = ~np.pad(np.ones((6, 5, 4), bool), 5)  # as of the background around a lesion
    for mask in (blob(), ~blob(seed=1), middle, np.pad(np.ones((3, 2, 2), bool), ((40, 9), (3, 30), (0, 20)))):
        assert np.abs(distance_outside(mask, spacing) - distance_transform_edt(~mask, sampling=spacing)).max() < 1e-3
    assert not distance_outside(np.ones((3, 3, 3), bool), spacing).any()
    plane = blob((30, 25))
    assert np.abs(distance_outside(plane, (1.0, 2.0)) - distance_transform_edt(~plane, sampling=(1, 2))).max() < 1e-3


def test_signed_distances_by_hand():
    pixel = np.zeros((5, 5), bool)
    pixel[2, 2] = True
    phi = signed_distance(pixel, (1.0, 1.0))
    assert (phi[2, 2], phi[1, 2], phi[2, 3], phi[4, 2]) == (0, 1, 1, 2)
    assert phi[1, 1] == pytest.approx(2**0.5)
    block = np.zeros((9, 9), bool)
    block[2:7, 2:7] = True
    phi = signed_distance(block, (1.0, 1.0))
    assert (phi[4, 4], phi[3, 4], phi[2, 4], phi[1, 4]) == (-2, -1, 0, 1)
    assert not signed_distance(np.zeros((4, 4), bool), (1.0, 1.0)).any()
    assert not signed_distance(np.ones((4, 4), bool), (1.0, 1.0)).any()


def test_channels_are_regions_or_classes_in_mm_or_voxels():
    label = np.zeros((6, 3, 3), np.int8)
    label[0], label[1], label[5, 2, 2] = 1, 2, -1
    line = partial(np.asarray, dtype=float)
    regions = DistanceMaps()(label, TASK, (2.0, 1.0, 1.0))
    assert regions.dtype == np.float16
    assert line(regions[:, :, 0, 0]).tolist() == [[0, 0, 2, 4, 6, 8], [2, 0, 2, 4, 6, 8]]
    classes = DistanceMaps(of="classes", background=True, unit="vox", limit=3.0)
    assert classes.channels(TASK) == ["background", "a", "b"]
    assert line(classes(label, TASK, (2.0, 1.0, 1.0))[:, :, 0, 0]).tolist() == [[2, 1, 0, 0, 0, 0], [0, 1, 2, 3, 3, 3], [1, 0, 1, 2, 3, 3]]
    assert DistanceMaps(of="classes", background=True)(label, TASK, (1.0, 1.0, 1.0))[0, 5, 2, 2] == 1  # ignored voxels belong to nothing


def test_the_limit_holds_on_both_sides():
    label = np.zeros((9, 9, 9), np.int8)
    label[2:7, 2:7, 2:7] = 1
    maps = DistanceMaps(of="classes", signed=True, limit=1.0)(label, TASK, (1.0, 1.0, 1.0))
    assert maps[0, :, 4, 4].tolist() == [1, 1, 0, -1, -1, -1, 0, 1, 1]


def test_what_is_absent_is_near_or_as_far_as_the_diagonal():
    label = np.zeros((3, 4, 12), np.int8)
    assert not DistanceMaps()(label, TASK, (1.0, 1.0, 1.0)).any()
    assert (DistanceMaps(absent="diagonal")(label, TASK, (1.0, 1.0, 1.0)) == 13).all()
    with pytest.raises(SuiteError, match="absent=diagonal"):
        DistanceMaps(signed=True, absent="diagonal")
    with pytest.raises(SuiteError, match="background"):
        DistanceMaps(background=True)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_in_the_plane_do_not_look_at_other_slices(axis):
    label = (blob((12, 11, 10)) * 2).astype(np.int8)
    maps = DistanceMaps(signed=True, in_plane=True, unit="vox")(label, TASK.narrowed(slice_axis=axis), (3.0, 3.0, 3.0))
    for index, part in enumerate(np.moveaxis(label, axis, 0)):
        assert np.array_equal(maps[1].take(index, axis), signed_distance(part == 2, (1.0, 1.0)).astype(np.float16))
    spacing, slices = (1.0, 2.0, 3.0), np.flatnonzero((label == 2).any(axis=tuple(a for a in range(3) if a != axis)))
    maps = DistanceMaps(in_plane=True)(label, TASK.narrowed(slice_axis=axis), spacing)
    expected = distance_outside(label.take(slices[0], axis) == 2, spacing[:axis] + spacing[axis + 1 :])
    assert np.array_equal(maps[1].take(slices[0], axis), expected.astype(np.float16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 7, shape=(14, 12, 10))


def common(folder, runs):
    return [*SMALL, f"data.root={folder}", f"runs={runs}", "epochs=2", "model._target_=tests.test_distances.Bounded", MAPS, STAGES]


def test_patches_keep_distances_to_what_lies_outside_of_them(folder, tmp_path):
    run(*common(folder, tmp_path))
    (found,) = run_folders(tmp_path)
    assert json.loads((found / "distances" / "distance.json").read_text()) == {"map": "distance", "channels": ["lesion"], "cases": 4}
    store = MapStore(found / "maps")
    data = Folder(
        folder, channels=["t1", "flair"], split=Split(test=2, val=1), patch=(4, 4, 4), sampling=Sampling("uniform"), extra_maps={"distance": "linear"},
        check=False, num_workers=0, samples_per_epoch=40,
    )  # fmt: skip
    data.maps = store
    data.prepare_data()
    data.setup("fit")
    away = 0
    for sample in (data.train_dataloader().dataset[(0, position)] for position in range(40)):
        assert sample["distance"].dtype == torch.float16
        if not (sample["label"] > 0).any():
            away += 1
            assert sample["distance"].min() >= 1
        assert ((sample["distance"] == 0) == (sample["label"] > 0)).all()
    assert away > 5


def test_killed_while_it_measures_goes_on_and_ends_the_same(folder, tmp_path, monkeypatch):
    run(*common(folder, tmp_path / "whole"))
    write, calls = MapStore.write, []

    def dies(self, name, case, array):
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(case)
        write(self, name, case, array)

    with monkeypatch.context() as patched:
        patched.setattr(MapStore, "write", dies)
        assert run_killed(*common(folder, tmp_path / "killed")) == -signal.SIGKILL
    (killed,) = run_folders(tmp_path / "killed")
    pending = killed / "maps" / "distance" / "pending"
    kept = {path.name: path.stat().st_mtime_ns for path in pending.glob("*.npy")}
    assert len(kept) == 2
    run(*common(folder, tmp_path / "killed"), "resume=true")
    (whole,) = run_folders(tmp_path / "whole")
    maps = sorted(path.name for path in (whole / "maps" / "distance" / "v0001").glob("*.npy"))
    assert len(maps) == 4
    for name in maps:
        first, second = (root / "maps" / "distance" / "v0001" / name for root in (whole, killed))
        assert first.read_bytes() == second.read_bytes()
    for name, stamp in kept.items():  # were not measured again
        assert (killed / "maps" / "distance" / "v0001" / name).stat().st_mtime_ns == stamp
    assert_same(weights(whole), weights(killed))


def test_a_full_disk_leaves_no_half_written_map(folder, tmp_path, monkeypatch):
    save, calls = np.save, []

    def full(file, array, *args, **kwargs):
        if "maps" in str(getattr(file, "name", file)):
            calls.append(file)
            if len(calls) == 3:
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
        save(file, array, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(SuiteError, match="no space left"):
            run(*common(folder, tmp_path))
    (found,) = run_folders(tmp_path)
    left = list((found / "maps").rglob("*"))
    assert len([path for path in left if path.suffix == ".npy"]) == 2
    assert not [path for path in left if path.name.startswith(".writing") or path.name == "CURRENT"]
    assert not (found / "distances" / "distance.json").exists()
    run(*common(folder, tmp_path), "resume=true")
    assert MapStore(found / "maps").version("distance") == 1


def test_without_maps_it_is_refused_before_the_training(folder, tmp_path):
    without = [part for part in common(folder, tmp_path) if not part.startswith("stages=")]
    with pytest.raises(SuiteError, match="write_distance_maps"):
        run(*without)
    with pytest.raises(SuiteError, match=r"has 2 channel\(s\), Bounded needs 1.*distance.of"):
        run(*common(folder, tmp_path), "+distance.background=true")
    with pytest.raises(SuiteError, match="unit"):
        run(*common(folder, tmp_path), "+distance.unit=inch")
