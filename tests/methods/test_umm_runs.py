"""Mutual learning through run.py: killed and resumed, on two processes, applied to files, and the small experiment of its page."""

import signal

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks.umm_effect import MODES, draw, finished, table
from lesionbench.errors import SuiteError
from lesionbench.reports.report import curve
from tests.fake_data import write_fake_folder
from tests.harness import assert_same, rows, run, run_folders, run_killed, weights

TINY = [
    "experiment=umm/thick_slices", "epochs=2", "data.samples_per_epoch=4", "data.count=7", "data.split.test=1", "data.split.val=1", "model.mc_samples=2",
    "trainer.check_val_every_n_epoch=1", "model.branches.s.features=[8,8,8]", "model.branches.v.features=[8,8,8]", "model.branches.p.features=[4,4,4,4]", "callbacks.figures=null",
    "metrics.names=[dice]", "threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_kill_and_resume_is_bit_identical(data, tmp_path):
    common = [*TINY, f"data.root={data}"]
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=3") == -signal.SIGKILL
    run(*killed, "resume=true")
    (whole,), (resumed,) = run_folders(tmp_path / "whole"), run_folders(tmp_path / "killed")
    assert_same(weights(whole), weights(resumed))
    assert rows(whole) == rows(resumed)
    assert {row["member"] for row in rows(whole)} == {"", "s", "p", "v", "mean"}
    assert [w for _, w in curve(whole, "train/weight")] == [w for _, w in curve(resumed, "train/weight")]


def test_two_processes_equal_one_with_twice_the_batch(data, tmp_path):
    """Without dropout and with class weights that do not depend on the batch; an unused parameter would stop the two processes."""
    common = [
        *TINY, f"data.root={data}", "epochs=1", "stages=[{name:fit,run:fit}]", "model/optimizer=sgd", "model/loss=cross_entropy",
        *(f"model.branches.{b}.dropout=0" for b in "spv"),
    ]  # fmt: skip
    run(*common, "data.batch_size=2", f"runs={tmp_path / 'one'}")
    run(*common, "data.batch_size=1", "trainer=ddp_sim", f"runs={tmp_path / 'two'}")
    one, two = (weights(run_folders(tmp_path / name)[0]) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name


@pytest.mark.parametrize("mutual", ["none", "gated"])
def test_two_processes_train_with_dropout(mutual, data, tmp_path):
    run(
        *TINY, f"data.root={data}", "epochs=1", "data.batch_size=1", "trainer=ddp_sim", f"model.mutual={mutual}", f"runs={tmp_path}",
        "stages=[{name:fit,run:fit}]",
    )  # fmt: skip
    (folder,) = run_folders(tmp_path)
    assert curve(folder, "train/loss")


def test_predict_writes_fused_masks_and_uncertainty(tmp_path):
    root = write_fake_folder(tmp_path / "data", 5, shape=(14, 12, 10))
    run(
        "experiment=umm/folder", f"data.root={root}", "data.channels=[t1,flair]", f"runs={tmp_path / 'runs'}", "debug=tiny", "patch=[16,16,12]",
        "model/network@model.branches.s=thick_2d", "model/network@model.branches.p=thick_pack", "model/network@model.branches.v=thick_3d",
        "model.mc_samples=2", "stages=[{name:fit,run:fit}]", "threads=1",
    )  # fmt: skip
    (folder,) = run_folders(tmp_path / "runs")
    out = tmp_path / "out"
    run(
        "job=predict", f"ckpt={folder / 'checkpoints' / 'last.ckpt'}", f"input={root / 'images'}", f"out={out}", "writer.uncertainty=true",
        "writer.members=true", "writer.probabilities=true",
    )  # fmt: skip
    for n in range(5):
        source = nib.load(root / "images" / f"case_{n:02d}_t1.nii.gz")
        for member in ("", "_s", "_p", "_v"):
            mask = nib.load(out / "predictions" / f"case_{n:02d}{member}.nii.gz")
            uncertainty = nib.load(out / "predictions" / f"case_{n:02d}{member}_uncertainty_entropy.nii.gz")
            for image in (mask, uncertainty):
                assert image.shape == source.shape
                assert np.allclose(image.affine, source.affine)
            assert set(np.unique(mask.dataobj)) <= {0, 1}
            values = np.asarray(uncertainty.dataobj)
            assert 0 <= values.min() < values.max() <= np.log(2) + 1e-6
    fused = np.asarray(nib.load(out / "predictions" / "case_00_prob_lesion.nii.gz").dataobj)
    own = [np.asarray(nib.load(out / "predictions" / f"case_00_{m}_prob_lesion.nii.gz").dataobj) for m in "spv"]
    assert (fused >= np.minimum.reduce(own) - 1e-6).all()
    assert (fused <= np.maximum.reduce(own) + 1e-6).all()


def test_views_and_patches_that_do_not_fit_are_refused_before_training(data, tmp_path):
    for wrong, message in [("data.view=slice", "needs data.view=patch"), ("patch=[4,4,2]", r"too small .* model\.branches\.s")]:
        with pytest.raises(SuiteError, match=message):
            run(*TINY, f"data.root={data}", f"runs={tmp_path}", "model.branches.s.norm=instance", wrong)


# the small experiment of docs/methods/umm.md


def dice(experiment, seeds, data, runs, *overrides):
    """Mode -> member -> Dice on test cases of every seed."""
    for seed in seeds:
        for mutual in MODES:
            run(
                f"experiment=umm/{experiment}", f"model.mutual={mutual}", f"seed={seed}", f"data.root={data}", f"runs={runs}", "threads=1",
                "callbacks.figures=null", "writer.on_test=false", *overrides,
            )  # fmt: skip
    found = [row for row in table(finished(runs)) if row["metric"] == "dice"]
    return {mode: {row["member"]: [row[s] for s in seeds] for row in found if row["mode"] == mode} for mode in MODES.values()}


def test_the_experiment_with_an_unreliable_peer_in_small(data, tmp_path):
    found = dice("thick_slices_unreliable", [0], data, tmp_path, *TINY[1:8], "epochs=1")
    assert set(found) == {"pure", "ml", "ml+u"}
    for members in found.values():
        assert set(members) == {"fused, softmin", "fused, mean", "2D", "3D"}
        assert all(len(values) == 1 and np.isfinite(values).all() for values in members.values())
    draw(finished(tmp_path), table(finished(tmp_path)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 150_000


@pytest.mark.slow
def test_the_gate_protects_from_an_unreliable_peer(tmp_path):
    """The frozen experiment, seeds it was not looked at on: on each, plain mutual learning harms the 3D branch and the fusion, and the
    gate undoes it; on average the gated 3D branch is no worse than one trained alone."""
    found = dice("thick_slices_unreliable", [4, 5, 6, 7], tmp_path / "data", tmp_path / "runs")
    for member in ("3D", "fused, softmin"):
        pure, plain, gated = (np.array(found[mode][member]) for mode in ("pure", "ml", "ml+u"))
        assert (plain < pure).all()
        assert (plain < gated).all()
        assert gated.mean() > pure.mean() - 0.01
    for members in found.values():
        assert (np.array(members["fused, softmin"]) > members["fused, mean"]).all()
