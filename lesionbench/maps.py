"""Per-case maps that change during a run or come from another run: pseudo labels, certainty masks, cascade inputs, supervoxels.

Layout: `<folder>/<name>/v0007/<case>.npy`, beside it `pending/` (the version being written) and `CURRENT`, a text file that holds the
number of the version that readers see. Only `CURRENT` decides, and it is replaced atomically, so a kill at any moment leaves the old
version or the new one.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from lesionbench.errors import SuiteError, unknown
from lesionbench.written import whole

Box = Sequence[tuple[int, int]]
KEPT = 2  # versions: the current one, and the one that a checkpoint written just before the last commit recorded


def file_name(name: str) -> str:
    """A file name for any case id or map name: no separators, never hidden; `urllib.parse.unquote` gives the name back."""
    safe = quote(name, safe=" ")
    return "%2E" + safe[1:] if safe.startswith(".") else safe


def read_box(array: np.ndarray, box: Box | None, fill: float = 0, dtype: type | np.dtype | None = None) -> np.ndarray:
    """Copies a box out of (..., X, Y, Z) as `dtype` (default: the array's); what lies beyond the borders is `fill`.

    `box` is ((start, stop),) * 3 on the last three axes, possibly negative or past the end; None is everything. Of a memory-mapped
    array only the box is touched.
    """
    dtype = dtype or array.dtype
    if box is None:
        return np.array(array, dtype=dtype)
    sizes = array.shape[-3:]
    source = tuple(slice(max(a, 0), min(b, n)) for (a, b), n in zip(box, sizes, strict=True))
    inside: Any = (..., *source)
    if all(a >= 0 and b <= n for (a, b), n in zip(box, sizes, strict=True)):
        return np.array(array[inside], dtype=dtype)
    out = np.full((*array.shape[:-3], *(b - a for a, b in box)), fill, dtype=dtype)
    if all(s.start < s.stop for s in source):
        target: Any = (..., *(slice(s.start - a, s.stop - a) for s, (a, _) in zip(source, box, strict=True)))
        out[target] = array[inside]
    return out


class MapStore:
    """Versioned maps by name and case, memory-mapped on reading. A map is (x, y, z) or (C, x, y, z) on the case's network grid.

    `write` fills the pending version and may be called from several processes; `commit`, `restore` and `load_state_dict` are for one
    process (rank zero) with a barrier before and after. Readers in other processes see a commit at their next `read`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def write(self, name: str, case_id: str, array: np.ndarray) -> None:
        """Puts one case's map into the pending version of `name`; the last write of a case wins.

        Raises:
            ValueError: an array that is neither (x, y, z) nor (C, x, y, z).
        """
        array = np.asarray(array)
        if array.ndim not in (3, 4):
            raise ValueError(f"map '{name}' of case {case_id}: expected (x, y, z) or (C, x, y, z), got shape {array.shape}")
        pending = self._pending(name)
        pending.mkdir(parents=True, exist_ok=True)
        with whole(pending / f"{file_name(case_id)}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array)

    def commit(self, name: str) -> int:
        """Makes the pending version of `name` current and returns its number; cases not rewritten carry over from the current one.

        Without a pending version nothing changes. All but the last two versions are removed.
        """
        pending, current = self._pending(name), self.version(name)
        if not pending.is_dir():
            return current
        for leftover in pending.glob(".writing-*"):
            leftover.unlink()
        for old in self._version(name, current).glob("*.npy"):
            if not (pending / old.name).exists():
                _link(old, pending / old.name)
        target = self._version(name, current + 1)
        shutil.rmtree(target, ignore_errors=True)  # a commit that was killed before it became current
        pending.rename(target)
        self._point(name, current + 1)
        self._remove(name, lambda number: number <= current + 1 - KEPT)
        return current + 1

    def read(self, name: str, case_id: str, box: Box | None = None) -> np.ndarray:
        """The current map of a case, or a box of it ((start, stop),) * 3 padded with 0 beyond the borders; always a copy.

        Raises:
            SuiteError: no such map, or none for this case; names both.
        """
        path = self._path(name, case_id)
        try:
            return read_box(np.load(path, mmap_mode="r"), box)
        except FileNotFoundError:
            known = self.state_dict()
            if name not in known:
                raise unknown("map", name, known) from None
            raise SuiteError(f"map '{name}' (version {self.version(name)}) has nothing for case {case_id}: no file {path}") from None
        except (ValueError, EOFError) as error:
            raise SuiteError(f"{path}: damaged map '{name}' of case {case_id} ({error}); write it again") from None

    def has(self, name: str, case_id: str) -> bool:
        """Whether the current version of `name` holds this case."""
        return self._path(name, case_id).exists()

    def is_pending(self, name: str, case_id: str) -> bool:
        """Whether the pending version of `name` holds this case already."""
        return (self._pending(name) / f"{file_name(case_id)}.npy").exists()

    def version(self, name: str) -> int:
        """Number of the current version; 0 before the first commit."""
        try:
            return int((self.folder / file_name(name) / "CURRENT").read_text())
        except FileNotFoundError:
            return 0

    def restore(self, name: str, version: int) -> None:
        """Makes an earlier version current again; later versions and the pending one are discarded. 0 discards everything.

        Raises:
            SuiteError: the version is gone.
        """
        if version and not self._version(name, version).is_dir():
            kept = [f"v{n:04d}" for n in sorted(self._versions(name))]
            raise SuiteError(f"{self.folder}: map '{name}' has no version {version} any more; there are: {', '.join(kept) or 'none'}")
        if version:
            self._point(name, version)
        else:
            (self.folder / file_name(name) / "CURRENT").unlink(missing_ok=True)
        shutil.rmtree(self._pending(name), ignore_errors=True)
        self._remove(name, lambda number: number > version)

    def state_dict(self) -> dict[str, int]:
        """{name: current version}, plain data for a checkpoint."""
        names = sorted(unquote(path.parent.name) for path in self.folder.glob("*/CURRENT"))
        return {name: self.version(name) for name in names}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes the store back to a checkpoint's versions; maps that the checkpoint did not know are discarded."""
        on_disk = {unquote(path.name) for path in self.folder.glob("*") if path.is_dir()}
        for name in sorted(on_disk | set(state)):
            self.restore(name, state.get(name, 0))

    def _pending(self, name: str) -> Path:
        return self.folder / file_name(name) / "pending"

    def _version(self, name: str, number: int) -> Path:
        return self.folder / file_name(name) / f"v{number:04d}"

    def _path(self, name: str, case_id: str) -> Path:
        return self._version(name, self.version(name)) / f"{file_name(case_id)}.npy"

    def _versions(self, name: str) -> list[int]:
        return [int(path.name[1:]) for path in (self.folder / file_name(name)).glob("v[0-9]*")]

    def _point(self, name: str, number: int) -> None:
        current = self.folder / file_name(name) / "CURRENT"
        with whole(current) as temporary, open(temporary, "w") as file:
            file.write(f"{number}\n")
            file.flush()
            os.fsync(file.fileno())

    def _remove(self, name: str, unwanted: Callable[[int], bool]) -> None:
        for number in filter(unwanted, self._versions(name)):
            shutil.rmtree(self._version(name, number), ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # maps are never written in place, so two versions can share one file
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
