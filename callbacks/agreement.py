"""A picture of where raters agree, and of where a method says that they do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.case_callback import CaseCallback
from callbacks.figures import drawn_channel
from callbacks.overlays import BandView, band_figure, save
from lesionbench.batch import Batch
from lesionbench.prediction import CaseResult
from lesionbench.raters import agreement
from lesionbench.task import IGNORE, Task


class AgreementFigure(CaseCallback):
    """Writes `<folder>/figures/agreement.png` after testing: the best, the median and the worst case by Q-Dice of the first region.

    Each row is one case, in the slice (along the task's slice axis) where the raters marked most: the image, the share of raters who
    marked a pixel as bands, and the predicted share, rounded to a number of raters. Without raters, or without Q-Dice among
    `metrics.names`, nothing is drawn.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "figures" / "agreement.png"

    def empty(self, method: Any) -> list[BandView]:
        return []

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        scores = [row["q_dice"] for row in result.rows if row["member"] == "" and "q_dice" in row]
        if scores and result.prediction.regions is not None:
            raters = batch["native_raters" if result.native else "raters"][0]
            self.collected.append(band_view(result, raters, method.task, float(scores[0])))

    def write(self, ranks: Sequence[Sequence[BandView]], method: Any) -> None:
        views = sorted((v for rank in ranks for v in rank), key=lambda v: (-v.score, v.case))
        if not views:
            return
        chosen = {name: views[place] for name, place in (("best", 0), ("median", (len(views) - 1) // 2), ("worst", len(views) - 1))}
        save(band_figure(chosen, method.task.raters), self.path)


def band_view(result: CaseResult, raters: torch.Tensor, task: Task, score: float) -> BandView:
    """The slice of a case where its raters, class indices (R, X, Y, Z) on the grid of the prediction, marked most of the first region."""
    geometry = result.geometry
    to_canonical = geometry.to_canonical if result.native else lambda array: array
    found = (result.image_on_grid()[drawn_channel(task)], agreement(raters, task)[0], result.prediction.regions[0])
    image, drawn, predicted = (to_canonical(m.float().cpu().numpy()) for m in found)
    axis = task.slice_axis
    index = int(drawn.sum(axis=tuple(a for a in range(3) if a != axis)).argmax())
    spacing = geometry.spacing if result.native else geometry.network_spacing
    u, v = (s for a, s in enumerate(spacing) if a != axis)
    present = int((raters != IGNORE).flatten(1).any(dim=1).sum())
    return BandView(result.case, score, present, (u, v), *(m.take(index, axis) for m in (image, drawn, predicted)))
