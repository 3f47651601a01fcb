"""A stage of kind `maps`: what a trained method says about the training cases, written to the map store for the rounds behind it."""

from typing import Any

from omegaconf import DictConfig

from lesionbench.errors import SuiteError

KEYS = ("name", "run", "map", "checkpoint", "out_of_fold", "override")


def check_stage(stage: DictConfig) -> None:
    """Refuses a stage that lacks something, before any stage is run.

    Raises:
        SuiteError: names the stage and the key.
    """
    for key in ("map", "checkpoint"):
        if not stage.get(key):
            raise SuiteError(
                f"stages.{stage.name}: a stage that writes maps needs {key}: {{run: maps, map: <name>, checkpoint: artefact:<stage>}}"
            )
    for key in stage:
        if key not in KEYS:
            raise SuiteError(f"stages.{stage.name}.{key}: a stage that writes maps has {', '.join(KEYS)}")


def write_maps(cfg: DictConfig, stage: DictConfig) -> str:
    """Writes the map `stage.map` of every training and validation case: region probabilities (R, x, y, z), float16, on the network grid.

    `stage.checkpoint` is asked, also about the cases that it was trained on. With `stage.out_of_fold`, a list of checkpoints trained with
    `data.split.inner_folds`, every case is answered by the mean of those that were neither trained nor selected on its patient, and by
    `stage.checkpoint` only where there is none, as for validation cases. They are asked with the precision of the trainer, as they are in
    tests and predictions, each about the case as normalized by the statistics that it was trained with.

    Returns:
        The folder of the map, in the map store.

    Raises:
        SuiteError: checkpoints that were trained with other channels, regions or preprocessing, or that draw different regions; out of
            fold, training cases that all of the checkpoints know.
    """
    import torch

    from lesionbench.checkpoint import load_method
    from lesionbench.jobs.assembled import Assembled
    from lesionbench.progress import tracked
    from lightning_modules.cascade import drawn, said

    paths = [stage.checkpoint, *(stage.get("out_of_fold") or [])]
    loaded = [load_method(path, cfg.trust) for path in paths]
    run = Assembled(cfg)
    for path, (method, own) in zip(paths, loaded, strict=True):
        _check_origin(path, method, own, run.data)
        if drawn(method) != drawn(loaded[0][0]):
            raise SuiteError(f"{path}: draws {drawn(method)}, {paths[0]} draws {drawn(loaded[0][0])}; give checkpoints of one round")
    run.prepare()
    run.data.setup("fit")
    device = run.trainer.strategy.root_device
    methods = [(method.to(device), frozenset(own.get("patients") or ())) for method, own in loaded]
    views = [own.get("statistics") or run.data.statistics for _, own in loaded]  # for most kinds of normalization there are none
    differing = [view for place, view in enumerate(views) if view not in views[:place]]
    cases = [case for part in ("train", "unlabeled", "val") for case in run.data.parts[part]]
    cases = list({case.id: case for case in cases}.values())
    if len(methods) > 1:
        known = sorted({c.patient for c in run.data.parts["train"] if all(c.patient in patients for _, patients in methods[1:])})
        if known:
            raise SuiteError(
                f"stages.{stage.name}.out_of_fold: all of these checkpoints were trained or selected on {len(known)} of the training patients "
                f"({', '.join(known[:5])}); train them with data.split.inner_folds and a fold each"
            )
    loaders = zip(*(run.data.case_loader(cases, statistics) for statistics in differing), strict=True)
    for dealt in tracked(loaders, len(cases), f"maps  {stage.map}"):
        batches = [run.data.transfer_batch_to_device(batch, device, 0) for batch in dealt]
        case, patient = batches[0]["case"][0], batches[0]["patient"][0]
        asked = [place for place, (_, patients) in enumerate(methods) if place and patient not in patients] or [0]
        with torch.no_grad(), run.trainer.precision_plugin.predict_step_context():
            answers = [said(methods[place][0], batches[differing.index(views[place])])[0].float() for place in asked]
        run.data.maps.write(stage.map, case, torch.stack(answers).mean(dim=0).half().cpu().numpy())
    run.data.maps.commit(stage.map)
    return str(run.data.maps.folder / stage.map)


def _check_origin(path: str, method: Any, own: dict[str, Any], data: Any) -> None:
    """Refuses a checkpoint that was trained on data prepared in another way."""
    task, preprocessing = data.task, data.preprocessing
    same = (method.task.channels, method.task.inputs) == (task.channels, task.inputs)
    if not same or (own.get("preprocessing") and type(preprocessing).from_dict(own["preprocessing"]) != preprocessing):
        raise SuiteError(f"{path}: was trained with other channels or another preprocessing than this experiment's data has")
