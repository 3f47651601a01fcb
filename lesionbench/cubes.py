"""Cases that were carried from brains to cubes, as a data set in the layout of `Folder`, with the map of each.

Layout: `<folder>/images/<case>_<channel>.nii.gz`, `labels/<case>.nii.gz`, `attributes.csv`, `split.json`, `conversion.csv`, per case
`maps/<case>.npz` (written last of a case) and `origin.json` (what the cubes were made from; written last of all).
"""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from lesionbench.maps import file_name
from lesionbench.results import write_json
from lesionbench.task import IGNORE, Task
from lesionbench.written import whole

# places of the vertices (3, n0, n1, n2), (start, stop) of the box along each axis of the volume, shape of the volume, density of the vertices
Map = tuple[np.ndarray, tuple[tuple[int, int], ...], tuple[int, ...], np.ndarray]
CUBE = "cube"  # attribute of a case that is a cube already


class CubeStore:
    """The cubes under `folder`; a case counts once its map is there, so that a kill leaves whole cases."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def origin(self) -> dict[str, Any]:
        """What the cubes were made from: `task`, `preprocessing`, `statistics`, `cases`.

        Raises:
            SuiteError: no finished store.
        """
        try:
            return json.loads((self.folder / "origin.json").read_text())
        except FileNotFoundError:
            raise SuiteError(f"{self.folder}: no cubes here; the stage that makes them has not finished") from None

    @property
    def split(self) -> Path:
        """JSON file of the cases by part, as `Split` reads it."""
        return self.folder / "split.json"

    @property
    def parts(self) -> dict[str, list[str]]:
        """The cases of each part of a finished store."""
        return json.loads(self.split.read_text())

    def begin(self, settings: str) -> None:
        """Keeps what is stored if it was made of these cases with these settings, and drops it otherwise."""
        mark = self.folder / "settings.json"
        if not mark.exists() or json.loads(mark.read_text()) != settings:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(mark, settings)

    def has(self, case: str) -> bool:
        """Whether this case is there."""
        return self._map(case).exists()

    def write(self, case: str, task: Task, image: np.ndarray, label: np.ndarray, warp: Map, row: Mapping[str, float]) -> None:
        """Stores a case.

        Args:
            image: modalities (M, x, y, z) in the cube.
            label: class indices (x, y, z).
            warp: the map.
            row: what the conversion did to the case.
        """
        nodes, box, shape, density = warp
        for channel, values in zip(task.channels, image, strict=True):
            write_volume(self.folder / "images" / f"{file_name(case)}_{channel}.nii.gz", values.astype(np.float32), np.eye(4))
        on_disk = task.to_disk(label)
        if (label == IGNORE).any():
            on_disk = np.where(label == IGNORE, task.ignore[0], on_disk)
        write_volume(self.folder / "labels" / f"{file_name(case)}.nii.gz", on_disk, np.eye(4))
        with whole(self._map(case)) as temporary, temporary.open("wb") as file:
            np.savez(file, f=nodes, box=np.array(box), shape=np.array(shape), density=density, row=np.array(json.dumps(row)))

    def read(self, case: str) -> Map:
        """The map of a case."""
        with np.load(self._map(case)) as arrays:
            box = tuple((int(start), int(stop)) for start, stop in arrays["box"])
            return arrays["f"], box, tuple(map(int, arrays["shape"])), arrays["density"]

    def finish(self, parts: Mapping[str, Sequence[Case]], origin: Mapping[str, Any]) -> None:
        """Writes the tables and the split of cases by part, and marks the store as complete."""
        cases = [case for part in parts.values() for case in part]
        known = [{"case": file_name(c.id), "patient": c.patient, "site": c.site, CUBE: 1} for c in cases]
        rows = []
        for case in cases:
            with np.load(self._map(case.id)) as arrays:
                rows.append({"case": case.id, **json.loads(str(arrays["row"]))})
        for name, table in (("attributes.csv", known), ("conversion.csv", rows)):
            with whole(self.folder / name) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(table)
        write_json(self.split, {name: [file_name(c.id) for c in part] for name, part in parts.items()})
        write_json(self.folder / "origin.json", origin)

    def _map(self, case: str) -> Path:
        return self.folder / "maps" / f"{file_name(case)}.npz"
