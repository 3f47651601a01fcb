"""Gives up a run of a search whose validation lags behind those of earlier runs."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lesionbench.study import Pruned, open_study, running_trial


class TrialPruner(pl.Callback):
    """Reports the objective to the study after each validation and ends the run where the study's pruner says so.

    The sweeper adds it to every run of a search that has a pruner. Values are reported under the number of iterations trained.

    Args:
        study: SQLite file of the study.
        trial: number of the trial that this run is.
        monitor: validation value that is reported.

    Raises:
        Pruned: in the middle of training, to end the run; `last.ckpt` is written as at every other error.
    """

    def __init__(self, study: str, trial: int, monitor: str) -> None:
        self.path, self.number, self.monitor = Path(study), trial, monitor

    @property
    def pruned(self) -> bool:
        """Whether this run was given up; read from the study, for a forked process tells nothing else."""
        return open_study(self.path).trials[self.number].user_attrs.get("pruned", False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or self.monitor not in trainer.callback_metrics:
            return
        if trainer.strategy.broadcast(self._judged(float(trainer.callback_metrics[self.monitor]), pl_module.iteration)):
            raise Pruned(f"given up after iteration {pl_module.iteration}: {self.monitor} lags behind earlier trials")

    @rank_zero_only
    def _judged(self, value: float, iteration: int) -> bool:
        from hydra.utils import instantiate

        study = open_study(self.path)
        study.pruner = instantiate(study.user_attrs["pruner"])
        trial = running_trial(study, self.number)
        trial.report(value, iteration)
        if trial.should_prune():
            trial.set_user_attr("pruned", True)
            return True
        return False
