"""Where the uncertain region of stored pseudo labels lies, over the labelings of a run: its size, its distance to the boundary, pictures."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from scipy.ndimage import binary_erosion, distance_transform_edt

from callbacks.gather import gather
from lesionbench.ranges import Count


class UncertainRegion(pl.Callback):
    """Appends to `<folder>/uncertain_region.csv` after every labeling of the unlabeled cases; looks at no true label.

    Columns: epoch, iteration, version (of the map), cases, voxels, share (of all voxels that are uncertain), distance and
    mean_distance (median and mean, over the uncertain voxels of all cases that have a boundary, of the distance to its nearest voxel).
    `<folder>/uncertain_region.npz` keeps, of every version and the first `keep` cases, `label_v<version>_<case>` and `uncertain_v<version>_<case>`
    (X, Y, Z).

    Args:
        folder: run folder.
        map: name of the stored class indices.
        mask: name of the stored map of uncertain voxels; several channels count as one region.
        keep: cases.
    """

    HEADER = ("epoch", "iteration", "version", "cases", "voxels", "share", "distance", "mean_distance")

    def __init__(self, folder: str, map: str = "pseudo_label", mask: str = "uncertain", keep: Count = 4) -> None:
        self.folder, self.map, self.mask, self.keep = Path(folder), map, mask, keep
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen = state_dict["seen"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule
        version = data.maps.version(self.map)
        if version == self._seen:
            return
        self._seen = version
        cases = [c for c in data.parts["unlabeled"] if data.maps.has(self.map, c.id)]
        found, size = [], 0
        for case in cases[trainer.global_rank :: trainer.world_size]:
            label, mask = self._read(data, case.id)
            found.append(boundary_distances(label, mask))
            size += mask.size
        ranks = gather((np.concatenate([np.zeros(0), *(f for f, _ in found)]), sum(n for _, n in found), size))
        if not trainer.is_global_zero:
            return
        distances = np.concatenate([d for d, _, _ in ranks])
        uncertain, voxels = sum(n for _, n, _ in ranks), sum(n for _, _, n in ranks)
        middle = [float(np.median(distances)), float(distances.mean())] if len(distances) else ["", ""]
        self._write(
            [trainer.current_epoch, pl_module.iteration, version, len(cases), voxels, uncertain / voxels if voxels else "", *middle]
        )
        if self.keep:
            self._remember(version, [self._read(data, c.id) for c in cases[: self.keep]], [c.id for c in cases[: self.keep]])

    def _read(self, data: Any, case_id: str) -> tuple[np.ndarray, np.ndarray]:
        label, mask = data.maps.read(self.map, case_id), data.maps.read(self.mask, case_id)
        return label.reshape(label.shape[-3:]), mask.reshape(-1, *mask.shape[-3:]).any(axis=0)

    def _write(self, row: list) -> None:
        path = self.folder / "uncertain_region.csv"
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([*([self.HEADER] if new else []), row])

    def _remember(self, version: int, kept: list[tuple[np.ndarray, np.ndarray]], ids: list[str]) -> None:
        path = self.folder / "uncertain_region.npz"
        before = dict(np.load(path)) if path.exists() else {}
        arrays = {
            f"{what}_v{version:04d}_{case}": values.astype(np.uint8)
            for case, pair in zip(ids, kept, strict=True)
            for what, values in zip(("label", "uncertain"), pair, strict=True)
        }
        np.savez_compressed(path, **before, **{name: values for name, values in arrays.items() if name not in before})


def boundary_distances(label: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Distances (in voxels) of the voxels of `mask` to the nearest boundary voxel of any class of `label`, and the number of voxels in
    `mask`; no distances where the label has no boundary. Boundary voxels of a class touch another class along an axis.

    Args:
        label: class indices (X, Y, Z).
        mask: bool (X, Y, Z).
    """
    inner = np.zeros(label.shape, dtype=bool)
    for value in np.unique(label):
        if value:
            inner |= (label == value) & ~binary_erosion(label == value, border_value=1)
    if not inner.any():
        return np.zeros(0), int(mask.sum())
    return distance_transform_edt(~inner)[mask], int(mask.sum())
