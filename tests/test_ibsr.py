import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from datamodules import IBSR, Preprocessing, Sampling, Split
from datamodules.readers.ibsr_files import find_ibsr, ibsr_task
from lesionbench.checkpoint import build_method
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from lesionbench.views import to_slices
from tests.fake_data import write_fake_ibsr
from tests.harness import composed

SHAPE = (8, 6, 8)


def touch(folder, *names):
    """Empty files: finding cases looks at names only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_nifti_files(tmp_path):
    root = write_fake_ibsr(tmp_path, count=3, shape=SHAPE)
    cases = find_ibsr(root)
    assert [(c.id, c.patient) for c in cases] == [(f"IBSR_0{n}", f"IBSR_0{n}") for n in (1, 2, 3)]
    folder = root / "IBSR_02"
    assert cases[1].images == {"t1": folder / "IBSR_02_ana_strip.nii.gz"}
    assert cases[1].label == folder / "IBSR_02_segTRI_ana.nii.gz"
    other = find_ibsr(root, image="ana", label="segTRI_fill")[1]
    assert [p.name for p in other.files] == ["IBSR_02_ana.nii.gz", "IBSR_02_segTRI_fill_ana.nii.gz"]


def test_analyze_files(tmp_path):
    root = write_fake_ibsr(tmp_path, "analyze", count=2, shape=SHAPE)
    case = find_ibsr(root, "analyze", image="ana")[0]
    assert [str(p.relative_to(root)) for p in case.files] == [
        "IBSR_01/images/analyze/IBSR_01_ana.img",
        "IBSR_01/segmentation/analyze/IBSR_01_segTRI_ana.img",
    ]
    for path in (root / "IBSR_01").rglob("*.hdr"):
        path.unlink()
    with pytest.raises(SuiteError, match=r"2 Analyze images lack their header[\s\S]*IBSR_01_ana.img[\s\S]*IBSR_01_segTRI_ana.img"):
        find_ibsr(root, "analyze", image="ana")


@pytest.mark.parametrize("above", ["IBSR_nifti_stripped", "IBSR_V2.0/IBSR_nifti_stripped"])
def test_archive_folders_and_unpacked_files(tmp_path, above):
    names = [f"{above}/IBSR_18/IBSR_18_{kind}.nii" for kind in ("ana_strip", "segTRI_ana")]
    touch(tmp_path, *names, f"{above}/._IBSR_18", f"{above}/IBSR_18/._IBSR_18_ana_strip.nii.gz", f"{above}/README.txt")
    (case,) = find_ibsr(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in case.files] == names


def test_a_stripped_analyze_image_beside_the_folders_of_the_archive(tmp_path):
    touch(tmp_path, *(f"IBSR_01/IBSR_01_ana_strip.{e}" for e in ("img", "hdr")))
    touch(tmp_path, *(f"IBSR_01/segmentation/analyze/IBSR_01_segTRI_ana.{e}" for e in ("img", "hdr")))
    (case,) = find_ibsr(tmp_path, "analyze")
    assert case.images["t1"].name == "IBSR_01_ana_strip.img"


def test_errors_name_what_is_missing_and_what_would_fit(tmp_path):
    with pytest.raises(SuiteError, match=r"IBSR data: no such folder[\s\S]*data.root"):
        find_ibsr(tmp_path / "nowhere")
    touch(tmp_path, "notes.txt")
    with pytest.raises(
        SuiteError, match=r"holds notes.txt; expected files such as IBSR_01/IBSR_01_ana_strip.nii.gz and IBSR_01/IBSR_01_segTRI_ana"
    ):
        find_ibsr(tmp_path)
    root = write_fake_ibsr(tmp_path / "analyze", "analyze", count=2, shape=SHAPE)
    with pytest.raises(SuiteError, match=r"2 of 2 cases lack their image: IBSR_01_ana_strip, IBSR_02_ana_strip;") as error:
        find_ibsr(root)
    assert "What is there fits data.files=analyze data.image=ana data.label=segTRI or " in str(error.value)
    root = write_fake_ibsr(tmp_path / "nifti", count=3, shape=SHAPE)
    (root / "IBSR_02" / "IBSR_02_segTRI_ana.nii.gz").unlink()
    assert [c.label is None for c in find_ibsr(root)] == [False, True, False]
    (root / "IBSR_02" / "IBSR_02_ana_strip.nii.gz").unlink()
    with pytest.raises(SuiteError, match="1 of 3 cases lack their image: IBSR_02_ana_strip;"):
        find_ibsr(root)
    for case in root.iterdir():
        (case / f"{case.name}_segTRI_ana.nii.gz").unlink(missing_ok=True)
    with pytest.raises(SuiteError, match=r"no case has a label IBSR_01_segTRI_ana;[\s\S]*data.image=ana data.label=segTRI_fill"):
        find_ibsr(root, image="ana")
    for option, value in {"files": "nifty", "image": "strip", "label": "seg"}.items():
        with pytest.raises(SuiteError, match=rf"data.{option}\) '{value}'"):
            find_ibsr(root, **{option: value})


def test_task():
    task = ibsr_task()
    assert (task.channels, task.region_names, task.slice_axis, task.unit) == (("t1",), ("CSF", "GM", "WM"), 1, "mm")
    assert task.to_disk(np.array([0, 1, 2, 3])).tolist() == [0, 1, 2, 3]
    assert ibsr_task("analyze").slice_axis == 2
    assert (ibsr_task(slice_axis=2).slice_axis, ibsr_task(unit="vox").unit) == (2, "vox")
    with pytest.raises(SuiteError, match="did you mean 'analyze'"):
        ibsr_task("analyse")


def module(root, files, image, **options):
    data = IBSR(root, files=files, image=image, preprocessing=Preprocessing(crop="none"), view="slice", patch=None, **options)
    data.prepare_data()
    data.setup()
    return data


def test_both_forms_give_the_same_slices(tmp_path):
    """The Analyze form has the thick axis last and is upside down; slices run across the thick axis in both."""
    split = Split(test=1, val=1)
    batches = {}
    for files in ("nifti", "analyze"):
        root = write_fake_ibsr(tmp_path / files, files, count=4, shape=(14, 12, 16))
        data = module(root, files, "ana", split=split, sampling=Sampling("uniform"))
        assert not [f for f in data.findings(progress=False) if f.level == "error"]
        assert data.train_dataloader().dataset[(0, 0)]["image"].shape == (1, 14, 16)
        (batches[files],) = data.test_dataloader()
        assert batches[files]["case"] == batches["nifti"]["case"]
    nifti, analyze = batches["nifti"], batches["analyze"]
    assert nifti["image"].shape == (1, 1, 14, 12, 16)
    assert analyze["image"].shape == (1, 1, 14, 16, 12)
    for name in ("image", "label"):
        assert (to_slices(nifti[name], 1) == to_slices(analyze[name], 2).flip(-1)).all()
    assert sorted(set(nifti["label"].unique().tolist())) == [0, 1, 2, 3]


def test_filled_labels_leave_no_hole_in_the_brain(tmp_path):
    root = write_fake_ibsr(tmp_path, count=1, shape=SHAPE)
    (plain,), (filled,) = find_ibsr(root), find_ibsr(root, label="segTRI_fill")
    brain = read_volume(plain.images["t1"])[0] > 0
    drawn, whole = (read_volume(case.label)[0] for case in (plain, filled))
    assert ((whole > 0) == brain).all()
    assert (whole[drawn > 0] == drawn[drawn > 0]).all()
    assert set(np.unique(whole[brain & (drawn == 0)])) == {1}


def test_six_folds_test_every_subject_once(tmp_path):
    names = [f"IBSR_{n:02d}/IBSR_{n:02d}_{kind}.nii.gz" for n in range(1, 19) for kind in ("ana_strip", "segTRI_ana")]
    cases = find_ibsr(touch(tmp_path, *names))
    tested = []
    for fold in range(6):
        parts = Split(folds=6, fold=fold, val=0).divide(cases)
        assert [len(parts[p]) for p in ("train", "val", "test")] == [15, 0, 3]
        tested += [c.id for c in parts["test"]]
    assert sorted(tested) == [c.id for c in cases]


SLICES = ("data.view=slice", "model/inferer=slice", "model.network.dimensions=2", "patch=[256,256]")


@pytest.mark.parametrize(
    ("network", "more"),
    [(n, ()) for n in ("small_unet", "vnet", "basic_unet", "dynunet", "segresnet", "transbts", "unetr", "swin_unetr")]
    + [(n, SLICES) for n in ("small_unet", "unet_plus_plus", "attention_unet", "swin_unet")],
)
def test_networks_take_whole_volumes_or_slices(network, more):
    cfg = composed("experiment=supervised/ibsr", f"model/network={network}", *more)
    with torch.device("meta"):
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), ibsr_task())
    assert method.network.dimensions == len(cfg.patch) == len(cfg.data.patch)
    assert all(side % by == 0 for side, by in zip(cfg.patch, method.network.divisor, strict=True))
    assert method.network.fixed_size in (None, tuple(cfg.patch))
