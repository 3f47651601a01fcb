"""The stages of an experiment that are no training: look at the settings, search for theta, fit the habitats, analyze survival. Called by
`run.py`."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from lesionbench.checkpoint import read_checkpoint
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_native
from lesionbench.results import read_rows, write_json, write_rows
from lesionbench.task import Task
from lesionbench.voxels import VoxelStore
from lesionbench.written import whole
from lightning_modules.habitats.bayesopt import EvaluationLog, Search, Theta, run_search
from lightning_modules.habitats.encoder import EncoderSettings
from lightning_modules.habitats.figures import clusters_figure, kaplan_meier_figure, save, search_figure
from lightning_modules.habitats.habitats import Habitats, case_table, native_labels
from lightning_modules.habitats.pipeline import EncoderFits, HabitatModel, HabitatObjective, HabitatSettings, Tumor, calinski_harabasz
from lightning_modules.habitats.survival import MIN_GROUP, Survival, log_rank, survival_time, testable


def settings(cfg: DictConfig, folder: Path) -> Path:
    """Refuses settings that later stages could not use, before any voxel is read; leaves them in `settings.json`.

    Raises:
        SuiteError: see `HabitatSettings`, `EncoderSettings` and `Search`.
    """
    found = settings_of(cfg, slice_axis=2)  # the axis is the task's, which only the data know
    return write_json(folder / "settings.json", {"settings": asdict(found), "search": asdict(search_of(cfg))})


def optimize(cfg: DictConfig, folder: Path) -> Path:
    """Searches for theta on the stored training voxels; leaves `theta.json`, beside it `evaluations.csv` and the fitted encoders.

    Killed after any evaluation it goes on from `evaluations.csv`, with the same result.
    """
    objective, search = _objective(cfg, folder), search_of(cfg)
    loggers = _loggers(cfg)
    best = [float("inf")]

    def watch(number: int, row: Mapping[str, float]) -> None:
        best[0] = min(best[0], row["loss"])
        values = {f"search/{k}": v for k, v in row.items() if v == v} | {"search/best": best[0]}
        for logger in loggers:
            logger.log_metrics(values, step=number)
        print(
            f"evaluation {number}/{search.budget}: quantile {row['quantile']:.2f}, {row['clusters']:.0f} clusters: loss {row['loss']:.4f} "
            f"(stability {row['stability_loss']:.4f}, p {row['p_train']:.4f}), best {best[0]:.4f}"
        )

    log = EvaluationLog(folder / "evaluations.csv")
    theta = run_search(search, objective, log, seed=cfg.seed, watch=watch)
    return write_json(folder / "theta.json", {"quantile": theta.quantile, "clusters": theta.clusters, "loss": min(log.losses)})


def cluster(cfg: DictConfig, folder: Path) -> Path:
    """Fits everything with the theta found and writes `checkpoints/best.ckpt`, the artefact that predicts.

    Beside it, in the folder of the stage: the training patients' habitat maps, `cases.csv`, and `clusters.csv` (stability and
    Calinski-Harabasz index by number of clusters at the quantile found, for the encoder and for the raw modalities).
    """
    found = json.loads(Path(cfg.habitats.theta).read_text())
    theta = Theta(found["quantile"], found["clusters"])
    objective = _objective(cfg, Path(cfg.habitats.theta).parent)
    model, predictions = objective.fit(theta)
    store = VoxelStore(cfg.habitats.voxels)
    rows = []
    for record, tumor, prediction in zip(store.records(), objective.tumors, predictions, strict=True):
        known = {"days": tumor.days, "died": float(tumor.died)} if tumor.days == tumor.days else {}
        who = {"case": record.case, "patient": record.patient, "site": record.site, "member": "", "region": ""}
        rows.append({**who, **case_table(prediction, len(tumor.values), theta.clusters), **known})
        if cfg.habitats.training_maps:
            labels = native_labels(prediction.labels, tumor.positions, record.shape, record.geometry)
            write_native(folder / "predictions" / f"{record.case}.nii.gz", labels.astype(np.uint8), record.geometry)
    write_rows(folder / "cases.csv", rows)
    _write_table(folder / "clusters.csv", by_clusters(objective, theta.quantile, search_of(cfg)))
    return write_checkpoint(folder.parent / "checkpoints" / "best.ckpt", model, cfg, store)


def analyze(cfg: DictConfig, folder: Path) -> Path:
    """Tables and figures: survival of the risk groups in training and held-out patients, the search, the choice of the number of clusters.

    The p of the held-out patients is computed here, once, when nothing can be chosen any more.
    """
    run, rows = folder.parent, []
    groups = {"training": _groups(run / "cluster" / "cases.csv"), "held-out": _groups(run / "test" / "cases.csv")}
    for part, (survival, high) in groups.items():
        rows.append({"patients": part, **survival_row(survival, high)})
        r = rows[-1]
        tested = f"log-rank p {r['p']:.4g}" if r["p"] == r["p"] else f"not tested: a group of fewer than {MIN_GROUP}, or no death"
        print(f"{part} patients: {r['low']} at low and {r['high']} at high risk, {tested}")
    table = _write_table(folder / "survival.csv", rows)
    log = EvaluationLog(run / "optimize" / "evaluations.csv")
    figures = {"kaplan_meier": kaplan_meier_figure(groups), "clusters": clusters_figure(_read_table(run / "cluster" / "clusters.csv"))}
    figures["search"] = search_figure(search_of(cfg), log)
    loggers = _loggers(cfg)
    for name, figure in figures.items():
        _send(f"figures/{name}", save(figure, run / "figures" / f"{name}.png"), loggers)
    return table


def survival_row(survival: Survival, high: np.ndarray) -> dict[str, float]:
    """Group sizes, deaths, p and median survival (days; NaN where half of a group did not die) of patients with known survival."""
    from lifelines import KaplanMeierFitter

    row: dict[str, float] = {"p": log_rank(survival, high) if testable(survival, high) else float("nan")}
    known = survival.known
    days, died, high = survival.days[known], survival.died[known], high[known]
    for name, group in (("low", ~high), ("high", high)):
        median = KaplanMeierFitter().fit(days[group], died[group]).median_survival_time_ if group.any() else float("nan")
        row |= {name: int(group.sum()), f"{name}_deaths": int(died[group].sum()), f"{name}_median": float(median)}
    return row


def by_clusters(objective: HabitatObjective, quantile: float, search: Search) -> list[dict[str, Any]]:
    """Stability 1 - Ls and Calinski-Harabasz index by number of clusters (Table 1 of the paper), for the encoder and the raw modalities."""
    raw = HabitatSettings(**{**vars(objective.settings), "encoder": EncoderSettings(kind="none")})
    own = "raw" if objective.settings.encoder.kind == "none" else objective.settings.encoder.kind
    fits = {own: objective.encoders, "raw": EncoderFits(objective.sample, raw, objective.seed)}
    rows = []
    for name, encoders in fits.items():
        encoder = encoders[quantile]
        kept = encoder.outliers.keep(objective.sample)
        latent = encoder.transform(objective.sample[kept])
        for k in range(search.clusters[0], search.clusters[1] + 1):
            losses = objective.stability(latent, objective.patient[kept], k)
            model = HabitatModel(Theta(quantile, k), objective.settings, encoder, objective.seed)
            quality = calinski_harabasz(latent, model.fit_habitats(latent, objective.sample[kept]))
            found = {"stability": float(1 - losses.mean()), "stability_std": float(losses.std()), "calinski_harabasz": quality}
            rows.append({"encoder": name, "clusters": k, **found})
    return rows


def write_checkpoint(path: Path, model: HabitatModel, cfg: DictConfig, store: VoxelStore) -> Path:
    """The fitted habitats as a checkpoint of the suite: `job=predict` and `job=test` take it, on any machine."""
    origin = store.origin
    options = OmegaConf.to_container(cfg.habitats.method, resolve=True)
    method = Habitats(Task.from_dict(origin["task"]), **{k: v for k, v in options.items() if k != "_target_"})
    method.fill(model)
    own = {
        "format": 1, "method": f"{Habitats.__module__}.{Habitats.__qualname__}", "iteration": 0, "model": options, "task": origin["task"],
        "preprocessing": origin["preprocessing"], "statistics": origin["statistics"], "patients": origin["patients"],
    }  # fmt: skip
    with whole(path) as temporary:
        torch.save({"state_dict": dict(method.state_dict()), "lesionbench": own}, temporary)
    return path


def tumors_of(store: VoxelStore, time: str, event: str) -> list[Tumor]:
    """The stored cases with their survival; of a patient with several cases, the first one carries it.

    Says which patients have no survival time or no event: they count for the encoder and the clustering, not for the log-rank test.

    Raises:
        SuiteError: times, but no events in the whole data set.
    """
    records, seen, lacking = store.records(), set(), []
    if any(time in r.attributes for r in records) and not any(event in r.attributes for r in records):
        raise SuiteError(f"cases have '{time}' but no '{event}' (1 died, 0 censored); name the column in habitats.event")
    tumors = []
    for record in records:
        days, died = float("nan"), False
        if record.patient not in seen:
            days, died = survival_time(record.case, record.attributes, time, event)
            lacking += [record.patient] if days != days else []
        seen.add(record.patient)
        tumors.append(Tumor(record.case, store.values(record.case), store.positions(record.case), days, died, record.patient))
    if lacking:
        print(f"{len(lacking)} of {len(seen)} training patients without survival: {', '.join(lacking[:8])}{' ...' if lacking[8:] else ''}")
    return tumors


def search_of(cfg: DictConfig) -> Search:
    """The search that the configuration describes."""
    return Search(**OmegaConf.to_container(cfg.habitats.search, resolve=True))


def settings_of(cfg: DictConfig, slice_axis: int) -> HabitatSettings:
    """The settings that the configuration describes."""
    options = OmegaConf.to_container(cfg.habitats, resolve=True)
    names = HabitatSettings.__dataclass_fields__.keys() - {"encoder", "slice_axis"}
    encoder = {k: options["encoder"][k] for k in EncoderSettings.__dataclass_fields__}
    return HabitatSettings(encoder=EncoderSettings(**encoder), slice_axis=slice_axis, **{k: options[k] for k in names})


def _objective(cfg: DictConfig, folder: Path) -> HabitatObjective:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    store, h = VoxelStore(cfg.habitats.voxels), cfg.habitats
    task, start = Task.from_dict(store.origin["task"]), None
    if h.start:
        weights = read_checkpoint(h.start)["state_dict"]
        start = {k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")}
    tumors = tumors_of(store, h.time, h.event)
    settings = settings_of(cfg, task.slice_axis)
    return HabitatObjective(tumors, settings, cfg.seed, names=task.channels, start=start, folder=folder / "encoders")


def _loggers(cfg: DictConfig) -> list[Any]:
    from hydra.utils import instantiate

    chosen = {"csv": {"_target_": "callbacks.CurvesLogger", "folder": cfg.run_folder}, **(cfg.logger or {})}
    loggers = [instantiate(c, _convert_="all") for c in chosen.values() if c]
    for logger in loggers:
        if hasattr(logger, "wind_back"):
            logger.wind_back(0)  # a search that goes on tells everything again
    return loggers


def _send(name: str, path: Path, loggers: Sequence[Any]) -> None:
    """Hands a picture to the loggers that take some: W&B and TensorBoard."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(path)])
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            from matplotlib.image import imread

            logger.experiment.add_image(name, imread(path)[..., :3], dataformats="HWC")


def _groups(path: Path) -> tuple[Survival, np.ndarray]:
    """Survival and risk group of the cases of a table that have tumor voxels, one case per patient."""
    rows = {row["patient"]: row for row in reversed(read_rows(path)) if row["high_risk"] == row["high_risk"]}
    days = np.array([float(r.get("days", "nan")) for r in rows.values()])
    survival = Survival(days, np.array([bool(r.get("died", 0)) for r in rows.values()]))
    return survival, np.array([bool(r["high_risk"]) for r in rows.values()])


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _read_table(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: v if k == "encoder" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
