"""Fit and test: an experiment's stages in its run folder."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lesionbench.errors import SuiteError, unknown
from lesionbench.jobs.arguments import check_arguments
from lesionbench.jobs.assembled import Assembled, Parts
from lesionbench.jobs.console import first_process, say
from lesionbench.jobs.ensemble import ensemble_model
from lesionbench.jobs.ensemble_members import is_ensemble
from lesionbench.jobs.forerunner_maps import check_stage, write_maps
from lesionbench.jobs.memory import say_memory
from lesionbench.jobs.run_folder import RunFolder, variant_hash
from lesionbench.jobs.validation import check_monitored, check_validation, waiting
from lesionbench.stopping import Stopped
from lesionbench.study import Pruned


def fit(cfg: DictConfig) -> float | None:
    """Runs the stages of the experiment (default: fit, test) in a run folder; with resume=true, those not done yet."""
    _check_options(cfg)
    folder = RunFolder.of(cfg, resume=cfg.resume, same=lambda folder: _same_cases(cfg, folder))
    known = {"experiment": cfg.experiment_name, "variant": variant_hash(cfg), "seed": cfg.seed}
    with open_dict(cfg):
        cfg.run_folder = str(folder.path)
    with folder.locked() if first_process() else nullcontext():
        return _run_stages(cfg, folder, known)


def _run_stages(cfg: DictConfig, folder: RunFolder, known: Mapping[str, Any]) -> float | None:
    done = folder.summary
    if done.get("status") == "finished":
        say(f"{folder.path} is finished; nothing to do (resume=true)")
        return done.get("objective")
    if first_process():
        folder.write_config(cfg)
        folder.update_summary(**{"started": time.time(), **done, **known, "status": "running"})
    try:
        for stage in cfg.stages[1:]:
            if folder.stage_done(stage.name) is None:
                _rehearse(cfg, stage)
        for stage in cfg.stages:
            _run_stage(cfg, stage, folder)
    except BaseException as error:
        kept = first_process() and not _discarded(folder)
        if kept:
            folder.update_summary(status="pruned" if isinstance(error, Pruned) else "interrupted")
        if isinstance(error, Stopped):
            error.left = _left(folder) if kept else "nothing had come of the run yet, and nothing is kept; the same command starts it again"
        raise
    if first_process():
        _finish(cfg, folder)
    return folder.summary.get("objective")


def _same_cases(cfg: DictConfig, folder: RunFolder) -> bool:
    """Whether a run was computed on the cases that the configuration finds today; also where that is not known, as of runs of 0.1.0."""
    today: dict[str, str] = {}
    for name, recorded in folder.summary.get("cases", {}).items():
        stage = next(stage for stage in cfg.stages if stage.name == name)
        own = _stage_config(cfg, stage, folder)[0].data
        data = own if own._target_ == cfg.data._target_ else cfg.data  # or what an earlier stage made of them
        text = OmegaConf.to_yaml(data, resolve=True)
        if text not in today:
            today[text] = fingerprint(data)
        if today[text] != recorded:
            say(f"{folder.path} was computed on other cases than those under data.root={cfg.data.root}, so it is another run")
            return False
    return True


def fingerprint(data: DictConfig) -> str:
    """Of the cases that a data configuration describes; prepares them."""
    from hydra.utils import instantiate

    found = instantiate(data, _convert_="all")
    found.prepare_data()
    return found.fingerprint()


def _prepare(run: Assembled, stage: DictConfig, folder: RunFolder) -> None:
    """Prepares the cases and remembers which they are."""
    run.prepare()
    if not first_process():
        return
    cases, doubts = run.data.fingerprint(), getattr(run.data, "doubts", "")
    if cases is not None:
        folder.update_summary(cases={**folder.summary.get("cases", {}), stage.name: cases})
    if doubts:
        folder.update_summary(data_warnings=doubts)


def _discarded(folder: RunFolder) -> bool:
    """Leaves no run behind where a mistake, or the user, ended it before it came to anything."""
    if not folder.empty:
        return False
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:  # it writes into the folder
        wandb.finish(exit_code=1)
    folder.discard()
    return True


def _left(folder: RunFolder) -> str:
    """Where a stopped run is, up to where it has come, and how it goes on."""
    from lesionbench.checkpoint import read_checkpoint

    found = sorted(folder.path.rglob("checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)  # a stage may have its own
    has = f"has a checkpoint after iteration {read_checkpoint(found[-1])['lesionbench']['iteration']}" if found else "has no checkpoint"
    return f"{folder.path} {has}; the same command with resume=true continues it"


def _check_options(cfg: DictConfig) -> None:
    """What can be said before anything is built."""
    for stage in cfg.stages:
        if stage.run not in STAGES:
            raise unknown(f"stages.{stage.name}.run", stage.run, STAGES)
        if stage.run == "maps":
            check_stage(stage)
        if stage.get("override"):
            check_arguments(_overridden(cfg, stage))
        if stage.run == "fit":
            check_validation(_overridden(cfg, stage), stage.name)
    split = cfg.data.get("split") or {}
    if any(s.run == "test" for s in cfg.stages) and split.get("test") == 0 and split.get("folds") is None and split.get("file") is None:
        raise SuiteError(
            "data.split.test=0 leaves nothing to test on; give it a number, or leave testing out: stages=[{name: fit, run: fit}]"
        )
    strategy = cfg.trainer.get("strategy")
    forks = strategy is None or (not isinstance(strategy, str) and strategy.get("start_method"))
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if not forks and hydra is not None and hydra.mode == RunMode.MULTIRUN and not hydra.launcher._target_.endswith(".SlurmLauncher"):
        raise SuiteError(
            "trainer=ddp and trainer=multinode start further processes by repeating the command, which cannot be told apart in a sweep; "
            "let SLURM start them (launcher=submitit_slurm), start one command per job, or try trainer=ddp_sim, which forks"
        )


def _rehearse(cfg: DictConfig, stage: DictConfig) -> None:
    """Builds what a later stage is made of, so that a mistake in it ends the run before the first one and not after.

    What an earlier stage leaves is not there yet: an error about that is none, and in place of data that it makes stand those of the run.
    """
    if stage.run in _OF_ONE_PROCESS:
        return
    cases, cfg = cfg.data, _overridden(cfg, stage)
    if "artefact:" in OmegaConf.to_yaml(cfg.data, resolve=True):
        cfg.data = cases
    try:
        parts = Parts(cfg)
        if stage.run == "fit":
            check_monitored(cfg, parts.method)
        else:
            parts.configure_inference(cfg)
    except Exception as error:
        if not any(promise in str(error) for promise in ("artefact:", "contents:")):
            raise


def _run_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> None:
    if folder.stage_done(stage.name) is not None:
        return
    cfg, stage = _stage_config(cfg, stage, folder)
    if first_process():  # another process may come here when this one has found a mistake and discarded the run
        Path(cfg.run_folder).mkdir(parents=True, exist_ok=True)
    elif stage.run in _OF_ONE_PROCESS:
        folder.await_stage(stage.name)
        return
    artefact = STAGES[stage.run](cfg, stage, folder)
    if first_process():
        folder.mark_done(stage.name, {"run": stage.run, "artefact": artefact})
    else:
        folder.await_stage(stage.name)  # the next stage reads what this one left


def _stage_config(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> tuple[DictConfig, DictConfig]:
    """The configuration of one stage and the stage itself: `override` put in, `artefact:<stage>` replaced by the path of what that stage
    left, `contents:<stage>` by what stands in it."""
    cfg = _overridden(cfg, stage)

    def left(promise: str, name: str) -> str:
        done = folder.stage_done(name)
        if done is None:
            raise SuiteError(f"stages.{stage.name} asks for {promise}, but no earlier stage has that name")
        return done["artefact"]

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: filled(v) for k, v in node.items()}
        if isinstance(node, list):
            return [filled(v) for v in node]
        if isinstance(node, str) and node.startswith("artefact:"):
            return left(node, node.removeprefix("artefact:"))
        if isinstance(node, str) and node.startswith("contents:"):
            return _contents(Path(left(node, node.removeprefix("contents:"))), f"stages.{stage.name} asks for {node}")
        return node

    cfg.run_folder = str(folder.path if stage.name in ("fit", "test") else folder.path / stage.name)
    cfg.maps = cfg.maps or str(folder.path / "maps")
    if stage.name != "fit" and "pruner" in (cfg.callbacks or {}):
        cfg.callbacks.pop("pruner")  # it judges the curve of the objective, which is that of the stage called fit
    cfg.pop("stages")
    values = OmegaConf.to_container(cfg, resolve=True)
    values.pop("rounds", None)  # stages by name, to which `stages` may refer
    return OmegaConf.create(filled(values)), OmegaConf.create(filled(OmegaConf.to_container(stage)))


def _contents(path: Path, asked: str) -> Any:
    """The plain data in the JSON file that a stage left."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SuiteError(
            f"{asked}, but {path} cannot be read as JSON ({error}); only what a stage leaves as a JSON file can be asked for so"
        ) from None


def _overridden(cfg: DictConfig, stage: DictConfig) -> DictConfig:
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    _override(cfg, OmegaConf.to_container(stage.get("override") or OmegaConf.create(), resolve=False))
    return cfg


def _override(cfg: DictConfig, changes: dict[str, Any], prefix: str = "") -> None:
    """Merges `changes` into `cfg`; a mapping that names a `_target_` replaces what was there, since another class has other arguments."""
    for key, value in changes.items():
        if isinstance(value, dict) and "_target_" not in value and OmegaConf.select(cfg, f"{prefix}{key}") is not None:
            _override(cfg, value, f"{prefix}{key}.")
        else:
            OmegaConf.update(cfg, f"{prefix}{key}", value, merge=False)


def _fit_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> str:
    from callbacks.stopping import stopped_between_batches
    from lesionbench.checkpoint import initialize_from, read_checkpoint, read_weights

    run = Assembled(cfg)
    run.method.check(run.data)
    run.method.check_schedules(run.steps)
    check_monitored(cfg, run.method)
    run.check_callbacks()
    if cfg.init_from:
        read_weights(cfg.init_from)  # one that cannot be read is refused before hours of caching
    say_memory(cfg, run.method, run.data, run.trainer.strategy.root_device)
    _prepare(run, stage, folder)
    names = waiting(cfg, stage.name)
    if names:
        run.data.setup("fit")
        if not run.data.parts["val"]:
            raise SuiteError(f"{' and '.join(names)} wait(s) for a validation, and data.split leaves no case to validate on")
    last = Path(cfg.run_folder) / "checkpoints" / "last.ckpt"
    resumed = str(last) if cfg.resume and last.exists() else None
    if resumed:
        say(f"continuing {cfg.run_folder} after iteration {read_checkpoint(resumed)['lesionbench']['iteration']}")
    else:
        if cfg.init_from:
            say(initialize_from(run.method, cfg.init_from, cfg.init_prefix))
        for logger in run.trainer.loggers:
            if hasattr(logger, "wind_back"):
                logger.wind_back(0)  # a process that came to no checkpoint may have logged
    trains = any(p.requires_grad for p in run.method.parameters())
    if not trains:
        raise SuiteError(f"{type(run.method).__name__} has nothing to train; give its experiment `stages: [{{name: test, run: test}}]`")
    for logger in run.trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    try:
        with stopped_between_batches(run.trainer):
            run.trainer.fit(run.method, datamodule=run.data, ckpt_path=resumed, weights_only=True)
    except Exception as error:
        if any(getattr(callback, "pruned", False) for callback in run.trainer.callbacks):
            raise Pruned("given up by the search") from error  # forked processes turn every error into one of theirs
        raise
    best = Path(cfg.run_folder) / "checkpoints" / "best.ckpt"
    return str(best if cfg.select == "best" and best.exists() else last)


def _test_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> str:
    from lesionbench.checkpoint import read_checkpoint

    run = Assembled(cfg)
    trains = any(p.requires_grad for p in run.method.parameters())
    checkpoint = stage.get("checkpoint") or cfg.ckpt or (folder.last_fitted() if trains else None)
    if checkpoint:
        read_checkpoint(checkpoint)  # before hours of caching
    run.configure_inference(cfg)
    last = Path(cfg.run_folder) / "checkpoints" / "last.ckpt"
    if folder.continued and last.exists():
        run.rewind.tested_after = last
    run.check_callbacks()
    _prepare(run, stage, folder)
    if checkpoint:
        run.load(checkpoint)
    elif trains:
        raise SuiteError(
            f"{type(run.method).__name__} is not trained: give ckpt=<run folder>/checkpoints/best.ckpt, or a stage that fits it first"
        )
    run.trainer.test(run.method, datamodule=run.data, verbose=False)
    return str(Path(cfg.run_folder) / "test" / "cases.csv")


def _call_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> str:
    """A stage that is a function: called with (cfg, folder of the stage), returns the path of its artefact."""
    from hydra.utils import get_method

    return str(get_method(stage.function)(cfg, Path(cfg.run_folder)))


def _maps_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> str:
    """A stage that writes what a checkpoint says about the training cases to the map store."""
    return write_maps(cfg, stage)


STAGES: dict[str, Callable[[DictConfig, DictConfig, RunFolder], str]] = {
    "fit": _fit_stage,
    "test": _test_stage,
    "call": _call_stage,
    "maps": _maps_stage,
}
_OF_ONE_PROCESS = ("call", "maps")


def _finish(cfg: DictConfig, folder: RunFolder) -> None:
    """Writes the summary and prints what was done, how good it is, where it is and what to do next."""
    from lesionbench.reports.report import print_run

    def found(name: str) -> dict[str, Any]:
        path = folder.path / name
        return json.loads(path.read_text()) if path.exists() else {}

    dataset = found("test/dataset.json")
    folder.update_summary(
        status="finished",
        finished=time.time(),
        objective=_objective(cfg, folder.path),
        test=found("test/summary.json"),
        cost=found("cost.json"),
        **({"dataset": dataset} if dataset else {}),
    )
    print_run(folder.path)


def _objective(cfg: DictConfig, path: Path) -> float | None:
    """The best value of the validation curve that the experiment optimizes; a test score never is a sweep's objective."""
    from lesionbench.reports.report import curve

    values = [v for _, v in curve(path, cfg.objective.name) if math.isfinite(v)]
    return None if not values else max(values) if cfg.objective.mode == "max" else min(values)


def test(cfg: DictConfig) -> float | None:
    """Tests `ckpt` (or, without one, the method as configured) on the test part of the data; results go to a run folder of its own.

    Several checkpoints are tested as one ensemble, whose run is named for its fusion.
    """
    if is_ensemble(cfg.ckpt):
        model = ensemble_model(cfg)
        with open_dict(cfg):
            cfg.model, cfg.ckpt = model, None
            cfg.experiment_name = f"{cfg.experiment_name}-{cfg.ensemble.fusion}"
    with open_dict(cfg):
        cfg.stages = [{"name": "test", "run": "test", "checkpoint": cfg.ckpt}]
        cfg.objective.name = None
    return fit(cfg)
