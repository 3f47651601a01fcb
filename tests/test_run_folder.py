"""Runs that compute the same share a folder name, nothing is ever overwritten, and what a run leaves can be read at any moment."""

import csv
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from lesionbench.errors import SuiteError, nearest, unknown
from lesionbench.jobs import run_folder
from lesionbench.jobs.main import run_job
from lesionbench.jobs.run_folder import RunFolder, config_hash, environment, variant_hash
from lesionbench.reports.report import curve, print_run
from lesionbench.resolvers import cap, either, offline_without_key, register
from tests.harness import composed, held

ROOT = Path(__file__).parent.parent
SCHEDULED = (
    "LESIONBENCH_RUN_FOLDER", "LOCAL_RANK", "RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID",
    "SLURM_PROCID",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    """As on a plain machine, and nothing that a run sets stays behind."""
    for name in SCHEDULED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def config(runs: Path, **changes):
    return OmegaConf.create({"runs": str(runs), "experiment_name": "umm/brats2020", "seed": 0, "epochs": 5, **changes})


# the hash


@pytest.fixture(scope="module")
def experiment():
    return composed("experiment=supervised/folder")


@pytest.mark.parametrize(
    ("arguments", "place", "option", "value"),
    [
        (["experiment=supervised/folder"], "model.inferer", "starts", "clamped"),
        (["experiment=supervised/folder", "model/network=swin_unetr"], "model.network", "shift", False),
        (["experiment=supervised/folder", "model/scheduler=steps"], "model.scheduler", "warmup_iterations", 5),
        (["experiment=umm/ibsr", "sweep=umm_rows", "row=swin_unetr"], "model.branches.v", "shift", False),
    ],
)
def test_an_argument_that_came_later_leaves_earlier_runs_where_they_are(arguments, place, option, value):
    cfg = composed(*arguments)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    earlier, other = cfg.copy(), cfg.copy()
    del OmegaConf.select(earlier, place)[option]
    OmegaConf.select(other, place)[option] = value
    assert config_hash(earlier) == config_hash(cfg) != config_hash(other)


def changed(cfg, override: str):
    """The configuration with `key=value`; a choice of a group (`trainer=gpu`) is composed anew."""
    key, _, value = override.partition("=")
    if "/" in key or key in ("trainer", "logger", "augmentation", "callbacks"):
        return composed("experiment=supervised/folder", override)
    cfg = cfg.copy()
    OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
    return cfg


@pytest.mark.parametrize(
    "incidental",
    [
        "seed=7", "resume=true", "runs=elsewhere", "out=o", "ckpt=c", "trust=[a]", "job=test", "data.root=/elsewhere", "data.cache=/fast",
        "data.num_workers=9", "data.check=false", "trainer.devices=2", "trainer.num_nodes=4", "trainer.strategy=ddp",
        "callbacks.checkpoint.every_n_batches=1", "callbacks.figures=null", "trainer=ddp_sim", "logger=[tensorboard,wandb]", "callbacks.pruner.trial=3", "dashboard.dry_run=true",
    ],
)  # fmt: skip
def test_where_and_how_a_run_is_computed_is_not_what_is_computed(experiment, incidental):
    assert config_hash(changed(experiment, incidental)) == config_hash(experiment)


@pytest.mark.parametrize(
    "essential",
    [
        "epochs=9", "patch=[8,8,8]", "model.optimizer.lr=0.5", "data.split.seed=1", "data.split.labeled=4", "data.batch_size=5", "data.sampling.share=0.5",
        "data.preprocessing.normalize=minmax", "precision=bf16-mixed", "accumulate=3", "clip=1", "init_from=a.ckpt", "task.channels=[t1]",
        "model/network=unet", "model/loss=focal", "augmentation=none", "callbacks=[default,ema]", "callbacks=[default,early_stopping]",
    ],
)  # fmt: skip
def test_what_is_computed_changes_the_hash(experiment, essential):
    assert config_hash(changed(experiment, essential)) != config_hash(experiment)


def test_seeds_and_folds_are_replicates_of_one_variant(experiment):
    same = {variant_hash(changed(experiment, c)) for c in ("seed=7", "data.split.fold=2", "runs=elsewhere")}
    assert same == {variant_hash(experiment)}
    assert config_hash(changed(experiment, "data.split.fold=2")) != config_hash(experiment)
    assert variant_hash(changed(experiment, "data.split.folds=4")) not in same


def test_the_hash_does_not_depend_on_the_order_of_keys(tmp_path):
    cfg = config(tmp_path, model={"a": 1, "b": 2})
    turned = OmegaConf.create({k: cfg[k] for k in reversed(list(cfg))})
    assert config_hash(cfg) == config_hash(turned)
    assert len(config_hash(cfg)) == 8
    assert cfg.seed == 0  # hashing leaves the configuration as it was


# folders


def test_the_same_command_again_never_overwrites(tmp_path):
    cfg = config(tmp_path)
    folders = [RunFolder.of(cfg).path for _ in range(12)]
    base = tmp_path / "umm" / "brats2020" / config_hash(cfg)
    assert folders == [base / "seed=0", *(base / f"seed=0-{n}" for n in range(2, 13))]
    assert all(f.is_dir() for f in folders)
    assert RunFolder.of(cfg, resume=True).path.name == "seed=0-12"  # the tenth sorts after the ninth
    assert RunFolder.of(cfg).path.name == "seed=0-13"


def test_seeds_and_settings_do_not_share_folders(tmp_path):
    names = [RunFolder.of(config(tmp_path, seed=seed)).path.name for seed in (1, 10, 1, 100, 10)]
    assert names == ["seed=1", "seed=10", "seed=1-2", "seed=100", "seed=10-2"]
    assert RunFolder.of(config(tmp_path, seed=1), resume=True).path.name == "seed=1-2"
    assert RunFolder.of(config(tmp_path, seed=1, epochs=6)).path.name == "seed=1"


def test_resume_without_a_run_begins_one(tmp_path):
    assert RunFolder.of(config(tmp_path), resume=True).path.name == "seed=0"


def test_a_place_that_cannot_be_is_an_error_and_no_endless_search_for_a_free_number(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "a disk that is not there")
    with pytest.raises(FileExistsError):
        RunFolder.of(config(tmp_path / "runs"))


# a run that came to nothing


def description(folder: RunFolder) -> RunFolder:
    """What every run writes first."""
    folder.write_config(OmegaConf.create({"a": 1}))
    folder.update_summary(status="running")
    (folder.path / "maps" / "none").mkdir(parents=True)
    return folder


def test_a_discarded_run_leaves_nothing_of_what_it_made_and_all_else(tmp_path):
    kept = description(RunFolder.of(config(tmp_path / "runs", seed=1)))
    description(RunFolder.of(config(tmp_path / "runs"))).discard()
    description(RunFolder.of(config(tmp_path / "runs", epochs=6))).discard()
    assert list(tmp_path.rglob("seed=*")) == [kept.path]
    assert len(list(kept.path.parents[1].iterdir())) == 1  # the hash of the other is gone as well
    description(RunFolder.of(config(tmp_path / "other" / "place"))).discard()
    assert not (tmp_path / "other").exists()
    (tmp_path / "mine").mkdir()
    description(RunFolder.of(config(tmp_path / "mine"))).discard()
    assert (tmp_path / "mine").is_dir()  # it was there before


def test_only_a_folder_that_this_command_made_is_empty(tmp_path, monkeypatch):
    first = description(RunFolder.of(config(tmp_path)))
    assert first.empty
    assert not RunFolder.of(config(tmp_path), resume=True).empty
    second = RunFolder.of(config(tmp_path))
    assert (second.path.name, second.empty) == ("seed=0-2", True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert RunFolder.of(config(tmp_path)).path == second.path
    assert not RunFolder.of(config(tmp_path)).empty
    assert not RunFolder(first.path).empty


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoints/last.ckpt", "stages/fit.json", "test/cases.csv", "threshold/threshold.json"])
def test_a_run_that_left_anything_is_not_empty(name, tmp_path):
    folder = description(RunFolder.of(config(tmp_path)))
    (folder.path / "tensorboard").mkdir()
    (folder.path / "tensorboard" / "events").touch()  # opened before training begins
    assert folder.empty
    (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / name).touch()
    assert not folder.empty


def test_folders_that_a_user_renamed_are_left_alone(tmp_path):
    first = RunFolder.of(config(tmp_path)).path
    first.rename(first.with_name("seed=0-old"))
    (first.parent / "seed=0.bak").mkdir()
    assert RunFolder.of(config(tmp_path)).path == first


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: RunFolder.of(config(tmp_path)).path, range(24)))
    assert len(set(paths)) == 24


def test_runs_that_resume_at_once_are_one_run(tmp_path, monkeypatch):
    real = run_folder._made

    def overtaken(base, *arguments, **options):
        (base / "seed=0").mkdir(parents=True, exist_ok=True)  # by another process, which has looked just as early
        return real(base, *arguments, **options)

    monkeypatch.setattr(run_folder, "_made", overtaken)
    folder = RunFolder.of(config(tmp_path), resume=True)
    assert [path.name for path in folder.path.parent.iterdir()] == ["seed=0"]
    assert not folder.empty  # so that it is not discarded
    assert RunFolder.of(config(tmp_path)).path.name == "seed=0-2"


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path):
    cfg = composed("experiment=supervised/folder", f"runs={tmp_path}", "resume=true")
    folder = description(RunFolder.of(cfg)).path
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with held(folder / ".lock"), pytest.raises(SuiteError, match="another process is at work on this run"):
        run_job(cfg)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == before
    with RunFolder(folder).locked():  # which has ended
        pass


def test_processes_of_one_run_share_its_folder(tmp_path, monkeypatch):
    first = RunFolder.of(config(tmp_path)).path
    monkeypatch.setenv("LOCAL_RANK", "1")  # Lightning starts the others with the environment of the first
    assert RunFolder.of(config(tmp_path)).path == first
    monkeypatch.delenv("LOCAL_RANK")
    assert RunFolder.of(config(tmp_path)).path.name == "seed=0-2"  # the next job of a sweep, in the same process


@pytest.mark.parametrize(
    ("launch", "rank"),
    [({"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500"}, "RANK"), ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}, "SLURM_PROCID")],
)
def test_processes_of_one_scheduler_launch_share_its_folder(launch, rank, tmp_path, monkeypatch):
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(rank, "0")
    first = RunFolder.of(config(tmp_path)).path
    monkeypatch.delenv("LESIONBENCH_RUN_FOLDER")  # another machine: no environment in common
    monkeypatch.setenv(rank, "3")
    assert RunFolder.of(config(tmp_path)).path == first
    assert not (first.parent / "seed=0-2").exists()


def test_an_announcement_of_an_earlier_launch_is_not_believed(tmp_path, monkeypatch):
    from lesionbench.jobs import run_folder

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    base = RunFolder.of(config(tmp_path)).path.parent
    (announcement,) = base.glob(".launch-*")
    yesterday = time.time() - 86400
    os.utime(announcement, (yesterday, yesterday))
    now = [0.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SuiteError, match="has not announced the run folder"):
        RunFolder.of(config(tmp_path))


# what a run leaves


def test_configuration_and_environment_are_written_resolved(tmp_path):
    folder = RunFolder.of(config(tmp_path))
    folder.write_config(OmegaConf.create({"seed": 3, "model": {"seed": "${seed}"}}))
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {"seed": 3, "model": {"seed": 3}}
    found = json.loads((folder.path / "environment.json").read_text())
    assert set(found) == {"command", "python", "packages", "machine", "git"}
    assert found["packages"]["torch"]
    assert found["packages"]["lesionbench"]
    assert set(found["git"]) == {"revision", "changed"}
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "environment.json"]


def test_environment_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] == {"revision": None, "changed": False}


def test_stages_and_summary_are_remembered(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.stage_done("fit") is None
    assert folder.summary == {}
    folder.mark_done("fit", {"artefact": "x.ckpt"})
    folder.update_summary(status="running", seed=1)
    folder.update_summary(status="finished")
    again = RunFolder(tmp_path / "run")
    assert again.stage_done("fit") == {"artefact": "x.ckpt"}
    assert again.stage_done("test") is None
    assert again.summary == {"status": "finished", "seed": 1}


def test_a_kill_while_writing_leaves_the_old_summary(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.update_summary(status="running")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.update_summary(status="finished")
    assert folder.summary == {"status": "running"}


# the report


def finished_run(folder: Path, job: str = "fit") -> Path:
    stats = {"mean": 0.81234, "std": 0.05, "median": 0.83, "n": 4, "missing": 1}
    alone = {"mean": 3.5, "std": None, "median": 3.5, "n": 1, "missing": 0}
    run = RunFolder(folder)
    targets = {"model": {"_target_": "lightning_modules.Supervised"}, "data": {"_target_": "datamodules.Simulated"}}
    run.write_config(OmegaConf.create({"runs": "all/of/them", "job": job, **targets}))
    test = {"": {"WT": {"dice": stats, "hd95_mm": alone}, "TC": {"dice": {**stats, "mean": None}}}}
    run.update_summary(
        experiment="supervised/simulated", seed=2, test=test, cost={"iterations": 40, "wall_s": 12.3, "parameters": 2_500_000}
    )
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "metrics.csv").write_text("iteration,epoch,name,value\n1,0,val/dice,0.5\n1,0,train/loss,2.0\n2,0,val/dice,nan\n")
    return folder


def test_the_report_says_what_how_good_where_and_what_next(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = finished_run(tmp_path / "seed=2")
    print_run(folder)
    text = capsys.readouterr().out
    for part in (
        "supervised/simulated seed 2: Supervised on Simulated, 40 iterations in 12 s, 2.50 M parameters", "0.812 ± 0.050 (0.830)", "3.500 (3.500)", "    5 │",
        str(folder / "summary.json"), str(folder / "metrics.csv"), f"job=predict ckpt={folder / 'checkpoints' / 'last.ckpt'}", "stand-in",
        "compare.runs=[all/of/them]",
    ):  # fmt: skip
        assert part in text, part
    assert "predictions " not in text  # what was not written is not shown


def test_the_report_says_why_a_case_has_dice_0(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    folder = finished_run(tmp_path / "run")
    (folder / "test").mkdir()
    lines = ["case,member,region,dice,sensitivity,precision", "a,,WT,0.0,nan,0.0", "b,,ET,0.0,0.0,nan", "b,,WT,0.5,0.5,0.5", "b,rival,TC,0.0,0.0,0.0", "c,,TC,0.0,0.0,0.0"]  # fmt: skip
    (folder / "test" / "cases.csv").write_text("\n".join(lines))
    print_run(folder)
    assert (
        "Dice 0, and why: WT of a (the truth has none; the picture has the prediction alone), ET of b (nothing predicted; the picture has "
        "the truth alone), TC of c (prediction and truth do not overlap).\n"
    ) in capsys.readouterr().out
    (folder / "test" / "cases.csv").write_text("\n".join([*lines, "d,,TC,0.0,0.0,0.0", "e,,TC,nan,nan,nan"]))
    print_run(folder)
    assert "TC of c (prediction and truth do not overlap), and 1 more in cases.csv.\n" in capsys.readouterr().out


def test_the_report_says_how_far_figures_differ_between_machines(tmp_path, capsys, monkeypatch):
    """As measured: the same command in the README, and with one thread on two machines."""
    monkeypatch.setenv("COLUMNS", "300")
    print_run(finished_run(tmp_path / "run"))
    stated = re.search(r"mean Dice by up to ([\d.]+), mean HD95 by up to (\d+) mm", capsys.readouterr().out)
    with (ROOT / "docs/results/supervised_simulated_one_thread.csv").open(newline="") as file:
        measured = [(row["group"][0], row["region"], row["metric"], float(row["mean"])) for row in csv.DictReader(file)]
    for region, dice, hd95 in re.findall(r"\| (WT|TC|ET) \| ([\d.]+) ± .*? \| ([\d.]+) ±", (ROOT / "README.md").read_text()):
        measured += [("0", region, "dice", float(dice)), ("0", region, "hd95_mm", float(hd95))]
    ranges = {"dice": [], "hd95_mm": []}
    for key in {row[:3] for row in measured}:
        values = [row[3] for row in measured if row[:3] == key]
        ranges[key[2]].append(max(values) - min(values))
    assert float(stated[1]) == round(max(ranges["dice"]), 2)
    assert float(stated[2]) == round(max(ranges["hd95_mm"]))


def test_the_time_of_a_test_is_not_given_as_that_of_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_run(finished_run(tmp_path / "run", job="test"))
    assert "Supervised on Simulated, tested after 40 iterations, in 12 s, 2.50 M parameters" in capsys.readouterr().out


@pytest.mark.parametrize(("select", "tested"), [("best", "best.ckpt"), ("last", "last.ckpt")])
def test_the_report_goes_on_with_the_checkpoint_that_was_tested(select, tested, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = finished_run(tmp_path / "run")
    (folder / "checkpoints" / "best.ckpt").touch()
    config = folder / "config.yaml"
    config.write_text(f"{config.read_text()}select: {select}\n")
    print_run(folder)
    assert f"job=predict ckpt={folder / 'checkpoints' / tested}" in capsys.readouterr().out


def test_curves_by_name(tmp_path):
    found = curve(finished_run(tmp_path / "run"), "val/dice")
    assert found[0] == (1, 0.5)
    assert len(found) == 2
    assert curve(tmp_path / "run", "other") == curve(tmp_path / "nowhere", "val/dice") == []


# resolvers and errors


def test_cap():
    assert cap([64, 16, 8], 16) == [16, 16, 8]
    assert cap([64, 16], None) == [64, 16]
    assert cap(None, None) is None
    assert cap(None, 16) == [16, 16, 16]
    assert cap([128, 16], 32, 64) == [64, 16]
    assert cap([128, 16], None, 64) == [128, 16]


def test_either_keeps_everything_but_null():
    assert [either(None, 1), either(0, 1), either("", 1)] == [1, 0, ""]


def test_resolvers_work_in_a_configuration():
    register()
    register()
    cfg = OmegaConf.create({"patch": [64, 8], "limit": 32, "small": "${cap:${patch},${limit}}", "p": None, "q": "${either:${p},32-true}"})
    assert cfg.small == [32, 8]
    assert cfg.q == "32-true"


def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert offline_without_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x")
    assert not offline_without_key()
    (tmp_path / ".netrc").write_text("machine example.org")
    assert offline_without_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert not offline_without_key()


def test_unknown_names_get_the_nearest():
    assert str(unknown("loss", "dise", ["dice", "ce"])) == "Unknown loss 'dise'; did you mean 'dice'? Known: ce, dice"
    assert nearest("zzz", ["dice"]) == ". Known: dice"
    assert nearest("zzz", []) == ". Known: (none)"
