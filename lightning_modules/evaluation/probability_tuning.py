"""Thresholds of probability, one per region, chosen on held-out predictions (Jabareen & Lukassen, BrainLes 2021, Section 3.2).

Probabilities are counted on a scale of thousandths, together with the true class: how a case is decoded, and its Dice, then follow for any
thresholds of that scale from a table instead of its volumes, and exactly so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.results import write_json
from lesionbench.target import RegionSigmoid
from lesionbench.task import IGNORE, Task
from lightning_modules.evaluation.tuning import gathered, tested_cases

SCALE = 1000
SCORES = ("regions", "classes")


@dataclass(frozen=True)
class Counted:
    """The voxels of one held-out case, those that are alike as one.

    Attributes:
        run, patient: identifiers.
        task: what was predicted.
        steps: thousandths (N, R): a probability is above k / 1000 exactly where its step is above k.
        truth: true class index (N,).
        voxels: how many are alike (N,).
    """

    run: str
    patient: str
    task: Task
    steps: np.ndarray
    truth: np.ndarray
    voxels: np.ndarray


def counted(run: str, patient: str, task: Task, regions: torch.Tensor, truth: torch.Tensor) -> Counted:
    """Region probabilities (R, X, Y, Z) and class indices (X, Y, Z), -1 = ignore, as counts."""
    there = (truth != IGNORE).numpy().ravel()
    steps = np.ceil(regions.double().flatten(1).numpy()[:, there] * SCALE).clip(0, SCALE).astype(np.int64)
    keys = truth.numpy().ravel()[there].astype(np.int64)
    for row in steps:
        keys = keys * (SCALE + 1) + row
    keys, voxels = np.unique(keys, return_counts=True)
    columns = []
    for _ in steps:
        keys, step = np.divmod(keys, SCALE + 1)
        columns.insert(0, step)
    return Counted(run, patient, task, np.stack(columns, axis=1), keys, voxels)


class Scorer:
    """Mean Dice of many cases for any thresholds.

    Args:
        cases: at least one, of one task.
        decoding: see `RegionSigmoid`.
        of: mean over `regions`, or over the foreground `classes`; two empty masks have Dice 1.
    """

    def __init__(self, cases: Sequence[Counted], decoding: str, of: str) -> None:
        self.task, self.decoding = cases[0].task, decoding
        self._values = torch.from_numpy(np.concatenate([c.steps for c in cases])).T[None].double() / SCALE
        self._case = np.repeat(np.arange(len(cases)), [len(c.voxels) for c in cases])
        self._voxels = np.concatenate([c.voxels for c in cases]).astype(np.float64)
        groups = self.task.region_matrix.astype(bool) if of == "regions" else np.eye(len(self.task.classes), dtype=bool)[1:]
        self._member = groups.T  # class -> the masks that it is in
        self._truth = self._member[np.concatenate([c.truth for c in cases])]
        self._real = self._per_case(self._truth)

    def _per_case(self, masks: np.ndarray) -> np.ndarray:
        """Voxels of masks (N, G) in every case: (cases, G)."""
        return np.stack([np.bincount(self._case, self._voxels * mask, minlength=self._case[-1] + 1) for mask in masks.T], axis=1)

    def __call__(self, thresholds: Mapping[str, int]) -> np.ndarray:
        """Region -> thousandths: mean Dice of every case."""
        between = {name: (step + 0.5) / SCALE for name, step in thresholds.items()}  # of two steps, so that rounding decides nothing
        labels = RegionSigmoid(self.task, between, self.decoding).labels(self._values)[0].numpy()
        ours = self._member[labels]
        both, said = self._per_case(ours & self._truth), self._per_case(ours)
        total = said + self._real
        return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0).mean(axis=1)


@dataclass(frozen=True)
class Levels:
    """Chosen thresholds and what they do.

    Attributes:
        probability: region -> threshold, the median over runs of the best of each.
        decoding, score: how labels were made, and what the Dice is a mean of.
        by_run: run folder -> its own best thresholds.
        before, after: mean Dice of the cases that they were chosen on, at 1/2 and with them.
        held_out: mean Dice where the cases of each run are judged by the median over the other runs; None for one run.
        patients: whom they were chosen on.
        runs: run folders.
    """

    probability: dict[str, float]
    decoding: str
    score: str
    by_run: dict[str, dict[str, float]]
    before: float
    after: float
    held_out: float | None
    patients: list[str]
    runs: list[str]

    def report(self) -> str:
        """What was found, in words."""
        levels = ", ".join(f"{name} {level:.4g}" for name, level in self.probability.items())
        other = "" if self.held_out is None else f"; with thresholds chosen on the other runs {self.held_out:.4f}"
        return (
            f"thresholds {levels} ({self.decoding}), chosen on {len(self.patients)} held-out patient(s) of {len(self.runs)} run(s); "
            f"mean Dice of {self.score} {self.before:.4f} -> {self.after:.4f} on these{other}"
        )

    def write(self, path: Path | str) -> Path:
        """Writes what `postprocessing.thresholds` reads."""
        return write_json(path, vars(self))


def tune(
    runs: Path | str | Sequence[Path | str],
    *,
    decoding: str = "nested",
    score: str = "regions",
    trials: int = 1000,
    seed: int = 0,
    data_root: str | None = None,
    trust: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Levels:
    """Chooses a threshold for every region on the probabilities that tested runs (the folds of a cross-validation) left in their folders.

    For each run by a tree-structured Parzen estimator, then the median over the runs.

    Args:
        runs, data_root, trust: see `tuning.tune`.
        decoding: see `RegionSigmoid`.
        score: see `Scorer`.
        trials: thresholds tried for every run, 1/2 first.
        seed: of the search.
        tell: gets a line for every run.

    Raises:
        SuiteError: no probabilities, no Optuna, runs of different regions, and what `tuning.tune` says of runs.
    """
    if score not in SCORES:
        raise unknown("tune.score", score, SCORES)
    folders, cases = gathered(runs, lambda folder: [_read(tested) for tested in tested_cases(folder, data_root, trust)])
    if any(c.task.regions != cases[0].task.regions for c in cases):
        raise SuiteError("the runs predicted different regions; thresholds are tuned on runs of one task")
    of_run = {folder: [c for c in cases if c.run == folder] for folder in folders}
    best = {}
    for number, (folder, own) in enumerate(of_run.items(), 1):
        best[folder] = _search(Scorer(own, decoding, score), trials, seed)
        tell(f"run {number} of {len(folders)}: {', '.join(f'{name} {step / SCALE:g}' for name, step in best[folder].items())} ({folder})")
    chosen = _median(list(best.values()))
    whole = Scorer(cases, decoding, score)
    half = dict.fromkeys(chosen, SCALE // 2)
    honest = None
    if len(folders) > 1:
        others = {f: _median([b for g, b in best.items() if g != f]) for f in folders}
        honest = float(np.concatenate([Scorer(own, decoding, score)(others[f]) for f, own in of_run.items()]).mean())
    return Levels(
        {name: step / SCALE for name, step in chosen.items()},
        decoding,
        score,
        {f: {name: step / SCALE for name, step in found.items()} for f, found in best.items()},
        float(whole(half).mean()),
        float(whole(chosen).mean()),
        honest,
        sorted({c.patient for c in cases}),
        folders,
    )


def _read(tested: Any) -> Counted:
    return counted(tested.run, tested.patient, tested.task, tested.regions(), tested.truth)


def _search(score: Scorer, trials: int, seed: int) -> dict[str, int]:
    """The best thresholds in thousandths; of equal ones those that were tried first."""
    try:
        import optuna
    except ImportError as error:
        raise SuiteError('tune.what=thresholds needs Optuna: pip install "lesionbench[sweeps]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict.fromkeys(score.task.regions, SCALE // 2))

    def objective(trial: Any) -> float:
        return float(score({name: trial.suggest_int(name, 1, SCALE - 1) for name in score.task.regions}).mean())

    study.optimize(objective, n_trials=trials)
    return dict(study.best_params)


def _median(found: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Of every region; of an even number the lower of the two in the middle, so that it stays on the scale."""
    return {name: sorted(f[name] for f in found)[(len(found) - 1) // 2] for name in found[0]}
