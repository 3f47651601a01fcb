"""Toy methods go through fit, kill, resume, test, predict and compare without any change to the frame."""

import json
import signal
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch

from lesionbench.errors import SuiteError
from lesionbench.jobs.run_folder import RunFolder
from lesionbench.jobs.stages import _stage_config
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, composed, rows, run, run_folders, run_killed, weights

TOYS = {
    "branches": ["model._target_=tests.toys.Branches"],
    "adversarial": ["model._target_=tests.toys.Adversarial", "accumulate=2", "clip=1.0", "data.num_workers=1"],
    "teacher": [
        "model._target_=tests.toys.Teacher", "data.split.labeled=2", "data.streams={labeled:{cases:labeled,batch_size:1},unlabeled:{cases:unlabeled,batch_size:2}}", "data.extra_maps={pseudo:nearest}", "data.samples_per_epoch=4",
    ],
    "raters": ["model._target_=tests.toys.ManyRaters", "data.raters=3"],
    "classifier": [
        "model._target_=tests.toys.CaseClassifier", "~model.network", "~model.loss", "~model.target", "~model.inferer", "objective.name=val/accuracy",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return partial(write_fake_folder, count=8, shape=(14, 12, 10))(root / "plain"), write_fake_folder(
        root / "raters", 8, raters=3, shape=(14, 12, 10)
    )


@pytest.mark.parametrize("toy", TOYS)
def test_kill_and_resume_is_bit_identical(toy, folder, tmp_path):
    root = folder[1] if toy == "raters" else folder[0]
    common = [*SMALL, f"data.root={root}", *TOYS[toy]]
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=6") == -signal.SIGKILL
    run(*killed, "resume=true")
    whole, resumed = run_folders(tmp_path / "whole"), run_folders(tmp_path / "killed")
    assert len(whole) == len(resumed) == 1
    assert_same(weights(whole[0]), weights(resumed[0]))
    assert rows(whole[0]) == rows(resumed[0])
    assert rows(whole[0])
    checkpoint = whole[0] / "checkpoints" / "last.ckpt"
    out = tmp_path / "out"
    run("job=predict", f"ckpt={checkpoint}", f"input={root / 'images'}", f"out={out}", "trust=[tests]", "writer.uncertainty=true")
    names = {p.name for p in (out / "predictions").iterdir()}
    if toy == "classifier":
        assert "table.csv" in names
    else:
        label = nib.load(out / "predictions" / "case_00.nii.gz")
        source = nib.load(next((root / "images").glob("case_00_*")))
        assert label.shape == source.shape
        assert np.allclose(label.affine, source.affine)
    if toy == "branches":
        assert "case_00_uncertainty_spread.nii.gz" in names
        assert {row["member"] for row in rows(whole[0])} == {"", "s", "p", "v"}
    if toy != "classifier":
        run("job=compare", f"compare.runs=[{tmp_path / 'whole'}]", f"out={tmp_path / 'table'}")
        assert (tmp_path / "table" / "comparison.md").exists()


def test_pseudo_labels_reach_training(folder, tmp_path):
    run(*SMALL, f"data.root={folder[0]}", *TOYS["teacher"], f"runs={tmp_path}")
    (found,) = run_folders(tmp_path)
    used = [line.split(",") for line in (found / "metrics.csv").read_text().splitlines() if "train/pseudo" in line]
    assert next(float(u[-1]) for u in used) == 0
    assert [float(u[-1]) for u in used][-1] == 1


def test_training_free_method_only_tests(folder, tmp_path):
    run(
        *SMALL, f"data.root={folder[0]}", f"runs={tmp_path}", "model._target_=tests.toys.Brightness", "~model.network", "~model.loss", "~model.target",
        "~model.inferer", "stages=[{name:test,run:test}]", "objective.name=null", "metrics.names=[dice,auroc]",
    )  # fmt: skip
    (found,) = run_folders(tmp_path)
    assert {"dice", "auroc"} <= set(rows(found)[0])
    run(
        *SMALL, f"data.root={folder[0]}", "model._target_=tests.toys.Brightness", "~model.network", "~model.loss", "~model.target", "~model.inferer",
        "job=predict", f"input={folder[0] / 'images'}", f"out={tmp_path / 'out'}",
    )  # fmt: skip
    assert len(list((tmp_path / "out" / "predictions").glob("*_score.nii.gz"))) == 8
    run("job=compare", f"compare.runs=[{tmp_path}]", "compare.metrics=[auroc]", f"out={tmp_path / 'table'}")


STAGES = (
    "stages=[{name:first,run:fit},"
    "{name:second,run:call,function:tests.toys.fit_threshold,override:{first:'artefact:first'}},"
    "{name:test,run:test,override:{model:{_target_:tests.toys.FromStage,found:'artefact:second',metrics:'${metrics}'}}}]"
)


def test_two_stage_procedure_skips_what_is_done(folder, tmp_path):
    common = [*SMALL, f"data.root={folder[0]}", f"runs={tmp_path}", "epochs=1", STAGES, "+first=null"]
    run(*common)
    (found,) = run_folders(tmp_path)
    assert (found / "second" / "threshold.json").exists()
    assert (found / "first" / "checkpoints" / "last.ckpt").exists()
    assert rows(found)
    before = (found / "first" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    (found / "stages" / "test.json").unlink()
    (found / "summary.json").unlink()
    run(*common, "resume=true")
    assert (found / "first" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert (found / "stages" / "test.json").exists()


def test_two_stage_procedure_killed_in_its_first_stage_ends_the_same(folder, tmp_path):
    common = [*SMALL, f"data.root={folder[0]}", "epochs=1", STAGES, "+first=null"]
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=2") == -signal.SIGKILL
    run(*killed, "resume=true")
    whole, resumed = (run_folders(tmp_path / n)[0] for n in ("whole", "killed"))
    assert (whole / "second" / "threshold.json").read_text() == (resumed / "second" / "threshold.json").read_text()
    assert rows(whole) == rows(resumed)


WITH_CONTENTS = STAGES.replace("FromStage", "FromContents").replace("artefact:second", "contents:second")


def test_contents_of_an_artefact_stand_in_the_configuration(folder, tmp_path):
    common = [*SMALL, f"data.root={folder[0]}", "epochs=1", "+first=null"]
    run(*common, f"runs={tmp_path / 'path'}", STAGES)
    run(*common, f"runs={tmp_path / 'contents'}", WITH_CONTENTS)  # which the rehearsal of the last stage, before there are any, lets pass
    by_path, by_contents = (run_folders(tmp_path / n)[0] for n in ("path", "contents"))
    assert rows(by_path) == rows(by_contents)
    cfg = composed(*common, f"runs={tmp_path / 'contents'}", WITH_CONTENTS)
    filled, _ = _stage_config(cfg, cfg.stages[2], RunFolder(by_contents))
    assert filled.model.found == json.loads((by_contents / "second" / "threshold.json").read_text())


def test_what_cannot_stand_in_the_configuration_is_named_with_stage_and_file(folder, tmp_path):
    with pytest.raises(SuiteError, match=r"stages\.test asks for contents:first, but \S*best\.ckpt cannot be read as JSON"):
        run(*SMALL, f"data.root={folder[0]}", f"runs={tmp_path}", "epochs=1", WITH_CONTENTS.replace("contents:second", "contents:first"), "+first=null")  # fmt: skip
    (found,) = run_folders(tmp_path)
    (found / "first" / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(SuiteError, match=r"contents:first, but \S*best\.ckpt cannot be read as JSON \(.*No such file"):
        run(*SMALL, f"data.root={folder[0]}", f"runs={tmp_path}", "epochs=1", WITH_CONTENTS.replace("contents:second", "contents:first"), "+first=null", "resume=true")  # fmt: skip


def test_ensemble_of_members_that_preprocess_differently(folder, tmp_path):
    common = [*SMALL, f"data.root={folder[0]}", "epochs=1"]
    for name, more in {
        "a": ["data.preprocessing.normalize=zscore"],
        "b": ["data.preprocessing.normalize=minmax", "data.preprocessing.spacing=[2,2,2]"],
    }.items():
        run(*common, *more, f"runs={tmp_path / name}")
    members = [run_folders(tmp_path / n)[0] / "checkpoints" / "last.ckpt" for n in "ab"]
    run(
        *common, f"runs={tmp_path / 'both'}", "stages=[{name:test,run:test}]", "objective.name=null", "~model.network", "~model.loss", "~model.target",
        "~model.inferer", "model._target_=tests.toys.Ensemble", f"+model.checkpoints=[{','.join(map(str, members))}]",
    )  # fmt: skip
    (found,) = run_folders(tmp_path / "both")
    assert {row["member"] for row in rows(found)} == {"", "m0", "m1"}
    own = {(r["case"], r["region"]): r["dice"] for r in rows(run_folders(tmp_path / "a")[0])}
    assert all(own[r["case"], r["region"]] == r["dice"] for r in rows(found) if r["member"] == "m0")
    run(
        *common, "job=predict", f"input={folder[0] / 'images'}", f"out={tmp_path / 'out'}", "~model.network", "~model.loss", "~model.target",
        "~model.inferer", "model._target_=tests.toys.Ensemble", f"+model.checkpoints=[{','.join(map(str, members))}]", "writer.members=true",
    )  # fmt: skip
    assert (tmp_path / "out" / "predictions" / "case_00_m1.nii.gz").exists()
    run("job=compare", f"compare.runs=[{tmp_path / 'both'}]", "compare.members=[m0,m1]", f"out={tmp_path / 'table'}")


def test_missing_stream_is_an_error_before_training(folder, tmp_path):
    with pytest.raises(SuiteError, match="needs the streams"):
        run(*SMALL, f"data.root={folder[0]}", f"runs={tmp_path}", "model._target_=tests.toys.Teacher")


def test_resume_in_other_seeded_process_with_workers(folder, tmp_path):
    common = [*SMALL, f"data.root={folder[0]}"]
    run(*common, f"runs={tmp_path / 'whole'}", "data.num_workers=1")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=3", "data.num_workers=2"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=5") == -signal.SIGKILL
    torch.rand(3)
    run(*killed, "resume=true", "data.num_workers=0")
    assert_same(weights(run_folders(tmp_path / "whole")[0]), weights(run_folders(tmp_path / "killed")[0]))
