"""SIGTERM and Ctrl-C, which reach every process of the group: one line, a checkpoint, the exit status of a shell."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, program, rows, run, run_folders, weights
from tests.toys import signal_group


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(20, 18, 16))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The run that nothing stops."""
    runs = tmp_path_factory.mktemp("whole")
    run(*SMALL, f"data.root={folder}", f"runs={runs}")
    return run_folders(runs)[0]


def signals(hook, how, iteration=0):
    options = {"hook": hook, "how": int(how), "iteration": iteration}
    return ["callbacks.progress._target_=tests.toys.SignalsGroup", *(f"+callbacks.progress.{k}={v}" for k, v in options.items())]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_stops_between_batches(folder, whole, tmp_path, how, workers):
    common = [*SMALL, f"data.root={folder}", f"runs={tmp_path}", f"data.num_workers={workers}"]
    code, printed = program(tmp_path / "log", *common, *signals("on_train_batch_start", how, 5))
    (found,) = run_folders(tmp_path)
    assert printed == (
        f"stopped by {how.name}: {found} has a checkpoint after iteration 6; the same command with resume=true continues it\n"
    )
    assert code == 128 + how
    assert json.loads((found / "summary.json").read_text())["status"] == "interrupted"
    run(*common, "resume=true")
    assert_same(weights(whole), weights(found))
    assert rows(whole) == rows(found)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_start"])
def test_stop_in_validation_repeats_it(folder, whole, tmp_path, hook):
    common = [*SMALL, f"data.root={folder}", f"runs={tmp_path}", "data.num_workers=2"]
    code, printed = program(tmp_path / "log", *common, *signals(hook, signal.SIGTERM, 8))
    (found,) = run_folders(tmp_path)
    assert code == 143
    assert len(printed.splitlines()) == 1
    assert "after iteration 8;" in printed
    run(*common, "resume=true")
    assert_same(weights(whole), weights(found))
    assert (whole / "metrics.csv").read_text() == (found / "metrics.csv").read_text()


@pytest.mark.parametrize(("trainer", "iteration"), [("cpu", 12), ("ddp_sim", 6)])
def test_stop_in_the_test_keeps_what_was_trained(folder, tmp_path, trainer, iteration):
    common = [*SMALL, f"data.root={folder}", f"runs={tmp_path}", "data.num_workers=2", f"trainer={trainer}"]
    code, printed = program(tmp_path / "log", *common, *signals("on_test_batch_start", signal.SIGTERM))
    (found,) = run_folders(tmp_path)
    assert code == 143
    told = [line for line in printed.splitlines() if not line.startswith("Initializing distributed")]
    assert told == [
        f"stopped by SIGTERM: {found} has a checkpoint after iteration {iteration}; the same command with resume=true continues it"
    ]
    trained = weights(found)
    run(*common, "resume=true")
    assert_same(trained, weights(found))
    assert len(rows(found)) == 2


@pytest.mark.parametrize("hook", ["setup", "on_sanity_check_start"])
def test_stop_ahead_of_the_first_batch_leaves_no_run(folder, tmp_path, hook):
    options = [*SMALL, f"data.root={folder}", f"runs={tmp_path / 'runs'}", "data.num_workers=2", "trainer.num_sanity_val_steps=1"]
    code, printed = program(tmp_path / "log", *options, *signals(hook, signal.SIGINT))
    assert printed == ("stopped by SIGINT: nothing had come of the run yet, and nothing is kept; the same command starts it again\n")
    assert code == 130
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_while_caching(folder, tmp_path, workers):
    def at_the_first_case():
        from datamodules import cache

        real = cache.tracked

        def tracked(*arguments):
            for outcome in real(*arguments):
                yield outcome
                signal_group(signal.SIGTERM)

        cache.tracked = tracked

    options = [
        *SMALL,
        f"data.root={folder}",
        f"data.cache={tmp_path / 'cache'}",
        f"runs={tmp_path / 'runs'}",
        f"data.num_workers={workers}",
    ]
    code, printed = program(tmp_path / "log", *options, before=at_the_first_case)
    assert code == 143
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert list((tmp_path / "cache").glob("*/case_*"))  # what was ready stays


def test_stop_in_predict(folder, whole, tmp_path):
    def at_the_second_file():
        from callbacks import nifti_writer

        real, written = nifti_writer.write_native, []

        def write(*arguments):
            real(*arguments)
            written.append(arguments)
            if len(written) == 2:
                signal_group(signal.SIGTERM)

        nifti_writer.write_native = write

    ckpt, out = whole / "checkpoints/best.ckpt", tmp_path / "out"
    options = ["job=predict", "experiment=supervised/folder", f"ckpt={ckpt}", f"data.root={folder}", "data.channels=[t1,flair]", f"out={out}", "trust=[tests]", "data.num_workers=2"]  # fmt: skip
    code, printed = program(tmp_path / "log", *options, before=at_the_second_file)
    assert code == 143
    assert printed == (
        f"stopped by SIGTERM: what is written stays in {out}/predictions; the same command with overwrite=true predicts all cases again\n"
    )
    assert len(list((out / "predictions").glob("*.nii.gz"))) == 2


def test_stop_in_a_sweep_ends_the_sweep(folder, tmp_path):
    common = [*SMALL, f"data.root={folder}", f"runs={tmp_path}", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    code, printed = program(tmp_path / "log", "-m", *common, *signals("on_train_batch_start", signal.SIGTERM, 5))
    (found,) = run_folders(tmp_path)
    assert code == 143
    assert printed.splitlines()[-1] == (
        f"stopped by SIGTERM: {found} has a checkpoint after iteration 6; the same command with resume=true continues it"
    )
    assert "Traceback" not in printed


@pytest.mark.parametrize(("accumulate", "asked"), [(1, 5), (2, 4)])  # the second in the middle of a window
def test_two_processes_stop_at_the_same_batch(folder, tmp_path, accumulate, asked):
    common = [*SMALL, f"data.root={folder}", "trainer=ddp_sim", "data.batch_size=1", "data.num_workers=1", f"accumulate={accumulate}"]
    run(*common, f"runs={tmp_path / 'whole'}")
    common.append(f"runs={tmp_path / 'stopped'}")
    code, printed = program(tmp_path / "log", *common, *signals("on_train_batch_start", signal.SIGTERM, asked))
    (found,) = run_folders(tmp_path / "stopped")
    told = [line for line in printed.splitlines() if not line.startswith("Initializing distributed")]
    assert told == [f"stopped by SIGTERM: {found} has a checkpoint after iteration 6; the same command with resume=true continues it"]
    assert code == 143
    run(*common, "resume=true")
    assert_same(weights(run_folders(tmp_path / "whole")[0]), weights(found))


def test_a_second_signal_ends_at_once_and_a_doubled_one_is_one(folder, tmp_path):
    """`timeout` sends its signal to the program and to its group."""

    def in_the_sixth_batch():
        from lesionbench import stopping
        from tests.toys import MeanCE

        real, losses = MeanCE.forward, []

        def forward(*arguments):
            losses.append(arguments)
            if len(losses) == 6:
                signal_group(signal.SIGTERM)
                signal_group(signal.SIGTERM)
                print("still here")
                stopping.request._since -= 1
                signal_group(signal.SIGINT)
                print("never here")
            return real(*arguments)

        MeanCE.forward = forward

    code, printed = program(tmp_path / "log", *SMALL, f"data.root={folder}", f"runs={tmp_path}", before=in_the_sixth_batch)
    assert code == -signal.SIGINT
    assert printed.splitlines()[-1] == "still here"


@pytest.mark.parametrize("stage", ["training", "caching"])
def test_workers_do_not_outlive_a_killed_program(folder, tmp_path, stage):
    def kill():
        pids = [process.pid for process in multiprocessing.active_children()]
        print(*pids)
        os.kill(os.getpid(), signal.SIGKILL)

    def before():
        from datamodules import cache
        from tests.toys import MeanCE

        if stage == "training":
            MeanCE.forward = lambda *_: kill()
        else:
            cache.tracked = lambda outcomes, *_: (kill() for _ in outcomes)

    options = [*SMALL, f"data.root={folder}", f"data.cache={tmp_path / 'cache'}", f"runs={tmp_path}", "data.num_workers=2"]
    if stage == "training":
        run("job=prepare", *options)
    code, printed = program(tmp_path / "log", *options, before=before)
    assert code == -signal.SIGKILL
    pids = [int(word) for word in printed.split()]
    assert len(pids) >= 2
    for _ in range(600):
        left = [pid for pid in pids if alive(pid)]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def alive(pid: int) -> bool:
    """Whether there is such a process, and not only what its parent has yet to read of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
