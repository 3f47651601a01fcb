"""ACDC in its four forms on disk, and the published division of its patients."""

import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest

from datamodules import ACDC, Preprocessing, Split
from datamodules.readers.acdc_files import NAMED_SPLITS, find_niftis, find_stacks
from lesionbench.errors import SuiteError
from tests.fake_data import ACDC as PATIENTS
from tests.fake_data import write_fake_acdc

AS_STORED = Preprocessing(crop="none", normalize="none")
FORMS = ("h5", "slices", "flat", "nifti")
NAMES = {part: [f"patient{n:03d}" for n in numbers] for part, numbers in PATIENTS.items()}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return {form: write_fake_acdc(tmp_path_factory.mktemp(form), files=form) for form in FORMS}


def ready(root, form="h5", **options):
    options = {"split": Split(labeled=3), "preprocessing": AS_STORED, "files": "nifti" if form == "nifti" else "h5", **options}
    data = ACDC(root, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def whole(data, part, number=0):
    (batch,) = data.case_loader(data.parts[part][number : number + 1])
    return batch


def test_the_published_lists():
    lists = NAMED_SPLITS["luo2022"]
    assert [len(lists[p]) for p in ("train", "val", "test")] == [70, 10, 20]
    assert sorted(p for part in lists.values() for p in part) == [f"patient{n:03d}" for n in range(1, 101)]
    assert lists["train"][:7] == tuple(f"patient{n:03d}" for n in (99, 38, 50, 100, 58, 21, 49))
    assert (lists["train"][-1], lists["val"][0], lists["test"][0]) == ("patient015", "patient028", "patient011")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_divides_patients_as_published(roots, form):
    data = ready(roots[form], form)
    for part in ("train", "val", "test"):
        assert list(dict.fromkeys(c.patient for c in data.parts[part])) == NAMES[part]
        assert len(data.parts[part]) == 2 * len(NAMES[part])
    assert list(dict.fromkeys(c.patient for c in data.parts["labeled"])) == NAMES["train"][:3]
    assert not {c.patient for c in data.parts["unlabeled"]} & set(NAMES["train"][:3])
    assert len(data.parts["labeled"]) == 6
    assert not [f for f in data.findings(progress=False) if f.level == "error"]


def test_frames_without_a_label_are_trained_on_only_of_patients_of_the_training_list(roots, tmp_path):
    own = shutil.copytree(roots["nifti"], tmp_path / "own")
    for patient in (NAMES["train"][-1], NAMES["val"][0], NAMES["test"][0], "patient101"):
        (frame,) = own.rglob(f"{patient}_frame01_gt.nii.gz")
        frame.unlink()
    streams = {"labeled": {"cases": "labeled"}, "unlabeled": {"cases": "unlabeled"}}
    data = ready(own, "nifti", streams=streams)
    assert {c.patient for c in data.parts["unlabeled"]} == set(NAMES["train"][3:])
    assert len(data.parts["unlabeled"]) == 2 * len(NAMES["train"][3:])  # the frame that lost its label is there


@pytest.mark.parametrize("form", ["h5", "slices", "flat"])
def test_hdf5_volumes_have_the_axes_of_the_nifti_files(roots, form):
    data = ready(roots[form], form)
    batch = whole(data, "test")
    number = PATIENTS["test"][0]
    name = f"patient{number:03d}_frame01"
    with h5py.File(roots["h5"] / "data" / f"{name}.h5") as file:
        image, label = file["image"][()], file["label"][()]
    assert batch["case"] == [name]
    assert np.array_equal(batch["image"][0, 0].numpy(), image.transpose(2, 1, 0))
    assert np.array_equal(batch["label"][0, 0].numpy(), label.transpose(2, 1, 0))
    assert (data.task.slice_axis, data.task.unit, data.task.region_names) == (2, "vox", ("RV", "MYO", "LV"))
    assert set(np.unique(label)) == {0, 1, 2, 3}
    nifti = nib.load(roots["nifti"] / "training" / f"patient{number:03d}" / f"{name}.nii.gz").get_fdata()
    assert np.allclose((nifti - nifti.min()) / np.ptp(nifti), batch["image"][0, 0].numpy(), atol=1e-6)


def test_info_of_the_challenge(roots):
    cases = {c.id: c for c in find_niftis(roots["nifti"])}
    case = cases["patient011_frame08"]
    assert case.attributes == {"phase": "ES", "group": "HCM", "height": 184.0, "weight": 95.0}
    assert cases["patient011_frame01"].attributes["phase"] == "ED"
    assert (case.patient, case.images["mri"].name, case.label.name) == (
        "patient011", "patient011_frame08.nii.gz", "patient011_frame08_gt.nii.gz",
    )  # fmt: skip
    assert "patient101_frame01" in cases
    data = ready(roots["nifti"], "nifti", unit="mm")
    assert "patient101" not in {c.patient for part in data.parts if part != "predict" for c in data.parts[part]}
    assert data.task.unit == "mm"


def test_frames_without_info_and_frames_that_are_not_there(roots, tmp_path):
    own = shutil.copytree(roots["nifti"] / "training", tmp_path / "own")
    (own / "patient011" / "Info.cfg").unlink()
    assert [c.id for c in find_niftis(own) if c.patient == "patient011"] == ["patient011_frame01", "patient011_frame08"]
    (own / "patient013" / "patient013_frame01_gt.nii.gz").unlink()
    assert [c.label is None for c in find_niftis(own) if c.patient == "patient013"] == [True, False]
    (own / "patient013" / "patient013_frame01.nii.gz").unlink()
    with pytest.raises(SuiteError, match=r"1 frame\(s\) named by Info.cfg are not there: patient013_frame01;"):
        find_niftis(own)
    (own / "patient013" / "Info.cfg").write_text("ED: first\n")
    with pytest.raises(SuiteError, match=r"patient013/Info.cfg: ED is 'first', expected a number"):
        find_niftis(own)


def test_trained_on_slices_of_256_and_tested_on_stacks(roots):
    settings = Preprocessing(crop="none", size=(256, 256, None), normalize="minmax")
    streams = {"labeled": {"cases": "labeled", "batch_size": 2}, "unlabeled": {"cases": "unlabeled", "batch_size": 2}}
    data = ready(roots["h5"], preprocessing=settings, view="slice", patch=(256, 256), streams=streams, samples_per_epoch=2)
    batch, _, _ = next(iter(data.train_dataloader()))
    assert batch["labeled"]["image"].shape == batch["labeled"]["label"].shape == (2, 1, 256, 256)
    assert "label" not in batch["unlabeled"]
    tested = whole(data, "test", 2)
    assert tested["image"].shape == (1, 1, 256, 256, 5)
    assert (float(tested["image"].min()), float(tested["image"].max())) == pytest.approx((0, 1))
    native = tested["native_label"][0]
    assert native.shape == (22 + PATIENTS["test"][1] % 3, 26, 5)
    back = tested["geometry"][0].to_native(tested["label"][0].float(), discrete=True)[0]
    assert (back == native).all()


def test_a_limit_keeps_patients_of_every_part(roots):
    data = ACDC(roots["h5"], limit_cases=6, split=Split(labeled=2))
    parts = data.divided(data.cases())
    assert [len(parts[p]) for p in ("train", "val", "test", "labeled", "unlabeled")] == [4, 1, 1, 2, 2]


def test_errors_name_the_file_and_the_fix(roots, tmp_path):
    with pytest.raises(SuiteError, match="ACDC data: no such folder"):
        find_stacks(tmp_path / "nowhere")
    with pytest.raises(SuiteError, match=r"no ACDC frames, it holds training, testing|testing, training.*fits data.files=nifti"):
        find_stacks(roots["nifti"])
    with pytest.raises(SuiteError, match=r"expected files such as patient001/Info.cfg.*fits data.files=h5"):
        find_niftis(roots["flat"])
    with pytest.raises(SuiteError, match="did you mean 'nifti'"):
        ACDC(tmp_path, files="nift")
    own = shutil.copytree(roots["slices"], tmp_path / "own", ignore=shutil.ignore_patterns(".cache"))
    folder = own / "ACDC_training_slices"
    with h5py.File(folder / "patient011_frame01_slice_2.h5", "r+") as file:
        del file["image"]
        file["image"] = np.zeros((3, 4), np.float32)
    with pytest.raises(SuiteError, match=r"patient011_frame01_slice_2.h5: 'image' has shape \(3, 4\), patient011_frame01_slice_1.h5 has"):
        ACDC(own).materialize()
    (folder / "patient011_frame01_slice_2.h5").unlink()
    with pytest.raises(SuiteError, match=r"patient011_frame01 has the slices 1 to 5 without \[2\]"):
        find_stacks(own)
    twice = tmp_path / "twice"
    for place in ("a", "b"):
        (twice / place).mkdir(parents=True)
        shutil.copy(roots["flat"] / "patient011_frame01.h5", twice / place)
    with pytest.raises(SuiteError, match="one frame twice"):
        find_stacks(twice)


def test_a_stack_with_other_dimensions(roots, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(roots["h5"] / "data" / "slices" / "patient011_frame01_slice_1.h5", own / "patient011_frame01.h5")
    with pytest.raises(SuiteError, match=r"patient011_frame01.h5: 'image' has shape .*expected 3 dimensions"):
        ACDC(own, named_split=None).materialize()


def test_real_acdc(real_data, tmp_path):
    root = real_data / "acdc"
    for part, patients in NAMED_SPLITS["luo2022"].items():
        listed = [line.partition("_")[0] for line in (root / f"{part}.list").read_text().split()]
        assert list(dict.fromkeys(listed)) == list(patients)
    data = ready(root, cache=tmp_path, split=Split(labeled=3), check=False, limit_cases=8)
    assert data.parts["train"]
    assert data.parts["test"]
    batch = whole(data, "train")
    with h5py.File(root / f"{batch['case'][0]}.h5") as file:
        assert np.array_equal(batch["label"][0, 0].numpy(), file["label"][()].transpose(2, 1, 0))
