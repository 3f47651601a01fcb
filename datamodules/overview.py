"""What a data set holds, in a few lines: cases, labels, patients, sites, shapes, voxel sizes, voxels of each class."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from datamodules.base import CaseDataModule
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import Geometry, read_volume
from lesionbench.task import Task

SHOWN = 4  # different shapes or voxel sizes that are listed one by one


def overview(cases: Sequence[Case], task: Task, header: str = "auto") -> str:
    """Counts of cases, patients and sites, shapes and voxel sizes (mm) along the canonical axes, and voxels of every class.

    Files that cannot be read are counted and left out. Of several raters the first counts.

    Args:
        header: see `geometry.read_volume`.
    """
    shapes: Counter[tuple[int, ...]] = Counter()
    sizes: Counter[tuple[float, ...]] = Counter()
    voxels: dict[str, list[int]] = {name: [] for name in task.class_names[1:]}
    unread = 0
    for case in cases:
        try:
            path = next((case.images[c] for c in task.channels if c in case.images), None)
            if path is not None:
                _, affine, shape = read_volume(path, header_only=True, header=header)
                geometry = Geometry.of(affine, shape)
                shapes[geometry.canonical] += 1
                sizes[tuple(round(size, 3) for size in geometry.spacing)] += 1
            label = case.label or next(iter(case.raters), None)
            if label is not None:
                found = np.bincount(task.from_disk(read_volume(label)[0]).ravel() + 1, minlength=len(task.classes) + 1)
                for name, count in zip(voxels, found[2:], strict=True):
                    voxels[name].append(int(count))
        except SuiteError:
            unread += 1
    labeled, rated = sum(case.label is not None for case in cases), sum(case.label is None and bool(case.raters) for case in cases)
    sites = Counter(case.site for case in cases if case.site)
    with_label = f"{labeled} with a label" + (f", {rated} with raters" if rated else "") + f", {len(cases) - labeled - rated} without"
    lines = [f"{len(cases)} case(s) of {len({case.patient for case in cases})} patient(s): {with_label}"]
    lines += [f"sites: {', '.join(f'{site} ({count})' for site, count in sites.most_common())}"] if sites else []
    lines.append(f"shape: {_listed(shapes, lambda s: ' x '.join(map(str, s)))}")
    lines.append(f"voxel size, mm: {_listed(sizes, lambda s: ' x '.join(f'{v:g}' for v in s))}")
    for name, counts in voxels.items():
        there = [count for count in counts if count]
        amount = f"; {int(np.median(there)):,} voxels in the median one, {min(there):,} to {max(there):,}" if there else ""
        lines.append(f"class {name}: in {len(there)} of {len(counts)} case(s){amount}")
    lines += [f"{unread} case(s) have a file that cannot be read, and are not counted in full"] if unread else []
    return "\n".join(lines)


def _listed(found: Counter, name: Callable[..., str]) -> str:
    """Each with its number where they are few, else how many there are and their range."""
    if len(found) <= SHOWN:
        return ", ".join(f"{name(value)} ({count})" for value, count in found.most_common()) or "none"
    value, count = found.most_common(1)[0]
    ends = f"; {name(min(found))} to {name(max(found))}"
    return f"{len(found)} different, most often {name(value)} ({count}){ends}"


def cut_off(data: CaseDataModule) -> dict[str, int]:
    """Id of every labeled case whose lesion reaches out of the middle that `crop="center"` keeps -> voxels of it outside; of prepared data.

    Empty for other crops, and where cases are resampled, so that voxels do not correspond.
    """
    found: dict[str, int] = {}
    for case in data.cases() if data.preprocessing.crop == "center" else []:
        cached = data.store.open(case)
        if case.label is None or cached.geometry.resampled != cached.geometry.canonical:
            continue
        values, kept = read_volume(case.label, header=data.preprocessing.header)[0], cached.label()
        outside = int(np.count_nonzero(data.task.from_disk(values) > 0)) - int(np.count_nonzero(kept > 0))
        if outside:
            found[case.id] = outside
    return found
