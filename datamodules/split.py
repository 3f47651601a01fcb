"""Splits by patient: who is trained on, validated on and tested on; independent of the training seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.keyed import numpy_generator
from lesionbench.ranges import AtLeastTwo, Count, NotNegative, Whole


@dataclass(frozen=True)
class Split:
    """How cases are divided; all cases of a patient go to the same part.

    Attributes:
        seed: of the division; a sweep over training seeds keeps its test cases.
        test, val: share (below 1) or number (1 and above) of the patients; `test: all` tests on every patient and leaves none to train
            on, for methods without training.
        folds: number of cross-validation folds, or None; then `test` is not used: fold `fold` is tested on.
        fold: which fold is tested on, from 0.
        labeled: number of training patients (in a fixed, seeded order) that keep their labels; the rest are `unlabeled`. None = all.
            With `file` the order is that of its list.
        file: JSON file with lists of case ids under `train`, `val`, `test`; replaces everything above but `labeled`.
        train: None, or the number of training patients to keep (the first in seeded order).
        inner_folds: None, or the number of parts of the training patients, of which part `inner_fold` is left out: it is in no part of the
            division. A network trained so can predict these training cases without having seen them. Who keeps a label is decided before.
        inner_fold: which part is left out, from 0.
    """

    seed: Whole = 0
    test: NotNegative | Literal["all"] = 0.2
    val: NotNegative = 0.1
    folds: AtLeastTwo | None = None
    fold: Whole = 0
    labeled: Whole | None = None
    file: str | None = None
    train: Count | None = None
    inner_folds: AtLeastTwo | None = None
    inner_fold: Whole = 0

    def divide(self, cases: Sequence[Case], published: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[Case]]:
        """Cases -> `train`, `val`, `test`, and `labeled` + `unlabeled` (together `train`); case order is kept within the seeded patient order.
        With `inner_folds` also `left_out`.

        `published` are lists of patients by part that take the place of all but `val`, `train` and `labeled`. Their order is kept,
        whoever is not there or not listed is left out, and without a list `val` the end of `train` is validated on.

        Raises:
            SuiteError: nothing left to train on, unknown or repeated ids in `file`, a fold that does not exist, too few patients.
        """
        by_patient: dict[str, list[Case]] = {}
        for case in cases:
            by_patient.setdefault(case.patient, []).append(case)
        patients = sorted(by_patient)
        numpy_generator(self.seed, "split").shuffle(patients)
        if published is not None:
            parts = self._published(published, by_patient)
        else:
            parts = self._listed(cases) if self.file else self._drawn(patients)
        for name in ("train", "labeled"):
            count = getattr(self, name)
            if count is not None and (count < 0 or count != int(count)):
                raise SuiteError(f"data.split.{name}={count}: a number of patients from 0, or null for all")
        if self.train is not None:
            parts["train"] = parts["train"][: int(self.train)]
        keep = len(parts["train"]) if self.labeled is None else int(self.labeled)
        if keep > len(parts["train"]):
            raise SuiteError(f"data.split.labeled={keep}, but there are only {len(parts['train'])} training patients")
        parts["labeled"], parts["unlabeled"] = parts["train"][:keep], parts["train"][keep:]
        if left_out := self._inner_fold(parts["train"]):
            for name in ("train", "labeled", "unlabeled"):
                parts[name] = [patient for patient in parts[name] if patient not in left_out]
            parts["left_out"] = left_out
        if self.file and published is None:
            listed = {i for ids in self._ids().values() for i in ids}
            by_patient = {p: [c for c in cs if c.id in listed] for p, cs in by_patient.items()}
        return {name: [case for p in part for case in by_patient[p]] for name, part in parts.items()}

    def share(self, cases: Sequence[Case], begin: float, end: float) -> list[Case]:
        """The cases of the patients from the share `begin` to the share `end` of all, in a seeded order of their own; `cases` keep theirs.

        Shares that meet, such as 0 to 0.3 and 0.3 to 1, have no patient in common and leave none out.
        """
        patients = sorted({case.patient for case in cases})
        numpy_generator(self.seed, "share").shuffle(patients)
        chosen = set(patients[round(begin * len(patients)) : round(end * len(patients))])
        return [case for case in cases if case.patient in chosen]

    def _drawn(self, patients: list[str]) -> dict[str, list[str]]:
        n = len(patients)
        if self.test == "all":
            return {"train": [], "val": [], "test": patients}
        if self.folds is not None:
            if not 0 <= self.fold < self.folds or self.folds > n:
                raise SuiteError(
                    f"data.split.fold={self.fold} of data.split.folds={self.folds} with {n} patients: need 0 <= fold < folds <= patients"
                )
            test = patients[self.fold :: self.folds]
        else:
            test = patients[: _count(self.test, n)]
        rest = [p for p in patients if p not in set(test)]
        val = rest[: _count(self.val, n)]
        train = rest[len(val) :]
        if not train:
            raise SuiteError(
                f"too few cases: {n} patient(s) leave none to train on after {len(test)} for test and {len(val)} for validation (data.split)"
            )
        return {"train": train, "val": val, "test": test}

    def _inner_fold(self, patients: list[str]) -> list[str]:
        """The training patients that are left out."""
        if self.inner_folds is None:
            if self.inner_fold:
                raise SuiteError(
                    f"data.split.inner_fold={self.inner_fold} is a part of data.split.inner_folds, which is null; give it a number"
                )
            return []
        folds, fold = self.inner_folds, self.inner_fold
        if not 0 <= fold < folds or not 2 <= folds <= len(patients):
            raise SuiteError(
                f"data.split.inner_fold={fold} of data.split.inner_folds={folds} with {len(patients)} training patients: "
                "need 0 <= inner_fold < inner_folds <= training patients, and 2 folds at least"
            )
        return patients[fold::folds]

    def _published(self, lists: Mapping[str, Sequence[str]], there: Mapping[str, list[Case]]) -> dict[str, list[str]]:
        parts = {part: [p for p in lists.get(part, ()) if p in there] for part in ("train", "val", "test")}
        if "val" not in lists:
            rest = len(parts["train"]) - _count(self.val, len(parts["train"]))
            parts["train"], parts["val"] = parts["train"][:rest], parts["train"][rest:]
        return parts

    def _ids(self) -> dict[str, list[str]]:
        path = Path(self.file)
        try:
            lists = json.loads(path.read_text())
            return {part: list(lists.get(part, [])) for part in ("train", "val", "test")}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise SuiteError(f"data.split.file={path}: expected a JSON object with lists train, val, test ({error})") from None

    def _listed(self, cases: Sequence[Case]) -> dict[str, list[str]]:
        patient_of = {c.id: c.patient for c in cases}
        parts, owner = {}, {}
        for part, ids in self._ids().items():
            missing = [i for i in ids if i not in patient_of]
            if missing:
                raise SuiteError(
                    f"{self.file}: {part} lists cases that were not found among those with a label: {missing[:5]} "
                    "(a case without one is unlabeled training data and is not listed)"
                )
            parts[part] = list(dict.fromkeys(patient_of[i] for i in ids))
            for p in parts[part]:
                if owner.setdefault(p, part) != part:
                    raise SuiteError(f"{self.file}: patient {p} is in both {owner[p]} and {part}")
        if not parts["train"]:
            raise SuiteError(f"{self.file}: the list 'train' is empty")
        return parts


def _count(share: float, n: int) -> int:
    return int(share) if share >= 1 else max(1, round(share * n)) if share > 0 and n > 2 else 0
