"""Weights & Biases without an account: what an offline run holds, and how runs are told apart and continued."""

import base64
import csv
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from callbacks.overlays import View
from callbacks.wandb_run import WandbRun, _innermost, described, records
from lesionbench.errors import SuiteError
from lesionbench.jobs.run_folder import RunFolder, variant_hash
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, composed, rows, run, run_folders, run_killed
from tests.toys import KillAt

OFFLINE = [*SMALL, "logger=[csv,wandb]", "logger.wandb.offline=true", "epochs=2", "callbacks.writer=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(14, 12, 10))


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """As without an account, and without W&B's lines on the terminal; no run stays open."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    end()


def end() -> None:
    """What W&B does when a process ends; a process that is forked later would share the service."""
    import wandb

    wandb.finish()
    wandb.teardown()


class Offline:
    """What one offline run holds."""

    def __init__(self, path: Path) -> None:
        self.folder, self.history, self.summary, self.config, self.artifacts, self.metrics = path.parent, [], {}, {}, [], []
        for record in records(path):
            self._take(record)

    def _take(self, record) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            self.history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        elif kind == "summary":
            self.summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "run":
            self.run = record.run
            self.config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "artifact":
            self.artifacts.append(record.artifact)
        elif kind == "metric":
            self.metrics.append(record.metric)

    def curve(self, name: str) -> dict[int, float]:
        return {row["iteration"]: row[name] for row in self.history if name in row}


def offline_runs(root: Path) -> list[Offline]:
    """Every W&B run under a folder, oldest first."""
    end()
    return [Offline(p) for p in sorted(root.rglob("*.wandb"), key=lambda p: p.stat().st_mtime)]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run with everything that W&B gets."""
    runs = tmp_path_factory.mktemp("runs")
    figures = ["+callbacks.figures._target_=callbacks.OverlayFigures", "+callbacks.figures.folder=${run_folder}"]
    run(*OFFLINE, *figures, f"data.root={folder}", f"runs={runs}", "data.split.folds=4", "data.split.fold=2", "seed=3", "logger.wandb.checkpoints=[best,last]", "logger.wandb.tags=[pilot]")  # fmt: skip
    (path,) = run_folders(runs)
    return path


def test_names_tell_method_data_fold_and_seed_apart(finished):
    (kept,) = offline_runs(finished)
    assert kept.run.display_name == "supervised/folder fold=2 seed=3"
    assert kept.run.job_type == "fit"
    assert sorted(kept.run.tags) == ["data=Folder", "fold=2", "method=Supervised", "pilot", "seed=3"]
    assert kept.run.run_group.startswith("supervised/folder ")
    assert kept.run.run_id.startswith(f"{finished.parent.name}-seed3-")
    assert kept.config["run"] == {"method": "Supervised", "data": "Folder", "fold": 2, "seed": 3, "folder": str(finished)}
    assert kept.config["model"]["_target_"] == "lightning_modules.Supervised"
    assert kept.config["epochs"] == 2


def test_curves_over_iterations_and_their_best(finished):
    (kept,) = offline_runs(finished)
    with (finished / "metrics.csv").open(newline="") as file:
        written = [row for row in csv.DictReader(file) if not row["name"].startswith("perf/")]
    for name in {row["name"] for row in written}:
        assert kept.curve(name) == {int(r["iteration"]): pytest.approx(float(r["value"])) for r in written if r["name"] == name}, name
    assert any(m.glob_name == "*" and m.step_metric == "iteration" for m in kept.metrics)
    assert any(m.name == "val/dice" and m.summary.max for m in kept.metrics)


def test_table_of_cases_and_their_means(finished):
    (kept,) = offline_runs(finished)
    (table,) = (kept.folder / "files/media/table/test").glob("cases*.json")
    sent = json.loads(table.read_text())
    expected = rows(finished)
    assert [dict(zip(sent["columns"], row, strict=True))["case"] for row in sent["data"]] == [r["case"] for r in expected]
    dice = [float(r["dice"]) for r in expected]
    assert [row[sent["columns"].index("dice")] for row in sent["data"]] == pytest.approx(dice)
    assert kept.summary["test/dice_lesion"] == pytest.approx(sum(dice) / len(dice))


def test_overlays_have_truth_and_prediction_as_masks(finished):
    (kept,) = offline_runs(finished)
    (row,) = [row for row in kept.history if "overlays/best/_type" in row]
    assert row["overlays/best/count"] == 3
    assert [c.split(", ")[1].split()[0] for c in row["overlays/best/captions"]] == ["axial", "coronal", "sagittal"]
    masks = row["overlays/best/all_masks"]
    assert len(masks) == 3
    assert all(set(m) == {"truth", "prediction"} for m in masks)
    truth = imread(kept.folder / "files" / masks[0]["truth"]["path"])
    images = [imread(kept.folder / "files" / name) for name in row["overlays/best/filenames"]]
    assert truth.shape[:2] == images[0].shape[:2]
    assert truth.max() > 0
    assert len({image.shape for image in images}) == 1  # else W&B warns and shows them wrongly


def test_slices_of_a_case_are_framed_to_one_size_with_their_masks(tmp_path, monkeypatch):
    sent = {}
    logger = WandbRun(str(tmp_path), offline=True)
    monkeypatch.setattr(logger, "log_image", lambda key, images, caption, masks: sent.update(images=images, masks=masks))
    views = []
    for name, shape in (("axial", (4, 6)), ("coronal", (7, 3))):
        mask = np.zeros((1, *shape), bool)
        mask[0, 0, 0] = True
        image = np.ones((1, *shape), np.float32)
        image[0, 0, 0] = 2  # the brightest voxel and the mask stay together
        views.append(View(name, 5, shape, image, truth=mask, prediction=None))
    logger.log_overlays("overlays/best", "case", views, ["lesion"])
    for image, masks, corner in zip(sent["images"], sent["masks"], [(1, 0), (0, 1)], strict=True):
        assert image.shape == masks["truth"]["mask_data"].shape == (7, 6)
        assert np.argwhere(masks["truth"]["mask_data"]).tolist() == [list(corner)]
        assert image[corner] == image.max() > 0


def test_nothing_is_handed_on_that_wandb_warns_of(tmp_path):
    assert "anonymous" not in WandbRun(str(tmp_path), offline=True)._wandb_init


def test_of_nested_regions_the_inner_one_is_seen():
    outer, inner = np.zeros((2, 4, 4), bool)
    outer[1:, 1:] = True
    inner[2, 2] = True
    assert _innermost(np.stack([outer, inner])).tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 1], [0, 1, 1, 1]]


def test_checkpoints_are_artifacts_on_request(finished, folder, tmp_path):
    (kept,) = offline_runs(finished)
    models = [a for a in kept.artifacts if a.type == "model"]
    assert [set(a.aliases) for a in models] == [{"latest", "best"}, {"latest", "last"}]
    for model, kind in zip(models, ("best", "last"), strict=True):
        path = finished / "checkpoints" / f"{kind}.ckpt"
        (content,) = model.manifest.contents
        assert Path(content.local_path) == path  # no copy
        assert content.digest == base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()
    with pytest.raises(SuiteError, match="did you mean 'best'"):
        WandbRun(str(tmp_path), checkpoints=["bst"])


def test_a_sweep_makes_one_run_for_each_job_and_ends_it(folder, tmp_path):
    """Two jobs in one process; without checkpoints asked for there are no artifacts of them."""
    for seed in (0, 1):
        run(*OFFLINE, f"data.root={folder}", f"runs={tmp_path}", f"seed={seed}")
    first, second = offline_runs(tmp_path)
    assert (first.run.run_id == second.run.run_id, first.run.run_group == second.run.run_group) == (False, True)
    assert [k.run.display_name for k in (first, second)] == ["supervised/folder seed=0", "supervised/folder seed=1"]
    assert not [a for a in first.artifacts if a.type == "model"]
    for kept, seed in ((first, 0), (second, 1)):
        assert kept.config["seed"] == seed
        assert sorted(kept.curve("val/dice")) == [4, 8]
        assert "test/dice_lesion" in kept.summary


def test_a_run_that_died_goes_on_as_the_same(folder, tmp_path):
    common = [*OFFLINE, f"data.root={folder}", f"runs={tmp_path}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*common, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=6") != 0
    run(*common, "resume=true")
    _, after = offline_runs(tmp_path)  # of the first, kill -9 leaves what W&B had written to disk, maybe nothing
    assert [p.name.split("-", 3)[3] for p in sorted(tmp_path.rglob("offline-run-*"))] == [after.run.run_id] * 2
    assert sorted(after.curve("val/dice")) == [8]
    assert sorted(after.curve("train/loss")) == [8]


class SentThenKilled(KillAt):
    """Kills the process after so many batches, or at the end of the test; what it had logged is in W&B's file by then."""

    def on_train_batch_end(self, trainer, pl_module, *more):
        if pl_module.iteration == self.iteration:
            end()
            super().on_train_batch_end(trainer, pl_module, *more)

    def on_test_end(self, trainer, pl_module):
        if self.iteration < 0:
            end()
            os.kill(os.getpid(), self.how)


def test_no_row_is_sent_twice_by_a_run_that_died_twice_in_training_and_once_in_its_test(folder, tmp_path):
    figures = ["callbacks.figures={_target_:callbacks.OverlayFigures,folder:'${run_folder}'}", "model._target_=tests.toys.Chatty"]
    common = [*OFFLINE, *figures, f"data.root={folder}", "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_batches=3"]
    run(*common, f"runs={tmp_path / 'whole'}")
    (whole,) = offline_runs(tmp_path / "whole")
    common.append(f"runs={tmp_path / 'killed'}")
    for iteration in (5, 7, -1):
        kill = ["callbacks.progress._target_=tests.test_wandb.SentThenKilled", f"+callbacks.progress.iteration={iteration}"]
        assert run_killed(*common, *kill, "resume=true") == -signal.SIGKILL
    run(*common, "resume=true")
    parts = offline_runs(tmp_path / "killed")
    assert len({part.run.run_id for part in parts}) == 1
    assert len(parts) == 4
    assert [rows_sent(part) != [] for part in parts] == [True, True, True, False]  # at the end of the test everything was there
    assert [row for part in parts for row in rows_sent(part)] == rows_sent(whole)
    assert {"train/extra", "train/measured", "test/cases/_type", "overlays/best/_type"} <= {k for row in rows_sent(whole) for k in row}
    (found,) = run_folders(tmp_path / "killed")
    (other,) = run_folders(tmp_path / "whole")
    assert (found / "metrics.csv").read_text() == (other / "metrics.csv").read_text()


def rows_sent(kept: Offline) -> list[dict]:
    """The rows of a run, numbers as they are and of files only what they are."""
    times = ("_timestamp", "_runtime")
    return [
        {k: v for k, v in row.items() if k not in times and (k.endswith("_type") or not isinstance(v, str | list))} for row in kept.history
    ]


def test_folds_and_seeds_share_a_group_settings_do_not(tmp_path):
    def group(*overrides):
        cfg = composed("experiment=supervised/folder", "data.split.folds=4", *overrides)
        folder = tmp_path / "-".join(["x", *overrides]).replace("/", "") / "abc" / f"seed={cfg.seed}"
        RunFolder(folder).write_config(cfg)
        RunFolder(folder).update_summary(started=1.0, variant=variant_hash(cfg))
        return described(folder)

    same = [group(), group("seed=4"), group("data.split.fold=3")]
    assert len({d["group"] for d in same}) == 1
    assert len({d["name"] for d in same}) == 3
    assert group("model/loss=focal")["group"] != same[0]["group"]


def test_on_two_processes_the_first_one_tells(folder, tmp_path):
    run(*OFFLINE, f"data.root={folder}", f"runs={tmp_path}", "trainer=ddp_sim", "data.batch_size=1")
    kept = offline_runs(tmp_path)
    assert {k.run.run_id for k in kept} == {kept[0].run.run_id}
    curve = {i: v for k in kept for i, v in k.curve("val/dice").items()}
    assert sorted(curve) == [4, 8]
    assert any("test/dice_lesion" in k.summary for k in kept)


# the dashboard


def panels(spec: dict) -> dict[str, list[dict]]:
    """Section -> panels of a written workspace."""
    return {s["name"]: s["panels"] for s in spec["spec"]["section"]["panelBankConfig"]["sections"]}


def test_dashboard_is_built_without_an_account(finished, tmp_path):
    pytest.importorskip("wandb_workspaces", reason="needs the extra `dashboard`")
    out = tmp_path / "dashboard.json"
    run("job=dashboard", f"compare.runs=[{finished}]", "compare.group_by=[experiment_name,model.loss._target_]", "dashboard.dry_run=true", "dashboard.entity=me", f"out={out}")  # fmt: skip
    made = json.loads(out.read_text())
    assert (made["entity"], made["project"], made["name"]) == ("me", "lesionbench", "comparison")
    sections = panels(made)
    assert list(sections) == ["Test scores", "Validation", "Training", "Cases", "Settings"]
    bars = {p["config"]["chartTitle"]: p["config"]["metrics"] for p in sections["Test scores"]}
    assert bars == {"dice": ["test/dice_lesion"], "hd95_mm": ["test/hd95_mm_lesion"]}
    assert [p["config"]["metrics"] for p in sections["Validation"]] == [["val/dice"], ["val/dice_lesion"]]
    assert all(p["config"]["xAxis"] == "iteration" for p in sections["Validation"] + sections["Training"])
    (shown,) = made["spec"]["section"]["runSets"]
    assert [g["name"] for g in shown["grouping"]] == ["experiment_name.value", "model.value.loss._target_"]
    (kept,) = offline_runs(finished)
    logged = {key for row in kept.history for key in row} | set(kept.summary)
    for part in ("Test scores", "Validation", "Training"):
        assert {m for p in sections[part] for m in p["config"]["metrics"]} <= logged  # what it shows is what runs send


def test_sending_a_dashboard_says_that_it_needs_an_account(finished, tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="needs the extra `dashboard`")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SuiteError, match="needs a W&B account"):
        run("job=dashboard", f"compare.runs=[{finished}]")
    with pytest.raises(SuiteError, match=r"Unknown config key 'model.los'; did you mean 'model.loss'"):  # W&B would show one group
        run(
            "job=dashboard", f"compare.runs=[{finished}]", "compare.group_by=[model.los]", "dashboard.dry_run=true", f"out={tmp_path / 'x'}"
        )
    with pytest.raises(SuiteError, match="out="):
        run("job=dashboard", f"compare.runs=[{finished}]", "dashboard.dry_run=true")
