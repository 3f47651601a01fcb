"""The jobs of run.py: what each does with a composed configuration. Everything they build comes from the configuration's `_target_`s."""

import json
import logging
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lesionbench.committee import best_per_fold, fingerprint, groups_of, is_ensemble
from lesionbench.errors import SuiteError, unknown
from lesionbench.run_folder import RunFolder, variant_hash
from lesionbench.study import Pruned


def run_job(cfg: DictConfig) -> float | None:
    """Runs `cfg.job`; returns the sweep objective where the job has one.

    Raises:
        SuiteError: an unknown job, or whatever the job finds wrong with its input.
    """
    if cfg.job not in JOBS:
        raise unknown("job", cfg.job, JOBS)
    return JOBS[cfg.job](cfg)


# fit: an experiment's stages in its run folder


def fit(cfg: DictConfig) -> float | None:
    """Runs the stages of the experiment (default: fit, test) in a run folder; with resume=true, those not done yet."""
    _check_options(cfg)
    folder = RunFolder.of(cfg, resume=cfg.resume)
    known = {"experiment": cfg.experiment_name, "variant": variant_hash(cfg), "seed": cfg.seed}
    with open_dict(cfg):
        cfg.run_folder = str(folder.path)
    done = folder.summary
    if done.get("status") == "finished":
        _say(f"{folder.path} is finished; nothing to do (resume=true)")
        return done.get("objective")
    if _first_process():
        folder.write_config(cfg)
        folder.update_summary(**{"started": time.time(), **done, **known, "status": "running"})
    try:
        for stage in cfg.stages:
            _run_stage(cfg, stage, folder)
    except BaseException as error:
        if _first_process():
            folder.update_summary(status="pruned" if isinstance(error, Pruned) else "interrupted")
        if type(error).__name__ == "SIGTERMException":  # Lightning's, which would end the process as if all were well
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    if _first_process():
        _finish(cfg, folder)
    return folder.summary.get("objective")


def _check_options(cfg: DictConfig) -> None:
    """What can be said before anything is built."""
    for option in ("seed", "epochs", "accumulate", "data.batch_size", "data.samples_per_epoch"):
        value, least = OmegaConf.select(cfg, option), 0 if option == "seed" else 1
        if value is not None and (not isinstance(value, int) or value < least):
            raise SuiteError(f"{option}={value}: expected a whole number, at least {least}")
    if cfg.select not in ("best", "last"):
        raise unknown("select", cfg.select, ["best", "last"])
    for stage in cfg.stages:
        if stage.run not in STAGES:
            raise unknown(f"stages.{stage.name}.run", stage.run, STAGES)
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


def _run_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> None:
    if folder.stage_done(stage.name) is not None:
        return
    cfg, stage = _stage_config(cfg, stage, folder)
    if stage.run == "call" and not _first_process():
        folder.await_stage(stage.name)
        return
    artefact = STAGES[stage.run](cfg, stage, folder)
    if _first_process():
        folder.mark_done(stage.name, {"run": stage.run, "artefact": artefact})
    else:
        folder.await_stage(stage.name)  # the next stage reads what this one left


def _stage_config(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> tuple[DictConfig, DictConfig]:
    """The configuration of one stage and the stage itself: `override` put in, `artefact:<stage>` replaced by what that stage left."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    _override(cfg, OmegaConf.to_container(stage.get("override") or OmegaConf.create(), resolve=False))

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: filled(v) for k, v in node.items()}
        if isinstance(node, list):
            return [filled(v) for v in node]
        if isinstance(node, str) and node.startswith("artefact:"):
            done = folder.stage_done(node.removeprefix("artefact:"))
            if done is None:
                raise SuiteError(f"stages.{stage.name} asks for {node}, but no earlier stage has that name")
            return done["artefact"]
        return node

    cfg.run_folder = str(folder.path if stage.name in ("fit", "test") else folder.path / stage.name)
    cfg.maps = cfg.maps or str(folder.path / "maps")
    if stage.name != "fit" and "pruner" in (cfg.callbacks or {}):
        cfg.callbacks.pop("pruner")  # it judges the curve of the objective, which is that of the stage called fit
    cfg.pop("stages")
    return OmegaConf.create(filled(OmegaConf.to_container(cfg, resolve=True))), OmegaConf.create(filled(OmegaConf.to_container(stage)))


def _override(cfg: DictConfig, changes: dict[str, Any], prefix: str = "") -> None:
    """Merges `changes` into `cfg`; a mapping that names a `_target_` replaces what was there, since another class has other arguments."""
    for key, value in changes.items():
        if isinstance(value, dict) and "_target_" not in value and OmegaConf.select(cfg, f"{prefix}{key}") is not None:
            _override(cfg, value, f"{prefix}{key}.")
        else:
            OmegaConf.update(cfg, f"{prefix}{key}", value, merge=False)


def _fit_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> str:
    from lesionbench.checkpoint import read_checkpoint

    run = Assembled(cfg)
    run.method.check(run.data)
    if cfg.init_from:
        read_checkpoint(cfg.init_from)  # one that cannot be read is refused before hours of caching
    run.prepare()
    last = Path(cfg.run_folder) / "checkpoints" / "last.ckpt"
    resumed = str(last) if cfg.resume and last.exists() else None
    iteration = -1
    if resumed:
        iteration = read_checkpoint(resumed)["lesionbench"]["iteration"]
        _say(f"continuing {cfg.run_folder} after iteration {iteration}")
    elif cfg.init_from:
        from lesionbench.checkpoint import initialize_from

        _say(initialize_from(run.method, cfg.init_from))
    for logger in run.trainer.loggers:
        if hasattr(logger, "truncate_after"):
            logger.truncate_after(iteration)  # what was logged after the checkpoint will be logged again
    trains = any(p.requires_grad for p in run.method.parameters())
    if not trains:
        raise SuiteError(f"{type(run.method).__name__} has nothing to train; give its experiment `stages: [{{name: test, run: test}}]`")
    for logger in run.trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    try:
        with _stopped_between_batches():
            run.trainer.fit(run.method, datamodule=run.data, ckpt_path=resumed, weights_only=True)
    except Exception as error:
        if any(getattr(callback, "pruned", False) for callback in run.trainer.callbacks):
            raise Pruned("given up by the search") from error  # forked processes turn every error into one of theirs
        raise
    if run.trainer.interrupted:
        raise KeyboardInterrupt
    best = Path(cfg.run_folder) / "checkpoints" / "best.ckpt"
    return str(best if cfg.select == "best" and best.exists() else last)


@contextmanager
def _stopped_between_batches() -> Iterator[None]:
    """Lets the launcher submitit, which queues a job again on SIGUSR2 and ends it at once, wait for the end of the batch and a checkpoint.

    Its handler is put off: the signal is passed on as a SIGTERM, on which Lightning stops between two batches.
    """
    number = getattr(signal, "SIGUSR2", None)  # not on Windows
    queue_again, caught = number and signal.getsignal(number), []
    if not callable(queue_again):
        yield
        return

    def stop(*arguments: Any) -> None:
        caught.append(arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(number, stop)
    try:
        yield
    except BaseException:
        if caught:
            queue_again(*caught[0])  # ends this process, if it is the job's first
        raise
    finally:
        signal.signal(number, queue_again)


def _test_stage(cfg: DictConfig, stage: DictConfig, folder: RunFolder) -> str:
    from lesionbench.checkpoint import read_checkpoint

    run = Assembled(cfg)
    trains = any(p.requires_grad for p in run.method.parameters())
    checkpoint = stage.get("checkpoint") or cfg.ckpt or (folder.last_fitted() if trains else None)
    if checkpoint:
        read_checkpoint(checkpoint)  # before hours of caching
    run.prepare()
    run.dress(cfg)
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

    Path(cfg.run_folder).mkdir(parents=True, exist_ok=True)
    return str(get_method(stage.function)(cfg, Path(cfg.run_folder)))


STAGES: dict[str, Callable[[DictConfig, DictConfig, RunFolder], str]] = {"fit": _fit_stage, "test": _test_stage, "call": _call_stage}


def _finish(cfg: DictConfig, folder: RunFolder) -> None:
    """Writes the summary and prints what was done, how good it is, where it is and what to do next."""
    from lesionbench.report import print_run

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
    from lesionbench.report import curve

    values = [v for _, v in curve(path, cfg.objective.name) if math.isfinite(v)]
    return None if not values else max(values) if cfg.objective.mode == "max" else min(values)


class Assembled:
    """Data module, method and trainer of one stage, built and checked before anything starts."""

    def __init__(self, cfg: DictConfig, method: Any = None, data: Any = None) -> None:
        import pytorch_lightning as pl
        import torch
        from hydra.utils import instantiate

        quiet()
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        pl.seed_everything(cfg.seed, workers=False, verbose=False)
        self.data = instantiate(cfg.data, _convert_="all") if data is None else data
        self.rules = instantiate(cfg.postprocessing, _convert_="all")
        self.rules.check(self.data.task)
        if cfg.maps:
            from lesionbench.maps import MapStore

            self.data.maps = MapStore(Path(cfg.maps))
        if method is None:
            from lesionbench.checkpoint import build_method

            method = build_method(OmegaConf.to_container(cfg.model, resolve=True), self.data.task)
        self.method = method
        if cfg.compile:
            self.method.compile()
        Path(cfg.run_folder).mkdir(parents=True, exist_ok=True)
        self.trainer = self._trainer(cfg)

    def prepare(self) -> None:
        """Generates, checks and caches the data; comes after everything that can be refused without it."""
        if _first_process():
            self.data.prepare_data()

    def _trainer(self, cfg: DictConfig) -> Any:
        from hydra.utils import instantiate

        options = OmegaConf.to_container(cfg.trainer, resolve=True)
        strategy = options.get("strategy")
        if not self.method.automatic_optimization and strategy:  # networks take turns: in each turn the others get no gradient
            if isinstance(strategy, dict):
                strategy["find_unused_parameters"] = True
            elif strategy in ("ddp", "ddp_fork", "ddp_spawn"):
                options["strategy"] = f"{strategy}_find_unused_parameters_true"
        from pytorch_lightning.callbacks import Checkpoint, ProgressBar
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

        callbacks = [instantiate(c, _convert_="all") for c in (cfg.callbacks or {}).values() if c]
        chosen = (
            {} if cfg.job == "predict" else {"csv": {"_target_": "callbacks.CurvesLogger", "folder": cfg.run_folder}, **(cfg.logger or {})}
        )
        loggers = [instantiate(c, _convert_="all") for c in chosen.values() if c]  # metrics.csv is always written: other jobs read it
        try:
            trainer = instantiate({**options, "_partial_": True}, _convert_="all")(
                callbacks=callbacks,
                logger=loggers,
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
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, self.data.batches_per_epoch // trainer.world_size))
        return trainer

    def dress(self, cfg: DictConfig) -> None:
        """Gives the method what only tested and predicted cases get: test-time mirroring and rules on the labels."""
        if cfg.mirror:
            self.method.mirror(list(cfg.mirror))
        if self.rules.active:
            self.method.postprocess(self.rules)

    def load(self, checkpoint: str) -> None:
        """Puts the weights of a checkpoint into the method."""
        from lesionbench.checkpoint import read_checkpoint

        found = read_checkpoint(checkpoint)
        try:
            self.method.load_state_dict(found["state_dict"])
        except RuntimeError as error:
            raise SuiteError(f"{checkpoint}: its weights do not fit this experiment's model: {str(error)[:400]}") from None
        self.method.on_load_checkpoint(found)
        own = found.get("lesionbench") or {}
        if own.get("statistics"):
            self.data.statistics = own["statistics"]
        self._check_origin(checkpoint, own)

    def _check_origin(self, checkpoint: str, own: dict[str, Any]) -> None:
        """Refuses weights that were trained on the cases they would be tested on, or on data prepared in another way."""
        for name, ours in [("task", self.data.task.to_dict()), ("preprocessing", self.data.preprocessing.to_dict())]:
            if own.get(name) not in (None, ours):
                differing = ", ".join(f"{k}: {own[name].get(k)} -> {ours.get(k)}" for k in ours if own[name].get(k) != ours.get(k))
                raise SuiteError(f"{checkpoint}: was trained with another {name} than this experiment's data has ({differing})")
        self.data.setup("test")
        both = sorted({c.patient for c in self.data.parts["test"]} & set(own.get("patients") or []))
        if both:
            raise SuiteError(
                f"{checkpoint}: was trained or selected on {len(both)} of the test patients ({', '.join(both[:5])}); "
                "test it with the data.split it was trained with"
            )


# test and predict: a checkpoint on its own


def test(cfg: DictConfig) -> float | None:
    """Tests `ckpt` (or, without one, the method as configured) on the test part of the data; results go to a run folder of its own.

    Several checkpoints are tested as one ensemble, whose run is named for its fusion.
    """
    if is_ensemble(cfg.ckpt):
        model = _ensemble(cfg)
        with open_dict(cfg):
            cfg.model, cfg.ckpt = model, None
            cfg.experiment_name = f"{cfg.experiment_name}-{cfg.ensemble.fusion}"
    with open_dict(cfg):
        cfg.stages = [{"name": "test", "run": "test", "checkpoint": cfg.ckpt}]
        cfg.objective.name = None
    return fit(cfg)


def _ensemble(cfg: DictConfig) -> dict[str, Any]:
    """The model configuration of the ensemble that `ckpt` names; fills in `ensemble.fingerprints`."""
    options = OmegaConf.to_container(cfg.ensemble, resolve=True)
    policy, score, _ = options.pop("policy"), options.pop("score"), options.pop("fingerprints")
    groups = groups_of(cfg.ckpt if isinstance(cfg.ckpt, str) else OmegaConf.to_container(cfg.ckpt, resolve=True))
    if policy not in ("all", "best_per_fold"):
        raise unknown("ensemble.policy", policy, ["all", "best_per_fold"])
    chosen_on: tuple[str, ...] = ()
    if policy == "best_per_fold":
        if any(len(group) > 1 for group in groups):
            raise SuiteError("ensemble.policy=best_per_fold chooses among single checkpoints; ckpt has groups of several")
        candidates = best_per_fold([path for (path,) in groups], score)
        groups = [[c.path] for c in candidates if c.chosen]
        chosen_on = tuple(sorted({p for c in candidates for p in c.patients}))
        for c in candidates:
            _say(f"{'kept   ' if c.chosen else 'dropped'} {score} score {c.score:.4f}  {c.path}")
    with open_dict(cfg):
        cfg.ensemble.fingerprints = [[fingerprint(path) for path in group] for group in groups]
    checkpoints = [group[0] if len(group) == 1 else group for group in groups]
    model = {"_target_": "lightning_modules.Ensemble", "checkpoints": checkpoints, **options, "chosen_on": list(chosen_on)}
    return {**model, "metrics": OmegaConf.to_container(cfg.metrics, resolve=True), "trust": list(cfg.trust), "seed": cfg.seed}


def predict(cfg: DictConfig) -> None:
    """Applies `ckpt` (or an experiment's method, if it has nothing to train) to the images under `input`, or to every case of the data
    set, and writes NIfTI files to `out`. Several checkpoints are applied as one ensemble."""
    quiet()
    source = _from_ensemble if is_ensemble(cfg.ckpt) else _from_checkpoint if cfg.ckpt else _from_experiment
    method, data = source(cfg)
    with open_dict(cfg):
        cfg.run_folder = str(Path(cfg.out or "predictions").absolute())
        cfg.logger = {}
        cfg.callbacks = {"writer": {**cfg.writer, "overwrite": cfg.overwrite}, "progress": {"_target_": "callbacks.progress_bar"}}
    run = Assembled(cfg, method=method, data=data)
    run.dress(cfg)
    for callback in run.trainer.callbacks:
        if hasattr(callback, "refuse_existing"):
            callback.refuse_existing(run.method, run.data)
    run.prepare()
    run.trainer.predict(run.method, datamodule=run.data, return_predictions=False)
    _say(f"{len(data.predict_ids())} case(s) written to {cfg.run_folder}/predictions")


def _from_checkpoint(cfg: DictConfig) -> tuple[Any, Any]:
    """The method of a checkpoint, and data preprocessed just as its training did."""
    from hydra.utils import get_class

    from lesionbench.checkpoint import load_method

    method, own = load_method(cfg.ckpt, cfg.trust)
    preprocessing = get_class("datamodules.preprocessing.Preprocessing").from_dict(own["preprocessing"])
    return method, _prediction_data(cfg, own["task"], preprocessing, own["statistics"])


def _from_ensemble(cfg: DictConfig) -> tuple[Any, Any]:
    """The ensemble of several checkpoints, and data preprocessed as the training of the first did; the others prepare cases themselves."""
    from hydra.utils import get_class, get_method

    from lesionbench.checkpoint import build_method, read_checkpoint

    if cfg.ensemble.out_of_fold and cfg.input:
        raise SuiteError("ensemble.out_of_fold=true needs the patients of a data set; images from input=... are not told apart")
    model = _ensemble(cfg)
    first, *others = [path for c in model["checkpoints"] for path in ([c] if isinstance(c, str) else c)]
    task = get_method("lightning_modules.ensemble.common_task")([first, *others], cfg.trust)
    method = build_method(model, task)
    own = read_checkpoint(first)["lesionbench"]
    preprocessing = get_class("datamodules.preprocessing.Preprocessing").from_dict(own["preprocessing"])
    return method, _prediction_data(cfg, task.to_dict(), preprocessing, own["statistics"])


def _from_experiment(cfg: DictConfig) -> tuple[Any, Any]:
    """An experiment's method that needs no training, and its data.

    Raises:
        SuiteError: the method has something to train.
    """
    from hydra.utils import instantiate

    from lesionbench.checkpoint import build_method

    data = instantiate(cfg.data, _convert_="all")
    method = build_method(OmegaConf.to_container(cfg.model, resolve=True), data.task)
    if any(p.requires_grad for p in method.parameters()):
        raise SuiteError("job=predict needs ckpt=<run folder>/checkpoints/best.ckpt (and input=<folder of NIfTI files>)")
    return method, _prediction_data(cfg, data.task.to_dict(), data.preprocessing, None)


def _prediction_data(cfg: DictConfig, task: dict[str, Any], preprocessing: Any, statistics: Any) -> Any:
    """The images under `input`, or the configured data set."""
    from hydra.utils import get_class, instantiate

    if cfg.input:
        images = get_class("datamodules.images.Images")
        return images(cfg.input, task=task, preprocessing=preprocessing, statistics=statistics, labels=cfg.data.get("labels"))
    data = instantiate(cfg.data, _convert_="all")
    if data.task.to_dict() != task:
        raise SuiteError(
            f"{cfg.ckpt}: its task {task} is not that of the data set, {data.task.to_dict()}; use input=<folder of NIfTI files>"
        )
    data.preprocessing, data.statistics = preprocessing, statistics
    data.materialize()
    data.predict_cases = data.cases()  # labeled or not, in no part of a split
    return data


# the other jobs


def check(cfg: DictConfig) -> None:
    """Checks every case of the data set and prints all findings at once."""
    from hydra.utils import get_method, instantiate

    render = get_method("datamodules.integrity.render")
    data = instantiate(cfg.data, _convert_="all")
    data.materialize()
    findings = data.findings()
    _say(render(findings) if findings else f"{data.root}: {len(data.cases())} cases, nothing to report")
    if any(f.level == "error" for f in findings):
        raise SuiteError(f"{sum(f.level == 'error' for f in findings)} error(s) in {data.root}; see above")


def prepare(cfg: DictConfig) -> None:
    """Fills the cache ahead of training, after an estimate of its size and a look at the free space."""
    from hydra.utils import instantiate

    data = instantiate(cfg.data, _convert_="all")
    data.materialize()
    cases = data.cases()
    cache = data.store
    data.cache_root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data.cache_root).free
    _say(f"{len(cases)} cases, about {cache.estimate(cases) / 1e9:.2f} GB in {data.cache_root} ({free / 1e9:.0f} GB free)")
    data.prepare_data()
    _say(f"{len(cases)} cases ready")


def simulate(cfg: DictConfig) -> None:
    """Writes simulated cases to `out` in the true layout of a BraTS year (`simulate.layout`)."""
    from hydra.utils import get_class, get_method

    if not cfg.out:
        raise SuiteError("job=simulate needs out=<new folder>")
    options = OmegaConf.to_container(cfg.simulate, resolve=True)
    count, layout = options.pop("count"), options.pop("layout")
    settings = get_class("datamodules.simulation.Simulation")(**options)
    path = get_method("datamodules.simulation.write_brats")(Path(cfg.out), settings, count, str(layout))
    _say(
        f"{count} cases in {path}; train on them with\n  python run.py experiment=supervised/brats2020 data.layout={layout} data.root={path}"
    )


def show(cfg: DictConfig) -> None:
    """Writes montages of cases and of augmented training samples to `out`."""
    from hydra.utils import get_method, instantiate

    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    out = Path(cfg.out or "show")
    montage = get_method("callbacks.figures.montage")
    whole = data.case_loader(data.parts["train"][: cfg.show.cases]).dataset
    items = [whole[(i, False)] for i in range(len(whole))]
    cases = [(i["case"], i["image"], i["label"][0] if "label" in i else None, data.task, i["geometry"].network_spacing) for i in items]
    montage(cases, out / "cases.png")
    if data.view == "patch":
        loader = data.train_dataloader()
        stream = (loader if not hasattr(loader, "flattened") else loader.flattened[0]).dataset
        samples = [stream[(0, position)] for position in range(cfg.show.samples)]
        spacing = items[0]["geometry"].network_spacing
        montage(
            [(s["case"], s["image"], s["label"][0] if "label" in s else None, data.task, spacing) for s in samples], out / "samples.png"
        )
    _say(f"written to {out}")


def tune(cfg: DictConfig) -> None:
    """Chooses the smallest volume of a region on out-of-fold predictions and writes it to `out`, for `postprocessing.thresholds`."""
    from hydra.utils import get_method, instantiate

    options = OmegaConf.to_container(cfg.tune, resolve=True)
    rules = instantiate(cfg.postprocessing, _convert_="all")
    out = Path(cfg.out or "thresholds.json")
    found = get_method("lightning_modules.tuning.tune")(options.pop("runs") or [cfg.runs], rules=rules, **options)
    _say(f"{found.report()}\nwritten to {found.write(out)}; apply it with postprocessing=tuned postprocessing.thresholds={out}")


def compare(cfg: DictConfig) -> None:
    """Compares run folders: table, costs and paired tests."""
    from lesionbench.comparison import compare as compare_runs

    if cfg.report not in (None, "html"):
        raise unknown("report", cfg.report, ["html", "null"])
    options = OmegaConf.to_container(cfg.compare, resolve=True)
    out = Path(cfg.out or "comparison") if cfg.out or cfg.report else None
    result = compare_runs(options.pop("runs") or [cfg.runs], out=out, **options)
    from rich.console import Console

    console = Console()
    console.print(result.table(console.width))
    if cfg.report:
        from lesionbench.html_report import write_html

        _say(f"open {write_html(result, out / 'report.html')}")
    if out:
        _say(f"written to {out}")


def dashboard(cfg: DictConfig) -> None:
    """Makes a comparison workspace of the runs of `compare.runs` on W&B, or with `dashboard.dry_run` writes it to `out`."""
    from lesionbench.dashboard import send, workspace, write

    options = cfg.dashboard
    if options.dry_run and not cfg.out:
        raise SuiteError("dashboard.dry_run=true needs out=<file>.json")
    made = workspace(cfg.compare.runs or [cfg.runs], list(cfg.compare.group_by), options.project, options.entity, options.name)
    _say(f"written to {write(made, Path(cfg.out))}" if options.dry_run else send(made))


JOBS: dict[str, Callable[[DictConfig], float | None]] = {
    "fit": fit, "test": test, "predict": predict, "tune": tune, "compare": compare, "check": check, "prepare": prepare, "simulate": simulate, "show": show, "dashboard": dashboard,
}  # fmt: skip


def quiet() -> None:
    """Silences what is known to be harmless: a deprecation inside Lightning, its tips, and advice on worker counts."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*of metric (PerCaseResults|DatasetMetrics) was called before.*")  # a process without cases
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log.*sync_dist")  # equal on every process already
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")  # no validation part, on purpose
    warnings.filterwarnings("ignore", message=r".*your dataloader is not resumable.*")  # the data module resumes in mid-epoch itself
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)


def _first_process() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0 and int(os.environ.get("LOCAL_RANK", 0)) == 0


def _say(text: str) -> None:
    if _first_process():
        print(text, flush=True)
