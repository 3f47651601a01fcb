import gzip
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from datamodules import integrity
from datamodules.integrity import Finding, check_cases, raise_on_errors, render
from datamodules.readers.brats_files import brats_task, find_brats
from datamodules.readers.folder_files import find_folder
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume, write_volume
from lesionbench.task import Task
from tests.fake_data import LPS, WRITERS, write_fake_brats, write_fake_folder

TASK = Task(
    channels=("t1", "flair"), classes={"background": 0, "core": 1, "edema": 2}, regions={"whole": ("core", "edema"), "core": ("core",)}
)
SHAPE = (12, 12, 10)


@pytest.fixture
def cases(tmp_path):
    return find_folder(
        write_fake_folder(tmp_path, 3, TASK.channels, {"background": 0, "core": 1, "edema": 2}, raters=2, shape=SHAPE), TASK.channels
    )


def check(cases, task=TASK, **options):
    return check_cases(cases, task, progress=False, **options)


def rewrite(path, change, affine=None):
    """Replaces a file's voxels by `change(voxels)` and, if given, its affine."""
    array, old, _ = read_volume(path)
    write_volume(path, change(array), old if affine is None else affine)


def same(array):
    return array


@pytest.mark.parametrize("name", [n for n in WRITERS if n.startswith("brats") or n == "folder"])
def test_clean_data_give_no_finding(tmp_path, name):
    root = WRITERS[name](tmp_path)
    if name == "folder":
        found, task = find_folder(root), Task(channels=("t1", "flair"), classes={"background": 0, "lesion": 1})
    else:
        layout = name.removeprefix("brats")
        found, task = find_brats(root, layout), brats_task(layout)
    patients = sorted({c.patient for c in found})
    splits = {"train": [c.id for c in found if c.patient in patients[:3]], "test": [c.id for c in found if c.patient not in patients[:3]]}
    assert check(found, task, splits=splits) == []
    raise_on_errors([])


def truncate(keep):
    def plant(case):
        path = case.images["flair"]
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep) if keep > 0 else keep])
        return path

    return plant


def flip_a_bit(case):
    path = case.images["flair"]
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the checksum: the voxels themselves can be read
    path.write_bytes(data)
    return path


def truncate_uncompressed(case):
    path = case.images["flair"].with_suffix("")
    path.write_bytes(gzip.decompress(case.images["flair"].read_bytes())[:-100])
    case.images["flair"] = path
    return path


def ruin_header(case):
    path = case.images["flair"]
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[70:72] = b"\xff\x7f"  # a data type that does not exist
    path.write_bytes(gzip.compress(bytes(data)))
    return path


def flatten_affine(case):
    path = case.images["flair"]
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[252:256] = np.array([0, 2], "<i2").tobytes()  # qform_code, sform_code
    data[280:328] = np.diag([1, 1, 0, 1])[:3].astype("<f4").tobytes()  # srow_x, srow_y, srow_z
    path.write_bytes(gzip.compress(bytes(data)))
    return path


def text_file(case):
    case.label.write_text("not an image")
    return case.label


def lost_file(case):
    case.images["t1"].unlink()
    return case.images["t1"]


def planted(file_of, change, affine=None):
    """A defect: the voxels of one file changed, or its affine."""

    def plant(case):
        rewrite(file_of(case), change, affine)
        return file_of(case)

    return plant


def with_value(value, kind=np.float32):
    def change(array):
        array = array.astype(kind)
        array[5, 5, 5] = value
        return array

    return change


def t1(case):
    return case.images["t1"]


def flair(case):
    return case.images["flair"]


def label(case):
    return case.label


def second_rater(case):
    return case.raters[1]


FLIPPED = LPS * np.array([[-1], [1], [1], [1]])
SHIFTED = LPS + np.array([[0, 0, 0, 0.2], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
DEFECTS = {
    "gzip cut in half": (truncate(0.5), integrity.UNREADABLE, "end"),
    "gzip without its last bytes": (truncate(-4), integrity.UNREADABLE, "end"),
    "gzip checksum": (flip_a_bit, integrity.UNREADABLE, "CRC"),
    "empty file": (truncate(0.0001), integrity.UNREADABLE, ""),
    "nii cut": (truncate_uncompressed, integrity.UNREADABLE, ""),
    "header": (ruin_header, integrity.UNREADABLE, ""),
    "text": (text_file, integrity.UNREADABLE, ""),
    "lost": (lost_file, integrity.UNREADABLE, "no such file"),
    "two volumes": (planted(t1, lambda a: np.stack([a, a], axis=-1)), integrity.UNREADABLE, "(12, 12, 10, 2)"),
    "nan": (planted(t1, with_value(np.nan)), integrity.NOT_FINITE, "1 of 1440 voxels"),
    "inf": (planted(flair, with_value(-np.inf)), integrity.NOT_FINITE, "1 of 1440 voxels"),
    "nan in label": (planted(label, with_value(np.nan)), integrity.NOT_FINITE, "1 of 1440 voxels"),
    "constant": (planted(flair, lambda a: np.full_like(a, 7)), integrity.CONSTANT, "7"),
    "image shape": (planted(flair, lambda a: a[:, :, :-1]), integrity.SHAPE, "(12, 12, 9) against (12, 12, 10)"),
    "label shape": (planted(label, lambda a: a[:-1]), integrity.SHAPE, "(11, 12, 10) against (12, 12, 10)"),
    "affine": (planted(flair, same, SHIFTED), integrity.AFFINE, "voxels apart"),
    "rater affine": (planted(second_rater, same, SHIFTED), integrity.AFFINE, "voxels apart"),
    "orientation": (planted(label, same, FLIPPED), integrity.ORIENTATION, "RPS against LPS"),
    "singular": (flatten_affine, integrity.SINGULAR, "[0.0, 0.0, 0.0, 0.0]"),
    "unknown value": (planted(label, with_value(7, np.int16)), integrity.UNKNOWN_VALUE, "7; known [0, 1, 2]"),
    "rater's unknown value": (planted(second_rater, with_value(-1, np.int16)), integrity.UNKNOWN_VALUE, "-1; known"),
    "interpolated label": (planted(label, with_value(0.5)), integrity.NOT_INTEGER, "0.5"),
    "almost an integer": (planted(label, with_value(1.0000001)), integrity.NOT_INTEGER, repr(float(np.float32(1.0000001)))),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_one_planted_defect_is_one_error_that_names_it(cases, defect):
    plant, message, value = DEFECTS[defect]
    path = plant(cases[2])  # the even ones have two raters
    findings = check(cases)
    assert [(f.level, f.case, f.file, f.message) for f in findings] == [("error", "case_02", path, message)]
    assert value in findings[0].value
    with pytest.raises(SuiteError) as error:
        raise_on_errors(findings)
    assert "case_02" in str(error.value)
    assert str(path) in str(error.value)


def test_affines_within_a_thousandth_of_a_voxel_agree(cases):
    rewrite(cases[1].images["flair"], same, LPS + 0.9e-3 * np.eye(4)[:, [3, 3, 3, 0]])
    rewrite(cases[1].label, same, LPS + np.array([[0, 0, 0, 0.0009], *[[0.0] * 4] * 3]))
    assert check(cases) == []


def test_a_label_that_its_writer_scaled_is_told_so(cases):
    """nibabel stores fractional types as scaled bytes: 1 comes back as 1.00392."""
    label = np.zeros(SHAPE)
    label[0, 0, :3] = 1, 2, 4
    image = nib.Nifti1Image(label, LPS)
    image.set_data_dtype(np.uint8)
    image.to_filename(cases[1].label)
    found = [f for f in check(cases) if f.message == integrity.NOT_INTEGER]
    assert [f.file for f in found] == [cases[1].label]
    assert "1.00392" in found[0].value
    assert "scl_slope" in found[0].message


def test_a_bad_file_does_not_hide_the_others(cases):
    truncate(0.5)(cases[0])
    rewrite(cases[0].label, with_value(7, np.int16))
    rewrite(cases[2].images["t1"], with_value(np.nan))
    assert [(f.case, f.message) for f in check(cases)] == [
        ("case_00", integrity.UNREADABLE),
        ("case_00", integrity.UNKNOWN_VALUE),
        ("case_02", integrity.NOT_FINITE),
    ]


def test_missing_channels_and_labels(cases):
    del cases[0].images["t1"]
    cases[1].label, cases[1].raters = None, []
    cases[2].label = None  # its raters are labels enough
    no_channel = Finding("error", "case_00", None, integrity.NO_CHANNEL, "t1")
    no_label = Finding("error", "case_01", None, integrity.NO_LABEL)
    assert check(cases) == [no_channel, no_label]
    assert check(cases, allow_missing=True) == [no_label]
    assert check(cases, allow_missing=True, splits={"train": ["case_00"], "unlabeled": ["case_01"], "predict": ["case_02"]}) == []
    assert check(cases, allow_missing=True, splits={"train": ["case_00"], "test": ["case_01"]}) == [no_label]
    cases[0].images.clear()
    assert check(cases[:1], allow_missing=True) == [Finding("error", "case_00", None, integrity.NO_CHANNEL, "t1, flair")]


def test_ignored_values_and_channels_outside_the_task_are_left_alone(cases):
    rewrite(cases[1].label, with_value(7, np.int16))
    rewrite(cases[1].images["t1"], with_value(np.nan))
    assert check(cases, replace(TASK, channels=("flair",), ignore=(7,))) == []


def test_same_id_twice(cases):
    findings = check([*cases, cases[0]])
    assert findings == [Finding("error", "case_00", cases[0].images["t1"], integrity.SAME_ID, f"also {cases[0].images['t1']}")]


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_same_image_content_in_two_cases(cases, kind):
    for channel, path in cases[0].images.items():
        shutil.copy(path, cases[2].images[channel])
        rewrite(cases[2].images[channel], lambda array: array.astype(kind))
    assert check(cases) == [Finding("error", "case_02", cases[2].images["t1"], integrity.SAME_IMAGE, "t1, flair as in case_00")]


def test_one_image_shared_by_two_cases(cases):
    shutil.copy(cases[0].images["flair"], cases[1].images["flair"])
    assert check(cases) == [Finding("error", "case_01", cases[1].images["flair"], integrity.SAME_IMAGE, "flair as in case_00")]


def test_a_patient_in_two_splits_and_a_split_entry_that_is_no_case(tmp_path):
    found = find_brats(write_fake_brats(tmp_path, "2023", shape=SHAPE))
    ids = [c.id for c in found]
    findings = check(found, brats_task("2023"), splits={"train": [ids[0], ids[2]], "test": [ids[1], "nobody"]})
    assert findings == [
        Finding("error", "nobody", None, integrity.NOT_FOUND, "test"),
        Finding("error", ids[0], None, integrity.TWO_SPLITS, f"patient BraTS-GLI-00000 in train ({ids[0]}), test ({ids[1]})"),
    ]
    assert check(found, brats_task("2023"), splits={"train": ids[:2], "test": ids[2:]}) == []


def test_empty_labels_and_regions_are_warnings(cases):
    rewrite(cases[0].label, np.zeros_like)
    rewrite(cases[1].label, lambda a: np.where(a == 1, 2, a))
    findings = check(cases)
    assert findings == [
        Finding("warning", "case_00", cases[0].label, integrity.EMPTY_LABEL),
        Finding("warning", "case_01", cases[1].label, integrity.EMPTY_REGION, "core"),
    ]
    raise_on_errors(findings)


@pytest.mark.parametrize(
    ("sizes", "value"),
    [
        ((1, 1, 2.1), "1 x 1 x 2.1 mm, the set's median is 1 x 1 x 1 mm"),
        ((1, 1, 1.9), None),
        ((0.45, 1, 1), "0.45 x 1 x 1 mm, the set's median is 1 x 1 x 1 mm"),
    ],
)
def test_a_voxel_size_far_from_the_rest_is_a_warning(cases, sizes, value):
    for path in cases[0].files:
        rewrite(path, same, LPS @ np.diag([*sizes, 1.0]))
    findings = check(cases)
    assert [(f.level, f.case, f.file, f.message) for f in findings] == (
        [("warning", "case_00", cases[0].images["t1"], integrity.ODD_SPACING)] if value else []
    )
    assert not value or value in findings[0].value


def test_voxel_sizes_are_compared_along_anatomical_axes(cases):
    """One sagittal scan among axial ones of the same resolution is not odd."""
    for case in cases:
        for path in case.files:
            axes = [1, 2, 0] if case is cases[1] else [0, 1, 2]
            rewrite(path, lambda array, axes=axes: array.transpose(axes), (LPS @ np.diag([1, 1, 5.0, 1]))[:, [*axes, 3]])
    assert check(cases) == []


def test_strong_anisotropy_is_a_warning_even_if_all_cases_share_it(cases):
    for case in cases:
        for path in case.files:
            rewrite(path, same, LPS @ np.diag([1, 1, 10.5, 1]))
    assert [f.value for f in check(cases)] == ["1 x 1 x 10.5 mm, anisotropy 10.5"] * 3


def test_threads_find_the_same_in_the_same_order(cases):
    truncate(0.5)(cases[0])
    rewrite(cases[1].label, np.zeros_like)
    rewrite(cases[2].images["t1"], with_value(np.nan))
    assert check(cases, workers=3) == check(cases)


def test_render_groups_counts_and_puts_errors_first():
    findings = [Finding("warning", "w", None, integrity.EMPTY_LABEL)]
    findings += [Finding("error", f"case{n}", None, integrity.NO_LABEL) for n in range(9)]
    findings += [Finding("error", "odd", None, integrity.NO_CHANNEL, "t1, flair")]
    lines = render(findings).splitlines()
    assert lines == [
        "Integrity check: 10 error(s), 1 warning(s)",
        f"error x 9: {integrity.NO_LABEL}",
        *(f"  case{n}" for n in range(4)),
        "  ... and 5 more",
        f"error x 1: {integrity.NO_CHANNEL}",
        "  odd: t1, flair",
        f"warning x 1: {integrity.EMPTY_LABEL}",
        "  w",
    ]
    assert render([]) == "Integrity check: nothing found."


def test_no_noise_off_a_terminal(cases, capfd):
    check_cases(cases, TASK, progress=True)
    assert capfd.readouterr() == ("", "")


def test_real_brats_2018_is_clean(real_data):
    found = find_brats(real_data / "brats18")
    assert [f for f in check(found, brats_task("2018"), workers=2) if f.level == "error"] == []
