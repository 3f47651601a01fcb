"""Tumor voxels of cases as vectors (N, M): one folder per case, memory-mapped, so that millions of voxels need no memory.

Layout: `<folder>/voxels.json` (what the voxels were made from; written last) and, per case, `<case>/values.npy` (N, M) float32,
`positions.npy` (N, 3) int16 on the network grid, and `case.json`.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import Geometry
from lesionbench.maps import file_name
from lesionbench.task import Task
from lesionbench.written import aside, whole


def tumor_mask(label: torch.Tensor, task: Task, region: str | None = None) -> torch.Tensor:
    """Class indices (X, Y, Z) -> where the tumor is, bool: every foreground class, or one region of the task.

    Raises:
        SuiteError: an unknown region.
    """
    if region is None:
        return label > 0
    if region not in task.region_names:
        raise unknown("region (habitats.region)", region, task.region_names)
    return task.region_masks(label)[task.region_names.index(region)]


@dataclass(frozen=True)
class VoxelRecord:
    """What is known of a stored case; `shape` is that of its network grid."""

    case: str
    patient: str
    site: str
    shape: tuple[int, ...]
    geometry: Geometry
    attributes: dict[str, Any] = field(default_factory=dict)


class VoxelStore:
    """The voxels under `folder`; a case appears whole or not at all."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def origin(self) -> dict[str, Any]:
        """What the voxels were made from: `task`, `preprocessing`, `statistics`, `patients`.

        Raises:
            SuiteError: no finished store.
        """
        try:
            return json.loads((self.folder / "voxels.json").read_text())
        except FileNotFoundError:
            raise SuiteError(f"{self.folder}: no voxels here; the stage that extracts them has not finished") from None

    def begin(self, cases: str) -> None:
        """Keeps what is stored of the cases with this fingerprint (`CaseDataModule.fingerprint`), and drops what is stored of others."""
        mark = self.folder / "cases.json"
        if not mark.exists() or json.loads(mark.read_text()) != cases:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            _write_json(mark, cases)

    def finish(self, origin: Mapping[str, Any]) -> None:
        """Marks the store as complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.folder / "voxels.json", origin)

    def has(self, case: str) -> bool:
        """Whether this case is there."""
        return (self.folder / file_name(case) / "case.json").exists()

    def write(self, record: VoxelRecord, values: np.ndarray, positions: np.ndarray) -> None:
        """Stores a case; one that is there already is replaced."""
        target = self.folder / file_name(record.case)
        temporary = aside(target)
        temporary.mkdir(parents=True)
        np.save(temporary / "values.npy", values.astype(np.float32))
        np.save(temporary / "positions.npy", positions.astype(np.int16))
        _write_json(temporary / "case.json", asdict(record))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)

    def records(self) -> list[VoxelRecord]:
        """The stored cases, by id."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("[!.]*/case.json")]
        records = [VoxelRecord(**{**r, "shape": tuple(r["shape"]), "geometry": Geometry.from_dict(r["geometry"])}) for r in found]
        return sorted(records, key=lambda r: r.case)

    def values(self, case: str) -> np.ndarray:
        """Modalities (N, M) float32 of a case, memory-mapped."""
        return np.load(self.folder / file_name(case) / "values.npy", mmap_mode="r")

    def positions(self, case: str) -> np.ndarray:
        """Grid positions (N, 3) int16 of a case, memory-mapped."""
        return np.load(self.folder / file_name(case) / "positions.npy", mmap_mode="r")


def _write_json(path: Path, data: Any) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data))
