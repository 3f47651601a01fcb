import csv
import json
import shutil
from functools import partial

import numpy as np
import pytest

from datamodules.brats import BraTS
from datamodules.readers.brats_files import brats_task, detect_layout, find_brats
from datamodules.readers.folder_files import find_folder, find_images, images_below
from datamodules.readers.ibsr_files import find_ibsr
from datamodules.split import Split
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from tests.fake_data import BRATS_CHANNELS, LPS, WRITERS, write_fake_brats, write_fake_folder

TINY = (6, 6, 5)


def touch(folder, *names):
    """Empty files: finding cases looks at names only."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


DETECTED = ["2018", "2019", "2020", "2021", "2023", "2024", "2024_men_rt"]  # by names alone


@pytest.mark.parametrize("layout", [*DETECTED, "2023_ped", "2024_ped", "2025_met"])
@pytest.mark.parametrize("extension", [".nii.gz", ".nii"])
def test_every_layout_is_detected_and_complete(tmp_path, layout, extension):
    root = write_fake_brats(tmp_path, layout, shape=TINY, extension=extension)
    cases = find_brats(root, layout)
    if layout in DETECTED:
        assert detect_layout(root) == layout
        assert find_brats(root) == cases
    assert len(cases) == 6
    assert [c.id for c in cases] == sorted(c.id for c in cases)
    for case in cases:
        assert tuple(case.images) == (("t1ce",) if layout == "2024_men_rt" else BRATS_CHANNELS)
        assert all(path.is_file() and path.parent.name == case.id for path in case.files)
        assert all(path.name.endswith(extension) for path in case.files)
        assert "eg" in case.label.name or case.label.name == f"{case.id}_gtv{extension}"


def test_channels_are_not_mixed_up(tmp_path):
    cases = find_brats(write_fake_brats(tmp_path, "2023", count=1, shape=TINY))
    suffix = {channel: path.name.removesuffix(".nii.gz").rpartition("-")[2] for channel, path in cases[0].images.items()}
    assert suffix == {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
    assert cases[0].label.name.endswith("-seg.nii.gz")


def test_2018_grade_site_patient_and_odd_survival(tmp_path):
    cases = {c.id: c for c in find_brats(write_fake_brats(tmp_path, "2018", shape=TINY))}
    dead = cases["Brats18_CBICA_100_1"]
    assert (dead.site, dead.patient) == ("CBICA", "Brats18_CBICA_100")
    assert dead.attributes == {"grade": "HGG", "age": 60.0, "survival": 289.0, "event": 1, "resection": "GTR"}
    assert cases["Brats18_TCIA01_101_1"].site == "TCIA01"
    assert "survival" not in cases["Brats18_TCIA01_101_1"].attributes  # NA
    assert cases["Brats18_2013_102_1"].attributes == {"grade": "LGG", "age": 62.2, "resection": "GTR"}  # empty survival
    assert cases["Brats18_CBICA_103_1"].attributes["event"] == 0


def test_flat_2018_folder_has_no_grade(tmp_path):
    source = write_fake_brats(tmp_path / "graded", "2018", shape=TINY)
    flat = tmp_path / "flat"
    for case in find_brats(source):
        shutil.copytree(case.label.parent, flat / case.id)
    cases = find_brats(flat)
    assert [c.id for c in cases] == [c.id for c in find_brats(source)]
    assert all("grade" not in c.attributes for c in cases)


def test_archive_folder_above_the_grades(tmp_path):
    write_fake_brats(tmp_path / "MICCAI_BraTS_2018_Data_Training", "2018", shape=TINY)
    cases = find_brats(tmp_path)
    assert len(cases) == 6
    assert {"grade", "age"} <= set(cases[0].attributes)


def test_2020_survival_strings_grades_and_misnamed_label(tmp_path):
    root = write_fake_brats(tmp_path, "2020", shape=TINY)
    cases = {int(c.id[-3:]): c for c in find_brats(root)}
    survival = {n: (c.attributes.get("survival"), c.attributes.get("event")) for n, c in cases.items()}
    assert survival == {1: (289, 1), 2: (361, 0), 3: (None, None), 4: (None, None), 5: (104, 1), 355: (None, None)}
    assert cases[2].attributes["age"] == 61.1
    assert "resection" not in cases[2].attributes
    assert [cases[n].attributes["grade"] for n in (1, 2, 3)] == ["HGG", "HGG", "LGG"]
    assert cases[1].site == "CBICA"  # from the case's name of 2019
    assert cases[355].label.name == "W39_1998.09.19_Segm.nii.gz"
    assert find_brats(root / "MICCAI_BraTS2020_TrainingData") == list(cases.values())


def test_a_survival_string_of_no_known_kind_is_named(tmp_path):
    root = touch(tmp_path, *(f"BraTS20_Training_001/BraTS20_Training_001_{c}.nii" for c in BRATS_CHANNELS))
    (root / "survival_info.csv").write_text("\ufeffBrats20ID,Age,Survival_days\nBraTS20_Training_001,60,two years\n")  # byte order mark
    with pytest.raises(SuiteError, match=r"survival_info.csv, BraTS20_Training_001, survival_days.*'two years'"):
        find_brats(root)


def test_2023_time_points_share_a_patient(tmp_path):
    cases = find_brats(write_fake_brats(tmp_path, "2023", shape=TINY))
    assert [c.id for c in cases[:3]] == ["BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00001-000"]
    assert [c.patient for c in cases[:3]] == ["BraTS-GLI-00000", "BraTS-GLI-00000", "BraTS-GLI-00001"]


def test_validation_cases_have_no_label(tmp_path):
    names = [f"MICCAI_BraTS2020_ValidationData/BraTS20_Validation_001/BraTS20_Validation_001_{c}.nii.gz" for c in BRATS_CHANNELS]
    cases = find_brats(touch(tmp_path, *names, "name_mapping_validation_data.csv"))
    assert [(c.id, c.label, c.patient) for c in cases] == [("BraTS20_Validation_001", None, "BraTS20_Validation_001")]


def test_missing_channels_are_listed_at_once_or_allowed(tmp_path):
    root = write_fake_brats(tmp_path, "2021", shape=TINY, missing=[(1, "t1ce"), (1, "flair"), (4, "t2"), (5, "seg")])
    with pytest.raises(SuiteError) as error:
        find_brats(root)
    assert "BraTS2021_00001: t1ce, flair\n" in str(error.value)
    assert "BraTS2021_00004: t2\n" in str(error.value)
    cases = find_brats(root, allow_missing=True)
    assert tuple(cases[1].images) == ("t1", "t2")
    assert cases[5].label is None


def test_a_case_without_any_image_is_refused_even_if_gaps_are_allowed(tmp_path):
    (touch(tmp_path, *(f"BraTS2021_00000/BraTS2021_00000_{c}.nii.gz" for c in BRATS_CHANNELS)) / "BraTS2021_00001").mkdir()
    with pytest.raises(SuiteError, match="BraTS2021_00001: t1, t1ce, t2, flair"):
        find_brats(tmp_path, allow_missing=True)


def test_missing_root_empty_root_mixed_years_and_unknown_layout(tmp_path):
    with pytest.raises(SuiteError) as error:
        find_brats(tmp_path / "nowhere")
    for word in (str(tmp_path / "nowhere"), "data.root", "LESIONBENCH_DATA", "docs/data.md"):
        assert word in str(error.value)
    with pytest.raises(SuiteError, match=r"found none.*holds nothing[\s\S]*BraTS2021_00000/BraTS2021_00000_t1.nii.gz"):
        find_brats(tmp_path)
    touch(tmp_path, *(f"{n}/{n}_{c}.nii" for n in ("BraTS2021_00000", "BraTS20_Training_001") for c in BRATS_CHANNELS))
    with pytest.raises(SuiteError, match=r"1 of 2020, 1 of 2021; choose one with data.layout"):
        find_brats(tmp_path)
    assert [c.id for c in find_brats(tmp_path, "2021")] == ["BraTS2021_00000"]
    assert [c.id for c in find_brats(tmp_path, 2020)] == ["BraTS20_Training_001"]  # a config may give a number
    with pytest.raises(SuiteError, match="no BraTS 2023 case folders"):
        find_brats(tmp_path, "2023")
    with pytest.raises(SuiteError, match="Unknown BraTS layout '2022'"):
        find_brats(tmp_path, "2022")


@pytest.mark.parametrize("layout", ["2018", "2020", "2021"])
def test_up_to_2021_both_values_of_enhancing_tumor_are_read_and_4_is_written(layout):
    task = brats_task(layout)
    assert task.from_disk(np.array([0, 1, 2, 3, 4])).tolist() == [0, 1, 2, 3, 3]
    assert task.to_disk(np.array([0, 1, 2, 3])).tolist() == [0, 1, 2, 4]
    assert task.region_names == ("WT", "TC", "ET")
    assert task.region_matrix.astype(int).tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("layout", "values"),
    [  # region -> values on disk, as the challenges evaluate them
        ("2023", {"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}}),
        ("2023_ped", {"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}}),
        ("2024", {"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}, "NETC": {1}, "SNFH": {2}, "RC": {4}}),
        ("2024_ped", {"WT": {1, 2, 3, 4}, "TC": {1, 2, 3}, "ET": {1}, "NETC": {2}, "CC": {3}, "ED": {4}}),
        ("2024_men_rt", {"GTV": {1}}),
        ("2025_met", {"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}, "RC": {4}}),
    ],
)
def test_what_label_values_mean_from_2023_on(layout, values):
    task = brats_task(layout)
    assert task.region_values() == values
    assert list(task.region_values()) == list(values)
    known = sorted({0}.union(*values.values()))
    assert task.to_disk(task.from_disk(np.array(known))).tolist() == known
    with pytest.raises(SuiteError, match="unknown label value"):
        task.from_disk(np.array([max(known) + 1]))


def test_names_that_two_sets_share_are_told_apart_by_the_user(tmp_path):
    """Pediatric labels of 2023 and of 2024 mean other things under the same names; the other pairs differ in one class more."""
    pediatric = write_fake_brats(tmp_path / "ped", "2024_ped", count=1, shape=TINY)
    with pytest.raises(SuiteError, match=r"BraTS-PED-00000-000 could be of data\.layout=2023_ped or 2024_ped.*say which"):
        find_brats(pediatric)
    metastases = write_fake_brats(tmp_path / "met", "2025_met", count=1, shape=TINY)
    assert detect_layout(metastases) == "2023"
    after = write_fake_brats(tmp_path / "gli", "2024", count=2, shape=TINY)
    with pytest.raises(SuiteError, match=r"no BraTS 2023 case folders \(there are cases of data\.layout=2024\)"):
        find_brats(after, "2023")
    mixed = write_fake_brats(after, "2023", count=2, shape=TINY)
    assert detect_layout(mixed) == "2024"
    for name, patient in [
        ("BraTS-SSA-00002-000", "BraTS-SSA-00002"),
        ("BraTS-GoAT-00003", "BraTS-GoAT-00003"),
        ("BraTS-MEN-00004-000", "BraTS-MEN-00004"),
    ]:
        (case,) = find_brats(touch(tmp_path / name, *(f"{name}/{name}-{s}.nii.gz" for s in ("t1n", "t1c", "t2w", "t2f"))))
        assert case.patient == patient


@pytest.mark.parametrize(
    ("written", "read", "fits"), [("2024", "2023", "2024"), ("2025_met", "2023", "2025_met"), ("2024_ped", "2023_ped", "2024_ped")]
)
def test_a_label_map_of_another_set_is_refused_with_the_set_that_it_fits(tmp_path, written, read, fits):
    root = write_fake_brats(tmp_path, written, shape=TINY)
    if written == "2024":  # a case from before treatment in the names, with a resection cavity in the labels
        for folder in sorted(root.glob("BraTS-GLI-*-1*")):
            new = folder.name[:-3] + "0" + folder.name[-2:]
            for path in folder.iterdir():
                path.rename(folder / path.name.replace(folder.name, new))
            folder.rename(root / new)
    data = BraTS(root, layout=read, split=Split(test=2, val=1), patch=(4, 4, 4))
    with pytest.raises(SuiteError, match=rf"holds values of no class[\s\S]*: 4; known \[0, 1, 2, 3\].*fits data\.layout={fits} \("):
        data.prepare_data()
    assert not data.store.folder.exists()
    BraTS(root, layout=fits, split=Split(test=2, val=1), patch=(4, 4, 4)).prepare_data()


def test_folder_with_raters_and_attributes(tmp_path):
    cases = find_folder(write_fake_folder(tmp_path, count=3, raters=3, shape=TINY))
    assert [c.id for c in cases] == ["case_00", "case_01", "case_02"]
    assert [tuple(c.images) for c in cases] == [("flair", "t1")] * 3  # told by the names, in alphabetical order
    assert [len(c.raters) for c in cases] == [3, 2, 3]
    assert [p.name for p in cases[0].raters] == [f"case_00_rater{n}.nii.gz" for n in (1, 2, 3)]
    assert cases[0].label.name == "case_00.nii.gz"
    assert (cases[1].patient, cases[1].site) == ("patient_01", "north")
    assert cases[1].attributes == {"age": 51, "score": 1.5}
    assert cases[0].attributes == {"age": 50}  # an empty cell is no attribute


def test_folder_raters_are_ordered_by_number(tmp_path):
    names = [f"labels/a_rater{n}.nii.gz" for n in (10, 2, 1)]
    case = find_folder(touch(tmp_path, "images/a_t1.nii.gz", *names))[0]
    assert [p.name for p in case.raters] == ["a_rater1.nii.gz", "a_rater2.nii.gz", "a_rater10.nii.gz"]
    assert case.label is None


def test_folder_channel_order_and_the_longest_channel_name_wins(tmp_path):
    touch(tmp_path, "images/my_case_flair.nii.gz", "images/my_case_flair_registered.nii", "images/my_case_t1.nii.gz", "images/._x_t1.nii")
    case = find_folder(tmp_path, ["registered", "flair_registered", "flair"], allow_missing=True)
    assert [c.id for c in case] == ["my_case"]
    assert {c: p.name for c, p in case[0].images.items()} == {
        "flair_registered": "my_case_flair_registered.nii",
        "flair": "my_case_flair.nii.gz",
    }
    assert list(find_folder(tmp_path, ["t1", "flair"])[0].images) == ["t1", "flair"]


def test_folder_errors(tmp_path):
    with pytest.raises(SuiteError, match=r"data.root"):
        find_folder(tmp_path / "nowhere")
    with pytest.raises(SuiteError, match="no folder images/"):
        find_folder(tmp_path)
    touch(tmp_path, "images/a_t1.nii.gz", "images/a_t2.nii.gz", "images/b_t1.nii.gz", "labels/a.nii.gz")
    with pytest.raises(SuiteError, match="  b: t2\n"):
        find_folder(tmp_path)
    assert [list(c.images) for c in find_folder(tmp_path, allow_missing=True)] == [["t1", "t2"], ["t1"]]
    with pytest.raises(SuiteError, match=r"no image of channels \['flair'\] among 3 image files \(a_t1.nii.gz"):
        find_folder(tmp_path, ["flair"])
    touch(tmp_path, "labels/a_seg.nii.gz")
    with pytest.raises(SuiteError, match=r"belong to no case: 1 image files .a_seg.nii.gz"):
        find_folder(tmp_path, ["t1"])
    touch(tmp_path, "images/a_t1.nii")
    with pytest.raises(SuiteError, match="two files for one channel"):
        find_folder(tmp_path, ["t1"])


LIST = [
    {
        "case": "001",
        "patient": "p",
        "site": "s",
        "t1": "x/1.nii",
        "my_flair": "x/2.nii.gz",
        "label": "x/3.nii",
        "rater1": "x/4.nii",
        "age": "61",
    },
    {"case": "002", "patient": "", "site": "", "t1": "x/1.nii", "my_flair": "x/2.nii.gz", "label": "", "rater1": "", "age": "NA"},
]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_list_file(tmp_path, kind):
    root = touch(tmp_path / "root", "lists/x/1.nii", "lists/x/2.nii.gz", "lists/x/3.nii", "lists/x/4.nii")
    path = root / "lists" / f"cases.{kind}"
    if kind == "json":
        path.write_text(json.dumps(LIST))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
            writer = csv.DictWriter(file, LIST[0])
            writer.writeheader()
            writer.writerows(LIST)
    x = root / "lists" / "x"
    first = Case("001", {"t1": x / "1.nii", "my_flair": x / "2.nii.gz"}, x / "3.nii", [x / "4.nii"], "p", "s", {"age": 61})
    second = Case("002", {"t1": x / "1.nii", "my_flair": x / "2.nii.gz"})
    assert find_folder(root, list_file=f"lists/cases.{kind}") == [first, second]
    narrowed = find_folder(root, ["my_flair"], path)
    assert [list(c.images) for c in narrowed] == [["my_flair"]] * 2
    assert narrowed[0].attributes == {"age": 61}


def test_list_raters_are_ordered_by_number(tmp_path):
    touch(tmp_path, "a.nii", "r1.nii", "r2.nii", "r10.nii")
    (tmp_path / "list.csv").write_text("case,rater10,rater2,t1,rater1\n1,r10.nii,r2.nii,a.nii,r1.nii\n")
    case = find_folder(tmp_path, list_file="list.csv")[0]
    assert list(case.images) == ["t1"]
    assert [p.name for p in case.raters] == ["r1.nii", "r2.nii", "r10.nii"]


def test_list_file_errors(tmp_path):
    with pytest.raises(SuiteError, match=r"no such list: nowhere.csv"):
        find_folder(tmp_path, list_file="nowhere.csv")
    (tmp_path / "a.csv").write_text("case,t1,label\n1,gone.nii,lost.nii\n")
    with pytest.raises(SuiteError, match=r"2 files do not exist[\s\S]*gone.nii[\s\S]*lost.nii"):
        find_folder(tmp_path, list_file="a.csv")
    (tmp_path / "b.csv").write_text("name,t1\n1,gone.nii\n")
    with pytest.raises(SuiteError, match="row 1: no 'case'"):
        find_folder(tmp_path, list_file="b.csv")
    (tmp_path / "c.json").write_text("[{")
    with pytest.raises(SuiteError, match="not valid JSON"):
        find_folder(tmp_path, list_file="c.json")
    touch(tmp_path, "there.nii")
    (tmp_path / "d.csv").write_text("case,t1,t2\n1,there.nii,there.nii\n2,there.nii,\n")
    with pytest.raises(SuiteError, match="  2: t2\n"):
        find_folder(tmp_path, list_file="d.csv")


@pytest.mark.parametrize(
    "pattern",
    [
        "images/{case}_{channel}",
        "{case}_{channel}",
        "{case}/{case}_{channel}",
        "HGG/{case}/{case}_{channel}",
        "{case}-{new}",
        "{case}/{case}-{new}",
        "{case}_{number:04d}",
    ],
)
def test_prediction_input_in_every_accepted_form(tmp_path, pattern):
    new = {"t2": "t2w", "t1": "t1n"}
    for case in ("b", "a"):
        for number, channel in enumerate(new):
            touch(tmp_path, pattern.format(case=case, channel=channel, new=new[channel], number=number) + ".nii.gz")
    touch(tmp_path, "notes.txt")
    cases = find_images(tmp_path, ["t2", "t1"])
    assert [c.id for c in cases] == ["a", "b"]
    for case in cases:
        assert list(case.images) == ["t2", "t1"]
        for number, (channel, path) in enumerate(case.images.items()):
            assert str(path) == str(tmp_path / (pattern.format(case=case.id, channel=channel, new=new[channel], number=number) + ".nii.gz"))


def test_prediction_input_errors_show_what_is_expected(tmp_path):
    touch(tmp_path, "scan.nii.gz")
    with pytest.raises(SuiteError) as error:
        find_images(tmp_path, ["t1", "flair"])
    for word in ("scan.nii.gz", "case01_t1.nii.gz", "case01_flair.nii.gz", "case01_0001.nii.gz"):
        assert word in str(error.value)
    touch(tmp_path, "scan_t1.nii.gz")
    with pytest.raises(SuiteError, match="  scan: flair\n"):
        find_images(tmp_path, ["t1", "flair"])
    assert list(find_images(tmp_path, ["t1", "flair"], allow_missing=True)[0].images) == ["t1"]


def test_more_numbered_channels_than_wanted_are_refused(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    with pytest.raises(SuiteError, match=r"a_0001.nii.gz: numbered channel, but only 1 are wanted"):
        find_images(tmp_path, ["flair"])


def test_a_missing_folder_of_images_to_predict_is_named_by_its_option(tmp_path):
    with pytest.raises(SuiteError, match=f"^input={tmp_path}/none: no such folder") as caught:
        find_images(tmp_path / "none", ["flair"])
    assert "data.root" not in str(caught.value)


def test_brats_folders_are_prediction_input_too(tmp_path):
    for layout in ("2018", "2023", "2024_men_rt"):
        root = write_fake_brats(tmp_path / layout, layout, count=3, shape=TINY)
        channels = brats_task(layout).channels
        assert [(c.id, c.images) for c in find_images(root, channels)] == [(c.id, c.images) for c in find_brats(root)]


@pytest.mark.parametrize("name", [n for n in WRITERS if n.startswith("brats") or n in ("folder", "ibsr")])
def test_fake_data_are_deterministic_and_hold_every_class(tmp_path, name):
    roots = [WRITERS[name](tmp_path / str(n)) for n in range(2)]
    finder = {"folder": find_folder, "ibsr": find_ibsr}.get(name, partial(find_brats, layout=name.removeprefix("brats")))
    first, second = (finder(root) for root in roots)
    four = {"folder": {0, 1}, "brats2024_men_rt": {0, 1}, "brats2023": {0, 1, 2, 3}, "brats2023_ped": {0, 1, 2, 3}, "ibsr": {0, 1, 2, 3}}
    values = four.get(name, {0, 1, 2, 3, 4} if name >= "brats2024" else {0, 1, 2, 4})
    for a, b in zip(first, second, strict=True):
        assert set(np.unique(read_volume(a.label)[0]).tolist()) == values
        for x, y in zip(a.files, b.files, strict=True):
            array, affine, _ = read_volume(x)
            assert (array == read_volume(y)[0]).all()
            assert array.dtype == np.int16
            assert (affine == read_volume(y)[1]).all()
            assert name == "ibsr" or (affine == LPS).all()


def test_real_brats_2018(real_data):
    cases = find_brats(real_data / "brats18")
    assert len(cases) == 6
    assert {c.site for c in cases} == {"2013", "CBICA", "TCIA01", "TCIA02", "TCIA03", "TCIA13"}


def test_prediction_input_of_all_depths_and_what_is_not_used(tmp_path):
    touch(
        tmp_path,
        "a_t1.nii.gz",
        "a_seg.nii.gz",
        "x/b_t1.nii.gz",
        "x/y/z/c_t1.nii.gz",
        ".hidden/d_t1.nii.gz",
        "n/e_0000.nii.gz",
        "x/b_0001.nii.gz",
    )
    assert [c.id for c in find_images(tmp_path, ["t1"])] == ["a", "b", "c", "e"]
    used = {path for case in find_images(tmp_path, ["t1"]) for path in case.images.values()}
    assert {str(p.relative_to(tmp_path)) for p in set(images_below(tmp_path)) - used} == {"a_seg.nii.gz", "x/b_0001.nii.gz"}
    touch(tmp_path, "x/y/a_t1.nii.gz")
    with pytest.raises(SuiteError, match=r"two files for one channel: .*a_t1.nii.gz and .*y/a_t1.nii.gz"):
        find_images(tmp_path, ["t1"])


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "all/a_t1.nii.gz", "elsewhere/b_t1.nii.gz")
    (tmp_path / "all" / "back").symlink_to(tmp_path / "all")
    for name in ("linked", "linked_again"):
        (tmp_path / "all" / name).symlink_to(tmp_path / "elsewhere")
    assert [c.id for c in find_images(tmp_path / "all", ["t1"])] == ["a", "b"]


def test_rows_of_attributes_that_belong_to_no_case_are_refused(tmp_path):
    touch(tmp_path, "images/sub0_ses0_t1.nii.gz", "images/sub0_ses1_t1.nii.gz")
    (tmp_path / "attributes.csv").write_text("case,patient\nsub0_ses0,sub0\nsub0-ses1,sub0\n")
    with pytest.raises(SuiteError, match=r"1 row\(s\) belong to no case.*\n  sub0-ses1 \(did you mean sub0_ses1\?\)"):
        find_folder(tmp_path, ["t1"])


@pytest.mark.parametrize(("encoding", "separator"), [("utf-8", ","), ("utf-8-sig", ";"), ("utf-16", ","), ("utf-16", "\t")])
def test_tables_as_spreadsheets_write_them(tmp_path, encoding, separator):
    touch(tmp_path, "images/a_t1.nii.gz")
    text = "case,site,code,age,left\na,Köln,1_5,51,infinity\n".replace(",", separator)
    (tmp_path / "attributes.csv").write_bytes(text.encode(encoding))
    (case,) = find_folder(tmp_path, ["t1"])
    assert (case.site, case.attributes) == ("Köln", {"code": "1_5", "age": 51, "left": "infinity"})


@pytest.mark.parametrize(("name", "number"), [("attributes.csv", 3), ("list.json", 2)])
def test_a_table_in_another_encoding_is_refused_with_its_line(tmp_path, name, number):
    touch(tmp_path, "images/a_t1.nii.gz", "images/b_t1.nii.gz")
    text = "case,site\na,Ulm\nb,Köln\n" if name.endswith("csv") else '[{"case": "a", "t1": "images/a_t1.nii.gz",\n"site": "Köln"}]'
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    with pytest.raises(SuiteError, match=rf"{name}, line {number}: byte 0xf6 is not UTF-8"):
        find_folder(tmp_path, ["t1"], list_file=None if name.endswith("csv") else tmp_path / name)


def test_a_survival_table_in_another_encoding_is_refused_with_its_line(tmp_path):
    root = write_fake_brats(tmp_path, "2020", count=2, shape=TINY)
    table = next(root.rglob("survival_info.csv"))
    table.write_bytes(table.read_bytes() + "\nBraTS20_Training_009,1,2,Größe\n".encode("cp1252"))
    with pytest.raises(SuiteError, match=r"survival_info.csv, line \d+: byte 0xf6"):
        find_brats(root)
