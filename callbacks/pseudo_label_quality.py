"""How good the pseudo labels of unlabeled cases are: the one place where their true labels are looked at, by case id."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from callbacks.case_callback import summed
from callbacks.gather import gather
from lesionbench.ranges import Count
from lesionbench.task import IGNORE


class PseudoLabelQuality(pl.Callback):
    """Appends to `<folder>/pseudo_labels.csv` what the labels given to unlabeled cases are worth, cases with a true label pooled.

    With `map`, the stored map is judged whenever there is a new version of it; without, the method's own prediction of the whole cases
    at the end of every `every` epochs. The method sees no label: cases come from `unlabeled_loader`, labels from the cache.

    Columns: epoch, iteration, version (of the map), region, where (`all`; with `mask` also `inside` and `outside` of it), cases,
    voxels (that were given a label; a stored label may leave out what is not sure), share (of all voxels of known truth), error (share of voxels with a wrong answer about the region), ppv = tp / (tp + fp),
    tpr = tp / (tp + fn), csi = tp / (tp + fp + fn); empty where the denominator is 0 (Shi et al., IEEE TMI 2022, Figs. 3-5).

    Args:
        folder: run folder.
        map: name of a stored map of class indices (X, Y, Z), or None.
        mask: name of a stored map, nonzero = inside; one for all regions, or a channel for each. Only with `map`.
        every: epochs.
    """

    HEADER = ("epoch", "iteration", "version", "region", "where", "cases", "voxels", "share", "error", "ppv", "tpr", "csi")

    def __init__(self, folder: str, map: str | None = None, mask: str | None = None, every: Count = 1) -> None:
        self.path, self.map, self.mask, self.every = Path(folder) / "pseudo_labels.csv", map, mask, every
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen = state_dict["seen"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.map is not None:
            self._judge_stored(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.map is None and (trainer.current_epoch + 1) % self.every == 0:
            data, counts = trainer.datamodule, {}
            modes = [(part, part.training) for part in pl_module.modules()]
            state = torch.get_rng_state()
            pl_module.eval()
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for batch in data.unlabeled_loader():
                    batch = data.transfer_batch_to_device(batch, pl_module.device, 0)
                    if not batch["again"][0]:
                        labels = pl_module.predict_case(batch).labels.cpu().numpy()
                        self._count(counts, data, batch["case"][0], labels, None)
            torch.set_rng_state(state)
            for part, mode in modes:
                part.training = mode
            self._write(trainer, pl_module, counts, version=0)

    def _judge_stored(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, counts = trainer.datamodule, {}
        version = data.maps.version(self.map)
        if version == self._seen:
            return
        self._seen = version
        mine = data.parts["unlabeled"][trainer.global_rank :: trainer.world_size]
        for case in mine:
            if data.maps.has(self.map, case.id):
                labels = data.maps.read(self.map, case.id)
                mask = None if self.mask is None else data.maps.read(self.mask, case.id)
                mask = None if mask is None else mask.reshape(-1, *mask.shape[-3:]) != 0
                self._count(counts, data, case.id, labels.reshape(labels.shape[-3:]), mask)
        self._write(trainer, pl_module, counts, version)

    def _count(self, counts: dict, data: Any, case_id: str, labels: np.ndarray, mask: np.ndarray | None) -> None:
        """Adds tp, fp, fn, voxels, 1 for the case and its voxels of known truth, under (region, where); mask (1 or R, X, Y, Z)."""
        case = next(c for c in data.parts["unlabeled"] if c.id == case_id)
        if case.label is None:
            return
        truth = data.store.open(case).label()
        known = truth != IGNORE
        given = known & (labels != IGNORE)
        for r, (region, members) in enumerate(zip(data.task.regions, data.task.region_matrix, strict=True)):
            places = {"all": given}
            if mask is not None:
                inside = mask[r if len(mask) > 1 else 0]
                places |= {"inside": given & inside, "outside": given & ~inside}
            said, true = members[np.maximum(labels, 0).astype(int)], members[np.maximum(truth, 0)]
            for where, place in places.items():
                found = [(said & true)[place].sum(), (said & ~true)[place].sum(), (~said & true)[place].sum(), place.sum(), 1, known.sum()]
                counts[region, where] = counts.get((region, where), 0) + np.array(found)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, counts: dict, version: int) -> None:
        ranks = gather(counts)
        if not trainer.is_global_zero:
            return
        total = summed(ranks)
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self.HEADER)
            for (region, where), (tp, fp, fn, voxels, cases, everything) in total.items():
                quotients = [(voxels, everything), (fp + fn, voxels), (tp, tp + fp), (tp, tp + fn), (tp, tp + fp + fn)]
                shares = [a / b if b else "" for a, b in quotients]
                writer.writerow([trainer.current_epoch, pl_module.iteration, version, region, where, cases, voxels, *shares])
