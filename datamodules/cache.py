"""The on-disk cache of preprocessed cases: built once, read by patch through memory maps, safe with several processes, no locks.

Layout: `<root>/<key>/<case>/` with `image.npy`, `label.npy`, `raters.npy`, `foreground.npy` and `meta.json`. A case is written into a
temporary sibling folder and renamed into place, so that a kill at any moment leaves a whole case or none.
"""

import errno
import json
import os
import shutil
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.preprocessing import LANDMARK_PERCENTILES, Prepared, Preprocessing, Stats, check_channels, preprocess, resampled_shape
from datamodules.provenance import current, stamps
from datamodules.workers import heed_parent, shielded
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import Geometry, fits_int16, read_volume
from lesionbench.keyed import key, numpy_generator
from lesionbench.maps import Box, file_name, read_box
from lesionbench.progress import tracked
from lesionbench.task import Task
from lesionbench.written import aside, clear, is_full

FORMAT = 1
COORDINATES = 10_000  # per class
ADVICE = "set data.cache to a folder on a larger disk, or store less (crop: foreground or a coarser spacing in data.preprocessing)"


class _Unusable(Exception):
    """A cache entry that cannot be read; the message says why."""


@dataclass(frozen=True)
class CachedCase:
    """One case in the cache; arrays are opened anew for every read, so that thousands of cases need no open files.

    Attributes:
        case: the case as the data set found it.
        folder: where its arrays lie.
        shape: (x, y, z) on the network grid.
        geometry: the way back to the native grid.
        stats: what `normalize_patch` needs.
        channel_mask: per channel, whether the case has it.
        background: raw value that stands for "nothing" in the image.
    """

    case: Case
    folder: Path
    shape: tuple[int, ...]
    geometry: Geometry
    stats: Stats
    channel_mask: tuple[bool, ...]
    background: float = 0.0

    def read(self, box: Box | None = None) -> np.ndarray:
        """Raw image (M, *box), float32, background beyond the borders. `box` is ((start, stop),) * 3 on the network grid."""
        return read_box(self._open("image"), box, self.background, np.float32)

    def label(self, box: Box | None = None) -> np.ndarray | None:
        """Class indices (*box), int8, -1 = ignore, background (0) beyond the borders; None for a case without label."""
        return read_box(self._open("label"), box) if self.case.label else None

    def raters(self, box: Box | None = None) -> np.ndarray | None:
        """Class indices (R, *box), int8, of the R raters present, padded like `label`; None for a case without raters."""
        return read_box(self._open("raters"), box) if self.case.raters else None

    @cached_property
    def foreground(self) -> dict[int, np.ndarray]:
        """Class index -> voxel coordinates (n, 3), int16: 10,000 drawn at random and one of every slice, for each foreground class that occurs.

        Taken from the label, or from all raters together where there is none.
        """
        rows = np.array(self._open("foreground"))
        return {int(index): rows[rows[:, 0] == index, 1:] for index in np.unique(rows[:, 0])}

    def labeled_values(self) -> np.ndarray:
        """Raw image values (M, n) at the voxels of `foreground`."""
        where = np.concatenate([np.zeros((0, 3), np.int16), *self.foreground.values()])
        return np.array(self._open("image")[(slice(None), *where.T)])

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise SuiteError(f"case {self.case.id}: {path} cannot be read ({error}); rebuild it with job=prepare") from None


@dataclass(frozen=True)
class CaseCache:
    """Preprocessed cases under `root`, for one task and one set of preprocessing settings.

    Settings that only matter when a patch is read (`normalize`) share their entries; everything else gets its own folder. So does
    `normalize="histogram"`, whose entries hold landmarks.
    """

    root: Path
    task: Task
    settings: Preprocessing

    @cached_property
    def folder(self) -> Path:
        """`<root>/<key>`: the key stands for all that changes what is stored."""
        settings = {k: v for k, v in self.settings.to_dict().items() if k not in ("normalize", "allow_missing")}
        for name, neutral in (("crop_size", None), ("header", "auto"), ("grid", "same")):
            if settings[name] == neutral:
                del settings[name]  # entries from before there was such a thing stay good
        stored = {
            "format": FORMAT,
            "channels": self.task.channels,
            "classes": list(self.task.classes.values()),
            "ignore": self.task.ignore,
            "settings": settings,
            **({"landmarks": LANDMARK_PERCENTILES} if self.settings.normalize == "histogram" else {}),
        }
        return Path(self.root) / f"{key(json.dumps(stored, sort_keys=True)):016x}"

    def prepare(self, cases: Sequence[Case], workers: int = 0, progress: bool = True) -> None:
        """Builds what is missing, out of date or damaged, in this process or in `workers` others; a second call finds nothing to do.

        Raises:
            SuiteError: too little disk space, or cases that cannot be preprocessed (all others are built first, then all are named).
        """
        for case in cases:
            check_channels(case, self.task, self.settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        clear(self.folder)
        todo = [case for case in cases if not self._is_fresh(case)]
        if not todo:
            return
        try:
            self._check_space(todo)
            with closing(self._outcomes(todo, workers)) as outcomes:  # a stop ends its processes, too
                failures = [message for message in tracked(outcomes, len(todo), "Preparing cases", progress) if message]
        except BrokenProcessPool:
            raise SuiteError("a process that prepared cases died, most likely for want of memory; use fewer workers") from None
        except OSError as error:
            if not is_full(error):
                raise
            raise SuiteError(f"{self.folder}: the disk is full ({error}); {ADVICE}") from None
        if failures:
            raise SuiteError("\n".join(failures))

    def estimate(self, cases: Sequence[Case]) -> int:
        """Bytes that these cases take at most, from their headers: whole volumes, as if there were nothing to crop.

        Raises:
            SuiteError: an unreadable header; names the file.
        """
        return sum(self._estimate(case) for case in cases)

    def open(self, case: Case) -> CachedCase:
        """The case's entry; whether its source files have changed since is `prepare`'s business.

        Raises:
            SuiteError: not in the cache, or damaged; names case, folder and reason.
        """
        check_channels(case, self.task, self.settings)
        try:
            meta = self._meta(case)
        except _Unusable as error:
            raise SuiteError(f"case {case.id}: {self._place(case)}: {error}; build it with job=prepare") from None
        return CachedCase(
            case=case,
            folder=self._place(case),
            shape=tuple(meta["arrays"]["image"][1:]),
            geometry=Geometry.from_dict(meta["geometry"]),
            stats=meta["stats"],
            channel_mask=tuple(meta["channel_mask"]),
            background=self.settings.background,
        )

    def fingerprint(self, cases: Sequence[Case]) -> str:
        """Sixteen characters that tell these cases, which are in the cache, by their ids and by what their files hold, wherever they lie."""
        found = []
        for case in cases:
            sources, made_from = _sources(case, self.task), self._meta(case)["stamps"]
            roles = [*sources["images"].items(), ("label", sources["label"]), *(("rater", path) for path in sources["raters"])]
            found.append([case.id, [[role, path and made_from[path]["content"]] for role, path in roles]])
        return f"{key(json.dumps(sorted(found))):016x}"

    def _place(self, case: Case) -> Path:
        return self.folder / file_name(case.id)

    def _meta(self, case: Case) -> dict[str, Any]:
        """The entry's description, once its arrays are found whole and made from this case's files."""
        folder = self._place(case)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            for name, shape in meta["arrays"].items():
                found = np.load(folder / f"{name}.npy", mmap_mode="r").shape
                if list(found) != shape:
                    raise _Unusable(f"{name}.npy has shape {found}, expected {shape}")
            wanted = _sources(case, self.task)
            if any(wanted[kind] and wanted[kind] != meta["sources"][kind] for kind in wanted):
                raise _Unusable("made from other files")
        except FileNotFoundError as error:
            raise _Unusable(f"no {Path(error.filename).name}" if folder.is_dir() else "not in the cache") from None
        except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise _Unusable(f"damaged ({type(error).__name__}: {error})") from None
        return meta

    def _is_fresh(self, case: Case) -> bool:
        try:
            meta = self._meta(case)
        except _Unusable:
            return False
        wanted = _files(_sources(case, self.task))
        before = {path: stamp for path, stamp in meta["stamps"].items() if path in wanted}  # it may serve a case without its label, too
        now = current(before, wanted)
        if now is not None and now != before:  # the same contents were put there again
            temporary = self._place(case) / f".meta-{os.getpid()}.json"
            with suppress(FileNotFoundError):  # another process may be replacing the entry
                _write(temporary, {**meta, "stamps": {**meta["stamps"], **now}})
                temporary.replace(self._place(case) / "meta.json")
        return now is not None

    def _build(self, case: Case) -> None:
        made_from = stamps(_files(_sources(case, self.task)))  # before reading: a file that changes meanwhile makes the entry out of date
        prepared = preprocess(case, self.task, self.settings)
        temporary = aside(self._place(case))
        temporary.mkdir()
        try:
            arrays = {"image": prepared.image, "label": prepared.label, "raters": prepared.raters}
            arrays = {name: array for name, array in arrays.items() if array is not None}
            arrays["foreground"] = _coordinates(case, prepared, len(self.task.classes))
            for name, array in arrays.items():
                _write(temporary / f"{name}.npy", array)
            meta = {
                "case": case.id,
                "arrays": {name: list(array.shape) for name, array in arrays.items()},
                "geometry": prepared.geometry.to_dict(),
                "stats": prepared.stats,
                "channel_mask": list(prepared.channel_mask),
                "sources": _sources(case, self.task),
                "stamps": made_from,
            }
            _write(temporary / "meta.json", meta)
            self._swap_in(temporary, case)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _swap_in(self, temporary: Path, case: Case) -> None:
        """Renames a finished folder into place; gives way to a good entry that another process put there first."""
        target = self._place(case)
        while True:
            try:
                return os.rename(temporary, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self._is_fresh(case):
                return
            away = aside(target)
            try:
                os.rename(target, away)
            except FileNotFoundError:  # another process was faster
                continue
            shutil.rmtree(away, ignore_errors=True)

    def _estimate(self, case: Case) -> int:
        path = next(case.images[channel] for channel in self.task.channels if channel in case.images)
        _, affine, shape = read_volume(path, header_only=True, header=self.settings.header)
        geometry = Geometry.of(affine, shape)
        grid = resampled_shape(geometry, self.settings)
        raw = grid == geometry.canonical and fits_int16(path)
        per_voxel = (2 if raw else 4) * len(self.task.channels) + bool(case.label) + len(case.raters)
        return int(np.prod(grid)) * per_voxel

    def _check_space(self, cases: Sequence[Case]) -> None:
        needed, free = self.estimate(cases), shutil.disk_usage(self.folder).free
        if needed > free and self.settings.crop == "foreground":
            # headers know nothing of the crop, which often saves two thirds: measure it on the first case before giving up
            self._build(cases[0])
            size = sum(path.stat().st_size for path in self._place(cases[0]).iterdir())
            needed = int(self.estimate(cases[1:]) * min(1, 1.2 * size / self._estimate(cases[0])))
            free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise SuiteError(
                f"the cache in {self.folder} needs about {needed / 1e9:.2f} GB for {len(cases)} case(s), and only {free / 1e9:.2f} GB "
                f"are free there; {ADVICE}"
            )

    def _outcomes(self, cases: Sequence[Case], workers: int) -> Generator[str, None, None]:
        """Builds the cases; for each, in any order, what went wrong with it or ""."""
        if not workers:
            yield from map(self._attempt, cases)
            return
        # spawn: forking a process that already runs threads can dead-lock
        with ProcessPoolExecutor(min(workers, len(cases)), get_context("spawn"), _start_worker) as pool:
            others = active_children()
            with shielded():  # processes start at the first submission
                futures = [pool.submit(self._attempt, case) for case in cases]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                for process in {*active_children()} - {*others}:
                    process.terminate()
                raise

    def _attempt(self, case: Case) -> str:
        try:
            self._build(case)
        except SuiteError as error:
            return str(error)
        return ""


def _sources(case: Case, task: Task) -> dict[str, Any]:
    """The files that an entry is made from, by role."""
    return {
        "images": {channel: os.path.abspath(case.images[channel]) for channel in task.channels if channel in case.images},
        "label": os.path.abspath(case.label) if case.label else None,
        "raters": [os.path.abspath(path) for path in case.raters],
    }


def _files(sources: dict[str, Any]) -> list[str]:
    return [*sources["images"].values(), *([sources["label"]] if sources["label"] else []), *sources["raters"]]


def _coordinates(case: Case, prepared: Prepared, classes: int) -> np.ndarray:
    """Rows (class, x, y, z), int16: of every foreground class `COORDINATES` random voxels and one of each slice that holds it."""
    rows = [np.zeros((0, 4), np.int16)]
    for index in range(1, classes):
        if prepared.label is not None:
            found = np.argwhere(prepared.label == index)
        elif prepared.raters is not None:
            found = np.argwhere((prepared.raters == index).any(axis=0))
        else:
            break
        if len(found) > COORDINATES:
            chosen = numpy_generator("foreground", case.id, index).choice(len(found), COORDINATES, replace=False)
            each_slice = [np.unique(found[:, axis], return_index=True)[1] for axis in range(3)]  # so that no positive slice looks empty
            found = found[np.unique(np.concatenate([chosen, *each_slice]))]
        rows.append(np.insert(found, 0, index, axis=1).astype(np.int16))
    return np.concatenate(rows)


def _write(path: Path, content: np.ndarray | dict[str, Any]) -> None:
    """Writes an array or JSON through to the disk."""
    with open(path, "wb") as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            file.write(json.dumps(content, allow_nan=False).encode())
        file.flush()
        os.fsync(file.fileno())


def _start_worker() -> None:
    heed_parent()
    torch.set_num_threads(1)
