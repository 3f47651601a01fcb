"""Plans by nnU-Net's rules: hand cases, nnU-Net's own plans as recorded, and an experiment that trains."""

import json

import numpy as np
import pytest

from datamodules.acdc import ACDC
from datamodules.brats import BraTS
from datamodules.planning import Fingerprint, fingerprint, plan
from lesionbench.errors import SuiteError
from tests.fake_data import write_fake_brats, write_fake_folder
from tests.harness import run
from tests.nnunet_official import FIELDS, RECORDED, drawn, planned


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


def fields(made):
    return json.loads(json.dumps({name: getattr(made, name) for name in FIELDS}))


def same(ours, theirs):
    return ours == {**theirs, "spacing": pytest.approx(theirs["spacing"])}


@pytest.mark.parametrize("theirs", json.loads(RECORDED.read_text()), ids=lambda row: str(row["seed"]))
def test_random_fingerprints_get_the_plan_that_nnunet_made(theirs):
    found, gib = drawn(theirs["seed"])
    assert same({"seed": theirs["seed"], **fields(plan(found, gib))}, theirs), (found.shapes[0], gib)


def test_real_cases_get_nnunets_plan(real_data, tmp_path):
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    tumors = BraTS(real_data / "brats18", layout="2018")
    hearts = ACDC(real_data / "acdc", files="h5", unit="vox", named_split=None, cache=tmp_path / "cache")
    hearts.materialize()
    for data in (tumors, hearts):
        found = fingerprint(data.cases(), data.task)
        assert same(fields(plan(found)), planned(found, 8))
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
