"""Rules for labels, chosen on predictions of cases that were held out.

Here the smallest volume of a region (Isensee et al., BrainLes 2020; Ren et al., BrainLes 2021): below it the region is removed from a case.
Its score there is then known without any image: 1 (or distance 0) where the truth has none of it either, else 0 (or the distance of an
empty mask). So every threshold is judged from one number per case. `probability_tuning` chooses thresholds of probability, and
`suppression_tuning` a tree on volumes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

from lesionbench.checkpoint import read_checkpoint, refuse_strangers
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import read_volume
from lesionbench.moved import current
from lesionbench.reports.runs import find_runs, read_run
from lesionbench.results import write_json
from lesionbench.task import IGNORE, Task
from lightning_modules.metrics.box import bounding_box
from lightning_modules.metrics.overlap import overlap_metrics
from lightning_modules.metrics.surface import grid_diagonal, surface_metrics
from lightning_modules.postprocessing import PostProcessing, class_volumes

METRICS = ("dice", "hd95")


@dataclass(frozen=True)
class HeldOut:
    """One held-out case of one run.

    Attributes:
        run, case, patient: identifiers.
        volume: voxels predicted as the region.
        kept, dropped: score with the region as it was predicted, and with none of it.
        classes: class -> voxels predicted as it.
        present: whether the truth has any of the region.
    """

    run: str
    case: str
    patient: str
    volume: int
    kept: float
    dropped: float
    classes: Mapping[str, int] = field(default_factory=dict)
    present: bool = True


@dataclass(frozen=True)
class Tuned:
    """A chosen threshold and what it does.

    Attributes:
        region, metric: what was tuned.
        threshold: the region stays where it has at least so many voxels.
        before, after: mean score on the cases that it was chosen on, without and with it.
        held_out: mean score where the cases of each run are judged by the threshold chosen on those of the other runs; None for one run.
        patients: whom it was chosen on.
        runs: run folders.
        tried: threshold -> mean score.
    """

    region: str
    metric: str
    threshold: int
    before: float
    after: float
    held_out: float | None
    patients: list[str]
    runs: list[str]
    tried: dict[int, float]

    def report(self) -> str:
        """What was found, in words."""
        other = "" if self.held_out is None else f"; with thresholds chosen on the other runs {self.held_out:.4f}"
        return (
            f"{self.region}: smallest volume {self.threshold} voxels, chosen on {len(self.patients)} held-out patient(s) of {len(self.runs)} "
            f"run(s); mean {self.metric} {self.before:.4f} -> {self.after:.4f} on these{other}"
        )

    def write(self, path: Path | str) -> Path:
        """Writes what `postprocessing.thresholds` reads."""
        tried = {str(t): score for t, score in self.tried.items()}
        return write_json(path, {"min_volume": {self.region: self.threshold}, **{**vars(self), "tried": tried}})


def best_threshold(
    cases: Sequence[HeldOut], grid: Sequence[int] | None = None, lower_is_better: bool = False
) -> tuple[int, dict[int, float]]:
    """The threshold with the best mean score, the smallest of equal ones, and the mean score of each that was tried.

    Args:
        cases: at least one.
        grid: thresholds to try, 0 (nothing is dropped) always among them; None = one for every way to divide the cases.
        lower_is_better: of the score.
    """
    volumes = np.array([c.volume for c in cases])
    kept, dropped = np.array([c.kept for c in cases]), np.array([c.dropped for c in cases])
    tried = sorted({0, *((volumes + 1).tolist() if grid is None else (int(t) for t in grid))})
    scores = {t: float(np.where(volumes < t, dropped, kept).mean()) for t in tried}
    sign = -1 if lower_is_better else 1
    return max(tried, key=lambda t: (sign * scores[t], -t)), scores


def tune(
    runs: Path | str | Sequence[Path | str],
    *,
    region: str = "ET",
    metric: str = "dice",
    grid: Sequence[int] | None = None,
    rules: PostProcessing | None = None,
    data_root: str | None = None,
    trust: Sequence[str] = (),
) -> Tuned:
    """Chooses the smallest volume of `region` on the predictions that tested runs (the folds of a cross-validation) left in their folders.

    Args:
        runs: run folders, folders that hold some, or patterns.
        region: name of the region.
        metric: `dice` or `hd95`, averaged over cases; two empty masks are Dice 1 and distance 0, one is Dice 0 and the image diagonal.
        grid: see `best_threshold`.
        rules: their components are removed before volumes are measured; they must have no smallest volume.
        data_root: where the data of the runs are, if not where they were.
        trust: packages whose data sets the runs may name.

    Raises:
        SuiteError: predictions of a case whose patient the run was trained or selected on, or that cannot be shown to be held out;
            predictions that had a smallest volume already; no predictions; a region that the task lacks.
    """
    if metric not in METRICS:
        raise unknown("tune.metric", metric, METRICS)
    rules = rules or PostProcessing()
    if given := rules.rules["min_volume"]:
        raise SuiteError(f"postprocessing.min_volume={given}: a threshold is tuned without one; use postprocessing.min_volume=null")
    folders, cases = gathered(runs, lambda folder: held_out(folder, region, metric, rules, data_root, trust))
    lower = metric == "hd95"
    threshold, tried = best_threshold(cases, grid, lower)
    others = []
    for folder in folders if len(folders) > 1 else ():
        found, _ = best_threshold([c for c in cases if c.run != folder], grid, lower)
        others += [c.dropped if c.volume < found else c.kept for c in cases if c.run == folder]
    honest = float(np.mean(others)) if others else None
    patients = sorted({c.patient for c in cases})
    return Tuned(region, metric, threshold, tried[0], tried[threshold], honest, patients, folders, tried)


T = TypeVar("T")


def gathered(runs: Path | str | Sequence[Path | str], read: Callable[[Path], list[T]]) -> tuple[list[str], list[T]]:
    """The folders of finished runs, and what `read` finds in all of them together.

    Raises:
        SuiteError: all that is wrong with any of them.
    """
    found, problems, folders = [], [], []
    for folder in find_runs(runs):
        run = read_run(folder)
        if run.status != "finished":
            problems.append(f"{folder}: {run.status}")
            continue
        try:
            found += read(folder)
            folders.append(str(folder))
        except SuiteError as error:
            problems.append(str(error) if str(error).startswith(str(folder)) else f"{folder}: {error}")
    if problems:
        raise SuiteError("rules can only be tuned on held-out predictions of finished runs:\n" + "\n".join(f"  {p}" for p in problems))
    return folders, found


@dataclass(frozen=True)
class TestedCase:
    """A held-out case of a tested run, with its truth.

    Attributes:
        run, case, patient: identifiers.
        task: what the run predicted.
        folder: where its predictions are.
        truth: class indices (X, Y, Z) on the native grid, -1 = ignore.
        spacing: mm along its axes; 1 where there is none.
    """

    run: str
    case: str
    patient: str
    task: Task
    folder: Path
    truth: torch.Tensor
    spacing: list[float]

    def labels(self) -> torch.Tensor:
        """The predicted class indices (X, Y, Z)."""
        return torch.from_numpy(self.task.from_disk(self._read("", "writer.on_test=true")))

    def regions(self) -> torch.Tensor:
        """The predicted region probabilities (R, X, Y, Z)."""
        needed = "writer.on_test=true writer.probabilities=true"
        return torch.stack([torch.from_numpy(self._read(f"_prob_{name}", needed)) for name in self.task.regions])

    def _read(self, suffix: str, needed: str) -> np.ndarray:
        path = self.folder / f"{self.case}{suffix}.nii.gz"
        if not path.exists():
            raise SuiteError(f"no predictions/{path.name}; test it with {needed}")
        return read_volume(path)[0]


def tested_cases(folder: Path, data_root: str | None, trust: Sequence[str]) -> Iterator[TestedCase]:
    """The cases that a run was tested on; arguments as in `tune`.

    Raises:
        SuiteError: see `tune`.
    """
    from hydra.utils import instantiate

    config = current(yaml.safe_load((folder / "config.yaml").read_text()))
    described = {**config["data"], "augmentation": None, **({"root": data_root} if data_root else {})}  # nothing is trained
    refuse_strangers(described, folder / "config.yaml", trust, kind="data")
    data = instantiate(described, _convert_="all")
    task = data.task
    run = read_run(folder)
    wanted = run.cases
    known = {c.id: c for c in data.cases() if c.id in wanted}
    lacking = sorted(wanted - set(known))
    if lacking:
        raise SuiteError(f"{len(lacking)} of its test cases are not in {data.root} ({', '.join(lacking[:5])}); give tune.data_root")
    if "cases" in run.settings:
        data.prepare_data()
        if data.fingerprint() not in run.settings["cases"].values():
            raise SuiteError(f"the files of its cases under {data.root} have changed since it was tested; test it again")
    _refuse_seen(folder, config, {c.patient for c in known.values()})
    for case in known.values():
        if case.label is None:
            raise SuiteError(f"case {case.id} has no label map to compare with")
        values, affine, _ = read_volume(case.label, header=data.preprocessing.header)
        spacing = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0)).tolist() if task.unit == "mm" else [1.0] * 3
        yield TestedCase(
            str(folder), case.id, case.patient, task, folder / "predictions", torch.from_numpy(task.from_disk(values)), spacing
        )


def held_out(
    folder: Path, region: str, metric: str, rules: PostProcessing, data_root: str | None, trust: Sequence[str] = ()
) -> list[HeldOut]:
    """What the predictions of one run say about a region, with it and without; arguments as in `tune`.

    Raises:
        SuiteError: see `tune`.
    """
    before = yaml.safe_load((folder / "config.yaml").read_text()).get("postprocessing") or {}
    if before.get("min_volume") or before.get("thresholds") or before.get("suppress"):
        raise SuiteError(
            "its predictions went through a smallest volume already; test it with postprocessing.min_volume=null, thresholds=null, suppress=null"
        )
    rows = []
    for tested in tested_cases(folder, data_root, trust):
        task = tested.task
        if region not in task.regions:
            raise unknown("region (tune.region)", region, task.regions)
        place = task.region_names.index(region)
        labels = rules.labels(tested.labels(), task, tested.regions() if rules.rules["probability"] else None)
        ours, theirs = task.region_masks(labels)[place].numpy(), task.region_masks(tested.truth)[place].numpy()
        counted = ours & (tested.truth != IGNORE).numpy()
        kept, dropped = (_score(mask, theirs, metric, tested.spacing) for mask in (counted, np.zeros_like(ours)))
        rows.append(
            HeldOut(
                tested.run,
                tested.case,
                tested.patient,
                int(np.count_nonzero(ours)),
                kept,
                dropped,
                classes=class_volumes(labels.numpy(), task),
                present=bool(theirs.any()),
            )
        )
    return rows


def _score(ours: np.ndarray, theirs: np.ndarray, metric: str, spacing: Sequence[float]) -> float:
    if metric == "dice":
        return overlap_metrics(ours, theirs)["dice"]
    box = bounding_box(ours | theirs)
    return surface_metrics(ours[box], theirs[box], spacing, ["hd95"], 1.0, grid_diagonal(ours.shape, spacing))["hd95"]


def _refuse_seen(folder: Path, config: Mapping[str, Any], patients: set[str]) -> None:
    """Refuses a run that was tested on patients that one of its checkpoints knows, unless others answered for them."""
    model = config.get("model") or {}
    groups = model.get("checkpoints")
    if groups is not None:  # an ensemble
        groups = [[g] if isinstance(g, str) else g for g in groups]
        seen = [[_patients(path) for path in group] for group in groups]
        if model.get("out_of_fold"):
            leaked = {p for p in patients if all(p in known for group in seen for known in group)}
        else:
            leaked = patients & set().union(*(known for group in seen for known in group))
    else:
        trained = [folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        paths = [config["ckpt"]] if config.get("ckpt") else [p for p in trained if p.exists()]
        if not paths and any(stage["run"] == "fit" for stage in config.get("stages") or ()):
            raise SuiteError("has no checkpoint any more that says whom it was trained on")
        leaked = patients & set().union(*(_patients(p) for p in paths))
    if leaked:
        raise SuiteError(f"was trained or selected on {len(leaked)} of the patients that it predicted ({', '.join(sorted(leaked)[:5])})")


def _patients(path: str | Path) -> set[str]:
    own = read_checkpoint(path).get("lesionbench") or {}
    if own.get("patients") is None:
        raise SuiteError(f"{path}: does not say whom it was trained on")
    return set(own["patients"])
