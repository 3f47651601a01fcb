"""job=predict: a checkpoint, several as an ensemble, or a method without training, applied to images."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lesionbench import dicom_segmentation
from lesionbench.errors import SuiteError
from lesionbench.jobs.assembled import Assembled, quiet
from lesionbench.jobs.console import say
from lesionbench.jobs.ensemble import ensemble_model
from lesionbench.jobs.ensemble_members import is_ensemble
from lesionbench.stopping import Stopped


def predict(cfg: DictConfig) -> None:
    """Applies `ckpt` (or an experiment's method, if it has nothing to train) to the images under `input`, or to every case of the data
    set, and writes masks to `out`. Several checkpoints are applied as one ensemble."""
    from callbacks import progress_bar

    quiet()
    source = _from_ensemble if is_ensemble(cfg.ckpt) else _from_checkpoint if cfg.ckpt else _from_experiment
    method, data = source(cfg)
    with open_dict(cfg):
        cfg.run_folder = str(Path(cfg.out or "predictions").absolute())
        cfg.logger = {}
        cfg.callbacks = {"writer": {**cfg.writer, "overwrite": cfg.overwrite}}
    run = Assembled(cfg, method=method, data=data, callbacks=[progress_bar()])
    run.configure_inference(cfg)
    if cfg.input:
        say(_found(data, segmentations=cfg.writer.dicom is not False))
    for callback in run.trainer.callbacks:
        if hasattr(callback, "refuse_existing"):
            callback.refuse_existing(run.method, run.data)
    wanted = len(data.predict_ids())
    left_out = data.leave_out_unusable() if cfg.on_error == "skip" else {}
    run.prepare()
    try:
        run.trainer.predict(run.method, datamodule=run.data, return_predictions=False)
    except Stopped as stopped:
        stopped.left = (
            f"what is written stays in {cfg.run_folder}/predictions; the same command with overwrite=true predicts all cases again"
        )
        raise
    say(f"{len(data.predict_ids())} case(s) written to {cfg.run_folder}/predictions")
    if left_out:
        reasons = "\n".join(f"  {name}: {why}" for name, why in left_out.items())
        raise SuiteError(f"{len(left_out)} of {wanted} case(s) were left out (on_error=skip):\n{reasons}")


def _found(data: Any, segmentations: bool) -> str:
    """What of the files under `input` will be predicted, what of them is not used, and which series get no DICOM segmentation."""
    lines = [
        f"{len(data.predict_cases)} case(s) found under {data.root}: {', '.join(data.predict_ids()[:5])}{', ...' if len(data.predict_cases) > 5 else ''}"
    ]
    if data.unused:
        names = ", ".join(str(path.relative_to(data.root)) for path in data.unused[:5])
        lines.append(f"not used, {len(data.unused)} file(s): {names}{', ...' if len(data.unused) > 5 else ''}")
    if segmentations and data.series and not dicom_segmentation.can_write():
        lines.append(f"masks of the series are written as NIfTI alone; for DICOM segmentations too: {dicom_segmentation.how_to_install()}")
    elif segmentations:
        for case in data.series:
            missing = dicom_segmentation.lacking(data.series_of(case.id))
            if missing:
                lines.append(f"{case.id}: no DICOM segmentation, since files of its series have no {', no '.join(missing)}")
    return "\n".join(lines)


def _from_checkpoint(cfg: DictConfig) -> tuple[Any, Any]:
    """The method of a checkpoint, and data preprocessed just as its training did."""
    from datamodules.preprocessing import Preprocessing
    from lesionbench.checkpoint import load_method

    method, own = load_method(cfg.ckpt, cfg.trust)
    preprocessing = Preprocessing.from_dict(own["preprocessing"])
    return method, _prediction_data(cfg, own["task"], preprocessing, own["statistics"])


def _from_ensemble(cfg: DictConfig) -> tuple[Any, Any]:
    """The ensemble of several checkpoints, and data preprocessed as the training of the first did; the others prepare cases themselves."""
    from datamodules.preprocessing import Preprocessing
    from lesionbench.checkpoint import build_method, read_checkpoint
    from lightning_modules.evaluation.ensemble import common_task

    if cfg.ensemble.out_of_fold and cfg.input:
        raise SuiteError("ensemble.out_of_fold=true needs the patients of a data set; images from input=... are not told apart")
    model = ensemble_model(cfg)
    first, *others = [path for c in model["checkpoints"] for path in ([c] if isinstance(c, str) else c)]
    task = common_task([first, *others], cfg.trust)
    method = build_method(model, task)
    own = read_checkpoint(first)["lesionbench"]
    preprocessing = Preprocessing.from_dict(own["preprocessing"])
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
        raise SuiteError("job=predict needs ckpt=<run folder>/checkpoints/best.ckpt (and input=<folder of images>)")
    return method, _prediction_data(cfg, data.task.to_dict(), data.preprocessing, None)


def _prediction_data(cfg: DictConfig, task: dict[str, Any], preprocessing: Any, statistics: Any) -> Any:
    """The images under `input`, or the configured data set."""
    from hydra.utils import instantiate

    from datamodules.images import Images

    if cfg.input:
        check = cfg.data.check if _asked("data.check") else True  # that of the default data set is not about these images
        return Images(
            cfg.input,
            task=task,
            preprocessing=preprocessing,
            statistics=statistics,
            labels=cfg.data.get("labels"),
            check=check,
            incomplete=cfg.on_error == "skip",
        )
    data = instantiate(cfg.data, _convert_="all")
    if data.task.to_dict() != task:
        raise SuiteError(
            f"{cfg.ckpt}: its task {task} is not that of the data set, {data.task.to_dict()}; use input=<folder of NIfTI files>"
        )
    data.preprocessing, data.statistics = preprocessing, statistics
    data.materialize()
    data.predict_cases = data.cases()  # labeled or not, in no part of a split
    return data


def _asked(key: str) -> bool:
    """Whether the user has set a key on the command line."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return any(word.lstrip("+").startswith(f"{key}=") for word in words)
