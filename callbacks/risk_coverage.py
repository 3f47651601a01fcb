"""What is left of the errors when the most uncertain voxels are left out: risk against coverage over the test cases."""

import csv
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch

from callbacks.case_callback import CaseCallback
from callbacks.overlays import save
from lesionbench.batch import Batch
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.score_counts import ScoreCounts
from lesionbench.task import IGNORE

LEFT_OUT = np.append(0, np.geomspace(1e-4, 0.5, 38))  # shares of the voxels
MOST = 2**14  # distinct values kept of a map


class RiskCoverage(CaseCallback):
    """Writes `<folder>/test/risk_coverage.csv` and `<folder>/figures/risk_coverage.png`: for every uncertainty map, how often the voxels that are
    not left out are wrong, when a share of the voxels is left out, the most uncertain first.

    A voxel is wrong where the predicted class is not the true one; all test cases are one set, ignored voxels count nowhere. Predictions
    with region probabilities have one map more, `region_entropy`: the entropy of each region's own, mean over regions. Columns: member, map,
    left_out, risk, and best, the risk if errors went first.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        for member, part in result.prediction.flat() if result.truth is not None else ():
            if part.labels is None:
                continue
            truth, labels = result.truth.cpu().numpy(), part.labels.cpu().numpy()
            counted = truth != IGNORE
            wrong = (labels != truth)[counted]
            for name, values in uncertainty_maps(part).items():
                counts = ScoreCounts.of(values.float().cpu().numpy()[counted], wrong)
                known = self.collected.get((member, name))
                self.collected[member, name] = (counts if known is None else known + counts).limited(MOST)

    def write(self, ranks: Sequence[Mapping[tuple[str, str], ScoreCounts]], method: Any) -> None:
        keys = dict.fromkeys(key for rank in ranks for key in rank)
        curves = {key: reduce(add, (rank[key] for rank in ranks if key in rank)) for key in keys}
        if not curves:
            return
        path = self.folder / "test" / "risk_coverage.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["member", "map", "left_out", "risk", "best"])
            for key, counts in curves.items():
                errors = counts.positive / (counts.positives + counts.negatives).sum()
                best = np.maximum(errors - LEFT_OUT, 0) / (1 - LEFT_OUT)
                for share, risk, least in zip(LEFT_OUT, counts.risk(1 - LEFT_OUT), best, strict=True):
                    writer.writerow([*key, f"{share:.4g}", f"{risk:.4g}", f"{least:.4g}"])
        self._draw(curves)

    def _draw(self, curves: Mapping[tuple[str, str], ScoreCounts]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.add_subplot()
        for (member, name), counts in curves.items():
            axis.plot(LEFT_OUT[1:], counts.risk(1 - LEFT_OUT[1:]), lw=1.2, label=f"{member} {name}".strip())
        axis.set(xscale="log", xlabel="share of voxels left out, most uncertain first", ylabel="share of wrong voxels among the others")
        axis.set_ylim(0)
        axis.legend(fontsize=8)
        save(figure, self.folder / "figures" / "risk_coverage.png")


def uncertainty_maps(part: Prediction) -> dict[str, torch.Tensor]:
    """The uncertainty maps of a prediction, with `region_entropy` where it has region probabilities."""
    maps = dict(part.uncertainty)
    if part.regions is not None:
        maps["region_entropy"] = part.region_entropy().mean(dim=0)
    return maps
