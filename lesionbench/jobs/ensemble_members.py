"""Which checkpoints make an ensemble: lists and patterns as the user writes them, and the best of each fold by its run folder."""

import glob
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lesionbench.errors import SuiteError, unknown
from lesionbench.results import read_rows

SCORES = ("validation", "test")


def is_ensemble(ckpt: Any) -> bool:
    """Whether `ckpt` of the configuration names several checkpoints: a list, or a pattern with * or ?."""
    return ckpt is not None and (not isinstance(ckpt, str) or "*" in ckpt or "?" in ckpt)


def groups_of(ckpt: Any) -> list[list[str]]:
    """Checkpoints as absolute paths, in groups that are averaged first: every entry is one group of its own, or a list that is a group.

    A pattern stands for all files that match it, in alphabetical order, each an entry of its own; one that matches nothing stays as it is,
    so that it is reported with what else is wrong.
    """
    entries = [ckpt] if isinstance(ckpt, str) else list(ckpt)
    groups: list[list[str]] = []
    for entry in entries:
        if isinstance(entry, str):
            groups += [[path] for path in _matching(entry)]
        else:
            groups.append([path for pattern in entry for path in _matching(pattern)])
    if not groups or not all(groups):
        raise SuiteError(f"ckpt={ckpt}: an ensemble needs at least one checkpoint in every group")
    return groups


def _matching(pattern: str) -> list[str]:
    path = str(Path(pattern).expanduser().absolute())
    return sorted(glob.glob(path, recursive=True)) or [path] if "*" in path or "?" in path else [path]


def fingerprint(path: str) -> str:
    """Eight characters that tell the contents of a file; of a missing one its name."""
    if not Path(path).is_file():
        return path
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:8]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint in its run folder: which fold it belongs to, how good it was there, and who was looked at to say so."""

    path: str
    fold: str
    score: float
    chosen: bool
    patients: tuple[str, ...] = ()


def best_per_fold(paths: Sequence[str], score: str = "validation") -> list[Candidate]:
    """The candidates, of which the best of each fold is chosen (Ma & Chen, BrainLes 2021); folds are runs with equal `data.split`.

    Args:
        paths: checkpoints inside of their run folders.
        score: `validation`, the best value of the curve that the run optimizes; `test`, the mean Dice over regions on the cases of the fold
            that is held out: the paper's protocol, whose numbers on these very cases are too good.

    Raises:
        SuiteError: an unknown score, checkpoints that do not lie in a run folder, runs without the score or with different objectives.
    """
    if score not in SCORES:
        raise unknown("ensemble.score", score, SCORES)
    found, problems, objectives = [], [], set()
    for path in paths:
        folder = Path(path).parent.parent
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text())
            fold = json.dumps({k: v for k, v in config["data"]["split"].items() if k != "_target_"}, sort_keys=True)
            value, patients, objective = (_validated if score == "validation" else _tested)(folder, config)
            objectives.add(objective)
            found.append((path, fold, value, patients))
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, SuiteError) as error:
            problems.append(f"  {path}: {error if isinstance(error, SuiteError) else f'no {score} score in its run folder ({error})'}")
    if len(objectives) > 1:
        problems.append(f"  the runs optimize different curves: {', '.join(sorted(name for name, _ in objectives))}")
    if problems:
        raise SuiteError("ensemble.policy=best_per_fold cannot compare these checkpoints:\n" + "\n".join(problems))
    sign = -1 if any(mode == "min" for _, mode in objectives) else 1
    best: dict[str, int] = {}
    for place, (_, fold, value, _) in enumerate(found):
        if fold not in best or sign * value > sign * found[best[fold]][2]:
            best[fold] = place
    return [Candidate(p, f, v, i in best.values(), patients) for i, (p, f, v, patients) in enumerate(found)]


def _validated(folder: Path, config: dict[str, Any]) -> tuple[float, tuple[str, ...], tuple[str, str]]:
    value = json.loads((folder / "summary.json").read_text()).get("objective")
    if value is None or not math.isfinite(value):
        raise SuiteError("its run has no validation score; give it data.split.val, or ensemble.score=test")
    return float(value), (), (config["objective"]["name"], config["objective"]["mode"])


def _tested(folder: Path, config: dict[str, Any]) -> tuple[float, tuple[str, ...], tuple[str, str]]:
    rows = [row for row in read_rows(folder / "test" / "cases.csv") if row["member"] == "" and row["region"]]
    values = [row["dice"] for row in rows]
    if not values:
        raise SuiteError("its run has no Dice of test cases")
    return sum(values) / len(values), tuple(sorted({row["patient"] for row in rows})), ("test dice", "max")
