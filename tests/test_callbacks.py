import csv
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset, Sampler

from callbacks import BestAndLast, CaseTable, Cost, CurvesLogger, LineProgress, NanGuard, NiftiWriter, NonFiniteLoss, progress_bar
from callbacks.progress import CaseBar
from lesionbench.errors import SuiteError
from lesionbench.geometry import Geometry
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.results import read_rows
from lesionbench.task import Task
from lightning_modules import Supervised
from lightning_modules.inferers import Mirrored, SlabWise, SliceWise, Transformed, Whole, Window
from lightning_modules.losses import DiceCE
from lightning_modules.metrics import DatasetMetrics

TASK = Task(("flair",), {"background": 0, "ed": 2, "et": 4}, {"WT": ("ed", "et"), "ET": ("et",)})
EPOCH = 6  # batches


class Keyed(Sampler):
    """Yields (epoch, position), from where a checkpoint stopped."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        current = self.data.trainer.fit_loop.epoch_progress.current.processed
        epoch, done = (current, 0) if current > self.data.resume[0] else self.data.resume
        return iter([(epoch, i) for i in range(done, EPOCH)])

    def __len__(self):
        return EPOCH


class Numbers(Dataset):
    def __init__(self, count=EPOCH):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        return {"image": torch.full((1, 2), 0.1 * i + 0.05 * epoch), "case": f"case{epoch}-{i}", "again": False}


class Data(pl.LightningDataModule):
    resume = (0, 0)

    def train_dataloader(self):
        return DataLoader(Numbers(), sampler=Keyed(self))

    def val_dataloader(self):
        return DataLoader(Numbers(3))

    def test_dataloader(self):
        return DataLoader(Numbers(3))

    def predict_dataloader(self):
        return DataLoader(Numbers(2))

    def predict_ids(self):
        return ["case0-0", "case0-1"]

    def state_dict(self):
        epoch, batch = self.trainer.fit_loop.epoch_progress.current, self.trainer.fit_loop.epoch_loop.batch_progress
        finished = batch.is_last_batch and epoch.processed < epoch.ready
        return {"epoch": epoch.processed + int(finished), "batch": 0 if batch.is_last_batch else batch.current.processed}

    def load_state_dict(self, state):
        self.resume = (state["epoch"], state["batch"])


class Tiny(pl.LightningModule):
    """Counts batches, keeps a running average (as a teacher does) after each, and dies on request."""

    def __init__(self, scores=(), stop_at=None, stop_in_validation=None, nan_at=None):
        super().__init__()
        self.task = TASK
        self.net = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(self.net.weight, 0.3)
        torch.nn.init.zeros_(self.net.bias)
        self.register_buffer("teacher", torch.zeros(1, 2))
        self.iteration, self.seen, self.validated = 0, [], []
        self.scores, self.stop_at, self.stop_in_validation, self.nan_at = list(scores), stop_at, stop_in_validation, nan_at
        self.val_results, self.test_results, self.dataset_results = Rows(), Rows(), DatasetMetrics()

    def training_step(self, batch, batch_idx):
        self.seen += batch["case"]
        if self.stop_at == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = (self.net(batch["image"][:, 0]) - 1).square().mean()
        self.log("train/loss", loss)
        self.log("iteration", float(self.iteration))
        return loss * (float("nan") if self.nan_at == self.iteration else 1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.teacher = 0.5 * self.teacher + self.net.weight.detach()
        self.iteration += 1

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validated.append((self.iteration, batch_idx))
            if self.stop_in_validation == (self.iteration, batch_idx):
                os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_epoch_end(self):
        if self.scores and not self.trainer.sanity_checking:
            self.log("val/dice", self.scores[(self.iteration - 1) // EPOCH])

    def test_step(self, batch, batch_idx):
        return result(batch["case"][0])

    predict_step = test_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["iteration"] = self.iteration

    def on_load_checkpoint(self, checkpoint):
        self.iteration = checkpoint["iteration"]


class Rows:
    """Stands in for the metric that gathers rows."""

    def __init__(self):
        self.rows = []

    def compute(self):
        return self.rows


def trainer(tmp_path, *callbacks, epochs=2, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, **options}
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=tmp_path, **quiet)


def fit(tmp_path, module, *callbacks, ckpt=None, **options):
    run = trainer(tmp_path, *callbacks, **options)
    run.fit(module, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    return run


def read(path):
    return torch.load(path, weights_only=True)


def state(module):
    return torch.cat([p.detach().flatten() for p in [*module.parameters(), module.teacher]])


# curves


def test_curves_are_long_rows_under_the_logged_iteration(tmp_path):
    logger = CurvesLogger(str(tmp_path / "run"))
    logger.log_metrics({"loss": 0.5, "iteration": 7.0, "epoch": 1}, step=99)
    logger.log_metrics({"lr": 0.1}, step=8)
    assert (tmp_path / "run/metrics.csv").read_text() == "iteration,epoch,name,value\n7,1,loss,0.5\n8,,lr,0.1\n"


def test_rows_of_one_call_stand_by_name(tmp_path):
    """Lightning hands on values in the order in which a process first logged them, which differs after a resume."""
    logger = CurvesLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 1.0, "train/dice": 2.0, "iteration": 1.0}, step=0)
    assert [line.split(",")[2] for line in logger.path.read_text().splitlines()[1:]] == ["train/dice", "train/loss"]


def test_curves_of_a_resumed_run_hold_nothing_later_than_the_checkpoint(tmp_path):
    logger = CurvesLogger(str(tmp_path))
    for i in range(1, 5):
        logger.log_metrics({"loss": i / 3, "iteration": i}, step=0)
    with open(logger.path, "a") as file:
        file.write("2,0,tor")  # a kill in the middle of a write
    logger.truncate_after(2)
    logger.log_metrics({"loss": 9.0, "iteration": 3}, step=0)
    rows = list(csv.DictReader(logger.path.read_text().splitlines()))
    assert [(r["iteration"], r["value"]) for r in rows] == [("1", repr(1 / 3)), ("2", repr(2 / 3)), ("3", "9.0")]


def test_curves_of_a_fit(tmp_path):
    fit(tmp_path, Tiny([0.5, 0.6]), logger=CurvesLogger(str(tmp_path)), log_every_n_steps=1, enable_checkpointing=False)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [int(r["iteration"]) for r in rows if r["name"] == "train/loss"] == list(range(2 * EPOCH))
    assert [float(r["value"]) for r in rows if r["name"] == "val/dice"] == pytest.approx([0.5, 0.6])


# checkpoints


def test_what_early_stopping_ended_does_not_go_on_at_a_resume(tmp_path):
    """As after a kill between the last checkpoint and the end of the training."""

    def stopping():
        return [EarlyStopping("val/dice", patience=1, mode="max"), BestAndLast(str(tmp_path))]

    fit(tmp_path, Tiny([0.2, 0.1, 0.3, 0.4]), *stopping(), epochs=4)
    last = tmp_path / "checkpoints/last.ckpt"
    assert read(last)["iteration"] == 2 * EPOCH
    again = Tiny([0.2, 0.1, 0.3, 0.4])
    fit(tmp_path, again, *stopping(), epochs=4, ckpt=last)
    assert (again.iteration, again.seen) == (2 * EPOCH, [])


def test_best_is_the_best_and_last_the_newest(tmp_path):
    callback = BestAndLast(str(tmp_path))
    fit(tmp_path, Tiny([0.2, 0.7, 0.5, 0.7]), callback, epochs=4)
    assert read(tmp_path / "checkpoints/best.ckpt")["iteration"] == 2 * EPOCH  # a tie does not replace it
    assert read(tmp_path / "checkpoints/last.ckpt")["iteration"] == 4 * EPOCH
    assert callback.best_model_score == pytest.approx(0.7)
    assert callback.best_model_path == str(tmp_path / "checkpoints/best.ckpt")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_min_mode_and_nan_scores(tmp_path):
    callback = BestAndLast(str(tmp_path), mode="min")
    fit(tmp_path, Tiny([float("nan"), 0.7, 0.5, float("nan")]), callback, epochs=4)
    assert read(tmp_path / "checkpoints/best.ckpt")["iteration"] == 3 * EPOCH


def test_without_validation_there_is_no_best(tmp_path):
    callback = BestAndLast(str(tmp_path))
    fit(tmp_path, Tiny(), callback, limit_val_batches=0)
    assert callback.best_model_path == ""
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_monitor_that_nobody_logs_is_an_error(tmp_path):
    with pytest.raises(SuiteError, match="did you mean 'val/dice'"):
        fit(tmp_path, Tiny([0.1, 0.2]), BestAndLast(str(tmp_path), monitor="val/dcie"))


@pytest.mark.parametrize("wrong", [{"mode": "maximum"}, {"every_n_batches": 0}, {"every_n_minutes": -1}])
def test_wrong_options_are_refused(tmp_path, wrong):
    with pytest.raises(SuiteError):
        BestAndLast(str(tmp_path), **wrong)


def test_best_score_survives_a_resume(tmp_path):
    fit(tmp_path, Tiny([0.9]), BestAndLast(str(tmp_path)), epochs=1)
    callback = BestAndLast(str(tmp_path))
    fit(tmp_path, Tiny([0.9, 0.5]), callback, ckpt=tmp_path / "checkpoints/last.ckpt")
    assert callback.best_model_path == str(tmp_path / "checkpoints/best.ckpt")
    assert read(tmp_path / "checkpoints/best.ckpt")["iteration"] == EPOCH


def test_all_ranks_decide_by_the_score_of_rank_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "broadcast", lambda self, value, src=0: 0.9 if value == 0.5 else value)
    callback = BestAndLast(str(tmp_path))
    fit(tmp_path, Tiny([0.5]), callback, epochs=1)
    assert callback.best_model_score == 0.9


class KillAfter(BestAndLast):
    """Stops the process' work, as kill -9 does, right after `last.ckpt` was written for this iteration."""

    def __init__(self, folder, iteration, **options):
        super().__init__(folder, **options)
        self.iteration = iteration

    def _save_last(self, run, module):
        super()._save_last(run, module)
        if module.iteration == self.iteration:
            raise NonFiniteLoss("killed")  # the one exception after which nothing more is written

    @property
    def state_key(self):
        return "BestAndLast"


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("iteration", [1, 3, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH])
def test_a_resume_from_any_batch_repeats_and_loses_nothing(tmp_path, iteration, options):
    whole = Tiny([0.1, 0.2, 0.3])
    fit(tmp_path, whole, epochs=3, enable_checkpointing=False, **options)
    first, second = Tiny([0.1, 0.2, 0.3]), Tiny([0.1, 0.2, 0.3])
    with pytest.raises(NonFiniteLoss):
        fit(tmp_path, first, KillAfter(str(tmp_path), iteration, every_n_batches=1), epochs=3, **options)
    fit(tmp_path, second, KillAfter(str(tmp_path), -1, every_n_batches=1), epochs=3, ckpt=tmp_path / "checkpoints/last.ckpt", **options)
    assert first.seen[:iteration] + second.seen == whole.seen
    assert first.validated + second.validated == whole.validated
    if iteration % options.get("accumulate_grad_batches", 1) == 0:  # the gradients of an open window are the module's to save
        assert torch.equal(state(second), state(whole))


@pytest.mark.parametrize("stop_at", [0, 2, EPOCH - 1, EPOCH])
def test_sigterm_writes_a_checkpoint_that_resumes_exactly(tmp_path, stop_at):
    whole = Tiny([0.1, 0.2])
    fit(tmp_path, whole, enable_checkpointing=False)
    first, second = Tiny([0.1, 0.2], stop_at=stop_at), Tiny([0.1, 0.2])
    with pytest.raises(SIGTERMException):
        fit(tmp_path, first, BestAndLast(str(tmp_path)))
    assert read(tmp_path / "checkpoints/last.ckpt")["iteration"] == stop_at + 1
    fit(tmp_path, second, BestAndLast(str(tmp_path)), ckpt=tmp_path / "checkpoints/last.ckpt")
    assert first.seen + second.seen == whole.seen
    assert torch.equal(state(second), state(whole))


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}])
@pytest.mark.parametrize("averaged", [False, True])
def test_sigterm_in_validation_repeats_the_validation(tmp_path, averaged, options):
    def ema():
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    at = EPOCH // 2 if options else EPOCH
    whole, first, second = (Tiny([0.1, 0.2], stop_in_validation=stop) for stop in (None, (at, 1), None))
    fit(tmp_path, whole, *ema(), enable_checkpointing=False, **options)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, first, BestAndLast(str(tmp_path)), *ema(), **options)
    assert len(first.validated) == 2
    fit(tmp_path, second, BestAndLast(str(tmp_path)), *ema(), ckpt=tmp_path / "checkpoints/last.ckpt", **options)
    assert first.seen + second.seen == whole.seen
    assert second.validated == whole.validated
    assert torch.equal(state(second), state(whole))


class Fails(pl.Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_before_backward(self, run, module, loss):
        if module.iteration == self.batch:
            raise ValueError("out of luck")


def test_another_exception_keeps_the_work_too(tmp_path):
    with pytest.raises(ValueError, match="out of luck"):
        fit(tmp_path, Tiny([0.1, 0.2]), BestAndLast(str(tmp_path)), Fails(3))
    assert read(tmp_path / "checkpoints/last.ckpt")["iteration"] == 3


class FailingStep(Tiny):
    """Breaks off before the forward pass, or between the optimizer's step and the end of the batch, of iteration 8."""

    def __init__(self, scores, after_step):
        super().__init__(scores)
        self.after_step = after_step

    def training_step(self, batch, batch_idx):
        if not self.after_step and self.iteration == 8:
            raise RuntimeError("unreadable file")
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        if self.after_step and self.iteration == 8:
            raise RuntimeError("no more memory")


@pytest.mark.parametrize("after_step", [False, True])
def test_a_batch_that_was_broken_off_is_not_trained_on_twice(tmp_path, after_step):
    whole, first, second = Tiny([0.1, 0.2, 0.3]), FailingStep([0.1, 0.2, 0.3], after_step), Tiny([0.1, 0.2, 0.3])
    fit(tmp_path, whole, epochs=3, enable_checkpointing=False)
    with pytest.raises(RuntimeError):
        fit(tmp_path, first, BestAndLast(str(tmp_path)), epochs=3)
    saved = read(tmp_path / "checkpoints/last.ckpt")["iteration"]
    assert saved == (EPOCH if after_step else 8)
    fit(tmp_path, second, BestAndLast(str(tmp_path)), epochs=3, ckpt=tmp_path / "checkpoints/last.ckpt")
    assert whole.seen == first.seen[:saved] + second.seen
    assert torch.equal(state(second), state(whole))


def test_an_exception_before_the_first_batch_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="out of luck"):
        fit(tmp_path, Tiny([0.1, 0.2]), BestAndLast(str(tmp_path)), Fails(0))
    assert not (tmp_path / "checkpoints").exists()


def test_minutes(tmp_path):
    class Counts(BestAndLast):
        saved = 0

        def _save_last(self, run, module):
            self.saved += 1

    always, never = Counts(str(tmp_path), every_n_minutes=1e-9), Counts(str(tmp_path), every_n_minutes=60)
    for callback in (always, never):
        fit(tmp_path, Tiny([0.1]), callback, epochs=1)
    assert (always.saved, never.saved) == (EPOCH, 1)  # after each batch but the last, and the epoch end


# not a number


@pytest.mark.parametrize(("every", "at"), [(None, 5), (4, 5), (4, 2)])  # read at once; by the checkpoint; with a later bad batch
def test_nan_loss_names_the_cases_and_keeps_the_last_good_checkpoint(tmp_path, every, at):
    callback = BestAndLast(str(tmp_path), every_n_batches=2)
    with pytest.raises(NonFiniteLoss, match=rf"iteration {at}, cases case0-{at}\..*last\.ckpt"):
        fit(tmp_path, Tiny([0.1, 0.2], nan_at=at), NanGuard(every), callback)
    checkpoint = read(tmp_path / "checkpoints/last.ckpt")
    assert checkpoint["iteration"] == at // 2 * 2
    assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(NonFiniteLoss, match="weights"):
        fit(tmp_path, Tiny([0.1, 0.2], nan_at=2), BestAndLast(str(tmp_path), every_n_batches=2))
    assert read(tmp_path / "checkpoints/last.ckpt")["iteration"] == 2


def test_the_guard_looks_at_logged_losses_where_the_step_returns_none(tmp_path):
    class Manual(Tiny):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss_g", loss)
            self.manual_backward(loss)

    with pytest.raises(NonFiniteLoss, match="case0-2"):
        fit(tmp_path, Manual([0.1, 0.2], nan_at=2), NanGuard(), enable_checkpointing=False)


def test_cases_of_several_streams():
    from callbacks.nan_guard import cases_of

    assert list(cases_of({"labeled": {"case": ["a"]}, "unlabeled": {"case": ["b", "c"]}})) == ["a", "b", "c"]


# cost


def test_cost_counts_and_goes_on_over_resumes(tmp_path):
    fit(tmp_path, Tiny([0.1]), Cost(str(tmp_path)), BestAndLast(str(tmp_path)), epochs=1)
    first = json.loads((tmp_path / "cost.json").read_text())
    assert (first["parameters"], first["iterations"], first["samples"]) == (3, EPOCH, EPOCH)
    assert 0 < first["iteration_s"] < first["train_s"] <= first["wall_s"]
    assert 0 <= first["data_wait"] < 1
    assert first["validation_s"] > 0 == first["test_s"]
    cost = Cost(str(tmp_path))
    run = fit(tmp_path, Tiny([0.1, 0.1]), cost, BestAndLast(str(tmp_path)), ckpt=tmp_path / "checkpoints/last.ckpt")
    second = json.loads((tmp_path / "cost.json").read_text())
    assert second["samples"] == 2 * EPOCH
    kept = read(tmp_path / "checkpoints/best.ckpt")["callbacks"]["Cost"]["seconds"]["train"]
    assert second["train_s"] > kept > 0
    run = trainer(tmp_path, Cost(str(tmp_path)))  # testing in a fresh process adds to what training wrote
    run.test(Tiny(), datamodule=Data(), verbose=False)
    third = json.loads((tmp_path / "cost.json").read_text())
    assert third["test_s"] > 0
    assert (third["train_s"], third["samples"]) == (second["train_s"], second["samples"])
    assert third["wall_s"] == pytest.approx(second["wall_s"] + third["test_s"])


def test_cost_of_a_run_that_was_killed_between_its_last_checkpoint_and_its_cost(tmp_path):
    fit(tmp_path, Tiny([0.1, 0.2]), Cost(str(tmp_path)), BestAndLast(str(tmp_path)))
    before = json.loads((tmp_path / "cost.json").read_text())
    (tmp_path / "cost.json").unlink()
    fit(tmp_path, Tiny([0.1, 0.2]), Cost(str(tmp_path)), BestAndLast(str(tmp_path)), ckpt=tmp_path / "checkpoints/last.ckpt")
    after = json.loads((tmp_path / "cost.json").read_text())
    assert {k: after[k] for k in ("iterations", "samples", "parameters")} == {k: before[k] for k in ("iterations", "samples", "parameters")}
    assert 0 < after["train_s"] <= before["train_s"]


def test_throughput_is_logged_on_its_own_clock(tmp_path):
    fit(tmp_path, Tiny([0.1]), Cost(str(tmp_path), every=3), epochs=1, logger=CurvesLogger(str(tmp_path)), enable_checkpointing=False)
    rows = [r for r in csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()) if r["name"].startswith("perf/")]
    assert [(r["iteration"], r["name"]) for r in rows] == [
        (i, f"perf/{n}") for i in ("3", "6") for n in ("data_wait", "memory_mb", "samples_per_s")
    ]
    assert all(float(r["value"]) > 0 for r in rows if r["name"] != "perf/data_wait")


def test_samples_of_streams_add_up():
    from callbacks.cost import samples_of

    assert samples_of({"a": {"image": torch.zeros(2, 1)}, "b": {"image": torch.zeros(3, 1)}}) == 5


# tables


def test_case_table(tmp_path):
    module = Tiny([0.1])
    who = {"patient": "p", "site": "s", "member": "", "region": "WT"}
    module.test_results.rows = [{"case": "a", **who, "dice": 0.5}, {"case": "b", **who, "dice": 0.9}]
    module.val_results.rows = [{"case": "v", **who, "dice": 0.1}]
    run = fit(tmp_path, module, CaseTable(str(tmp_path)), epochs=1, enable_checkpointing=False)
    run.test(module, datamodule=Data(), verbose=False)
    assert [r["case"] for r in read_rows(tmp_path / "validation/cases.csv")] == ["v"]
    assert [r["dice"] for r in read_rows(tmp_path / "test/cases.csv")] == [0.5, 0.9]
    assert json.loads((tmp_path / "test/summary.json").read_text())[""]["WT"]["dice"]["mean"] == pytest.approx(0.7)


# predictions

AFFINE = np.array([[-1.0, 0, 0, 40], [0, 0, 3.0, -5], [0, 2.0, 0, 7], [0, 0, 0, 1]])  # L, S, A axes


def result(case, native=True):
    geometry = Geometry.of(AFFINE, (4, 5, 6))
    labels = torch.zeros(4, 5, 6, dtype=torch.int8)
    labels[1, 2, 3], labels[0, 0, 0] = 1, 2
    regions = torch.stack([labels > 0, labels == 2]).float() * 0.75
    if not native:
        labels = torch.from_numpy(np.ascontiguousarray(geometry.to_canonical(labels.numpy())))
        regions = torch.stack([torch.from_numpy(np.ascontiguousarray(geometry.to_canonical(r.numpy()))) for r in regions])
    prediction = Prediction(
        regions,
        labels,
        uncertainty={"entropy": regions[0] / 2},
        members={"ema": Prediction(labels=labels * 0)},
        table={"risk": 0.25 if case.endswith("0") else 0.5},
    )
    return CaseResult(case, "p", "s", prediction, None, torch.zeros(1, 4, 6, 5), geometry, native=native)


def predict(tmp_path, module, **options):
    trainer(tmp_path, NiftiWriter(str(tmp_path), **options)).predict(module, datamodule=Data(), return_predictions=False)


def test_predictions_have_the_grid_and_values_of_the_input(tmp_path):
    predict(tmp_path, Tiny(), probabilities=True, uncertainty=True, members=True)
    folder = tmp_path / "predictions"
    image = nib.load(folder / "case0-0.nii.gz")
    array = np.asarray(image.dataobj)
    assert image.get_data_dtype() == np.uint8
    assert (image.shape, array[1, 2, 3], array[0, 0, 0], array.sum()) == ((4, 5, 6), 2, 4, 6)
    np.testing.assert_allclose(image.affine, AFFINE)
    probability = nib.load(folder / "case0-0_prob_ET.nii.gz")
    assert probability.get_data_dtype() == np.float32
    assert probability.get_fdata()[0, 0, 0] == 0.75
    assert nib.load(folder / "case0-1_uncertainty_entropy.nii.gz").get_fdata().max() == 0.375
    assert np.asarray(nib.load(folder / "case0-1_ema.nii.gz").dataobj).max() == 0
    assert [(r["case"], r["risk"]) for r in read_rows(folder / "table.csv")] == [("case0-0", 0.25), ("case0-1", 0.5)]


def test_only_labels_by_default_and_network_grids_are_brought_back(tmp_path):
    class OnNetworkGrid(Tiny):
        def predict_step(self, batch, batch_idx):
            return result(batch["case"][0], native=False) if batch_idx == 0 else None  # None: only evens out the ranks

    predict(tmp_path, OnNetworkGrid())
    assert sorted(p.name for p in (tmp_path / "predictions").iterdir()) == ["case0-0.nii.gz", "table.csv"]
    array = np.asarray(nib.load(tmp_path / "predictions/case0-0.nii.gz").dataobj)
    assert (array.shape, array[1, 2, 3], array[0, 0, 0]) == ((4, 5, 6), 2, 4)


def test_prediction_refuses_to_overwrite_before_any_inference(tmp_path):
    class Explodes(Tiny):
        def predict_step(self, batch, batch_idx):
            raise AssertionError("inference ran")

    predict(tmp_path, Tiny())
    before = (tmp_path / "predictions/case0-1.nii.gz").stat().st_mtime_ns
    (tmp_path / "predictions/case0-0.nii.gz").unlink()
    (tmp_path / "predictions/table.csv").unlink()
    with pytest.raises(SuiteError, match=r"case0-1\.nii\.gz exists.*overwrite"):
        predict(tmp_path, Explodes())
    predict(tmp_path, Tiny(), overwrite=True)
    assert (tmp_path / "predictions/case0-1.nii.gz").stat().st_mtime_ns > before


def test_names_unknown_before_inference_are_refused_when_written(tmp_path):
    predict(tmp_path, Tiny(), labels=False, uncertainty=True)
    (tmp_path / "predictions/table.csv").unlink()
    with pytest.raises(SuiteError, match="uncertainty_entropy"):
        predict(tmp_path, Tiny(), labels=False, uncertainty=True)


def test_test_predictions_are_written_on_request_and_replaced(tmp_path):
    for on_test, expected in [(False, 0), (True, 3), (True, 3)]:
        run = trainer(tmp_path, NiftiWriter(str(tmp_path), on_test=on_test))
        run.test(Tiny(), datamodule=Data(), verbose=False)
        assert len(list(tmp_path.glob("predictions/*.nii.gz"))) == expected


# progress


def test_line_progress(tmp_path, capsys):
    fit(tmp_path, Tiny([0.125, 0.25]), LineProgress(), enable_checkpointing=False, enable_progress_bar=True)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "val/dice 0.125" in lines[0]
    assert "ETA 0:00:00" in lines[1]


def test_line_progress_shows_the_mean_loss(tmp_path, capsys):
    class Steps(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0 + batch_idx

    fit(tmp_path, Steps([0.1]), LineProgress(), epochs=1, enable_checkpointing=False, enable_progress_bar=True)
    assert "loss 2.5000" in capsys.readouterr().out


def test_line_progress_of_a_resumed_run_counts_this_process_alone(tmp_path, capsys, monkeypatch):
    """2 s a batch, 1 s a case of validation: the last three of an epoch's six batches at 0.5 a second, then a whole epoch, 6 * 2 + 3 s."""
    clock = [1000.0]
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: clock[0])

    class Slow(Tiny):
        def training_step(self, batch, batch_idx):
            clock[0] += 2
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock[0] += 1
            super().validation_step(batch, batch_idx)

    with pytest.raises(SIGTERMException):
        fit(tmp_path, Slow([0.1, 0.2], stop_at=2), BestAndLast(str(tmp_path)))
    clock[0] += 500
    capsys.readouterr()
    resumed = tmp_path / "checkpoints/last.ckpt"
    fit(tmp_path, Slow([0.1, 0.2]), BestAndLast(str(tmp_path)), LineProgress(), ckpt=resumed, enable_progress_bar=True)
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.endswith("0.5 it/s  ETA 0:00:15")
    assert second.endswith("0.5 it/s  ETA 0:00:00")


def predicting(bar: pl.callbacks.ProgressBar, seconds: list[float], inferer: Any = None) -> None:
    """Two cases of 40^3 in windows of 8^3, 125 passes each, through a network that takes so long for a window of the first and of the second case."""

    class Slow(Supervised):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

        def predict_maps(self, view):
            clock[0] += seconds[len(cases)]
            return super().predict_maps(view)

        def predict_step(self, batch, batch_idx):
            self.predict_case(batch)
            cases.append(batch_idx)

    cases: list[int] = []
    task = Task(("t1",), {"background": 0, "lesion": 1})
    method = Slow(
        task,
        network=lambda in_channels, out_channels: torch.nn.Conv3d(1, 2, 1),
        loss=DiceCE(),
        inferer=inferer or Window((8, 8, 8), overlap=0),
    )
    batches = [
        {"image": torch.zeros(1, 1, 40, 40, 40), "case": [f"case_{n}"], "geometry": [Geometry.of(np.eye(4), (40, 40, 40))]}
        for n in range(2)
    ]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    pl.Trainer(accelerator="cpu", logger=False, callbacks=[bar], enable_checkpointing=False, enable_model_summary=False).predict(
        method, loader
    )


clock = [0.0]


def test_a_long_case_tells_every_tenth_of_its_passes(capsys, monkeypatch):
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: clock[0])
    predicting(LineProgress(), [1.0, 0.01])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("predict")]
    assert lines[0] == "predict  case_0  13 of 125 passes (10 %)  ETA 0:01:52"
    assert [line.split("(")[1].split()[0] for line in lines[:-1]] == [str(n) for n in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)]
    assert lines[-1] == "predict  2 cases  126.3 s"  # the second case, of 1.25 s, has none

    predicting(LineProgress(), [1.0, 0.01], Mirrored(Window((8, 8, 8), overlap=0), [0]))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("predict  case_0  25 of 250 passes (10 %)") for line in lines)


def test_the_bar_of_a_terminal_shows_the_passes_of_a_case(monkeypatch):
    told: list[tuple[int, int]] = []

    class Bar(CaseBar):
        def _passed(self, done, passes):
            super()._passed(done, passes)
            told.append((done, passes))
            shown.add(str(self.progress.tasks[-1].total))

    shown: set[str] = set()
    bar = Bar(console_kwargs={"force_terminal": True, "file": io.StringIO()})
    predicting(bar, [0.0, 0.0])
    assert told == [(n + 1, 125) for n in range(125)] * 2
    assert shown == {"125"}


def test_passes_are_counted_before_they_are_made():
    image = torch.zeros(1, 1, 20, 11, 7)
    inferers = [
        Window((8, 8, 8), 0.5, batch=3),
        Window((8, 8, 8), 0.5, starts="clamped"),
        Whole(4),
        SliceWise(4, batch=3),
        SlabWise(3, batch=2),
    ]
    for inferer in [*inferers, *(Transformed(inferer, "flips") for inferer in inferers), Transformed(inferers[0], "dihedral")]:
        for axis in range(3):
            made = []
            middle = (..., 1) if isinstance(getattr(inferer, "inferer", inferer), SlabWise) else ...
            inferer(image, lambda view, made=made, middle=middle: made.append(view) or {"x": view[middle]}, axis)
            assert len(made) == inferer.passes(image.shape[2:], axis)


def test_progress_bar_suits_the_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert isinstance(progress_bar(), LineProgress)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(progress_bar(), pl.callbacks.RichProgressBar)


# several processes


class Distributed(Tiny):
    """Rank 1 alone sees the NaN; scores differ between ranks, as a metric that is not synchronized would make them."""

    def on_validation_epoch_end(self):
        self.log("val/dice", float((0.2, 0.6)[self.global_rank]))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.nan_at is not None and self.global_rank == 1 and self.iteration >= 2 else loss


@pytest.mark.parametrize("nan", [None, 99])
def test_two_processes_save_together_and_stop_together(tmp_path, nan):
    run = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[NanGuard(), Cost(str(tmp_path)), BestAndLast(str(tmp_path), every_n_batches=2)],
    )  # fmt: skip
    if nan is None:
        run.fit(Distributed(), datamodule=Data())
        assert read(tmp_path / "checkpoints/last.ckpt")["iteration"] == EPOCH
        assert read(tmp_path / "checkpoints/best.ckpt")["callbacks"]["BestAndLast"]["score"] == pytest.approx(0.2)
        assert json.loads((tmp_path / "cost.json").read_text())["samples"] == 2 * EPOCH
    else:
        with pytest.raises(Exception, match="iteration 2, cases case0-2"):
            run.fit(Distributed(nan_at=nan), datamodule=Data())
        assert read(tmp_path / "checkpoints/last.ckpt")["iteration"] == 2
    assert not list(Path(tmp_path).glob("checkpoints/.writing*"))
