"""The stages of a two-phase experiment through `run.py`: they finish, resume after kills, leave nothing half-written, predict alone."""

import csv
import errno
import os
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hydra.utils import instantiate

import lightning_modules.transport.stages as stages
from datamodules import Cubes
from lesionbench.checkpoint import load_method, read_checkpoint
from lesionbench.cubes import CubeStore
from lesionbench.errors import SuiteError
from lightning_modules import TwoPhaseOMT
from lightning_modules.transport.warp import Warp
from tests.harness import assert_same, composed, rows, run, run_folders, run_killed, weights

COMMON = [
    "experiment=two_phase_omt/simulated", "data.spacing=8", "data.count=6", "data.split.test=2", "data.split.val=1", "patch=[16,16,16]", "epochs=2", "threads=1", "select=best",
    "model.network.network.channels=[4,8]", "model.transport.grid=6", "model.transport.dilation=1", "trainer.check_val_every_n_epoch=1", "omt.data.batch_size=1", "callbacks.checkpoint.every_n_batches=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"data.root={tmp_path_factory.mktemp('data')}"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run."""
    runs = tmp_path_factory.mktemp("runs")
    run(*COMMON, data, f"runs={runs}")
    return run_folders(runs)[0]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_cubes_are_a_data_set_of_the_cases_that_are_trained_and_validated_on(whole):
    tested = {row["case"] for row in rows(whole)}
    assert len(tested) == 2
    for name in ("cubes0", "cubes"):
        cubes = Cubes(whole / name)
        cubes.setup("fit")
        assert {part: len(cubes.parts[part]) for part in ("train", "val", "test")} == {"train": 3, "val": 1, "test": 0}
        assert cubes.samples_per_epoch == 3
        assert not tested & {case.id for case in cubes.cases()}
        assert all(case.attributes["cube"] == 1 for case in cubes.cases())
        assert len(table(whole / name / "conversion.csv")) == 4
        assert cubes.fingerprint() == cubes.origin["cases"] is not None
    case = cubes.cases()[0]
    image = nib.load(case.images["flair"])
    assert image.shape == nib.load(case.label).shape == (16, 16, 16)
    warp = Warp(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in CubeStore(whole / "cubes").read(case.id)))
    assert warp.nodes.shape == (3, 6, 6, 6)


def test_training_cases_are_magnified_by_their_labels_and_validation_by_what_was_found(whole, data):
    cfg = composed(*COMMON, data)
    cases = instantiate(cfg.data, _convert_="all")
    cases.prepare_data()
    cases.setup("fit")
    method, _ = load_method(read_artefact(whole, "."))
    with torch.inference_mode():
        for part in ("train", "val"):
            for batch in cases.case_loader(cases.parts[part]):
                case, truth, found = batch["case"][0], batch["label"][0, 0] > 0, method.found(batch)
                assert not torch.equal(truth, found)
                for name, tumor in (("cubes0", None), ("cubes", truth if part == "train" else found)):
                    stored = CubeStore(whole / name).read(case)[0]
                    assert np.array_equal(stored, method._warp(batch, tumor).nodes.numpy()), (name, part)


def test_the_first_network_comes_from_its_stage_and_stays(whole):
    first, own = weights(whole / "net0"), weights(whole)
    assert {name.replace("network.", "first.", 1): v.shape for name, v in first.items()} == {
        name: v.shape for name, v in own.items() if name.startswith("first.")
    }
    best = torch.load(read_artefact(whole, "net0"), weights_only=True)["state_dict"]
    for name, value in best.items():
        assert torch.equal(value, own[name.replace("network.", "first.", 1)])
    assert sum(name.startswith("network.networks.2.") for name in own) > 0


def read_artefact(folder, stage):
    return next(p for p in (folder / stage / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")) if p.exists())


def test_a_moved_checkpoint_predicts_new_cases_alone(whole, data, tmp_path):
    root = data.removeprefix("data.root=")
    (tmp_path / "input").mkdir()
    row = rows(whole)[0]
    for path in Path(root).rglob(f"{row['case']}_*.nii.gz"):
        shutil.copy(path, tmp_path / "input" / path.name)
    moved = tmp_path / "omt.ckpt"
    shutil.copy(read_artefact(whole, "."), moved)
    run("job=predict", f"ckpt={moved}", f"input={tmp_path / 'input'}", f"out={tmp_path / 'out'}", "threads=1", "trainer=cpu")
    (found,) = (tmp_path / "out" / "predictions").glob("*.nii.gz")
    tested = whole / "predictions" / f"{row['case']}.nii.gz"
    assert np.array_equal(np.asarray(nib.load(found).dataobj), np.asarray(nib.load(tested).dataobj))
    own = read_checkpoint(moved)["lesionbench"]
    assert own["preprocessing"]["normalize"] == "zscore"  # that of cases, not of cubes
    assert len(own["patients"]) == 4


def test_killed_in_every_stage_it_ends_the_same(whole, data, tmp_path, monkeypatch):
    common = [*COMMON, data, f"runs={tmp_path}"]
    write, predict = CubeStore.write, TwoPhaseOMT.test_step

    def dies_after(count, method):
        calls = []

        def dying(self, *args):
            result = method(self, *args)
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return dying

    for stage in ("cubes0", "net0", "cubes", "fit", "test"):
        kill = ["callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=4"] if stage in ("net0", "fit") else []
        with monkeypatch.context() as patch:
            if stage in ("cubes0", "cubes"):
                patch.setattr(CubeStore, "write", dies_after(2, write))
            if stage == "test":
                patch.setattr(TwoPhaseOMT, "test_step", dies_after(1, predict))
            assert run_killed(*common, *kill, *(["resume=true"] if stage != "cubes0" else [])) == -signal.SIGKILL, stage
        (killed,) = run_folders(tmp_path)
        if stage in ("cubes0", "cubes"):
            assert len(list((killed / stage / "maps").glob("*.npz"))) == 2
            assert not (killed / stage / "origin.json").exists()
    run(*common, "resume=true")
    assert_same(weights(whole / "net0"), weights(killed / "net0"))
    assert_same(weights(whole), weights(killed))
    for name in ("cubes0", "cubes"):
        assert table(whole / name / "conversion.csv") == table(killed / name / "conversion.csv")
        for path in (whole / name / "maps").iterdir():
            assert (np.load(path)["f"] == np.load(killed / name / "maps" / path.name)["f"]).all()
    assert rows(whole) == rows(killed)


def test_a_full_disk_leaves_whole_cases(data, tmp_path, monkeypatch):
    common = [*COMMON, data, f"runs={tmp_path}"]
    savez, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(SuiteError, match="no space left"):
            run(*common)
    (folder,) = run_folders(tmp_path)
    assert len(list((folder / "cubes0" / "maps").iterdir())) == 2
    assert not list(folder.rglob(".writing-*"))
    with pytest.raises(SuiteError, match="has not finished"):
        Cubes(folder / "cubes0")
    with monkeypatch.context() as patch:
        patch.setattr(
            stages, "conversion", lambda *_: (_ for _ in ()).throw(ZeroDivisionError)
        )  # the third case is mapped, two are not again
        with pytest.raises(ZeroDivisionError):
            run(*common, "resume=true")


def test_other_settings_make_cubes_anew(tmp_path):
    store = CubeStore(tmp_path / "cubes")
    store.begin("a")
    (tmp_path / "cubes" / "maps").mkdir()
    (tmp_path / "cubes" / "maps" / "one.npz").touch()
    store.begin("a")
    assert store.has("one")
    store.begin("b")
    assert not store.has("one")


def test_a_wrong_channel_is_said_before_anything_is_mapped(data, tmp_path):
    with pytest.raises(SuiteError, match=r"model\.channel"):
        run(*COMMON, data, f"runs={tmp_path}", "model.channel=adc")
    assert not run_folders(tmp_path)


def test_what_would_stop_a_training_is_said_before_anything_is_mapped(data, tmp_path):
    with pytest.raises(SuiteError, match=r"objective\.name=val/dise"):
        run(*COMMON, data, f"runs={tmp_path}", "objective.name=val/dise")
    assert not run_folders(tmp_path)


def test_a_region_that_the_first_network_does_not_know_may_be_the_objective(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lesionbench.progress.PATIENCE", 0)
    run(*COMMON, data, f"runs={tmp_path}", "objective.name=val/dice_ET")
    (folder,) = run_folders(tmp_path)
    assert not (folder / "net0" / "checkpoints" / "best.ckpt").exists()
    assert (folder / "checkpoints" / "best.ckpt").exists()
    told = capsys.readouterr().err
    assert all(f"{line} of {n} cases" in told for line, n in [("cubes0, train  2", 3), ("cubes0, val  1", 1), ("cubes, train  3", 3)])
