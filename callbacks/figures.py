"""Pictures of the best, the median and the worst test case, and of all scores."""

import math
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from callbacks.case_callback import CaseCallback
from callbacks.gather import gather
from callbacks.overlays import View, case_figure, masks_of, montage, save, score_figure, slices
from callbacks.wandb_run import WandbRun
from lesionbench.batch import Batch
from lesionbench.errors import unknown
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.task import Task

__all__ = ["OverlayFigures", "montage"]


class OverlayFigures(CaseCallback):
    """Writes `<folder>/figures/{best,median,worst,summary}.png` after testing and hands them to every logger that takes images.
    W&B also gets the slices themselves, with truth and prediction as masks that can be switched on and off.

    Cases are ranked by their mean Dice over the regions of the main prediction; without truth the first three are drawn as
    `case_1.png` and so on. Only three slices of each case are kept, on disk, until the ranking is known.

    Args:
        folder: run folder.
        channels: what is drawn; by default the FLAIR channel, else the first.

    Attributes:
        collected: result rows of each case of this rank, in the order in which their slices were put aside.

    Raises:
        SuiteError: a channel that the task does not have.
    """

    def __init__(self, folder: str, channels: list[str] | None = None) -> None:
        self.folder, self.channels = Path(folder) / "figures", channels

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._spill = tempfile.TemporaryDirectory(prefix="lesionbench-figures-")

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        rows = [row for row in result.rows if row["member"] == "" and row["region"]]
        channels = self._channels(method.task)
        views = case_slices(result, method.task, channels)
        absent = not_drawn(result, method.task, views)
        subtitle = "   ".join(f"{row['region']} {_shown(row)}{absent.get(row['region'], '')}" for row in rows if "dice" in row)
        payload = (result.case, subtitle and f"Dice   {subtitle}", views, channels)
        with open(Path(self._spill.name) / str(len(self.collected)), "wb") as file:
            pickle.dump(payload, file)
        self.collected[result.case] = rows

    def finish(self, ranks: Sequence[dict[str, list[dict[str, Any]]]], trainer: pl.Trainer, method: Any) -> None:
        cases = {case: rows for part in ranks for case, rows in part.items()}
        rows = [row for case in sorted(cases) for row in cases[case]]  # the same on any number of ranks
        places = {case: (rank, place) for rank, cases in enumerate(ranks) for place, case in enumerate(cases)}
        chosen = selected(rows, list(cases))
        drawn = {
            name: self._draw(name, places[case][1], method.task) for name, case in chosen.items() if places[case][0] == trainer.global_rank
        }
        if trainer.is_global_zero and _scored(rows):
            save(score_figure(rows, method.task.region_names), self.folder / "summary.png")
        trainer.strategy.barrier("figures")
        self._spill.cleanup()
        sent = {name: drawing for own in gather(drawn) for name, drawing in own.items()}
        if trainer.is_global_zero:
            self._send(trainer, method, [*chosen, *(["summary"] if _scored(rows) else [])])
            for logger in trainer.loggers:
                if isinstance(logger, WandbRun):
                    for name in chosen:
                        logger.log_overlays(f"overlays/{name}", *sent[name], method.task.region_names)

    def _channels(self, task: Task) -> list[str]:
        for name in self.channels or ():
            if name not in task.channels:
                raise unknown("figures.channels", name, task.channels)
        return self.channels or [task.channels[drawn_channel(task)]]

    def _draw(self, name: str, place: int, task: Task) -> tuple[str, list[View]]:
        """Writes one figure; returns the case and its slices."""
        with open(Path(self._spill.name) / str(place), "rb") as file:
            title, subtitle, views, channels = pickle.load(file)
        label = "" if name.startswith("case_") else f" ({name} case)"
        save(case_figure(title + label, subtitle, views, channels, task.region_names, task.unit == "mm"), self.folder / f"{name}.png")
        return title, views

    def _send(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str]) -> None:
        from matplotlib.image import imread

        for logger in trainer.loggers:
            for name in names:
                path = self.folder / f"{name}.png"
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"figures/{name}", imread(path)[..., :3], pl_module.iteration, dataformats="HWC")
                elif hasattr(logger, "log_image"):
                    logger.log_image(key=f"figures/{name}", images=[str(path)])


def drawn_channel(task: Task) -> int:
    """Index of the channel that is drawn unless another is asked for: FLAIR, else the first."""
    return next((i for i, c in enumerate(task.channels) if "flair" in c.lower()), 0)


def case_slices(result: CaseResult, task: Task, channels: list[str]) -> list[Any]:
    """The slices of one case that a figure needs, on canonical axes."""
    geometry = result.geometry
    image = result.image[[task.channels.index(c) for c in channels]].float()
    image = geometry.to_native(image) if result.native else image

    def canonical(maps: torch.Tensor | np.ndarray | None) -> np.ndarray | None:
        """(C, *grid of the prediction) -> (C, X, Y, Z)."""
        if maps is None:
            return None
        maps = maps.cpu().numpy() if isinstance(maps, torch.Tensor) else maps
        return np.stack([geometry.to_canonical(m) for m in maps]) if result.native else maps

    prediction = result.prediction
    spacing = geometry.spacing if result.native else geometry.network_spacing
    truth = None if result.truth is None else masks_of(result.truth.cpu(), task)
    extra = {f"{member} {name}".strip(): values for member, part in prediction.flat() for name, values in part.uncertainty.items()}
    extra |= {} if prediction.scores is None else {"score": prediction.scores}
    maps = {name: canonical(values[None].float())[0] for name, values in extra.items()}
    return slices(canonical(image), canonical(truth), canonical(_regions(prediction, task)), maps, spacing)


def not_drawn(result: CaseResult, task: Task, views: list[View]) -> dict[str, str]:
    """Region -> why it is not outlined in the picture, for those of which the truth, the prediction or both are not to be seen."""
    prediction = result.prediction
    predicted = None if prediction.regions is None else (prediction.regions > 0.5).flatten(1).any(dim=1).tolist()
    if prediction.labels is not None:
        predicted = _present(prediction.labels, task)
    if result.truth is None or predicted is None:
        return {}
    reasons = {(False, False): " (in neither)", (False, True): " (not in the truth)", (True, False): " (not predicted)"}
    found = {}
    for r, (true, own) in enumerate(zip(_present(result.truth, task), predicted, strict=True)):
        if true and own:
            seen = any(masks[r].any() for view in views for masks in (view.truth, view.prediction))
            found[task.region_names[r]] = "" if seen else " (elsewhere)"
        else:
            found[task.region_names[r]] = reasons[true, own]
    return found


def _present(labels: torch.Tensor, task: Task) -> list[bool]:
    """Which regions have a voxel."""
    return task.region_masks(torch.unique(labels)).any(dim=1).tolist()


def _regions(prediction: Prediction, task: Task) -> np.ndarray | None:
    if prediction.labels is not None:
        return masks_of(prediction.labels.cpu(), task)
    return None if prediction.regions is None else (prediction.regions > 0.5).cpu().numpy()


def selected(rows: list[dict[str, Any]], cases: list[str]) -> dict[str, str]:
    """Figure name -> case: the best, median and worst by mean Dice over regions; the first three where no case has a Dice."""
    scores: dict[str, list[float]] = {}
    for row in _scored(rows):
        scores.setdefault(row["case"], []).append(row["dice"])
    ranked = sorted(scores, key=lambda case: (-sum(scores[case]) / len(scores[case]), case))
    if not ranked:
        return {f"case_{i + 1}": case for i, case in enumerate(sorted(cases)[:3])}
    places = {"best": 0, "worst": len(ranked) - 1, "median": (len(ranked) - 1) // 2}
    chosen: dict[int, str] = {}
    for name, place in places.items():
        chosen.setdefault(place, name)
    return {name: ranked[place] for place, name in chosen.items()}


def _scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("dice") is not None and not math.isnan(row["dice"])]


def _shown(row: dict[str, Any]) -> str:
    return "-" if row["dice"] is None or math.isnan(row["dice"]) else f"{row['dice']:.3f}"
