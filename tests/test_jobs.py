"""Every job and first-class option, run on tiny data as a user would."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from datamodules.preprocessing import Preprocessing
from lesionbench.checkpoint import load_method
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from lesionbench.task import Task
from tests.fake_data import write_fake_brats, write_fake_folder
from tests.harness import SMALL, assert_same, composed, rows, run, run_folders, run_killed, weights

ROOT = Path(__file__).parent.parent
SHORT = [*SMALL, "epochs=1", "data.samples_per_epoch=4"]
NO_MOMENTUM = ["model/optimizer=sgd", "model.optimizer.momentum=0"]  # each is fine, both are not


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(20, 18, 16))


def test_returned_value_is_the_best_of_the_objective(folder, tmp_path):
    value = run(*SMALL, f"data.root={folder}", f"runs={tmp_path}")
    (found,) = run_folders(tmp_path)
    curve = [float(line.split(",")[-1]) for line in (found / "metrics.csv").read_text().splitlines() if ",val/dice," in line]
    assert len(curve) == 3
    assert value == max(curve) == json.loads((found / "summary.json").read_text())["objective"]


def test_same_command_again_makes_a_new_folder_and_resume_skips_a_finished_one(folder, tmp_path):
    common = [*SHORT, f"data.root={folder}", f"runs={tmp_path}"]
    first = run(*common)
    run(*common)
    assert [f.name for f in run_folders(tmp_path)] == ["seed=0", "seed=0-2"]
    stamp = (run_folders(tmp_path)[1] / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run(*common, "resume=true") == first
    assert (run_folders(tmp_path)[1] / "checkpoints" / "last.ckpt").stat().st_mtime_ns == stamp
    assert len(run_folders(tmp_path)) == 2


def test_sweep_resumes_by_skipping_finished_runs(folder, tmp_path):
    common = [*SHORT, f"data.root={folder}", f"runs={tmp_path}"]
    run(*common, "seed=0")
    stamp = (run_folders(tmp_path)[0] / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    arguments = [sys.executable, "run.py", "-m", *common, "seed=0,1", "resume=true"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert [f.name for f in run_folders(tmp_path)] == ["seed=0", "seed=1"]
    assert (run_folders(tmp_path)[0] / "checkpoints" / "last.ckpt").stat().st_mtime_ns == stamp


def test_sigterm_writes_a_checkpoint_first(folder, tmp_path):
    common = [*SMALL, f"data.root={folder}"]
    run(*common, f"runs={tmp_path / 'whole'}")
    stopped = [*common, f"runs={tmp_path / 'stopped'}"]
    assert (
        run_killed(
            *stopped,
            "callbacks.progress._target_=tests.toys.KillAt",
            "+callbacks.progress.iteration=6",
            f"+callbacks.progress.how={int(signal.SIGTERM)}",
        )
        == 143
    )
    (found,) = run_folders(tmp_path / "stopped")
    assert torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)["lesionbench"]["iteration"] == 7
    assert json.loads((found / "summary.json").read_text())["status"] == "interrupted"
    run(*stopped, "resume=true")
    assert_same(weights(run_folders(tmp_path / "whole")[0]), weights(found))


def _killed_while_caching(*overrides: str) -> None:
    from datamodules import cache

    real, written = cache._write, []

    def write(path, array):
        written.append(path)
        if len(written) == 8:  # two arrays of the third case
            Path(path).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, array)

    cache._write = write
    run(*overrides)


def test_kill_while_caching(folder, tmp_path):
    common = [*SHORT, f"data.root={folder}"]
    run(*common, f"runs={tmp_path / 'whole'}", f"data.cache={tmp_path / 'first'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", f"data.cache={tmp_path / 'second'}"]
    process = multiprocessing.get_context("fork").Process(target=_killed_while_caching, args=killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "second").glob("*/case_*"))) < 8
    run(*killed, "resume=true")
    whole, resumed = run_folders(tmp_path / "whole"), run_folders(tmp_path / "killed")
    assert_same(weights(whole[0]), weights(resumed[0]))
    assert len(resumed) == 1
    assert rows(whole[0]) == rows(resumed[0])
    assert not list((tmp_path / "second").rglob(".*"))


def test_kill_within_an_accumulation_window(folder, tmp_path):
    common = [*SMALL, f"data.root={folder}", "accumulate=3", "model/scheduler=plateau"]
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=6") == -signal.SIGKILL
    run(*killed, "resume=true")
    assert_same(weights(run_folders(tmp_path / "whole")[0]), weights(run_folders(tmp_path / "killed")[0]))


def rates(folder):
    """Epoch, of four iterations, -> learning rate at its last one."""
    with (folder / "metrics.csv").open() as file:
        return {int(r["iteration"]) // 4: float(r["value"]) for r in csv.DictReader(file) if r["name"].startswith("lr/")}


def test_patience_counts_validations(folder, tmp_path):
    """Weights that stay as they are, validated after every second epoch: the first validation is the best."""
    common = [
        *SMALL,
        f"data.root={folder}",
        "epochs=10",
        "trainer.check_val_every_n_epoch=2",
        "trainer.log_every_n_steps=1",
        "model.optimizer.lr=1e-7",
    ]
    run(*common, "model/scheduler=plateau", "model.scheduler.patience=1", "model.scheduler.factor=0.5", f"runs={tmp_path / 'plateau'}")
    (found,) = run_folders(tmp_path / "plateau")
    assert [rate / 1e-7 for _, rate in sorted(rates(found).items())] == pytest.approx([1] * 6 + [0.5] * 4)
    run(*common, "callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=2", f"runs={tmp_path / 'early'}")
    (found,) = run_folders(tmp_path / "early")
    assert max(rates(found)) == 5  # of ten: after the validations of epochs 1, 3 and 5


def test_the_direction_of_a_plateau_is_that_of_the_objective():
    assert composed(*SMALL, "model/scheduler=plateau", "objective.mode=min").model.scheduler.mode == "min"
    assert composed(*SMALL, "model/scheduler=plateau").model.scheduler.mode == "max"


@pytest.mark.parametrize(
    ("waits", "names"),
    [
        (["model/scheduler=plateau"], "model.scheduler"),
        (["callbacks=[default,early_stopping]"], "callbacks.early_stopping"),
        (["model/scheduler=plateau", "callbacks=[default,early_stopping]"], "model.scheduler and callbacks.early_stopping"),
    ],
)
@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("data.split.val=0", "data.split.val=0"),
        ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0"),
        ("objective.name=null", "objective.name=null"),
        ("trainer.check_val_every_n_epoch=4", "epochs=3 ends before trainer.check_val_every_n_epoch=4"),
    ],
)
def test_what_waits_for_a_validation_that_never_comes_is_refused_at_once(waits, names, why, said, folder, tmp_path):
    with pytest.raises(SuiteError, match=rf"^{re.escape(names)} wait\(s\) for .*{re.escape(said)}$"):
        run(*SMALL, f"data.root={folder}", f"runs={tmp_path}", why, *waits)
    assert not any(tmp_path.iterdir())


def test_a_split_file_without_validation_cases_is_refused_before_training(folder, tmp_path):
    ids = sorted(p.name.removesuffix(".nii.gz") for p in (folder / "labels").iterdir())
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:4], "val": [], "test": ids[4:]}))
    split = [f"data.split.file={tmp_path / 'split.json'}", "data.split.test=0.2", "data.split.val=0.1"]
    with pytest.raises(SuiteError, match=r"model\.scheduler wait.*no case to validate on"):
        run(*SMALL, f"data.root={folder}", f"runs={tmp_path / 'runs'}", "model/scheduler=plateau", *split)


def test_kill_with_averaged_weights(folder, tmp_path):
    common = [*SMALL, f"data.root={folder}", "callbacks=[default,ema]", "callbacks.ema.decay=0.9"]
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=6") == -signal.SIGKILL
    run(*killed, "resume=true")
    whole, killed = (run_folders(tmp_path / n)[0] for n in ("whole", "killed"))
    assert_same(weights(whole), weights(killed))
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(
        not torch.equal(checkpoint["state_dict"][k], v)
        for k, v in checkpoint["current_model_state"].items()
        if k in checkpoint["state_dict"]
    )


NETWORKS = {
    "2d": ["data.view=slice", "model/inferer=slice", "model/network=basic_unet", "model.network.dimensions=2", "model.network.features=[4,4,4,4,4,4]", "patch=[32,32]"],
    "2.5d": ["data.view=slab", "model/inferer=slab", "model/network=slab", "model.network.slab=3", "model.network.network.features=[4,4,4,4,4,4]", "patch=[32,32]"],
    "regions": ["model/network=basic_unet", "model.network.features=[4,4,4,4,4,4]", "patch=[32,32,32]", "model/target=regions", "model/loss=region_bce_dice"],
    "deep": ["model/network=unet_plus_plus", "model.network.features=[4,4,4,4,4,4]", "model.network.deep_supervision=true", "patch=[32,32,32]", "model/loss=topk"],
    "vae": ["model/network=segresnet_vae", "model.network.features=8", "patch=[32,32,32]", "model/loss=focal"],
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_views_networks_and_targets(kind, folder, tmp_path):
    plain = [o for o in SHORT if "model.network" not in o and "model.loss" not in o and not o.startswith("patch")]
    run(*plain, f"data.root={folder}", f"runs={tmp_path}", *NETWORKS[kind])
    (found,) = run_folders(tmp_path)
    assert len(rows(found)) == 2
    run(
        "job=predict",
        f"ckpt={found / 'checkpoints' / 'last.ckpt'}",
        f"input={folder / 'images'}",
        f"out={tmp_path / 'out'}",
        "writer.probabilities=true",
    )
    assert len(list((tmp_path / "out" / "predictions").glob("*_prob_lesion.nii.gz"))) == 8


def test_patch_that_does_not_fit_the_network_is_refused_before_training(folder, tmp_path):
    plain = [o for o in SHORT if "model.network" not in o and not o.startswith("patch")]
    with pytest.raises(SuiteError, match="divisible by"):
        run(*plain, f"data.root={folder}", f"runs={tmp_path}", "model/network=small_unet", "patch=[24,24,24]")


def test_an_optimizer_that_cannot_be_built_is_named(folder, tmp_path):
    with pytest.raises(SuiteError, match=r"model\.optimizer: Nesterov momentum requires a momentum"):
        run(*SHORT, f"data.root={folder}", f"runs={tmp_path}", *NO_MOMENTUM)
    with pytest.raises(SuiteError, match=r"model\.optimizer: `fused` and `foreach` cannot be"):
        run(*SHORT, f"data.root={folder}", f"runs={tmp_path}", "+model.optimizer.fused=true", "+model.optimizer.foreach=true")


def test_loggers_together(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(*SHORT, f"data.root={folder}", f"runs={tmp_path}", "logger=[csv,tensorboard,wandb]", "logger.wandb.offline=true", "+callbacks.figures._target_=callbacks.OverlayFigures", "+callbacks.figures.folder=${run_folder}")  # fmt: skip
    (found,) = run_folders(tmp_path)
    assert (found / "metrics.csv").exists()
    assert list(found.rglob("events.out.tfevents*"))
    assert list(found.rglob("*.wandb"))
    assert {p.name for p in (found / "figures").iterdir()} >= {"best.png", "worst.png", "summary.png"}


@pytest.mark.parametrize("debug", ["fast", "overfit", "profile"])
def test_debug_modes(debug, folder, tmp_path):
    run(*SMALL, f"data.root={folder}", f"runs={tmp_path}", f"debug={debug}", "epochs=1")
    (found,) = run_folders(tmp_path)
    assert rows(found)
    if debug == "profile":
        assert list(found.glob("*profile*"))


def test_overfit_repeats_the_same_samples(folder):
    from hydra.utils import instantiate

    data = instantiate(composed(*SMALL, f"data.root={folder}", "debug=overfit").data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    samples = data.stream_loader("default", {}).dataset
    assert torch.equal(samples[(0, 0)]["image"], samples[(7, 4)]["image"])
    assert not torch.equal(samples[(0, 0)]["image"], samples[(0, 1)]["image"])


def test_init_from_loads_what_matches(folder, tmp_path, capsys):
    run(*SHORT, f"data.root={folder}", f"runs={tmp_path / 'a'}")
    checkpoint = run_folders(tmp_path / "a")[0] / "checkpoints" / "last.ckpt"
    run(
        *SHORT,
        f"data.root={folder}",
        f"runs={tmp_path / 'b'}",
        f"init_from={checkpoint}",
        "+model.network.width=6",
        "stages=[{name:fit,run:fit}]",
    )
    assert "other shape" in capsys.readouterr().out
    run(
        *SHORT,
        f"data.root={folder}",
        f"runs={tmp_path / 'c'}",
        f"init_from={checkpoint}",
        "model.optimizer.lr=0",
        "stages=[{name:fit,run:fit}]",
    )
    assert_same(weights(run_folders(tmp_path / "c")[0]), weights(run_folders(tmp_path / "a")[0]))


def test_precision_deterministic_and_compile(folder, tmp_path):
    run(*SHORT, f"data.root={folder}", f"runs={tmp_path / 'bf16'}", "precision=bf16-mixed", "deterministic=true")
    torch.use_deterministic_algorithms(False)
    assert all(v.dtype == torch.float32 for v in weights(run_folders(tmp_path / "bf16")[0]).values())


@pytest.mark.slow
def test_compile(folder, tmp_path):
    run(*SHORT, f"data.root={folder}", f"runs={tmp_path}", "compile=true")
    assert all("_orig_mod" not in name for name in weights(run_folders(tmp_path)[0]))


def test_predict_refuses_to_overwrite_and_writes_the_inputs_geometry(folder, tmp_path, monkeypatch):
    run(*SHORT, f"data.root={folder}", f"runs={tmp_path / 'runs'}")
    checkpoint = run_folders(tmp_path / "runs")[0] / "checkpoints" / "last.ckpt"
    images = shutil.copytree(folder / "images", tmp_path / "images")
    for path in images.glob("case_00_*"):
        scan = nib.load(path)
        scan.set_qform(scan.affine, code=1)
        scan.header["descrip"] = b"a scanner"
        scan.to_filename(path)
    predict = ["job=predict", f"ckpt={checkpoint}", f"input={images}", f"out={tmp_path / 'out'}", "trust=[tests]"]
    run(*predict)
    before = (tmp_path / "out" / "predictions" / "case_00.nii.gz").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("datamodules.cache.CaseCache.prepare", None)  # said before anything is prepared
        with pytest.raises(SuiteError, match=r"case_00\.nii\.gz"):
            run(*predict)
    assert (tmp_path / "out" / "predictions" / "case_00.nii.gz").read_bytes() == before
    with pytest.raises(SuiteError, match="precision=half"):
        run(*predict[:-2], f"out={tmp_path / 'refused'}", "trust=[tests]", "trainer.precision=half")
    assert not (tmp_path / "refused").exists()
    run(*predict, "overwrite=true")
    image = nib.load(next(images.glob("case_00_*")))
    mask = nib.load(tmp_path / "out" / "predictions" / "case_00.nii.gz")
    assert mask.shape == image.shape
    assert np.array_equal(mask.affine, image.affine)
    for field in ("qform_code", "sform_code", "descrip", "quatern_d", "srow_x"):
        assert np.array_equal(mask.header[field], image.header[field]), field
    assert not list(images.glob(".*"))


def test_further_inputs_reach_training_test_prediction_and_ensembles(folder, tmp_path):
    for name, inputs in [("with", "task.inputs=[brain_mask]"), ("without", "task.inputs=null")]:
        run(*SHORT, f"data.root={folder}", f"runs={tmp_path / name}", inputs)
    found = {name: run_folders(tmp_path / name)[0] / "checkpoints" / "last.ckpt" for name in ("with", "without")}
    first = {name: load_method(str(path), ["tests"])[0].network[0].weight for name, path in found.items()}
    assert [first[name].shape[1] for name in ("with", "without")] == [3, 2]
    predict = ["job=predict", f"input={folder / 'images'}", "trust=[tests]", "writer.probabilities=true"]
    for name, ckpt in [("alone", found["with"]), ("both", f"[{found['with']},{found['without']}]"), ("plain", found["without"])]:
        run(*predict, f"ckpt={ckpt}", f"out={tmp_path / name}")
    maps = {
        name: read_volume(next((tmp_path / name / "predictions").glob("case_00_prob_*.nii.gz")))[0] for name in ("alone", "both", "plain")
    }
    assert np.allclose(maps["both"], (maps["alone"] + maps["plain"]) / 2, atol=2e-3)
    assert not np.allclose(maps["alone"], maps["plain"], atol=2e-3)
    with pytest.raises(SuiteError, match=r"(FAE|Habitats) sees the channels of the image alone"):
        run("experiment=fae/simulated", "task.inputs=[brain_mask]", f"runs={tmp_path / 'fae'}")
    with pytest.raises(SuiteError, match=r"FlairThreshold sees the channels of the image alone"):
        run("experiment=flair_threshold/simulated", "task.inputs=[brain_mask]", f"runs={tmp_path / 'flair'}")


def test_prediction_goes_on_without_what_cannot_be_used(folder, tmp_path, capsys, monkeypatch):
    """One file is truncated, one holds NaN, one case lacks a channel, and one scan comes under two names, which is no error."""
    run(*SHORT, f"data.root={folder}", f"runs={tmp_path / 'runs'}")
    checkpoint = run_folders(tmp_path / "runs")[0] / "checkpoints" / "last.ckpt"
    images = shutil.copytree(folder / "images", tmp_path / "images")
    cut = images / "case_01_t1.nii.gz"
    cut.write_bytes(cut.read_bytes()[:400])
    scan = nib.load(images / "case_03_flair.nii.gz")
    nib.Nifti1Image(np.full(scan.shape, np.nan, np.float32), scan.affine).to_filename(images / "case_03_flair.nii.gz")
    (images / "case_05_t1.nii.gz").unlink()
    for channel in ("t1", "flair"):
        shutil.copy(images / f"case_02_{channel}.nii.gz", images / f"again_{channel}.nii.gz")
    predict = ["job=predict", f"ckpt={checkpoint}", f"input={images}", f"out={tmp_path / 'out'}", "trust=[tests]"]
    with pytest.raises(SuiteError, match="case_05"):
        run(*predict)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SuiteError) as caught:
        run(*predict, "on_error=skip")
    told = str(caught.value).splitlines()
    assert told[0] == "3 of 9 case(s) were left out (on_error=skip):"
    for line, (case, why) in zip(
        sorted(told[1:]), (("case_01", "truncated"), ("case_03", "NaN"), ("case_05", "missing channel.*t1")), strict=True
    ):
        assert re.match(rf"  {case}: .*{why}", line), line
    assert "6 case(s) written" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out" / "predictions").iterdir()) == sorted(
        f"{name}.nii.gz" for name in ("again", "case_00", "case_02", "case_04", "case_06", "case_07")
    )
    with pytest.raises(SuiteError, match="did you mean 'skip'"):
        run(*predict, "on_error=skipp")
    for path in images.glob("*_t1.nii.gz"):
        path.write_bytes(b"")
    with pytest.raises(SuiteError, match="no case can be predicted"):
        run(*predict, "on_error=skip", "overwrite=true")


def test_the_check_of_the_input_is_left_out_only_when_asked_for(folder, monkeypatch):
    from lesionbench.jobs import predict as module

    cfg = composed(*SHORT, "job=predict", f"input={folder / 'images'}")  # whose data set is not checked
    task = Task(("t1", "flair"), {"background": 0, "lesion": 1}).to_dict()
    assert module._prediction_data(cfg, task, Preprocessing(), None).check
    monkeypatch.setattr(module, "_asked", lambda key: key == "data.check")
    assert not module._prediction_data(cfg, task, Preprocessing(), None).check


def test_check_names_everything_at_once_and_training_refuses(tmp_path):
    root = write_fake_brats(tmp_path / "data", "2020", 4)
    broken = sorted(root.rglob("*_flair.nii.gz"))
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    image = nib.load(broken[1])
    values = image.get_fdata().astype(np.float32)
    values[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(values, image.affine), broken[1])
    common = ["benchmark=brats2020", "model=supervised", "trainer=cpu", f"data.root={root}", "debug=tiny", f"runs={tmp_path / 'runs'}"]
    with pytest.raises(SuiteError, match=r"2 error"):
        run(*common, "job=check")
    with pytest.raises(SuiteError) as caught:
        run(*common)
    assert broken[0].name in str(caught.value)
    assert broken[1].name in str(caught.value)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_list_of_files_trains_and_predicts(kind, folder, tmp_path):
    cases = sorted({p.name.rsplit("_", 1)[0] for p in (folder / "images").glob("*.nii.gz")})
    listed = [
        {"case": c, **{m: f"{folder}/images/{c}_{m}.nii.gz" for m in ("t1", "flair")}, "label": f"{folder}/labels/{c}.nii.gz"}
        for c in cases[:6]
    ]
    path = tmp_path / f"cases.{kind}"
    if kind == "json":
        path.write_text(json.dumps(listed))
    else:
        path.write_text("\n".join([",".join(listed[0]), *(",".join(row.values()) for row in listed)]))
    run(*SHORT, f"data.root={tmp_path}", f"data.list_file={path}", f"runs={tmp_path / 'runs'}")
    found = run_folders(tmp_path / "runs")[0]
    assert {r["case"] for r in rows(found)} < set(cases[:6])
    checkpoint = found / "checkpoints" / "last.ckpt"
    run("job=predict", *SHORT, f"data.root={tmp_path}", f"data.list_file={path}", f"ckpt={checkpoint}", f"out={tmp_path / 'out'}")
    assert {p.name.split(".")[0] for p in (tmp_path / "out" / "predictions").iterdir()} == set(cases[:6])


def test_prepare_and_show(folder, tmp_path, capsys):
    run(*SMALL, f"data.root={folder}", "job=prepare", f"data.cache={tmp_path / 'cache'}")
    assert "8 cases ready" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("image.npy"))) == 8
    run(*SMALL, f"data.root={folder}", "job=show", f"out={tmp_path / 'show'}", "show.cases=2", "show.samples=2")
    assert {p.name for p in (tmp_path / "show").iterdir()} == {"cases.png", "samples.png"}


@pytest.mark.parametrize("view", ["patch", "slice", "slab"])
@pytest.mark.parametrize("axis", [1, 2])
def test_show_draws_samples_of_every_view(view, axis, folder, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("callbacks.figures.montage", lambda cases, path: drawn.update({path.name: cases}))
    patch = "[8,8,8]" if view == "patch" else "[8,10]"
    run(
        *SMALL,
        f"data.root={folder}",
        "job=show",
        f"out={tmp_path}",
        "show.samples=3",
        f"data.view={view}",
        f"patch={patch}",
        f"data.slice_axis={axis}",
    )
    assert len(drawn["samples.png"]) == 3
    for _, image, label, task, spacing in drawn["samples.png"]:
        assert image.shape == ((2, 8, 8, 8) if view == "patch" else (2, 8, 10, 1))
        assert label.shape == image.shape[1:]
        assert len(spacing) == 3
        assert task.unit == ("mm" if view == "patch" or axis == 2 else "vox")


def test_simulated_cases_in_brats_layout_train_through_the_real_path(tmp_path):
    out = tmp_path / "brats"
    run("job=simulate", f"out={out}", "simulate.count=4", "simulate.spacing=6", "simulate.layout=2021")
    with pytest.raises(SuiteError):
        run("job=simulate", f"out={out}", "simulate.count=1", "simulate.spacing=6")
    run("job=check", "benchmark=brats2021", "model=supervised", "trainer=cpu", f"data.root={out}", "debug=tiny")
    run(
        "benchmark=brats2021",
        "model=supervised",
        "trainer=cpu",
        f"data.root={out}",
        "debug=tiny",
        f"runs={tmp_path / 'runs'}",
        "threads=1",
        "model/network=small_unet",
    )
    assert {r["region"] for r in rows(run_folders(tmp_path / "runs")[0])} == {"WT", "TC", "ET"}


def test_resampled_network_grid_and_narrowed_task(tmp_path):
    root = write_fake_brats(tmp_path / "data", "2018", 4)
    common = [
        "benchmark=brats2018",
        "model=supervised",
        "trainer=cpu",
        f"data.root={root}",
        "debug=tiny",
        f"runs={tmp_path / 'runs'}",
        "threads=1",
        "model/network=small_unet",
    ]
    run(*common, "task.channels=[flair]", "task.regions=[WT]", "data.preprocessing.spacing=[2,2,2]", "metrics.space=native")
    (found,) = run_folders(tmp_path / "runs")
    assert {r["region"] for r in rows(found)} == {"WT"}
    written = nib.load(next((found / "predictions").glob("*.nii.gz")))
    source = nib.load(next(root.rglob("*_seg.nii.gz")))
    assert written.shape == source.shape
    assert set(np.unique(written.get_fdata())) <= {0, 1}


def test_job_test_leaves_the_training_run_alone_and_refuses_its_own_training_cases(folder, tmp_path):
    common = [*SHORT, f"data.root={folder}", f"runs={tmp_path}"]
    with pytest.raises(SuiteError, match="not trained"):
        run(*common, "job=test")
    run(*common)
    trained = next(f for f in run_folders(tmp_path) if (f / "checkpoints").exists())
    checkpoint = trained / "checkpoints" / "last.ckpt"
    run(*common, "job=test", f"ckpt={checkpoint}")
    assert list(trained.parent.iterdir()) == [trained]
    tested = [f for f in run_folders(tmp_path) if (f / "test" / "cases.csv").exists() and f != trained]
    assert rows(tested[0]) == rows(trained)
    with pytest.raises(SuiteError, match="test patients"):
        run(*common, "job=test", f"ckpt={checkpoint}", "data.split.seed=1")
    with pytest.raises(SuiteError, match="another preprocessing"):
        run(*common, "job=test", f"ckpt={checkpoint}", "data.preprocessing.normalize=minmax")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.split.test=0", "leaves nothing to test on"),
        ("data.extra_maps={pseudolabel:nearest}", "pseudolabel"),
        ("data.streams={labeled:{cases:labeled},unlabeled:{cases:unlabeled}}", "needs the streams"),
    ],
)
def test_what_the_data_cannot_give_is_refused_before_caching(override, message, folder, tmp_path):
    with pytest.raises(SuiteError, match=message):
        run(*SHORT, f"data.root={folder}", f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}", override)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("option", [["init_from=none.ckpt"], ["job=test", "ckpt=none.ckpt"]])
def test_a_checkpoint_that_is_not_there_is_refused_before_caching(option, folder, tmp_path):
    with pytest.raises(SuiteError, match=r"none\.ckpt: no such checkpoint"):
        run(*SHORT, f"data.root={folder}", f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}", *option)
    assert not (tmp_path / "cache").exists()


REFUSED = {
    "no data": (["data.root=/nowhere"], "/nowhere"),
    "an option that does not exist": (["+model.nope=1"], "unexpected keyword argument 'nope'"),
    "data that the method cannot be trained on": (["data.streams={a:{cases:labeled},b:{cases:unlabeled}}"], "needs the streams"),
    "nothing to begin with": (["init_from=none.ckpt"], "no such checkpoint"),
    "nothing to test": (["job=test"], "not trained"),
    "no checkpoint to test": (["job=test", "ckpt=none.ckpt"], "no such checkpoint"),
    "no case to train on": (["data.streams={default:{cases:labeled}}", "data.split.labeled=0"], "has no cases"),
    "an optimizer that cannot be made": (NO_MOMENTUM, "Nesterov momentum requires"),
    "after every logger has begun": ([*NO_MOMENTUM, "logger=[tensorboard,wandb]"], "Nesterov momentum requires"),
    "by a process of the run": ([*NO_MOMENTUM, "trainer=ddp_sim"], "Nesterov momentum requires"),
    "by a stage that is a function": (["stages=[{name:threshold,run:call,function:tests.toys.refuse}]"], "cannot be computed"),
    "a stage that is not there": (["stages=[{name:fit,run:fit,override:{init_from:'artefact:none'}}]"], "no earlier stage has that name"),
    "contents of none": (
        ["stages=[{name:fit,run:fit,override:{init_from:'contents:none'}}]"],
        "fit asks for contents:none, but no earlier",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_before_the_first_stage_leaves_no_run_folder(options, message, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(Exception, match=r".") as caught:
        run(*SHORT, f"data.root={folder}", f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}", *options)
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_refusal_leaves_runs_that_were_there_alone(folder, tmp_path):
    common = [*SMALL, f"data.root={folder}", f"runs={tmp_path}"]
    stop = ["callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=5"]
    assert run_killed(*common, *stop) == -signal.SIGKILL  # after the first epoch
    (killed,) = run_folders(tmp_path)
    before = sorted(killed.rglob("*"))
    with pytest.raises(SuiteError, match="/nowhere"):  # the same run, for the place of the data is not what is computed
        run(*common, "data.root=/nowhere")
    assert run_folders(tmp_path) == [killed]
    with pytest.raises(SuiteError, match="/nowhere"):
        run(*common, "data.root=/nowhere", "resume=true")
    assert run_folders(tmp_path) == [killed]
    assert sorted(killed.rglob("*")) == before
    run(*common, "resume=true")
    assert json.loads((killed / "summary.json").read_text())["status"] == "finished"


def test_options_are_checked_before_anything_is_built(folder, tmp_path):
    common = [*SHORT, f"data.root={folder}", f"runs={tmp_path}"]
    with pytest.raises(SuiteError, match="did you mean 'best'"):
        run(*common, "select=bset")
    with pytest.raises(SuiteError, match="did you mean 'fit'"):
        run(*common, "stages=[{name:fit,run:fitt}]")
    assert not run_folders(tmp_path)


def test_validation_metric_of_choice_is_the_objective(folder, tmp_path):
    value = run(
        *SHORT,
        f"data.root={folder}",
        f"runs={tmp_path}",
        "validation_metrics=[dice,hd95]",
        "objective={name:val/hd95_mm,mode:min}",
        "logger=[tensorboard]",
    )
    curve = [line for line in (run_folders(tmp_path)[0] / "metrics.csv").read_text().splitlines() if ",val/hd95_mm," in line]
    assert value == float(curve[0].split(",")[-1])


def test_early_stopping_stops(folder, tmp_path):
    run(
        *SMALL,
        f"data.root={folder}",
        f"runs={tmp_path}",
        "epochs=8",
        "callbacks=[default,early_stopping]",
        "callbacks.early_stopping.patience=1",
        "model.optimizer.lr=0",
        "callbacks.figures=null",
    )
    assert json.loads((run_folders(tmp_path)[0] / "cost.json").read_text())["iterations"] == 2 * 4


def test_missing_modality_trains_when_allowed(tmp_path):
    root = write_fake_brats(tmp_path / "data", "2021", 5, missing=[(0, "t2")])
    common = [
        "benchmark=brats2021",
        "model=supervised",
        "trainer=cpu",
        f"data.root={root}",
        "debug=tiny",
        "threads=1",
        "model/network=small_unet",
    ]
    with pytest.raises(SuiteError, match="t2"):
        run(*common, f"runs={tmp_path / 'refused'}")
    run(*common, f"runs={tmp_path / 'runs'}", "data.preprocessing.allow_missing=true", "data.samples_per_epoch=6")
    assert rows(run_folders(tmp_path / "runs")[0])
