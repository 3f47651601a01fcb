"""Plans by nnU-Net's rules: hand cases, nnU-Net's own plans where it is installed, and an experiment that trains."""

import contextlib
import importlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from datamodules.acdc import ACDC
from datamodules.brats import BraTS
from datamodules.planning import Fingerprint, fingerprint, plan
from lesionbench.errors import SuiteError
from tests.fake_data import write_fake_brats, write_fake_folder
from tests.harness import run


def of(spacing, shape, cases=10, channels=("t1",), classes=2):
    return Fingerprint(np.tile(np.array(spacing, float), (cases, 1)), np.tile(np.array(shape), (cases, 1)), 1.0, channels, classes)


def test_the_plan_of_brats_is_the_one_that_everybody_knows():
    """nnU-Net's plan for BraTS: 128^3, six levels, two in a batch, on 1 mm (Isensee et al., BrainLes 2020)."""
    made = plan(of((1, 1, 1), (140, 171, 137), 369, ("t1", "t1ce", "t2", "flair"), 4))
    assert (made.spacing, made.patch, made.batch_size) == ((1, 1, 1), (128, 128, 128), 2)
    assert made.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)
    assert made.features == (32, 64, 128, 256, 320, 320)
    assert (made.kernels, made.normalize) == (((3, 3, 3),) * 6, "zscore")


def test_coarse_slices_are_halved_last_and_convolved_in_the_plane_first():
    made = plan(of((1.5, 1.5, 10), (220, 256, 10), 200, classes=4))
    assert made.patch[2] <= 12
    assert made.strides[1] == (2, 2, 1)
    assert (made.kernels[0], made.kernels[-1]) == ((3, 3, 1), (3, 3, 3))
    assert {n: v for n, v, _ in made.reasons}["spacing"] == "1.5 x 1.5 x 10 mm"


def test_the_tenth_percentile_of_a_coarse_axis_and_ct():
    spacings = np.array([[0.8, 0.8, z] for z in (2.5, 3, 5, 5, 5, 5, 5, 5, 5, 5, 5)])
    made = plan(Fingerprint(spacings, np.tile([512, 512, 60], (11, 1)), 1.0, ("CT",), 3))
    assert made.spacing == pytest.approx((0.8, 0.8, 3.0))
    assert made.normalize == "ct"


def test_more_memory_means_larger_patches_and_then_larger_batches():
    large, small = of((1, 1, 1), (300, 300, 300)), of((1, 1, 1), (64, 64, 64), 400)
    volumes = [np.prod(plan(large, gib).patch) for gib in (4, 8, 24)]
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[-1]
    batches = [plan(of((1, 1, 1), (64, 64, 64), 4000), gib).batch_size for gib in (8, 16)]
    assert batches[1] == pytest.approx(2 * batches[0], abs=1)
    assert plan(of((1, 1, 1), (64, 64, 64), 100)).batch_size == 5  # 5 % of 100 cases of one patch each
    assert plan(of((1, 1, 1), (64, 64, 64), 2)).batch_size == 2  # 5 % of two cases are less than a patch
    for wrong in (0, -1):
        with pytest.raises(SuiteError, match=rf"plan\.memory_gib={wrong}: a positive number"):
            plan(small, wrong)
    with pytest.raises(SuiteError, match=r"too little for any patch"):
        plan(large, 1e-6)


@pytest.fixture
def nnunet(tmp_path, monkeypatch):
    """(fingerprint, GiB) -> nnU-Net's own plan as (spacing, patch, batch, strides, kernels, features), in the suite's axes."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name / "Dataset001_X" / "imagesTr").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    home = "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner"
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    with contextlib.redirect_stdout(io.StringIO()):
        planner = importlib.import_module(home)
    reader = importlib.import_module("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO
    for name in ("raw", "preprocessed"):
        monkeypatch.setattr(planner, f"nnUNet_{name}", str(tmp_path / name), raising=False)

    def planned(found: Fingerprint, gib: float):
        channels = {str(n): name for n, name in enumerate(found.channels)}
        labels = {"background": 0} | {f"c{n}": n for n in range(1, found.classes)}
        described = {"channel_names": channels, "labels": labels, "numTraining": len(found.shapes), "file_ending": ".nii.gz"}
        (tmp_path / "raw" / "Dataset001_X" / "dataset.json").write_text(json.dumps(described))
        told = {
            "spacings": found.spacings[:, ::-1].tolist(),
            "shapes_after_crop": found.shapes[:, ::-1].tolist(),
            "median_relative_size_after_cropping": found.shrinks,
            "foreground_intensity_properties_per_channel": {n: {} for n in channels},
        }
        (tmp_path / "preprocessed" / "Dataset001_X" / "dataset_fingerprint.json").write_text(json.dumps(told))
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = planner.ExperimentPlanner(1, gpu_memory_target_in_gb=gib)
            theirs.dataset = {f"case{n}": SimpleNamespace() for n in range(len(found.shapes))}
            theirs.determine_reader_writer = lambda: reader
            theirs.plan_experiment()
        chosen, order = theirs.plans["configurations"]["3d_fullres"], theirs.plans["transpose_forward"]
        back = [order.index(axis) for axis in range(3)][::-1]
        network = chosen["architecture"]["arch_kwargs"]

        def ours(values):
            return tuple(values[a] for a in back)

        return (
            pytest.approx(ours(chosen["spacing"])), ours(chosen["patch_size"]), chosen["batch_size"],
            tuple(map(ours, network["strides"])), tuple(map(ours, network["kernel_sizes"])), tuple(network["features_per_stage"]),
        )  # fmt: skip

    return planned


def fields(made):
    return made.spacing, made.patch, made.batch_size, made.strides, made.kernels, made.features


def test_random_fingerprints_get_nnunets_plan(nnunet):
    rng = np.random.default_rng(1)
    for _ in range(12):
        count = int(rng.integers(2, 40))
        base = rng.uniform(0.4, 2, 3) * np.array([1, 1, rng.choice([1, 1, 2, 4, 6])])[rng.permutation(3)]
        shapes = rng.integers(20, 300, 3) * np.ones((count, 1), int) + rng.integers(-5, 6, (count, 3))
        channels = tuple(f"c{n}" for n in range(rng.integers(1, 5)))
        found = Fingerprint(base * rng.uniform(0.9, 1.1, (count, 1)), shapes, 1.0, channels, int(rng.integers(2, 6)))
        gib = float(rng.choice([4, 8, 11, 24]))
        assert fields(plan(found, gib)) == nnunet(found, gib), (base, shapes[0], gib)


def test_real_cases_get_nnunets_plan(nnunet, real_data, tmp_path):
    tumors = BraTS(real_data / "brats18", layout="2018")
    hearts = ACDC(real_data / "acdc", files="h5", unit="vox", named_split=None, cache=tmp_path / "cache")
    hearts.materialize()
    for data in (tumors, hearts):
        found = fingerprint(data.cases(), data.task)
        assert fields(plan(found)) == nnunet(found, 8)
    assert plan(fingerprint(tumors.cases(), tumors.task)).patch == (128, 128, 128)


def test_a_fingerprint_by_hand(tmp_path):
    data = BraTS(write_fake_brats(tmp_path, "2021", count=3, shape=(12, 10, 9)), layout="2021")
    counts = []
    found = fingerprint(data.cases(), data.task, tell=counts.append)
    data.prepare_data()
    assert counts == [1, 2, 3]
    assert found.shapes.tolist() == [list(data.store.open(c).shape) for c in data.cases()]
    assert (found.spacings.tolist(), found.channels, found.classes) == ([[1, 1, 1]] * 3, ("t1", "t1ce", "t2", "flair"), 4)


def test_the_experiment_that_is_written_trains(tmp_path, capsys):
    from tests.harness import program

    root = write_fake_folder(tmp_path / "data", 6, shape=(20, 18, 16))
    options = ["data=folder", "data.channels=[t1,flair]", f"data.root={root}", "data.split.folds=null"]
    run(
        "job=plan",
        "experiment=supervised/folder",
        *options,
        "plan.memory_gib=0.05",
        f"out={tmp_path / 'mine' / 'experiment' / 'plan.yaml'}",
    )
    said = capsys.readouterr().out
    assert "6 of 6 cases read" in said
    assert "mean and deviation of every case" in said
    text = (tmp_path / "mine" / "experiment" / "plan.yaml").read_text()
    assert "# patch:" in text
    code, printed = program(
        tmp_path / "log", "--config-dir", str(tmp_path / "mine"), "experiment=plan", *options, "debug=tiny", "trainer=cpu", "threads=1",
        f"runs={tmp_path / 'runs'}",
    )  # fmt: skip
    assert code == 0, printed
    assert "DynUNet" in printed or "Supervised on Folder" in printed
