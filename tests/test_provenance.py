"""What was made from other files is made again when these change, whatever their dates say, and only then."""

import os
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest

from datamodules import QUBIQ, Atlas, LeftAtrium, SemiReal
from datamodules import provenance as module
from datamodules.cache import CaseCache
from datamodules.preprocessing import Preprocessing
from datamodules.provenance import current, derive, stamps
from datamodules.readers.atlas_files import merge_masks
from datamodules.simulated.lesion_insertion import LesionInsertion
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from lesionbench.reports.comparison import compare
from lesionbench.task import Task
from tests.fake_data import LEFT_ATRIUM, write_fake_folder, write_fake_left_atrium
from tests.harness import SMALL, run, run_folders

OLD = (10**18, 10**18)  # ns: in 2001, before anything was made


def write(path, content, ns=OLD):
    path.write_bytes(content)
    os.utime(path, ns=ns)
    return path


@pytest.fixture
def made(tmp_path):
    """Calls `derive` for the sources; returns how often something was made so far."""
    count = []

    def call(*sources):
        derive([tmp_path / "target"], sources, lambda: count.append((tmp_path / "target").write_bytes(b"t")))
        return len(count)

    return call


@pytest.mark.parametrize("small", [1 << 20, 0])
def test_contents_decide(tmp_path, made, monkeypatch, small):
    monkeypatch.setattr(module, "SMALL", small)
    a, b = write(tmp_path / "a", b"aaa"), write(tmp_path / "b", b"bbb")
    assert [made(a), made(a)] == [1, 1]
    write(a, b"AAA")  # another release of the same size, that kept its date
    assert [made(a), made(a)] == [2, 2]
    os.utime(a, ns=(10**18 + 5,) * 2)  # only its date
    assert made(a) == 2
    assert [made(a, b), made(a, b)] == [3, 3]  # one that is there with an old date
    assert [made(b), made(b)] == [4, 4]  # one that is gone
    b.unlink()
    assert made(b) == 5
    write(b, b"bbb")
    (tmp_path / "target").unlink()
    assert made(b) == 6


@pytest.mark.parametrize("small", [1 << 20, 0])
def test_a_link_to_another_release(tmp_path, made, monkeypatch, small):
    monkeypatch.setattr(module, "SMALL", small)
    first, second, copy = (write(tmp_path / name, content) for name, content in (("1", b"xx"), ("2", b"yy"), ("3", b"xx")))
    link = tmp_path / "link"
    for expected, release in ((1, first), (2, second), (3, copy), (3, first)):
        link.unlink(missing_ok=True)
        link.symlink_to(release)
        assert made(link) == expected, release


def test_large_files_are_read_once_and_again_only_when_something_about_them_changed(tmp_path, made, monkeypatch):
    read, digest = [], module._digest
    monkeypatch.setattr(module, "_digest", lambda file: read.append(file.name) or digest(file))
    a = write(tmp_path / "a", bytes(module.SMALL + 1))
    assert [made(a), made(a), made(a)] == [1, 1, 1]
    assert len(read) == 1
    os.utime(a)
    assert [made(a), made(a)] == [1, 1]
    assert len(read) == 2


def test_a_source_that_changes_while_it_is_read_is_found_the_next_time(tmp_path):
    a, target, count = write(tmp_path / "a", b"1"), tmp_path / "t", []

    def make():
        count.append(target.write_bytes(a.read_bytes()))
        if len(count) == 1:
            write(a, b"2")

    for _ in range(3):
        derive([target], [a], make)
    assert (len(count), target.read_bytes()) == (2, b"2")


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"x": 3}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, made, record):
    a = write(tmp_path / "a", b"1")
    made(a)
    (tmp_path / ".target.json").write_text(record)
    assert made(a) == 2
    assert current({str(a): 5}, [a]) is None
    assert current(stamps([a]), [a]) == stamps([a])


# the copies and caches of the suite


def mask(voxels):
    values = np.zeros((10, 10, 10), np.uint8)
    values.reshape(-1)[:voxels] = 1
    return values


def save(path, values, ns=OLD):
    """Uncompressed: the same size whatever the values."""
    write_volume(path, values, np.eye(4))
    os.utime(path, ns=ns)
    return path


def voxels(path):
    return int((np.asarray(nib.load(path).dataobj) > 0).sum())


def test_hdf5_of_a_corrected_release(tmp_path):
    root = write_fake_left_atrium(tmp_path / "h5")
    data = LeftAtrium(root)
    data.materialize()
    (label,) = [c.label for c in data.cases() if c.id == LEFT_ATRIUM["train"][0]]
    source = root / LEFT_ATRIUM["train"][0] / "mri_norm2.h5"
    with h5py.File(source, "r+") as file:
        file["label"][...] = 1
        count = file["label"].size
    os.utime(source, ns=OLD)
    assert voxels(label) < count
    LeftAtrium(root).materialize()
    assert voxels(label) == count


def test_masks_that_come_and_go(tmp_path):
    parts = [save(tmp_path / f"{n}.nii", np.roll(mask(64), 200 * n)) for n in range(3)]
    out = tmp_path / "out.nii.gz"
    assert voxels(merge_masks(parts[:2], out)) == 128
    assert voxels(merge_masks(parts[:1], out)) == 64
    assert voxels(merge_masks(parts, out)) == 192


def test_atlas_lesions_that_come_and_go(tmp_path):
    folder = tmp_path / "c0003s0002t01"
    save(folder / "c0003s0002t01_t1w_stx.nii", mask(900))
    first = save(folder / "c0003s0002t01_LesionSmooth_stx.nii", mask(64))
    second = save(folder / "c0003s0002t01_LesionSmooth_1_stx.nii", np.roll(mask(27), 300))

    def label():
        data = Atlas(tmp_path, cache=tmp_path / "cache")
        data.materialize()
        return voxels(data.cases()[0].label)

    assert label() == 91
    second.unlink()
    assert label() == 64
    save(second, np.roll(mask(27), 300))
    assert label() == 91
    save(first, mask(32))
    assert label() == 59


def test_qubiq_raters(tmp_path):
    case = tmp_path / "kidney" / "Training" / "case01"
    save(case / "image.nii", np.ones((10, 10), np.uint8))
    rater = save(case / "task01_seg01.nii", mask(50)[0])
    (tmp_path / "kidney" / "Validation").mkdir()
    data = QUBIQ(tmp_path, dataset="kidney", cache=tmp_path / "cache")
    data.materialize()
    save(rater, mask(20)[0])
    data.materialize()
    assert voxels(data.cases()[0].raters[0]) == 20


def test_semi_real_lesions(tmp_path):
    mni = np.array([[4.0, 0, 0, -78], [0, 4, 0, -112], [0, 0, 4, -50], [0, 0, 0, 1]])

    def lesion(radius):
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in (40, 48, 40)], indexing="ij"), -1)
        write_volume(tmp_path / "masks" / "a.nii", (np.linalg.norm(grid - (26, 28, 18), axis=-1) < radius).astype(np.uint8), mni)
        os.utime(tmp_path / "masks" / "a.nii", ns=OLD)
        data = SemiReal(tmp_path / "made", masks=tmp_path / "masks", brains={"icbm152": None}, insertion=LesionInsertion(spacing=4.0))
        data.materialize()
        return voxels(data.cases()[0].label)

    assert lesion(5) > 2 * lesion(3) > 0


@pytest.mark.parametrize("small", [1 << 20, 0])
def test_cache_behind_a_link_to_another_release_with_equal_sizes_and_dates(tmp_path, monkeypatch, small):
    monkeypatch.setattr(module, "SMALL", small)
    for release, count in (("first", 64), ("second", 343)):
        save(tmp_path / release / "image.nii", mask(900))
        save(tmp_path / release / "label.nii", mask(count))
    link = tmp_path / "data"
    cache = CaseCache(tmp_path / "cache", Task(("t1",), {"background": 0, "lesion": 1}), Preprocessing(crop="none"))
    case = Case("a", {"t1": link / "image.nii"}, link / "label.nii")

    def label():
        cache.prepare([case])
        return int(cache.open(case).label().sum())

    link.symlink_to(tmp_path / "first")
    assert label() == 64
    link.unlink()
    link.symlink_to(tmp_path / "second")
    assert label() == 343
    shutil.copytree(tmp_path / "second", tmp_path / "third")  # the same contents elsewhere
    before = (cache.folder / "a" / "label.npy").stat().st_ino
    link.unlink()
    link.symlink_to(tmp_path / "third")
    assert label() == 343
    assert (cache.folder / "a" / "label.npy").stat().st_ino == before
    assert sorted(p.name for p in (cache.folder / "a").iterdir()) == ["foreground.npy", "image.npy", "label.npy", "meta.json"]


# whose results they are


def test_other_cases_have_runs_of_their_own(tmp_path, capsys):
    """Of the same ids or of others, under the same path or another; the same cases elsewhere are the same."""
    first = write_fake_folder(tmp_path / "first", 6, shape=(14, 12, 10))
    moved = shutil.copytree(first, tmp_path / "moved", ignore=shutil.ignore_patterns(".cache"))
    other = shutil.copytree(moved, tmp_path / "other")
    for label in (other / "labels").iterdir():
        image = nib.load(label)
        nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 1, axis=0), image.affine).to_filename(label)
    runs = tmp_path / "runs"

    def start(root, *more):
        capsys.readouterr()
        run(*SMALL, f"data.root={root}", f"runs={runs}", "data.split.val=1", "data.split.test=1", "resume=true", *more)
        return capsys.readouterr().out

    assert "is finished" not in start(first)
    assert "is finished" in start(first)
    assert "is finished" in start(moved)
    text = start(other)
    assert "other cases than those under" in text
    assert "is finished" not in text
    assert [folder.name for folder in run_folders(runs)] == ["seed=0", "seed=0-2"]
    assert f"{run_folders(runs)[1]} is finished" in start(other)
    assert f"{run_folders(runs)[0]} is finished" in start(moved)
    with pytest.raises(SuiteError, match=r"They differ in cases.fit, cases.test, data.root"):
        compare([runs])
    assert len(compare([runs], group_by=["data.root"]).groups) == 2
