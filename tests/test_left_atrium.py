"""The 2018 left-atrium challenge in both of its forms, and the published division of its patients."""

import os
import shutil

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from datamodules import LeftAtrium, Preprocessing, Sampling, Split
from datamodules.readers.left_atrium_files import NAMED_SPLITS, find_left_atrium
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from tests.fake_data import LEFT_ATRIUM, write_fake_left_atrium

TRAIN, TEST = LEFT_ATRIUM["train"][:7], LEFT_ATRIUM["test"]
AS_STORED = Preprocessing(crop="none", normalize="none")


@pytest.fixture(scope="module")
def h5(tmp_path_factory):
    return write_fake_left_atrium(tmp_path_factory.mktemp("h5"))


@pytest.fixture(scope="module")
def nrrd(tmp_path_factory):
    return write_fake_left_atrium(tmp_path_factory.mktemp("nrrd"), files="nrrd")


def ready(root, **options):
    options = {"split": Split(val=0), "preprocessing": AS_STORED, "sampling": Sampling("uniform"), **options}
    data = LeftAtrium(root, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def ids(data):
    return {part: [c.id for c in data.parts[part]] for part in ("train", "val", "test", "labeled", "unlabeled")}


def whole(data, name):
    """One whole case as a test would get it."""
    cases = [c for part in ("train", "test") for c in data.parts[part] if c.id == name]
    (batch,) = data.case_loader(cases)
    return batch


def test_the_published_lists():
    lists = NAMED_SPLITS["yu2019"]
    train, test = lists["train"], lists["test"]
    assert (len(train), len(test), len({*train, *test})) == (80, 20, 100)
    assert (train[0], train[3], train[7], train[79]) == (
        "06SR5RBREL16DQ6M8LWS", "1GU15S0GJ6PFNARO469W", "38CWS74285MFGZZXR09Z", "UZUZZT2W9IUSHL6ASOX3",
    )  # fmt: skip
    assert (test[0], test[19]) == ("UPT6DX9IQY9JAZ7HJKA7", "ZQPMJ4XEC5A4BISD45P1")
    assert list(train) == sorted(train)
    assert all(len(i) == 20 and i.isalnum() and i.isupper() for i in (*train, *test))


def test_h5_arrays_arrive_as_they_are_stored(h5):
    data = ready(h5)
    with h5py.File(h5 / TRAIN[2] / "mri_norm2.h5") as file:
        image, label = file["image"][()], file["label"][()]
    batch = whole(data, TRAIN[2])
    assert np.array_equal(batch["image"][0, 0].numpy(), image)
    assert np.array_equal(batch["label"][0, 0].numpy(), label)
    assert np.array_equal(batch["native_label"][0].numpy(), label)
    assert batch["geometry"][0].native_spacing == pytest.approx((0.625,) * 3)
    assert (data.task.channels, data.task.region_names, data.task.unit) == (("mri",), ("LA",), "vox")
    assert not [f for f in data.findings(progress=False) if f.level == "error"]


def test_nrrd_files_keep_their_place_and_become_the_box_around_the_atrium(nrrd):
    data = ready(nrrd, files="nrrd", preprocessing=Preprocessing(crop="label", margin=[3, 2, 88], normalize="zscore_all"))
    folder = nrrd / "2018LA_Seg_Training Set" / TRAIN[1]
    image, label = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{n}.nrrd"))).T for n in ("lgemri", "laendo"))
    (case,) = [c for c in data.parts["train"] if c.id == TRAIN[1]]
    stored, affine, _ = read_volume(case.images["mri"])
    assert np.array_equal(stored, image)
    assert affine[:3] == pytest.approx(np.array([[-0.625, 0, 0, 10], [0, -0.625, 0, -20], [0, 0, 0.625, 30]]))
    batch = whole(data, TRAIN[1])
    assert np.array_equal(batch["native_label"][0].numpy(), label == 255)
    flipped_image, flipped_label = image[::-1, ::-1].astype(float), label[::-1, ::-1]  # canonical axes run the other way
    box = [slice(max(0, w.min() - m), w.max() + 1 + m) for w, m in zip(np.nonzero(flipped_label), (3, 2, 88), strict=True)]
    assert box[2].start == 0
    cut = flipped_image[tuple(box)]
    assert np.allclose(batch["image"][0, 0].numpy(), (cut - cut.mean()) / cut.std(), atol=1e-4)
    assert np.array_equal(batch["label"][0, 0].numpy(), flipped_label[tuple(box)] == 255)
    back = batch["geometry"][0].to_native(batch["label"][0].float(), discrete=True)[0].numpy()
    assert np.array_equal(back, label == 255)


def test_the_published_division_labels_the_first_of_the_list(h5):
    data = ready(h5, split=Split(labeled=4, val=0), streams={"labeled": {"cases": "labeled"}, "unlabeled": {"cases": "unlabeled"}})
    assert ids(data) == {"train": TRAIN, "val": [], "test": TEST, "labeled": TRAIN[:4], "unlabeled": TRAIN[4:]}
    other = ready(h5, split=Split(labeled=4, val=2, seed=7), seed=3)
    assert ids(other) == {"train": TRAIN[:5], "val": TRAIN[5:], "test": TEST, "labeled": TRAIN[:4], "unlabeled": TRAIN[4:5]}
    everything = ready(h5, named_split=None, split=Split(test=3, val=0, labeled=2))
    assert [len(v) for v in ids(everything).values()] == [6, 0, 3, 2, 4]


def test_streams_give_labels_to_labeled_cases_alone(h5):
    streams = {"labeled": {"cases": "labeled", "batch_size": 2}, "unlabeled": {"cases": "unlabeled", "batch_size": 3}}
    data = ready(h5, split=Split(labeled=2, val=0), streams=streams, patch=(8, 8, 8), samples_per_epoch=8)
    seen = {"labeled": set(), "unlabeled": set()}
    for batch, _, _ in data.train_dataloader():
        assert batch["labeled"]["label"].shape == (2, 1, 8, 8, 8)
        assert batch["unlabeled"]["image"].shape == (3, 1, 8, 8, 8)
        assert "label" not in batch["unlabeled"]
        for name in seen:
            seen[name] |= set(batch[name]["case"])
    assert seen == {"labeled": set(TRAIN[:2]), "unlabeled": set(TRAIN[2:])}


def test_half_resolution(h5):
    full = whole(ready(h5), TEST[0])
    data = ready(h5, preprocessing=Preprocessing(crop="none", normalize="none", spacing=(1.25,) * 3))
    half = whole(data, TEST[0])
    assert list(half["image"].shape[2:]) == [round(n / 2) for n in full["image"].shape[2:]]
    assert half["native_label"][0].shape == full["native_label"][0].shape
    back = half["geometry"][0].to_native(half["label"][0].float(), discrete=True)[0]
    assert (back == half["native_label"][0]).float().mean() > 0.95


def test_what_is_missing_of_the_list_is_said(h5, tmp_path, capsys):
    ready(h5, cache=tmp_path / "a", split=Split(labeled=4, val=0))
    assert "data.named_split=yu2019: 7 of 80 train, 2 of 20 test patients are under" in (said := capsys.readouterr().out)
    assert "the first 4 training patients that are there" in said
    few = shutil.copytree(h5, tmp_path / "few", ignore=shutil.ignore_patterns(".cache", TRAIN[0], *TEST[:1]))
    assert ids(ready(few, split=Split(labeled=2, val=0)))["labeled"] == TRAIN[1:3]
    with pytest.raises(SuiteError, match=r"labeled=16, but there are only 6 training patients"):
        ready(few, split=Split(labeled=16, val=0))
    shutil.rmtree(few / TEST[1])
    with pytest.raises(SuiteError, match=r"none of its 20 test patients is under .*few \(6 cases found\); data.named_split=null"):
        LeftAtrium(few).prepare_data()


def test_a_limit_keeps_training_and_test_patients(h5):
    data = LeftAtrium(h5, limit_cases=6, split=Split(val=1, labeled=2))
    assert [c.id for c in data.cases()] == [*TRAIN[:3], TEST[0], *TRAIN[3:5]]
    assert [len(data.divided(data.cases())[p]) for p in ("train", "val", "test", "labeled", "unlabeled")] == [4, 1, 1, 2, 2]


def test_a_changed_source_is_converted_again(h5, tmp_path):
    own = shutil.copytree(h5, tmp_path / "own", ignore=shutil.ignore_patterns(".cache"))
    data = ready(own)
    stamp = data.parts["train"][0].images["mri"].stat().st_mtime_ns
    LeftAtrium(own).materialize()
    assert data.parts["train"][0].images["mri"].stat().st_mtime_ns == stamp
    source = own / TRAIN[0] / "mri_norm2.h5"
    with h5py.File(source, "r+") as file:
        file["label"][...] = 1
    os.utime(source, ns=(stamp + 10**9, stamp + 10**9))
    assert (whole(ready(own), TRAIN[0])["label"] == 1).all()


def test_errors_name_the_file_and_the_fix(h5, nrrd, tmp_path):
    with pytest.raises(SuiteError, match=r"left atrium data: no such folder[\s\S]*data.root"):
        find_left_atrium(tmp_path / "nowhere")
    with pytest.raises(SuiteError, match=r"holds nothing; expected files such as 06SR5RBREL16DQ6M8LWS/mri_norm2.h5$"):
        find_left_atrium(tmp_path)
    with pytest.raises(SuiteError, match=r"what is there fits data.files=nrrd"):
        find_left_atrium(nrrd)
    with pytest.raises(SuiteError, match="did you mean 'h5'"):
        LeftAtrium(h5, files="hd5")
    with pytest.raises(SuiteError, match="yu2019"):
        LeftAtrium(h5, named_split="yu2018")
    with pytest.raises(SuiteError, match=r"data.named_split=yu2019 and data.split.folds"):
        LeftAtrium(h5, split=Split(folds=5))
    shutil.copytree(h5 / TRAIN[0], tmp_path / "twice" / "copy" / TRAIN[0])
    shutil.copytree(h5 / TRAIN[0], tmp_path / "twice" / TRAIN[0])
    with pytest.raises(SuiteError, match="two scans of one name"):
        find_left_atrium(tmp_path / "twice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.create_dataset("label", data=np.zeros((3, 3, 3), np.uint8)), r"image has shape .* its label \(3, 3, 3\)"),
        (lambda f: f.create_dataset("label", data=np.zeros((3, 3), np.uint8)), r"'label' has shape \(3, 3\), expected 3 dimensions"),
        (lambda f: f.move("image", "mri"), r"no array 'image', it holds \['mri'\]"),
    ],
)
def test_wrong_shapes_and_names(h5, tmp_path, change, message):
    own = shutil.copytree(h5, tmp_path / "own", ignore=shutil.ignore_patterns(".cache"))
    with h5py.File(own / TRAIN[1] / "mri_norm2.h5", "r+") as file:
        del file["label"]
        change(file)
    with pytest.raises(SuiteError, match=rf"{TRAIN[1]}/mri_norm2.h5: .*{message}"):
        LeftAtrium(own).materialize()


def test_truncated_files(h5, nrrd, tmp_path):
    for source, name, files in ((h5, f"{TRAIN[0]}/mri_norm2.h5", "h5"), (nrrd, f"2018LA_Seg_Training Set/{TRAIN[0]}/lgemri.nrrd", "nrrd")):
        own = shutil.copytree(source, tmp_path / files, ignore=shutil.ignore_patterns(".cache"))
        (own / name).write_bytes((own / name).read_bytes()[:200])
        with pytest.raises(SuiteError, match=rf"{TRAIN[0]}/\w+.{files}: cannot be read as"):
            LeftAtrium(own, files=files).materialize()


def test_a_scan_without_a_label_takes_no_part_in_the_division(nrrd, tmp_path):
    own = shutil.copytree(nrrd, tmp_path / "own", ignore=shutil.ignore_patterns(".cache"))
    (own / "2018LA_Seg_Training Set" / TRAIN[0] / "laendo.nrrd").unlink()
    assert ids(ready(own, files="nrrd"))["train"] == TRAIN[1:]
    for path in own.rglob("laendo.nrrd"):
        path.unlink()
    with pytest.raises(SuiteError, match=r"none of 9 scans has a label \(laendo.nrrd\)"):
        find_left_atrium(own, "nrrd")


def test_real_left_atrium(real_data, tmp_path):
    root = real_data / "la2018"
    train, test = NAMED_SPLITS["yu2019"]["train"], NAMED_SPLITS["yu2019"]["test"]
    assert ((root / "train.list").read_text().split(), (root / "test.list").read_text().split()) == (list(train), list(test))
    with pytest.raises(SuiteError, match="none of its 20 test patients"):
        LeftAtrium(root, cache=tmp_path).prepare_data()
    data = ready(root, cache=tmp_path, named_split=None, limit_cases=3, check=False, split=Split(test=1, val=0, labeled=1))
    assert {c.id for p in ("train", "test") for c in data.parts[p]} == set(train[:3])
    batch = whole(data, train[0])
    assert batch["image"].shape == (1, 1, 183, 140, 88)
    assert batch["label"].unique().tolist() == [0, 1]
