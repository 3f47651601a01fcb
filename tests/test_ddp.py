"""Two processes behave as one with twice the batch: training, accumulation, evaluation, sweeps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, rows, run, run_folders, run_killed, weights

ROOT = Path(__file__).parent.parent
PLAIN = [
    *SMALL,
    "augmentation=none",
    "model.network._target_=tests.toys.plain_net",
    "epochs=1",
    "data.samples_per_epoch=6",
    "model/optimizer=sgd",
]
AUTOMATIC = ["model._target_=lightning_modules.Supervised"]
MANUAL = ["model._target_=tests.toys.Adversarial"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 14, shape=(14, 12, 10))


def close(a: Path, b: Path) -> None:
    """Weights equal to 1e-6."""
    first, second = weights(a), weights(b)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-6, rtol=0), name


@pytest.mark.parametrize("method", [AUTOMATIC, MANUAL], ids=["automatic", "manual"])
def test_two_processes_and_accumulation_equal_a_larger_batch(method, folder, tmp_path):
    common = [*PLAIN, *method, f"data.root={folder}", "stages=[{name:fit,run:fit}]", "data.split.val=1"]
    run(*common, "data.batch_size=2", f"runs={tmp_path / 'large'}")
    run(*common, "data.batch_size=1", "accumulate=2", f"runs={tmp_path / 'accumulated'}")
    run(*common, "data.batch_size=1", "trainer=ddp_sim", f"runs={tmp_path / 'two'}")
    large = run_folders(tmp_path / "large")[0]
    close(large, run_folders(tmp_path / "accumulated")[0])
    close(large, run_folders(tmp_path / "two")[0])


def test_results_are_equal_with_seven_cases_on_two_processes(folder, tmp_path):
    common = [*PLAIN, f"data.root={folder}", "data.split.test=7"]
    run(*common, f"runs={tmp_path / 'train'}")
    checkpoint = run_folders(tmp_path / "train")[0] / "checkpoints" / "last.ckpt"
    for trainer in ("cpu", "ddp_sim"):
        run(*common, "job=test", f"ckpt={checkpoint}", f"trainer={trainer}", f"runs={tmp_path / trainer}")
    one, two = (rows(run_folders(tmp_path / t)[0]) for t in ("cpu", "ddp_sim"))
    assert len({r["case"] for r in one}) == 7
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a["case"] == b["case"]
        assert a["region"] == b["region"]
        assert float(a["dice"]) == pytest.approx(float(b["dice"]), abs=1e-6)
        assert float(a["hd95_mm"]) == pytest.approx(float(b["hd95_mm"]), abs=1e-6)


def test_multirun_of_two_jobs(folder, tmp_path):
    arguments = [*PLAIN, f"data.root={folder}", "trainer=ddp_sim", f"runs={tmp_path}", "seed=0,1"]
    done = subprocess.run([sys.executable, "run.py", "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in run_folders(tmp_path)] == ["seed=0", "seed=1"]
    assert all(rows(f) for f in run_folders(tmp_path))


@pytest.mark.parametrize("method", [AUTOMATIC, MANUAL], ids=["automatic", "manual"])
def test_kill_and_resume_in_two_processes(method, folder, tmp_path):
    common = [*PLAIN, *method, f"data.root={folder}", "trainer=ddp_sim", "data.batch_size=1", "data.samples_per_epoch=8"]
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=3") != 0
    assert not list((tmp_path / "killed").rglob("cases.csv"))
    run(*killed, "resume=true")
    whole, resumed = (run_folders(tmp_path / name)[0] for name in ("whole", "killed"))
    assert_same(weights(whole), weights(resumed))
    assert rows(whole) == rows(resumed)


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_processes_started_by_command_equal_forked_ones_and_predict(folder, tmp_path):
    """trainer=ddp repeats the command for the second process; here on two CPU processes."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "precision=32-true"]
    common = [*PLAIN, f"data.root={folder}", "data.batch_size=1", "model._target_=tests.toys.Adversarial"]
    run(*common, "trainer=ddp_sim", f"runs={tmp_path / 'forked'}")
    _run(*common, *ddp, f"runs={tmp_path / 'started'}")
    forked, started = (run_folders(tmp_path / name) for name in ("forked", "started"))
    assert len(started) == 1
    assert_same(weights(forked[0]), weights(started[0]))
    assert rows(forked[0]) == rows(started[0])
    checkpoint = started[0] / "checkpoints" / "last.ckpt"
    _run("job=predict", *ddp, f"ckpt={checkpoint}", f"input={folder / 'images'}", f"out={tmp_path / 'out'}", "trust=[tests]")
    assert len(list((tmp_path / "out" / "predictions").glob("*.nii.gz"))) == 14
