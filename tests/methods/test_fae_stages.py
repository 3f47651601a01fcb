"""The stages of an FAE experiment through `run.py`: they finish, resume, predict, leak nothing and refuse what cannot be used."""

import csv
import os
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
import torch

from lesionbench.errors import SuiteError
from lesionbench.voxels import VoxelStore
from lightning_modules.habitats.bayesopt import EvaluationLog
from lightning_modules.habitats.texture import FEATURES
from tests.fake_data import write_fake_folder
from tests.harness import assert_same, composed, rows, run, run_folders, run_killed, weights

COMMON = [
    "experiment=fae/folder", "data.channels=[t1,flair]", "data.check=false", "data.split.test=4", "epochs=2", "threads=1", "data.num_workers=0",
    "habitats.encoder.batch_size=256", "habitats.encoder.samples_per_epoch=40", "habitats.voxels_per_patient=200", "habitats.repeats=2", "habitats.search={initial:2,iterations:1,clusters:[3,4],quantile:[0.8,1.0]}",
    "callbacks.figures=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 12, shape=(14, 12, 10), survival=True)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An undisturbed run."""
    runs = tmp_path_factory.mktemp("runs")
    run(*COMMON, f"data.root={folder}", f"runs={runs}")
    return run_folders(runs)[0]


def table(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("s_")} for row in csv.DictReader(file)]


def fitted(folder):
    """The fitted artefact of a run, flat."""
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]["_extra_state"]
    return {**state["arrays"], **state["network"], "significant": torch.tensor(state["significant"])}


def test_every_stage_leaves_what_it_should(whole, folder):
    assert len(rows(whole)) == 4
    row = rows(whole)[0]
    assert {"tumor_voxels", *FEATURES, "fraction_1", "high_risk", "days", "died"} <= set(row)
    assert len(table(whole / "optimize" / "evaluations.csv")) == 4
    assert "search/best" in (whole / "optimize" / "metrics.csv").read_text()
    assert {p.name for p in (whole / "figures").iterdir()} == {"kaplan_meier.png", "clusters.png", "search.png"}
    survival = table(whole / "analyze" / "survival.csv")
    assert [r["patients"] for r in survival] == ["training", "held-out"]
    assert sum(int(survival[0][k]) for k in ("low", "high")) == 8
    by_clusters = table(whole / "cluster" / "clusters.csv")
    assert [(r["encoder"], r["clusters"]) for r in by_clusters] == [("fae", "3"), ("fae", "4"), ("raw", "3"), ("raw", "4")]


def test_maps_lie_on_the_input_and_agree_with_the_table(whole, folder):
    training = sorted((whole / "cluster" / "predictions").glob("*.nii.gz"))
    held_out = sorted((whole / "predictions").glob("*.nii.gz"))
    assert len(training) == 8
    assert len(held_out) == 4
    shares = {r["case"]: r for r in table(whole / "cluster" / "cases.csv") + rows(whole)}
    for path in (*training, *held_out):
        case = path.name.removesuffix(".nii.gz")
        found, label = nib.load(path), nib.load(folder / "labels" / path.name)
        assert np.array_equal(found.affine, label.affine)
        values, tumor = np.asarray(found.dataobj), np.asarray(label.dataobj) > 0
        assert np.array_equal(values > 0, tumor)
        assert (values == 1).sum() / tumor.sum() == pytest.approx(float(shares[case]["fraction_1"]))


def test_killed_after_an_evaluation_and_in_training_it_ends_the_same(whole, folder, tmp_path, monkeypatch):
    common = [*COMMON, f"data.root={folder}", f"runs={tmp_path}", "callbacks.checkpoint.every_n_batches=1"]
    kill = ["callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=13"]
    assert run_killed(*common, *kill) == -signal.SIGKILL
    append = EvaluationLog.append

    def dying(log, row):
        append(log, row)
        if len(log.rows) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(EvaluationLog, "append", dying)
    assert run_killed(*common, "resume=true") == -signal.SIGKILL
    monkeypatch.setattr(EvaluationLog, "append", append)
    (killed,) = run_folders(tmp_path)
    assert len(table(killed / "optimize" / "evaluations.csv")) == 3
    run(*common, "resume=true")
    assert_same(weights(whole / "encoder"), weights(killed / "encoder"))
    assert table(whole / "optimize" / "evaluations.csv") == table(killed / "optimize" / "evaluations.csv")
    assert_same(fitted(whole), fitted(killed))
    assert rows(whole) == rows(killed)
    search = [line.split(",")[:3] for line in (killed / "optimize" / "metrics.csv").read_text().splitlines() if "search/loss" in line]
    assert [int(line[0]) for line in search] == [1, 2, 3, 4]


def test_held_out_patients_change_nothing_that_is_fitted(whole, folder, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns(".cache"))
    held_out = [r["case"] for r in rows(whole)]
    lines = (root / "attributes.csv").read_text().splitlines()
    changed = [",".join([*line.split(",")[:-2], "9999", "0"]) if line.split(",")[0] in held_out else line for line in lines]
    (root / "attributes.csv").write_text("\n".join(changed) + "\n")
    for case in held_out:
        for path in (root / "images").glob(f"{case}_*"):
            image = nib.load(path)
            nib.save(nib.Nifti1Image((np.asarray(image.dataobj) * 3 + 5).astype(np.int16), image.affine), path)
    run(*COMMON, f"data.root={root}", f"runs={tmp_path / 'runs'}")
    (other,) = run_folders(tmp_path / "runs")
    assert_same(fitted(whole), fitted(other))
    assert table(whole / "optimize" / "evaluations.csv") == table(other / "optimize" / "evaluations.csv")
    assert rows(whole) != rows(other)


def test_new_patients_are_predicted_with_nothing_refitted(whole, folder, tmp_path):
    moved = tmp_path / "habitats.ckpt"
    shutil.copy(whole / "checkpoints" / "best.ckpt", moved)
    predict = ["job=predict", f"ckpt={moved}", f"input={folder / 'images'}", f"data.labels={folder / 'labels'}"]
    run(*predict, f"out={tmp_path / 'out'}")
    by_case = {r["case"]: r for r in table(tmp_path / "out" / "predictions" / "table.csv")}
    assert len(by_case) == 12
    for row in rows(whole):
        assert {k: row[k] for k in (*FEATURES, "high_risk")} == {k: by_case[row["case"]][k] for k in (*FEATURES, "high_risk")}
        name = f"{row['case']}.nii.gz"
        assert np.array_equal(*(np.asarray(nib.load(f / "predictions" / name).dataobj) for f in (whole, tmp_path / "out")))
    with pytest.raises(SuiteError, match=r"no tumor mask.*data\.labels"):
        run(*predict[:-1], f"out={tmp_path / 'without'}")
    with pytest.raises(SuiteError, match="no label map"):
        run(*predict[:-1], f"data.labels={tmp_path}", f"out={tmp_path / 'wrong'}")


def test_tested_again_from_the_checkpoint(whole, folder, tmp_path):
    run(*COMMON, f"data.root={folder}", f"runs={tmp_path}", "job=test", "model=habitats", f"ckpt={whole / 'checkpoints' / 'best.ckpt'}")
    assert rows(run_folders(tmp_path)[0]) == rows(whole)
    encoder = whole / "encoder" / "checkpoints" / "last.ckpt"
    with pytest.raises(SuiteError, match=r"best\.ckpt"):
        run("job=predict", f"ckpt={encoder}", f"input={folder / 'images'}", f"out={tmp_path / 'out'}")


def test_another_encoder_and_all_loggers(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    short = [o for o in COMMON if "search" not in o] + ["habitats.search={initial:2,iterations:0,clusters:[3,3],strategy:random}"]
    more = ["habitats.encoder.kind=ensemble", "habitats.training_maps=false", "logger=[csv,tensorboard,wandb]"]
    run(*short, f"data.root={folder}", f"runs={tmp_path}", *more)
    (found,) = run_folders(tmp_path)
    assert len(rows(found)) == 4
    assert not (found / "cluster" / "predictions").exists()
    assert list(found.glob("optimize/tensorboard/events.out*"))
    assert list(found.rglob("*.wandb"))


def test_presets_and_options_reach_the_search_and_the_settings():
    from lightning_modules.habitats.stages import search_of, settings_of

    assert search_of(composed("experiment=fae/folder", "habitats=paper")).quantile == (0, 1)
    cfg = composed("experiment=fae/brats2020", "habitats.search.strategy=grid", "habitats.alpha=0.25", "habitats.encoder.update=joint")
    assert (search_of(cfg).strategy, search_of(cfg).quantile) == ("grid", (0.8, 1.0))
    assert (settings_of(cfg, 2).alpha, settings_of(cfg, 2).encoder.update, cfg.model["update"]) == (0.25, "joint", "joint")


@pytest.mark.parametrize("wrong", ["search.strategy=tpe", "significance=units", "encoder.kind=vae", "share=1", "repeats=0"])
def test_bad_settings_are_refused_before_a_voxel_is_read(wrong, folder, tmp_path):
    with pytest.raises(SuiteError, match=r"habitats\." + wrong.partition("=")[0].replace(".", r"\.")):
        run(*COMMON, f"data.root={folder}", f"runs={tmp_path}", f"habitats.{wrong}")
    assert not list(tmp_path.rglob("case.json"))


def test_stored_voxels_are_streamed_by_case_and_key(whole):
    from datamodules import TumorVoxels

    data, same = (TumorVoxels(whole / "voxels", voxels=16, batch_size=2, samples_per_epoch=16, seed=3) for _ in range(2))
    for module in (data, same):
        module.setup("fit")
    batches, again = list(data.train_dataloader()), list(same.train_dataloader())
    assert len(batches) == 8
    assert batches[0]["image"].shape == (32, 2)
    assert batches[0]["case_index"].tolist() == [0] * 16 + [1] * 16
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, again, strict=True))
    drawn = [case for batch in batches for case in batch["case"]]
    assert all(drawn.count(case) == 2 for case in set(drawn))  # sixteen samples of eight cases
    values = data.voxel_store.values(batches[0]["case"][0])
    assert all((values == row.numpy()).all(axis=1).any() for row in batches[0]["image"][:16])
    assert data.voxel_sample(10, 0).shape == (80, 2)
    with pytest.raises(SuiteError, match="no voxels here"):
        TumorVoxels(whole / "test")


def changed_attributes(root, column, value, cases=None):
    """Overwrites a column of attributes.csv (of some cases); the column goes with value None."""
    found = table(root / "attributes.csv")
    for row in found:
        if cases is None or row["case"] in cases:
            row[column] = value
        if value is None:
            del row[column]
    with (root / "attributes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def broken(folder, tmp_path, name):
    """A copy of the data to spoil, and the overrides that stop after the search."""
    root = tmp_path / name
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns(".cache"))
    return root, [*COMMON, f"data.root={root}", f"runs={tmp_path / f'runs-{name}'}", "habitats=raw", "habitats.search.limit=1"]


def test_unusable_survival_is_refused_and_alpha_one_needs_none(folder, tmp_path):
    root, common = broken(folder, tmp_path, "censored")
    changed_attributes(root, "event", "0")
    with pytest.raises(SuiteError, match="censored"):
        run(*common)
    changed_attributes(root, "event", None)
    with pytest.raises(SuiteError, match=r"habitats\.event"):
        run(*common)
    changed_attributes(root, "survival", None)
    with pytest.raises(SuiteError, match="survival time"):
        run(*common)
    run(*common, "habitats.alpha=1")
    (found,) = [f for f in run_folders(tmp_path / "runs-censored") if (f / "test").exists()]
    assert not (found / "encoder").exists()  # habitats=raw


def test_held_out_survival_is_read_as_that_of_training_patients_is(whole, folder, tmp_path):
    root, common = broken(folder, tmp_path, "events")
    held_out = [r["case"] for r in rows(whole)]
    changed_attributes(root, "event", "alive", held_out[:1])
    with pytest.raises(SuiteError, match=f"case {held_out[0]}: .*'alive'"):
        run(*common)
    changed_attributes(root, "event", "", held_out[:1])  # days without an event are not censored days
    run(*common, "resume=true")
    (found,) = run_folders(tmp_path / "runs-events")
    training, tested = table(found / "analyze" / "survival.csv")
    assert [int(r["low"]) + int(r["high"]) for r in (training, tested)] == [8, 3]
    trained = next(r["case"] for r in table(root / "attributes.csv") if r["case"] not in held_out)
    changed_attributes(root, "event", "2", [trained])
    with pytest.raises(SuiteError, match=f"case {trained}: .*'event': 2"):
        run(*common)


def test_voxels_of_other_cases_are_not_kept(folder, tmp_path, monkeypatch):
    """A kill in the middle of the extraction, then a corrected release in the same place."""
    root, common = broken(folder, tmp_path, "released")

    def dies(store, record, *arrays, real=VoxelStore.write):
        real(store, record, *arrays)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(VoxelStore, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            run(*common)
    (found,) = run_folders(tmp_path / "runs-released")
    (kept,) = (found / "voxels").glob("*/values.npy")
    before = np.load(kept)
    for image in (root / "images").glob(f"{kept.parent.name}_*"):
        scan = nib.load(image)
        nib.Nifti1Image(np.asarray(scan.dataobj)[::-1].copy(), scan.affine).to_filename(image)
    run(*common, "resume=true")
    assert not np.array_equal(np.load(kept), before)


def test_empty_masks_are_left_out_and_constant_modalities_refused(folder, tmp_path, capsys):
    root, common = broken(folder, tmp_path, "spoiled")
    for case in ("case_00", "case_01", "case_02", "case_03", "case_04"):
        label = nib.load(root / "labels" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), root / "labels" / f"{case}.nii.gz")
    run(*common)
    said = capsys.readouterr().out
    (found,) = run_folders(tmp_path / "runs-spoiled")
    trained = {p.parent.name for p in (found / "voxels").glob("*/case.json")}
    empty = {"case_00", "case_01", "case_02", "case_03", "case_04"}
    assert not trained & empty
    assert "without tumor voxels are left out" in said
    tested = {r["case"]: r for r in rows(found)}
    assert all((float(r["tumor_voxels"]) == 0) == (c in empty) == (r["high_risk"] == "nan") for c, r in tested.items())
    for path in (root / "images").glob("*_t1.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.full(image.shape, 7, np.int16), image.affine), path)
    with pytest.raises(SuiteError, match="modality t1"):
        run(*common)
    with pytest.raises(SuiteError, match="did you mean 'lesion'"):
        run(*common, "habitats.region=lesions")


def test_a_missing_modality_is_refused(folder, tmp_path):
    root, common = broken(folder, tmp_path, "missing")
    for path in (root / "images").glob("case_0*_t1.nii.gz"):
        path.unlink()
    with pytest.raises(SuiteError, match="lacks the modality t1"):
        run(*common, "data.preprocessing.allow_missing=true")


def test_masks_of_a_segmentation_run_replace_the_labels(folder, tmp_path):
    masks = tmp_path / "predictions"
    masks.mkdir()
    for path in sorted((folder / "labels").glob("*.nii.gz"))[:9]:
        label = nib.load(path)
        half = np.asarray(label.dataobj).copy()
        half[:7] = 0
        nib.save(nib.Nifti1Image(half, label.affine), masks / path.name)
    run(*COMMON, f"data.root={folder}", f"runs={tmp_path / 'runs'}", "habitats=raw", "habitats.search.limit=1", f"data.labels={masks}")
    (found,) = run_folders(tmp_path / "runs")
    maps = sorted((found / "cluster" / "predictions").glob("*.nii.gz"))
    assert len(maps) + len(rows(found)) == 9
    for path in maps:
        assert np.array_equal(np.asarray(nib.load(path).dataobj) > 0, np.asarray(nib.load(masks / path.name).dataobj) > 0)


def test_real_cases(real_data, tmp_path):
    """Six real cases without enough patients for a test: stability alone, masks filled exactly."""
    run(
        "experiment=fae/brats2020", "data=brats2018", f"data.root={real_data / 'brats18'}", f"data.cache={tmp_path / 'cache'}", "data.split.test=1", "trainer=cpu",
        f"runs={tmp_path / 'runs'}", "habitats.alpha=1", "habitats.search.limit=2", "habitats.repeats=3", "epochs=2", "threads=1", "data.num_workers=0",
    )  # fmt: skip
    (found,) = run_folders(tmp_path / "runs")
    maps = [*(found / "cluster" / "predictions").glob("*.nii.gz"), *(found / "predictions").glob("*.nii.gz")]
    assert len(maps) == 6
    for path in maps:
        label = nib.load(next((real_data / "brats18").rglob(f"{path.name.removesuffix('.nii.gz')}_seg.nii*")))
        assert np.array_equal(np.asarray(nib.load(path).dataobj) > 0, np.asarray(label.dataobj) > 0)
        assert np.array_equal(nib.load(path).affine, label.affine)
