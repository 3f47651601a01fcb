"""Sweeps: what a search tries, that it survives its end, that it gives up what lags, and every launcher."""

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from omegaconf import DictConfig, read_write

from callbacks import TrialPruner
from lesionbench.errors import SuiteError
from lesionbench.jobs.command_line import CONF, quoted
from lesionbench.jobs.failed_jobs import hand_on_errors, notes
from lesionbench.jobs.main import run_job
from lesionbench.jobs.stages import _check_options
from lesionbench.resolvers import register
from lesionbench.study import Pruned, open_study
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, held, run, run_folders, weights
from tests.light_jobs import optimum, process, refusing_one
from tests.slurm_stand_in import install

optuna = pytest.importorskip("optuna", reason="needs the extra `sweeps`")
LR = "model.optimizer.lr=tag(log,interval(1e-4,1e-1))"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A configuration that is composed in no time, with the suite's sweeps and launchers."""
    conf = tmp_path_factory.mktemp("conf")
    for group in ("sweep", "launcher"):
        shutil.copytree(CONF / group, conf / group)
    (conf / "experiment").mkdir()
    (conf / "experiment/toy.yaml").touch()
    (conf / "config.yaml").write_text("""
defaults: [_self_, experiment: toy, sweep: none, launcher: basic]
runs: runs
seed: 0
resume: false
epochs: 1
objective: {name: val/dice, mode: max}
model: {optimizer: {lr: 0.5}}
data: {batch_size: 1, split: {fold: 0, folds: null}}
hydra: {output_subdir: null, sweep: {dir: "${runs}/.sweeps", subdir: .}}
""")
    return conf


def sweep(conf: Path, task, *overrides: str) -> None:
    """`run.py` with these arguments, but `task(cfg)` for its job."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        hydra.multirun("config", task, quoted(overrides), with_log_configuration=False)


class Recorder:
    """A task that keeps what it was called with; the call number `fails` raises."""

    def __init__(self, fails: dict[int, BaseException] | None = None) -> None:
        self.tried, self.resumed, self.fails = [], [], fails or {}

    def __call__(self, cfg: DictConfig) -> float:
        self.tried.append((cfg.model.optimizer.lr, cfg.data.batch_size))
        self.resumed.append(cfg.resume)
        if len(self.tried) in self.fails:
            raise self.fails[len(self.tried)]
        return optimum(cfg)


def trials(runs: Path) -> list:
    """Of the one study under `runs`."""
    (path,) = (runs / "studies").glob("*.db")
    return open_study(path).trials


def search(conf: Path, task, runs: Path, *overrides: str, count: int = 4) -> None:
    sweep(conf, task, "sweep=tpe", f"hydra.sweeper.trials={count}", f"runs={runs}", LR, "data.batch_size=1,2", *overrides)


# what is tried


def test_grammar_of_search_spaces():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from hydra_plugins.lesionbench_optuna.optuna_search import _suggested

    trial = optuna.create_study().ask()
    kinds = optuna.distributions
    expected = {
        "a=interval(0.1,3)": kinds.FloatDistribution(0.1, 3.0),
        "b=tag(log,interval(1e-5,1e-2))": kinds.FloatDistribution(1e-5, 1e-2, log=True),
        "c=int(interval(1,8))": kinds.IntDistribution(1, 8),
        "d=int(tag(log,interval(1,64)))": kinds.IntDistribution(1, 64, log=True),
        "e=range(2,11,4)": kinds.IntDistribution(2, 10, step=4),
        "f=range(3)": kinds.IntDistribution(0, 2),
        "g=dice_ce,focal": kinds.CategoricalDistribution(["dice_ce", "focal"]),
        "h=choice([8,8],[16,16])": kinds.CategoricalDistribution(["[8,8]", "[16,16]"]),
        "i=range(0,1,0.25)": kinds.CategoricalDistribution(["0.0", "0.25", "0.5", "0.75"]),
    }
    for override in OverridesParser.create().parse_overrides(list(expected)):
        _suggested(trial, override.get_key_element(), override)
        assert trial.distributions[override.get_key_element()] == expected[override.input_line], override.input_line


def test_the_best_is_what_the_objective_says(small, tmp_path, capsys):
    task = Recorder()
    search(small, task, tmp_path, count=6)
    found = trials(tmp_path)
    assert [t.params["model.optimizer.lr"] for t in found] == pytest.approx([lr for lr, _ in task.tried])
    assert all(1e-4 <= lr <= 1e-1 and size in (1, 2) for lr, size in task.tried)
    assert len(set(task.tried)) == 6
    best = max(found, key=lambda t: t.value)
    assert f"best: trial {best.number}, val/dice {best.value:.4g}" in capsys.readouterr().out
    (table,) = (tmp_path / "studies").glob("*.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["objective"]) for r in rows] == [t.value for t in found]
    assert [float(r["model.optimizer.lr"]) for r in rows] == [lr for lr, _ in task.tried]


def test_an_objective_that_is_minimized(small, tmp_path, capsys):
    search(small, Recorder(), tmp_path, "objective.mode=min", count=3)
    best = min(trials(tmp_path), key=lambda t: t.value)
    assert f"best: trial {best.number}," in capsys.readouterr().out


def test_a_preset_holds_the_space_and_the_command_line_goes_before_it(tmp_path):
    seen = []

    def task(cfg):
        seen.append((cfg.model.optimizer.lr, cfg.model.optimizer.weight_decay, cfg.model.loss._target_))
        return 0.0

    sweep(CONF, task, "sweep=supervised", "hydra.sweeper.trials=3", f"runs={tmp_path}", "model/loss=focal", "model.optimizer.lr=0.01,0.02")
    assert {lr for lr, _, _ in seen} <= {0.01, 0.02}
    assert all(1e-6 <= decay <= 1e-3 for _, decay, _ in seen)
    assert {loss for _, _, loss in seen} == {"lightning_modules.losses.Focal"}


def test_grids_by_name(small, tmp_path):
    seen = []
    sweep(small, lambda cfg: seen.append(cfg.seed), "sweep=seeds", f"runs={tmp_path}")
    sweep(small, lambda cfg: seen.append((cfg.data.split.folds, cfg.data.split.fold)), "sweep=folds", f"runs={tmp_path}")
    assert seen == [0, 1, 2, *((5, fold) for fold in range(5))]


# what happens on the way


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(small, tmp_path):
    whole = Recorder()
    search(small, whole, tmp_path / "whole", count=5)
    before, after = Recorder({3: KeyboardInterrupt()}), Recorder()
    with pytest.raises(KeyboardInterrupt):
        search(small, before, tmp_path / "killed", count=5)
    search(small, after, tmp_path / "killed", count=5)
    assert before.tried == whole.tried[:3]
    assert after.tried == whole.tried[2:]  # the one that was running again, the finished ones not
    assert all(before.resumed + after.resumed)
    again = Recorder()
    search(small, again, tmp_path / "killed", count=5)
    assert again.tried == []
    search(small, again, tmp_path / "killed", count=6)
    assert len(again.tried) == 1
    assert again.tried[0] not in whole.tried


def test_equal_values_asked_for_together_are_run_once(small, tmp_path):
    calls = []

    def task(cfg):
        calls.append(cfg.data.batch_size)
        return float(cfg.data.batch_size)

    sweep(small, task, "sweep=tpe", "hydra.sweeper.trials=6", "hydra.sweeper.parallel=6", f"runs={tmp_path}", "data.batch_size=1,2")
    assert sorted(calls) == [1, 2]
    assert [t.value for t in trials(tmp_path)] == [float(t.params["data.batch_size"]) for t in trials(tmp_path)]


def test_one_failure_is_entered_and_the_search_goes_on(small, tmp_path, capsys):
    search(small, Recorder({2: RuntimeError("out of memory")}), tmp_path, count=3)
    assert [t.state.name for t in trials(tmp_path)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "trial 1 failed: out of memory" in capsys.readouterr().out


def test_a_search_in_which_nothing_succeeds_ends(small, tmp_path):
    task = Recorder({1: SuiteError("no data there")})
    with pytest.raises(SuiteError, match="no data there"):
        search(small, task, tmp_path)
    assert len(task.tried) == 1
    with pytest.raises(SuiteError, match="returned no objective"):
        sweep(small, lambda cfg: None, "sweep=tpe", LR, f"runs={tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=tpe"], "nothing to search"),
        (["sweep=tpe", LR, "seed=0,1"], "seed is not a setting"),
        (["sweep=tpe", LR, "data.split.fold=0,1"], "fold is not a setting"),
        (["sweep=tpe", LR, "objective.name=null"], "nothing that could be optimized"),
        (["sweep=tpe", LR, "hydra.sweeper.parallel=0"], "at least 1"),
        (["sweep=tpe", LR.replace("log", "lgo")], "the one tag there is"),
        (["sweep=tpe", LR.replace("1e-4,1e-1", "1e-1,1e-4")], "the first end has to be below"),
        (["sweep=tpe", LR.replace("1e-4", "0")], "both ends are above 0"),
        (["sweep=tpe", LR, "epochs=tag(log,range(1,9))"], "the one tag there is"),
    ],
)
def test_mistakes_are_said_before_anything_runs(small, overrides, message, tmp_path):
    task = Recorder()
    with pytest.raises(Exception) as caught:
        sweep(small, task, f"runs={tmp_path}", *overrides)
    errors = [str(e) for e in (caught.value, caught.value.__cause__) if e is not None]
    assert any(message in e for e in errors), errors
    assert task.tried == []


def test_a_study_is_of_one_search_and_of_one_sweep_at_a_time(small, tmp_path):
    search(small, Recorder(), tmp_path, "hydra.sweeper.study=mine", count=1)
    with pytest.raises(SuiteError, match="study of another search"):
        search(small, Recorder(), tmp_path, "hydra.sweeper.study=mine", "epochs=99")
    with held(tmp_path / "studies/mine.lock"), pytest.raises(SuiteError, match="another sweep is working"):
        search(small, Recorder(), tmp_path, "hydra.sweeper.study=mine")


def test_a_study_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A search that is killed while it makes its study left tables without one, and another search at that moment met half of them."""
    path, made = tmp_path / "studies" / "mine.db", optuna.create_study

    def killed(**options):
        made(**options)
        assert not path.exists()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(optuna, "create_study", killed)
    dead = multiprocessing.get_context("fork").Process(target=open_study, args=(path, "maximize"))
    dead.start()
    dead.join(60)
    assert dead.exitcode == -signal.SIGKILL
    assert not path.exists()
    monkeypatch.setattr(optuna, "create_study", made)
    open_study(path, "maximize").set_user_attr("identity", "x")
    assert open_study(path, "maximize").user_attrs == open_study(path).user_attrs == {"identity": "x"}
    assert sorted(p.name for p in path.parent.iterdir()) == ["mine.db"]


def test_a_study_is_of_its_cases(folder, tmp_path, capsys):
    """Another data set without a case in common, then the first one from elsewhere."""
    common = [
        *SMALL,
        "callbacks.writer=null",
        f"runs={tmp_path / 'runs'}",
        "data.batch_size=1",
        "model.optimizer.lr=choice(0.01)",
        "sweep=tpe",
        "hydra.sweeper.trials=1",
    ]
    other = write_fake_folder(tmp_path / "other", 8, shape=(14, 12, 10))
    for path in [*other.rglob("case*.nii.gz")]:
        path.rename(path.with_name(path.name.replace("case", "other")))
    (other / "attributes.csv").unlink()
    moved = shutil.copytree(folder, tmp_path / "moved")
    said = []
    for root in (folder, other, moved, other):
        sweep(CONF, training, *common, f"data.root={root}")
        said.append(capsys.readouterr().out)
    assert ["so far" in text for text in said] == [False, False, True, True]
    assert len([*(tmp_path / "runs" / "studies").glob("*.db")]) == len(run_folders(tmp_path / "runs")) == 2
    named = [*common, "hydra.sweeper.study=mine"]
    sweep(CONF, training, *named, f"data.root={folder}")
    with pytest.raises(SuiteError, match=r"mine.db is the study of other cases than .*other; choose another"):
        sweep(CONF, training, *named, f"data.root={other}")


def test_a_search_without_validation_ends_before_its_first_trial(folder, tmp_path):
    with pytest.raises(SuiteError, match=r"the search \(hydra.sweeper\) wait.*data.split.val=0"):
        sweep(CONF, training, *SMALL, f"data.root={folder}", f"runs={tmp_path}", "sweep=tpe", "data.batch_size=1,2", "data.split.val=0")
    assert not run_folders(tmp_path)


# giving up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(14, 12, 10))


def training(cfg: DictConfig) -> float | None:
    """A true run."""
    os.environ.pop("LESIONBENCH_RUN_FOLDER", None)
    cfg.experiment_name = "supervised/folder"
    return run_job(cfg)


GIVE_UP = ["hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner", "+hydra.sweeper.pruner.lower=2", "~hydra.sweeper.pruner.n_startup_trials"]  # fmt: skip


@pytest.mark.parametrize("trainer", ["cpu", "ddp_sim"])
def test_a_lagging_training_is_given_up_after_a_validation(trainer, folder, tmp_path):
    common = [*SMALL, f"data.root={folder}", "callbacks.writer=null", f"runs={tmp_path}", f"trainer={trainer}", "data.batch_size=1"]
    sweep(CONF, training, *common, "model.optimizer.lr=choice(0.01)", "sweep=tpe", "hydra.sweeper.trials=1", *GIVE_UP)  # no Dice is 2
    (trial,) = trials(tmp_path)
    assert trial.state.name == "PRUNED"
    assert list(trial.intermediate_values) == [8 if trainer == "cpu" else 4]  # after the first of three epochs, and no more
    (path,) = run_folders(tmp_path)
    assert json.loads((path / "summary.json").read_text())["status"] == "pruned"
    assert not (path / "test").exists()
    if trainer == "cpu":  # it can be run to its end all the same, and is then as if nothing had been
        run(*common, "model.optimizer.lr=0.01", "resume=true")
        run(*common, "model.optimizer.lr=0.01", f"runs={tmp_path / 'whole'}")
        assert_same(weights(path), weights(run_folders(tmp_path / "whole")[0]))


def test_the_median_of_earlier_trials_decides(small, tmp_path):
    """A stand-in for training reports a curve to the pruner of `sweep=tpe`, as `TrialPruner` does: bad ones end early from the sixth on."""
    reported = []

    def task(cfg):
        pruner = cfg.callbacks.pruner
        callback = TrialPruner(pruner.study, pruner.trial, pruner.monitor)
        reported.append([])
        for step in range(1, 4):
            reported[-1].append(step)
            if callback._judged(float(-pruner.trial), step):  # each trial is worse than all before it
                raise Pruned
        return float(-pruner.trial)

    search(small, task, tmp_path, "+callbacks={}", count=7)
    assert reported == [[1, 2, 3]] * 5 + [[1]] * 2
    assert [t.state.name for t in trials(tmp_path)] == ["COMPLETE"] * 5 + ["PRUNED"] * 2
    with_none = tmp_path / "none"
    sweep(small, lambda cfg: float("callbacks" in cfg), "sweep=tpe", LR, "hydra.sweeper.pruner=null", "hydra.sweeper.trials=1", f"runs={with_none}")  # fmt: skip
    assert trials(with_none)[0].value == 0


def test_only_trials_that_ran_to_their_end_let_others_be_given_up():
    """What docs/sweeps.md says of Optuna's pruner, seen with 5.0.0."""

    def given_up(whole: int, pruned: int) -> bool:
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0))
        for state, count in ((optuna.trial.TrialState.COMPLETE, whole), (optuna.trial.TrialState.PRUNED, pruned)):
            study.add_trials([optuna.trial.create_trial(state=state, value=1.0, intermediate_values={1: 1.0})] * count)
        trial = study.ask()
        trial.report(0.0, 1)
        return trial.should_prune()

    assert [given_up(2, 3), given_up(4, 9), given_up(5, 0), given_up(5, 3)] == [False, False, True, True]


# errors


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local", "ray"])
def test_the_error_of_a_job_is_raised_without_a_line_of_hydras_and_names_the_job(launcher, small, tmp_path, capsys, monkeypatch):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher", reason=f"the launcher {launcher} is not installed")
    monkeypatch.setattr(JobReturn, "return_value", JobReturn.return_value)  # put back after the test
    hand_on_errors()
    with pytest.raises(SuiteError, match="seed=1 is refused") as caught:
        sweep(small, refusing_one, f"launcher={launcher}", "seed=0,1", f"runs={tmp_path}", "epochs=2")
    assert notes(caught.value).startswith("\nin this job of the sweep: ")
    assert "seed=1" in notes(caught.value)
    assert "Error executing job" not in capsys.readouterr().err


def test_a_job_that_is_the_whole_command_is_not_told_its_own_arguments(small, capsys, monkeypatch):
    monkeypatch.setattr(JobReturn, "return_value", JobReturn.return_value)
    hand_on_errors()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(small), version_base="1.3"), pytest.raises(SuiteError, match="is refused") as caught:
        GlobalHydra.instance().hydra.run("config", refusing_one, ["seed=1"], with_log_configuration=False)
    assert notes(caught.value) == ""
    assert capsys.readouterr().err == ""


# launchers


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_launchers_run_two_jobs_elsewhere(launcher, small, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher", reason=f"the launcher {launcher} is not installed")
    sweep(small, process, f"launcher={launcher}", "seed=0,1", f"runs={tmp_path}")
    found = [int((tmp_path / f"seed={seed}/process").read_text()) for seed in (0, 1)]
    assert os.getpid() not in found
    assert launcher == "joblib" or found[0] != found[1]


def test_a_search_in_other_processes(small, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the launcher joblib is not installed")
    search(small, optimum, tmp_path, "launcher=joblib", "hydra.sweeper.parallel=2", count=4)
    assert [t.value for t in trials(tmp_path)] == [-((math.log10(t.params["model.optimizer.lr"]) + 3) ** 2) for t in trials(tmp_path)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local", "ray"])
def test_launchers_train_two_seeds(launcher, folder, tmp_path):
    """From the command line to results; the same whoever launched them."""
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher", reason=f"the launcher {launcher} is not installed")
    arguments = [*SMALL, f"data.root={folder}", "seed=0,1"]
    for name in dict.fromkeys(["basic", launcher]):
        done = subprocess.run([sys.executable, "run.py", "-m", *arguments, f"launcher={name}", f"runs={tmp_path / name}"], cwd=CONF.parent, capture_output=True, text=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stderr
    expected, found = run_folders(tmp_path / "basic"), run_folders(tmp_path / launcher)
    assert [f.name for f in found] == ["seed=0", "seed=1"]
    for a, b in zip(expected, found, strict=True):
        assert_same(weights(a), weights(b))


# SLURM, by a stand-in for its commands


def submitted(tmp_path: Path, *arguments: str) -> None:
    """`run.py launcher=submitit_slurm` where sbatch, srun, scontrol and sacct are those of `slurm_stand_in`."""
    programs = install(tmp_path / "slurm")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(CONF.parent)}
    asked = ["launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=null", "hydra.launcher.cpus_per_task=1"]
    done = subprocess.run([sys.executable, "run.py", *arguments, *asked, f"runs={tmp_path / 'runs'}"], cwd=CONF.parent, env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    logs = "\n".join(p.read_text()[-2000:] for p in sorted(programs.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs


@pytest.mark.slow
def test_slurm_jobs_of_two_processes_each(folder, tmp_path, monkeypatch):
    """A sweep of DDP runs whose processes SLURM starts equals one whose processes are forked."""
    monkeypatch.delenv("MASTER_PORT", raising=False)  # which Lightning leaves behind; both jobs would take it
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the launcher submitit is not installed")
    arguments = [*SMALL, f"data.root={folder}", "data.batch_size=1", "callbacks.writer=null"]
    submitted(tmp_path, *arguments, "seed=0,1", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "precision=32-true", "hydra.launcher.tasks_per_node=2")  # fmt: skip
    found = run_folders(tmp_path / "runs")
    assert [f.name for f in found] == ["seed=0", "seed=1"]
    for seed, path in enumerate(found):
        run(*arguments, f"seed={seed}", "trainer=ddp_sim", f"runs={tmp_path / 'forked'}")
        assert_same(weights(path), weights(run_folders(tmp_path / "forked")[seed]))


@pytest.mark.slow
def test_a_preempted_slurm_job_is_queued_again_and_goes_on(folder, tmp_path):
    """The signal that SLURM sends ahead of preemption and time limit, in mid-epoch."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the launcher submitit is not installed")
    arguments = [*SMALL, f"data.root={folder}", "callbacks.writer=null"]
    preempted = ["callbacks.progress._target_=tests.toys.PreemptedOnce", "+callbacks.progress.iteration=6", f"+callbacks.progress.how={signal.SIGUSR2.value}"]  # fmt: skip
    submitted(tmp_path, *arguments, *preempted)
    (path,) = run_folders(tmp_path / "runs")
    assert json.loads((tmp_path / "slurm/100.json").read_text())["restarts"] == 1
    assert json.loads((path / "summary.json").read_text())["status"] == "finished"
    run(*arguments, f"runs={tmp_path / 'whole'}")
    (whole,) = run_folders(tmp_path / "whole")
    assert_same(weights(path), weights(whole))
    assert (path / "test/cases.csv").read_text() == (whole / "test/cases.csv").read_text()


def test_ddp_in_a_sweep_needs_processes_that_slurm_starts(tmp_path):
    arguments = ["trainer=ddp", "seed=0,1", f"runs={tmp_path}", "hydra.mode=MULTIRUN"]
    with pytest.raises(SuiteError, match="let SLURM start them"):
        sweep(CONF, _check_options, *arguments)

    def under_slurm(cfg):
        launcher = HydraConfig.instance().cfg.hydra.launcher
        with read_write(launcher):
            launcher._target_ = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
        _check_options(cfg)

    sweep(CONF, under_slurm, *arguments)
