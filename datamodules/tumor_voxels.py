"""Tumor voxels of a data set's training cases: extracted once into a `VoxelStore`, then streamed as voxel vectors."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from datamodules.base import CaseDataModule
from datamodules.preprocessing import Preprocessing
from datamodules.samples import KeyedSampler, collate
from datamodules.workers import WorkerLoader
from lesionbench.batch import Batch
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.keyed import numpy_generator
from lesionbench.ranges import Count, Whole
from lesionbench.task import Task
from lesionbench.voxels import VoxelRecord, VoxelStore, tumor_mask


def extract(cfg: DictConfig, folder: Path) -> Path:
    """The stage that stores the tumor voxels of the training cases, one case at a time; cases stored before a kill are kept.

    Test and validation cases are not read. A case whose mask is empty is left out, and named.

    Raises:
        SuiteError: no training case has tumor voxels, a case lacks a modality.
    """
    from hydra.utils import instantiate

    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    store, empty = VoxelStore(folder), []
    store.begin(data.fingerprint())
    for batch in data.case_loader([c for c in data.parts["train"] if not store.has(c.id)]):
        if not _store(store, batch, data.task, cfg.habitats.region):
            empty.append(batch["case"][0])
    if empty:
        print(f"{len(empty)} training case(s) without tumor voxels are left out: {', '.join(empty)}")
    if not store.records():
        raise SuiteError("no training case has tumor voxels; look at habitats.region, and at the masks (labels, or data.labels=<folder>)")
    patients = sorted({c.patient for c in data.parts["train"]})
    origin = {"task": data.task.to_dict(), "preprocessing": data.preprocessing.to_dict(), "statistics": data.statistics}
    store.finish({**origin, "patients": patients, "cases": data.fingerprint()})
    return folder


def _store(store: VoxelStore, batch: Batch, task: Task, region: str | None) -> bool:
    case, missing = batch["case"][0], ~batch["channel_mask"][0]
    if missing.any():
        lost = ", ".join(c for c, m in zip(task.channels, missing.tolist(), strict=True) if m)
        raise SuiteError(f"case {case} lacks the modality {lost}; voxel vectors need every one (leave the case or the modality out)")
    if "label" not in batch:
        raise SuiteError(f"case {case} has no tumor mask: one label, or a mask in data.labels=<folder>, is needed")
    mask = tumor_mask(batch["label"][0, 0], task, region)
    if not mask.any():
        return False
    record = VoxelRecord(case, batch["patient"][0], batch["site"][0], tuple(mask.shape), batch["geometry"][0], dict(batch["attributes"][0]))
    store.write(record, batch["image"][0][:, mask].T.numpy(), mask.nonzero().numpy())
    return True


class TumorVoxels(CaseDataModule):
    """Stored voxels as training batches: `image` (N, M), the vectors of `batch_size` cases with `voxels` each.

    A sample depends on (seed, epoch, position) alone, like those of any data set here, so a run resumes in mid-epoch. Nothing but
    training cases is there.

    Args:
        root: folder of a finished `VoxelStore`.
        voxels: vectors per sample, drawn with replacement from one case.
        batch_size, samples_per_epoch, num_workers, seed: as in `CaseDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        voxels: Count = 256,
        batch_size: Count = 4,
        samples_per_epoch: Count = 400,
        num_workers: Whole = 0,
        seed: Whole = 0,
    ) -> None:
        self.voxel_store = VoxelStore(root)
        origin = self.voxel_store.origin
        self._task, self._patients = Task.from_dict(origin["task"]), origin["patients"]
        super().__init__(
            root, preprocessing=Preprocessing.from_dict(origin["preprocessing"]), view="voxels", voxels=voxels, batch_size=batch_size,
            samples_per_epoch=samples_per_epoch, num_workers=num_workers, seed=seed,
        )  # fmt: skip
        self.statistics = origin["statistics"]

    def default_task(self) -> Task:
        return self._task

    def find_cases(self) -> list[Case]:
        return [Case(r.case, {}, patient=r.patient, site=r.site, attributes=r.attributes) for r in self.voxel_store.records()]

    def prepare_data(self) -> None:
        """Nothing: the stage that made the store has done it."""

    def fingerprint(self) -> str | None:
        """That of the cases from which the voxels were taken; None for a store of 0.1.0, which does not know it."""
        return self.voxel_store.origin.get("cases")

    def setup(self, stage: str | None = None) -> None:
        self.parts = {"train": self.cases(), "val": [], "test": [], "predict": []}

    def stream_loader(self, name: str, spec: Mapping[str, Any]) -> DataLoader:
        samples = VoxelSamples(self.voxel_store, [c.id for c in self.parts["train"]], self.voxels, self.seed)
        sampler = KeyedSampler(self.batches_per_epoch, self.batch_size, *self._rank_world, self._start)
        return WorkerLoader(samples, batch_size=self.batch_size, sampler=sampler, collate_fn=collate, **self._loading)

    def voxel_sample(self, count: int | None, seed: object) -> np.ndarray:
        """At most `count` voxels of every training case (None = all), (N, M)."""
        return np.concatenate(list(self._drawn(count, seed)))

    def _drawn(self, count: int | None, seed: object) -> Iterator[np.ndarray]:
        for case in self.cases():
            values = self.voxel_store.values(case.id)
            rng = numpy_generator("sample", seed, case.id)
            chosen = slice(None) if count is None or len(values) <= count else np.sort(rng.choice(len(values), count, replace=False))
            yield np.asarray(values[chosen])


class VoxelSamples(Dataset):
    """Item (epoch, position): `voxels` vectors of one case; every case comes once before any comes again."""

    def __init__(self, store: VoxelStore, cases: list[str], voxels: int, seed: int) -> None:
        self.store, self.cases, self.voxels, self.seed = store, cases, voxels, seed

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, where: tuple[int, int]) -> dict[str, Any]:
        epoch, position = where
        turn, place = divmod(position, len(self.cases))
        case = self.cases[numpy_generator(self.seed, "order", epoch, turn).permutation(len(self.cases))[place]]
        values = self.store.values(case)
        chosen = numpy_generator(self.seed, "voxels", epoch, position).integers(len(values), size=self.voxels)
        return {"image": torch.from_numpy(values[np.sort(chosen)]), "case": case}
