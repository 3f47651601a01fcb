"""Curves of runs that were killed and resumed: the rows of the uninterrupted run, in its order, none of them twice."""

import multiprocessing
import os
import signal

import pytest
import torch
from pytorch_lightning.callbacks import LearningRateMonitor

from callbacks import BestAndLast, CurvesLogger, Rewind
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, run, run_folders, run_killed, weights
from tests.test_callbacks import Data, Tiny, trainer

CHATTY = [
    *SMALL,
    "model._target_=tests.toys.Chatty",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_batches=3",
    "callbacks.cost=null",
]


class Talks(Tiny):
    """Logs at every place at which a method may: when training starts, ahead of and in batches, in validation, at the ends of epochs."""

    def on_fit_start(self):
        self.logger.log_metrics({"fit_start": 1.0, "iteration": float(self.iteration)})

    def on_train_start(self):
        self.logger.log_metrics({"train_start": 1.0}, step=self.iteration)

    def on_train_epoch_start(self):
        self.logger.log_metrics({"epoch_start": float(self.iteration)}, step=self.iteration)

    def on_train_batch_start(self, batch, batch_idx):
        self.logger.log_metrics({"batch_start": float(self.iteration)}, step=self.iteration)

    def on_train_epoch_end(self):
        self.log("epoch_end", float(self.iteration))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.PolynomialLR(optimizer, 12), "interval": "step"}]


def train(folder, accumulate=1, ahead=None, after=None):
    """Trains on from the last checkpoint there is; is killed ahead of or after the row that has this number, from 1."""
    logger = CurvesLogger(str(folder))
    append, rows = logger._append, []

    def dying(lines):
        rows.append(lines)
        if len(rows) == ahead:
            os.kill(os.getpid(), signal.SIGKILL)
        append(lines)
        if len(rows) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    logger._append = dying
    last = folder / "checkpoints" / "last.ckpt"
    callbacks = [Rewind(), LearningRateMonitor("step"), BestAndLast(str(folder), every_n_batches=4)]
    fitted = trainer(folder, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=accumulate)
    if not last.exists():
        logger.wind_back(0)
    fitted.fit(Talks([0.5, 0.6]), datamodule=Data(), ckpt_path=last if last.exists() else None, weights_only=True)


def killed(folder, accumulate, **place):
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, accumulate), kwargs=place)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("accumulate", "place"), [(1, "ahead"), (2, "after")])  # with 2, Lightning's step counts every other batch
def test_killed_at_any_row_the_curves_are_those_of_the_whole_run(tmp_path, accumulate, place):
    train(tmp_path / "whole", accumulate)
    whole = (tmp_path / "whole" / "metrics.csv").read_text()
    for name in ("fit_start", "train_start", "epoch_start", "batch_start", "lr-Adam", "train/loss", "val/dice", "epoch_end"):
        assert f",{name}," in whole
    row = 1
    while killed(tmp_path / str(row), accumulate, **{place: row}):
        killed(tmp_path / str(row), accumulate, after=2)  # and soon again
        train(tmp_path / str(row), accumulate)
        assert (tmp_path / str(row) / "metrics.csv").read_text() == whole, row
        row += 1
    assert row > 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(14, 12, 10))


@pytest.mark.parametrize("iteration", [2, 5, 7, 9])  # without a checkpoint; the rest after one within an epoch, and two at the end of one
def test_curves_of_a_killed_job_are_those_of_the_whole_one(folder, whole, tmp_path, iteration):
    common = [*CHATTY, f"data.root={folder}", f"runs={tmp_path}"]
    assert (
        run_killed(*common, "callbacks.progress._target_=tests.toys.KillAt", f"+callbacks.progress.iteration={iteration}")
        == -signal.SIGKILL
    )
    (found,) = run_folders(tmp_path)
    run(*common, "resume=true")
    assert_same(weights(whole), weights(found))
    assert (found / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    run(*CHATTY, f"data.root={folder}", f"runs={runs}")
    (found,) = run_folders(runs)
    curves = (found / "metrics.csv").read_text()
    assert all(f",{name}" in curves for name in ("lr/", "train/measured", "train/extra", "val/dice"))
    return found


def test_a_checkpoint_that_knows_no_places_has_its_curves_cut_by_iteration(folder, tmp_path):
    """As written by earlier versions."""
    common = [*SMALL, "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_batches=3", f"data.root={folder}", f"runs={tmp_path}"]
    run_killed(*common, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=8")
    (found,) = run_folders(tmp_path)
    last = found / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["curves"]
    torch.save(checkpoint, last)
    run(*common, "resume=true")
    losses = [line.split(",")[0] for line in (found / "metrics.csv").read_text().splitlines() if ",train/loss," in line]
    assert [int(i) for i in losses] == list(range(1, 13))
