"""What waits for a validation value: refused before training where none will come."""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lesionbench.errors import SuiteError, nearest


def check_validation(cfg: DictConfig, stage: str) -> None:
    """Of the configuration of one training stage.

    Raises:
        SuiteError: something waits, and the configuration leaves out validation, or comes to its end before the first one.
    """
    why = _why_none(cfg)
    if why and (names := waiting(cfg, stage)):
        raise SuiteError(
            f"{' and '.join(names)} wait(s) for {cfg.objective.name or 'objective.name'} of a validation, and there is none: {why}"
        )


def check_monitored(cfg: DictConfig, method: Any) -> None:
    """Of the configuration of one training stage and its method.

    Raises:
        SuiteError: a value is watched that its validation does not give.
    """
    known = method.validated()
    if known is None or _why_none(cfg):
        return
    callbacks = {f"callbacks.{name}.monitor": node for name, node in (cfg.callbacks or {}).items() if node}
    watched = {"objective.name": cfg.objective.name}
    watched |= {option: node.get("monitor") for option, node in {**callbacks, "model.monitor": cfg.model}.items()}
    for option, name in watched.items():
        if name is not None and not any(fnmatch(name, pattern) for pattern in known):
            raise SuiteError(
                f"{option}={name}: no value of a validation with validation_metrics={list(cfg.validation_metrics)}{nearest(name, known)}"
            )


def waiting(cfg: DictConfig, stage: str) -> list[str]:
    """Options of a training stage that wait for a validation value."""
    found = [f"model.{name}" for name, node in _nodes(cfg.model) if node.get("_target_") == "lightning_modules.schedules.plateau"]
    for name, node in (cfg.callbacks or {}).items():
        if node and str(node.get("_target_", "")).rpartition(".")[2] == "EarlyStopping":
            found.append(f"callbacks.{name}")
    if stage == "fit" and _searching():
        found.append("the search (hydra.sweeper)")
    return found


def _searching() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().sweeper._target_.endswith(".OptunaSearch")


def _why_none(cfg: DictConfig) -> str:
    split, trainer = cfg.data.get("split") or {}, cfg.trainer
    every = trainer.get("check_val_every_n_epoch")
    if cfg.objective.name is None:
        return "objective.name=null"
    if split.get("val") == 0 and split.get("file") is None:
        return "data.split.val=0"
    if trainer.get("limit_val_batches") == 0:
        return "trainer.limit_val_batches=0"
    if every is not None and cfg.epochs < every:
        return f"epochs={cfg.epochs} ends before trainer.check_val_every_n_epoch={every}"
    return ""


def _nodes(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and mapping of everything in a configuration that is built."""
    if OmegaConf.is_dict(config):
        if name and "_target_" in config:
            yield name, config
        for key, value in config.items_ex(resolve=False):
            yield from _nodes(value, f"{name}.{key}" if name else str(key))
