"""Whole cases for validation, test and prediction, each exactly once over all processes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datamodules.cache import CaseCache
from datamodules.preprocessing import Preprocessing, foreground, normalize_patch, outside
from datamodules.samples import with_inputs
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from lesionbench.maps import MapStore
from lesionbench.task import Task


class WholeCases(Dataset):
    """Whole cases for validation, test and prediction, on the network grid, with the label also on its native grid."""

    def __init__(
        self,
        cases: Sequence[Case],
        cache: CaseCache,
        task: Task,
        preprocessing: Preprocessing,
        *,
        statistics: dict | None = None,
        maps: Mapping[str, str] | None = None,
        store: MapStore | None = None,
    ) -> None:
        self.cases, self.cache, self.task, self.preprocessing, self.statistics = list(cases), cache, task, preprocessing, statistics
        self.maps, self.store = dict(maps or {}), store

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, where: tuple[int, bool]) -> dict[str, Any]:
        """Item (index, whether the case has been dealt to another process already)."""
        index, again = where
        case = self.cases[index]
        cached = self.cache.open(case)
        raw = cached.read(None)
        item = {
            "image": torch.from_numpy(normalize_patch(raw, cached.stats, self.preprocessing, self.statistics)),
            "outside": torch.from_numpy(outside(cached.stats, self.preprocessing, self.statistics)),
            "brain_mask": torch.from_numpy(foreground(raw, self.preprocessing.background))[None],
            "channel_mask": torch.as_tensor(np.asarray(cached.channel_mask, dtype=bool)),
            "case": case.id,
            "patient": case.patient,
            "site": case.site,
            "attributes": case.attributes,
            "geometry": cached.geometry,
            "again": again,
        }
        if case.label is not None:
            item["label"] = torch.from_numpy(np.array(cached.label(None)))[None]
            item["native_label"] = torch.from_numpy(self._native(case, case.label))
        if case.raters:
            item["native_raters"] = torch.from_numpy(np.stack([self._native(case, path) for path in case.raters]))
            item["raters"] = torch.from_numpy(np.array(cached.raters(None)))
        for name in self.maps:
            if self.store is not None and self.store.has(name, case.id):
                array = np.array(self.store.read(name, case.id))
                item[name] = torch.from_numpy(array if array.ndim == 4 else array[None])
        return with_inputs(item, self.task, case.id)

    def _native(self, case: Case, path: Path) -> np.ndarray:
        values, _, _ = read_volume(path)
        try:
            return self.task.from_disk(values)
        except SuiteError as error:
            raise SuiteError(f"case {case.id}, {path}: {error}") from None


class WholeCaseSampler(Sampler):
    """Every case once. Under DDP each rank gets the same number of items: a rank short of cases gets one again, marked so that it
    is computed (all ranks must take part in collective calls) but never counted."""

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        self.items = [(i % length, i >= length) for i in range(rank, -(-length // world) * world, world)] if length else []

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        return iter(self.items)
