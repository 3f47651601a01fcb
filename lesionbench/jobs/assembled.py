"""Data module, method and trainer of one stage, built from its configuration."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lesionbench.errors import SuiteError
from lesionbench.jobs.console import first_process


class Parts:
    """Data module, rules on labels and method of one stage.

    Args:
        method, data: instead of those that the configuration describes.
    """

    def __init__(self, cfg: DictConfig, method: Any = None, data: Any = None) -> None:
        from hydra.utils import instantiate

        self.data = instantiate(cfg.data, _convert_="all") if data is None else data
        self.rules = instantiate(cfg.postprocessing, _convert_="all")
        self.rules.check(self.data.task)
        if method is None:
            from lesionbench.checkpoint import build_method

            method = build_method(OmegaConf.to_container(cfg.model, resolve=True), self.data.task)
        self.method = method

    def configure_inference(self, cfg: DictConfig) -> None:
        """Gives the method what only tested and predicted cases get: means over moved copies and rules on the labels."""
        if cfg.mirror:
            self.method.mirror(list(cfg.mirror))
        if cfg.test_time:
            from lightning_modules.inferers import Transformed

            self.method.average(lambda inferer: Transformed(inferer, cfg.test_time))
        if self.rules.active:
            self.method.postprocess(self.rules)


class Assembled(Parts):
    """The parts of one stage and its trainer, built and checked before anything starts.

    Args:
        method, data: instead of those that the configuration describes.
        callbacks: beside those of the configuration.
    """

    def __init__(self, cfg: DictConfig, method: Any = None, data: Any = None, callbacks: Sequence[Any] = ()) -> None:
        import pytorch_lightning as pl
        import torch

        quiet()
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        pl.seed_everything(cfg.seed, workers=False, verbose=False)
        super().__init__(cfg, method, data)
        if cfg.maps:
            from lesionbench.maps import MapStore

            self.data.maps = MapStore(Path(cfg.maps))
        if cfg.compile:
            self.method.compile()
        self.trainer = self._trainer(cfg, callbacks)

    @property
    def steps(self) -> int:
        """Optimizer steps of the training, as far as they can be told before it."""
        batches, limit = self.data.batches_per_epoch // self.trainer.world_size, self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-max(batches, 1) // self.method.accumulate) * self.trainer.max_epochs

    def check_callbacks(self) -> None:
        """Has the callbacks that need something of the method say so before anything is prepared."""
        for callback in self.trainer.callbacks:
            if hasattr(callback, "check"):
                callback.check(self.method)

    def prepare(self) -> None:
        """Generates, checks and caches the data; comes after everything that can be refused without it."""
        if first_process():
            self.data.prepare_data()

    def _trainer(self, cfg: DictConfig, further: Sequence[Any]) -> Any:
        from hydra.utils import instantiate

        from callbacks import CurvesLogger, Rewind
        from callbacks.stopping import Signals

        options = OmegaConf.to_container(cfg.trainer, resolve=True)
        strategy = options.get("strategy")
        if not self.method.automatic_optimization and strategy:  # networks take turns: in each turn the others get no gradient
            if isinstance(strategy, dict):
                strategy["find_unused_parameters"] = True
            elif strategy in ("ddp", "ddp_fork", "ddp_spawn"):
                options["strategy"] = f"{strategy}_find_unused_parameters_true"
        from pytorch_lightning.callbacks import Checkpoint, ProgressBar
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

        self.rewind = Rewind()
        callbacks = [self.rewind, *(instantiate(c, _convert_="all") for c in (cfg.callbacks or {}).values() if c), *further]
        loggers = {} if cfg.job == "predict" else {"csv": CurvesLogger(cfg.run_folder)}  # always written: other jobs read it
        loggers |= {name: instantiate(c, _convert_="all") if c else None for name, c in (cfg.logger or {}).items()}
        try:
            trainer = instantiate({**options, "_partial_": True}, _convert_="all")(
                callbacks=callbacks,
                logger=[logger for logger in loggers.values() if logger is not None],
                enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
                enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
                accumulate_grad_batches=cfg.accumulate if self.method.automatic_optimization else 1,
            )
        except (MisconfigurationException, ValueError, TypeError) as error:  # what the machine or Lightning does not have
            asked = " ".join(f"trainer.{k}={options[k]}" for k in ("accelerator", "devices", "precision") if k in options)
            hint = (
                "" if options.get("accelerator") == "cpu" else "\nWithout a GPU write trainer=cpu; docs/scaling.md has the other trainers."
            )
            raise SuiteError(f"{asked}: {error}{hint}") from error
        trainer._signal_connector = Signals(trainer)
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, self.data.batches_per_epoch // trainer.world_size))
        return trainer

    def load(self, checkpoint: str) -> None:
        """Puts the weights of a checkpoint into the method."""
        from lesionbench.checkpoint import read_checkpoint

        found = read_checkpoint(checkpoint)
        try:
            self.method.load_state_dict(found["state_dict"])
        except RuntimeError as error:
            holds = (found.get("lesionbench") or {}).get("model")
            hint = f"\nckpt=['{checkpoint}'], as a list of one, tests the model that the checkpoint describes." if holds else ""
            raise SuiteError(f"{checkpoint}: its weights do not fit this experiment's model: {str(error)[:400]}{hint}") from None
        self.method.on_load_checkpoint(found)
        own = found.get("lesionbench") or {}
        if own.get("statistics"):
            self.data.statistics = own["statistics"]
        self._check_origin(checkpoint, own)

    def _check_origin(self, checkpoint: str, own: dict[str, Any]) -> None:
        """Refuses weights that were trained on the cases they would be tested on, or on data prepared in another way."""
        for name, now in [("task", self.data.task), ("preprocessing", self.data.preprocessing)]:
            theirs = type(now).from_dict(own[name]) if own.get(name) else now  # fields that came later have their defaults
            if theirs != now:
                before, after = theirs.to_dict(), now.to_dict()
                differing = ", ".join(f"{k}: {before[k]} -> {after[k]}" for k in after if before[k] != after[k])
                raise SuiteError(f"{checkpoint}: was trained with another {name} than this experiment's data has ({differing})")
        self.data.setup("test")
        both = sorted({c.patient for c in self.data.parts["test"]} & set(own.get("patients") or []))
        if both:
            raise SuiteError(
                f"{checkpoint}: was trained or selected on {len(both)} of the test patients ({', '.join(both[:5])}); "
                "test it with the data.split it was trained with"
            )


def quiet() -> None:
    """Silences what is known to be harmless: a deprecation inside Lightning, its tips, and advice on worker counts."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*of metric (PerCaseResults|DatasetMetrics) was called before.*")  # a process without cases
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log.*sync_dist")  # equal on every process already
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")  # no validation part, on purpose
    warnings.filterwarnings("ignore", message=r".*your dataloader is not resumable.*")  # the data module resumes in mid-epoch itself
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # how it ends the others when a forked process has ended
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
