import json
import multiprocessing
import os
import pickle
import signal
import time
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from datamodules import cache as cache_module
from datamodules.cache import CaseCache
from datamodules.preprocessing import Preprocessing, preprocess
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lesionbench.written import STALE_SECONDS, prefix

TASK = Task(channels=("t1", "flair"), classes={"background": (0,), "core": (1,), "edema": (2,)})
FORK = multiprocessing.get_context("fork")


def write(path, array):
    nib.Nifti1Image(array, np.diag([-1.0, -1, 2, 1])).to_filename(path)
    return path


def make_cases(folder, count=3, raters=0, shape=(14, 16, 18)):
    folder.mkdir(exist_ok=True)
    cases = []
    for number in range(count):
        rng = np.random.default_rng(number)
        images = {}
        for channel in TASK.channels:
            array = np.zeros(shape, np.int16)
            array[2:12, 3:13, 4:16] = rng.integers(1, 500, (10, 10, 12))
            images[channel] = write(folder / f"{number}_{channel}.nii.gz", array)
        label = np.zeros(shape, np.uint8)
        label[3:9, 4:9, 5:12] = 2
        label[4:6, 5:7, 6:8] = 1
        files = [write(folder / f"{number}_rater{i}.nii.gz", label) for i in range(raters)]
        cases.append(Case(f"case{number}", images, write(folder / f"{number}_label.nii.gz", label), files))
    return cases


def alter(case):
    """Turns one voxel of the label from core to edema or back."""
    label = np.asarray(nib.load(case.label).dataobj).copy()
    label[4, 5, 6] = 3 - label[4, 5, 6]
    write(case.label, label)


@pytest.fixture
def cases(tmp_path):
    return make_cases(tmp_path / "data")


@pytest.fixture
def cache(tmp_path):
    return CaseCache(tmp_path / "cache", TASK, Preprocessing())


def temporaries(cache):
    return list(cache.folder.glob(".*"))


def built(cache, cases):
    """Inode of each case's image: changes when a case is built again."""
    return [(cache.folder / case.id / "image.npy").stat().st_ino for case in cases]


def test_cached_case_equals_the_preprocessed_one(cache, tmp_path):
    cases = make_cases(tmp_path / "data", raters=2)
    cache.prepare(cases)
    for case in cases:
        expected, found = preprocess(case, TASK, Preprocessing()), cache.open(case)
        assert found.read().dtype == np.float32
        assert np.array_equal(found.read(), expected.image)
        assert np.array_equal(found.label(), expected.label)
        assert np.array_equal(found.raters(), expected.raters)
        assert found.shape == expected.label.shape == (10, 10, 12)
        assert (found.geometry, found.stats, found.channel_mask) == (expected.geometry, expected.stats, (True, True))
    assert np.load(found.folder / "image.npy", mmap_mode="r").dtype == np.int16
    assert not temporaries(cache)
    assert np.array_equal(pickle.loads(pickle.dumps(found)).label(), expected.label)


def test_box_beyond_the_borders_is_padded(cache, cases):
    cache.prepare(cases)
    case = cache.open(cases[0])
    box = ((-2, 5), (3, 13), (0, 12))
    image, label = np.pad(case.read(), ((0, 0), (2, 0), (0, 3), (0, 0))), np.pad(case.label(), ((2, 0), (0, 3), (0, 0)))
    assert np.array_equal(case.read(box), image[:, :7, 3:])
    assert np.array_equal(case.label(box), label[:7, 3:])
    assert case.label(box).dtype == np.int8


def test_box_of_clipped_units_is_padded_with_air(tmp_path, cases):
    cache = CaseCache(tmp_path / "cache", TASK, Preprocessing(clip=(-50, 100)))
    cache.prepare(cases)
    assert (cache.open(cases[0]).read(((-4, -1), (0, 3), (0, 3))) == -50).all()


def test_foreground_holds_voxels_of_each_class(cache, cases, monkeypatch):
    monkeypatch.setattr(cache_module, "COORDINATES", 50)
    cache.prepare(cases)
    case = cache.open(cases[0])
    label, foreground = case.label(), case.foreground
    assert len(foreground[1]) == 8  # all
    assert 50 <= len(foreground[2]) <= 50 + sum(label.shape)
    for index, coordinates in foreground.items():
        assert (label[tuple(coordinates.T)] == index).all()
        assert len(np.unique(coordinates, axis=0)) == len(coordinates)
    for axis in range(3):  # every slice that holds the class is known to hold it
        assert set(foreground[2][:, axis]) == set(np.argwhere(label == 2)[:, axis])
    again = CaseCache(cache.root / "again", TASK, Preprocessing())
    again.prepare(cases)
    assert np.array_equal(again.open(cases[0]).foreground[2], foreground[2])


def test_foreground_of_raters_and_of_lesion_free_cases(cache, tmp_path):
    rated, bare = make_cases(tmp_path / "data", count=2, raters=2)
    lesion = nib.load(rated.raters[1]).get_fdata().astype(np.uint8)
    lesion[10, 10, 10] = 1  # seen by one rater only
    write(rated.raters[1], lesion)
    rated.label, bare.label, bare.raters = None, None, []
    cache.prepare([rated, bare])
    assert len(cache.open(rated).foreground[1]) == 9
    assert cache.open(rated).label() is None
    assert cache.open(bare).foreground == {}
    assert cache.open(bare).raters() is None


def test_second_prepare_builds_nothing(cache, cases):
    cache.prepare(cases)
    before = built(cache, cases)
    cache.prepare(cases)
    assert built(cache, cases) == before


@pytest.mark.parametrize("role", ["image", "label"])
def test_touched_source_is_rebuilt_and_no_other(cache, cases, role):
    cache.prepare(cases)
    before = built(cache, cases)
    path = cases[1].images["flair"] if role == "image" else cases[1].label
    array = np.asarray(nib.load(path).dataobj).copy()
    array[5, 6, 8] = 1
    write(path, array)
    os.utime(path, ns=(1, 1))
    cache.prepare(cases)
    after = built(cache, cases)
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]
    expected = preprocess(cases[1], TASK, Preprocessing())
    assert np.array_equal(cache.open(cases[1]).read(), expected.image)
    assert np.array_equal(cache.open(cases[1]).label(), expected.label)
    assert not temporaries(cache)


def test_key_follows_what_is_stored(tmp_path):
    def folder(task=TASK, **settings):
        return CaseCache(tmp_path, task, Preprocessing(**settings)).folder

    same = folder()
    assert folder(normalize="minmax") == folder(allow_missing=True) == folder(task=TASK.narrowed(channels=TASK.channels)) == same
    others = [
        folder(margin=2),
        folder(crop="none"),
        folder(spacing=(1, 1, 1)),
        folder(clip=(0, 100)),
        folder(TASK.narrowed(channels=["flair"])),
        folder(TASK.narrowed(regions=["core"])),
        folder(Task(TASK.channels, TASK.classes, ignore=(9,))),
    ]
    assert len({same, *others}) == 8


def test_entry_serves_the_same_case_without_its_label_but_not_the_reverse(cache, cases):
    bare = Case(cases[0].id, cases[0].images)
    cache.prepare([bare])
    with pytest.raises(SuiteError, match=r"case0: .*made from other files"):
        cache.open(cases[0])
    cache.prepare(cases)
    before = built(cache, cases)
    cache.prepare([bare])
    assert built(cache, cases) == before
    assert cache.open(bare).label() is None


def test_missing_channel_needs_to_be_allowed(tmp_path, cases):
    partial = Case("case0", {"flair": cases[0].images["flair"]})
    tolerant = CaseCache(tmp_path / "cache", TASK, Preprocessing(allow_missing=True))
    tolerant.prepare([partial])
    assert tolerant.open(partial).channel_mask == (False, True)
    strict = CaseCache(tmp_path / "cache", TASK, Preprocessing())
    for action in (strict.open, lambda case: strict.prepare([case])):
        with pytest.raises(SuiteError, match=r"case case0: no file for channel.* t1"):
            action(partial)
    strict.prepare(cases)  # the same id with all its channels is another case
    assert strict.open(cases[0]).channel_mask == (True, True)


DAMAGE = {
    "truncated": lambda folder: (folder / "image.npy").write_bytes((folder / "image.npy").read_bytes()[:500]),
    "empty": lambda folder: (folder / "label.npy").write_bytes(b""),
    "gone": lambda folder: (folder / "foreground.npy").unlink(),
    "bad json": lambda folder: (folder / "meta.json").write_text('{"arrays": {'),
    "other json": lambda folder: (folder / "meta.json").write_text("[]"),
    "other array": lambda folder: np.save(folder / "label.npy", np.zeros((3, 3, 3), np.int8)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_named_on_open_and_rebuilt_by_prepare(cache, cases, damage):
    cache.prepare(cases)
    before = built(cache, cases[1:])
    DAMAGE[damage](cache.folder / "case0")
    with pytest.raises(SuiteError, match=r"case case0: .*case0: .*job=prepare"):
        cache.open(cases[0])
    cache.prepare(cases)
    assert np.array_equal(cache.open(cases[0]).read(), preprocess(cases[0], TASK, Preprocessing()).image)
    assert built(cache, cases[1:]) == before
    assert not temporaries(cache)


def test_open_of_an_unprepared_case_says_so(cache, cases):
    with pytest.raises(SuiteError, match=r"case case0: .* not in the cache; build it with job=prepare"):
        cache.open(cases[0])


def test_good_cases_are_built_and_every_bad_one_is_named(cache, cases):
    cases[0].label.write_bytes(cases[0].label.read_bytes()[:40])
    write(cases[2].label, np.full((14, 16, 18), 7, np.uint8))
    with pytest.raises(SuiteError, match=r"(?s)0_label.nii.gz.*case case2: .*2_label.nii.gz.*\[7\]"):
        cache.prepare(cases)
    assert cache.open(cases[1]).shape == (10, 10, 12)
    assert not temporaries(cache)


def test_worker_processes_build_the_same(cache, cases, tmp_path):
    write(cases[2].label, np.full((14, 16, 18), 7, np.uint8))
    with pytest.raises(SuiteError, match="case case2"):
        cache.prepare(cases, workers=2, progress=False)
    alone = CaseCache(tmp_path / "alone", TASK, Preprocessing())
    alone.prepare(cases[:2])
    for case in cases[:2]:
        for name in ("image", "label", "foreground"):
            one, other = ((c.folder / case.id / f"{name}.npy").read_bytes() for c in (cache, alone))
            assert one == other


def _die_at(moment, cache, cases):
    """Runs `prepare` in a child that is killed with signal 9 in the middle of `moment` (module attribute, count of calls before)."""
    target, calls = moment
    owner, name = (os, "rename") if target == "rename" else (cache_module, target)
    real, left = getattr(owner, name), [calls]

    def hang(*args, **kwargs):
        if left[0] == 0:
            if target == "_write":
                with open(args[0], "wb") as file:
                    file.write(b"half")
            started.set()
            time.sleep(60)
        left[0] -= 1
        return real(*args, **kwargs)

    started = FORK.Event()

    def work():
        setattr(owner, name, hang)
        cache.prepare(cases)

    process = FORK.Process(target=work)
    process.start()
    assert started.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("moment", [("_write", 0), ("_write", 1), ("_write", 3), ("_write", 5), ("rename", 0), ("rename", 1)])
def test_killed_writer_leaves_whole_cases_or_none(cache, cases, moment):
    _die_at(moment, cache, cases)
    assert temporaries(cache)  # it was killed while writing
    finished = [path for path in cache.folder.iterdir() if not path.name.startswith(".")]
    for path in finished:
        assert cache.open(next(case for case in cases if case.id == path.name)).read().any()
    cache.prepare(cases)
    assert not temporaries(cache)
    for case in cases:
        assert np.array_equal(cache.open(case).read(), preprocess(case, TASK, Preprocessing()).image)


@pytest.mark.parametrize("calls", [1, 2])  # the first rename fails on the old entry; killed before moving it away, and right after
def test_kill_while_replacing_an_old_entry(cache, cases, calls):
    cache.prepare(cases)
    alter(cases[0])
    _die_at(("rename", calls), cache, cases)
    cache.prepare(cases)
    assert not temporaries(cache)
    assert cache.open(cases[0]).label().any()


def test_temporaries_of_the_living_stay_and_old_ones_go(cache, cases):
    cache.folder.mkdir(parents=True)
    mine = cache.folder / f"{prefix()}00-x"
    elsewhere = cache.folder / ".writing-otherhost-1-00-a-b"
    old = cache.folder / ".writing-otherhost-1-01-x"
    for path in (mine, elsewhere, old):
        path.mkdir()
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    cache.prepare(cases)
    assert sorted(temporaries(cache)) == sorted([mine, elsewhere])


def test_two_processes_prepare_at_once(cache, cases, tmp_path):
    cases = make_cases(tmp_path / "data", count=6)
    errors = FORK.Queue()

    def work(barrier):
        for _ in range(4):
            barrier.wait()
            try:
                cache.prepare(cases)
            except BaseException as error:
                errors.put(repr(error))
                raise
            barrier.wait()
            if barrier.wait() == 0:  # one of them makes the entries out of date, differently each time
                for case in cases[::2]:
                    alter(case)
                (cache.folder / "case1" / "image.npy").write_bytes(b"")

    barrier = FORK.Barrier(3)
    processes = [FORK.Process(target=work, args=(barrier,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0], errors.get(timeout=1)
    cache.prepare(cases)
    assert not temporaries(cache)
    assert len(list(cache.folder.iterdir())) == 6
    for case in cases:
        assert np.array_equal(cache.open(case).read(), preprocess(case, TASK, Preprocessing()).image)


def test_estimate_counts_voxels_and_bounds_what_is_written(tmp_path):
    cases = make_cases(tmp_path / "data", count=2, raters=3)
    voxels = 14 * 16 * 18
    assert CaseCache(tmp_path, TASK, Preprocessing()).estimate(cases) == 2 * voxels * (2 * 2 + 1 + 3)
    finer = CaseCache(tmp_path, TASK, Preprocessing(spacing=(0.5, 1, 1)))  # canonical spacing is 1, 1, 2
    assert finer.estimate(cases[:1]) == 28 * 16 * 36 * (2 * 4 + 1 + 3)
    whole = CaseCache(tmp_path / "whole", TASK, Preprocessing(crop="none"))
    whole.prepare(cases)
    arrays = [path.stat().st_size - 128 for path in whole.folder.glob("*/*.npy") if path.stem != "foreground"]
    assert sum(arrays) == whole.estimate(cases)


def test_short_disk_is_an_error_before_anything_is_written(tmp_path, cases, monkeypatch):
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    cache = CaseCache(tmp_path / "cache", TASK, Preprocessing(crop="none"))
    with pytest.raises(SuiteError, match=r"0.00 GB .*data.cache"):
        cache.prepare(cases)
    assert not list(cache.folder.iterdir())


def test_space_saved_by_the_crop_is_measured_before_giving_up(tmp_path, monkeypatch):
    cases = make_cases(tmp_path / "data", count=4, shape=(40, 40, 40))
    cache = CaseCache(tmp_path / "cache", TASK, Preprocessing())
    assert cache.estimate(cases) > 1_000_000  # the crops are 1200 voxels of 64000
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    cache.prepare(cases)
    assert cache.open(cases[3]).shape == (10, 10, 12)


def test_full_disk_is_told_with_the_setting_to_change(cache, cases, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write", full)
    with pytest.raises(SuiteError, match=r"disk is full.*data.cache"):
        cache.prepare(cases)
    assert not temporaries(cache)


def test_description_is_plain_json(cache, cases):
    cache.prepare(cases)
    meta = json.loads((cache.folder / "case0" / "meta.json").read_text())
    assert meta["sources"]["label"] == str(cases[0].label)
    assert meta["stamps"][str(cases[0].label)]["size"] == cases[0].label.stat().st_size
    assert "attributes" not in meta
