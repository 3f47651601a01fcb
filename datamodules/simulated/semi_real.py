"""Semi-real strokes: real lesion masks in real brains (see `datamodules.simulated.lesion_insertion`). A stand-in, never a benchmark."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.provenance import derive
from datamodules.readers.brats_files import require_root
from datamodules.simulated.lesion_insertion import GENERATOR, LesionInsertion, brain, insert_lesion
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import write_volume
from lesionbench.keyed import key
from lesionbench.task import Task


class SemiReal(CaseDataModule):
    """Every mask in every brain, as a case `<mask>_<brain>` made on first use under `root/<key of the settings>`.

    The masks are the patients of the split, so a mask is in one part only, whatever the brain; the site of a case is its brain.

    Args:
        masks: folder of lesion masks in MNI space, one NIfTI file each (files named in `brains` are left out).
        brains: name -> T1 in MNI space; None = the ICBM 152 2009a template that comes with nilearn.
        train_brains, test_brains: names of the brains to train (and validate) in, and to test in; None = all.
        insertion: how lesions look, see `LesionInsertion`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        masks: str | Path,
        brains: Mapping[str, str | Path | None],
        train_brains: Sequence[str] | None = None,
        test_brains: Sequence[str] | None = None,
        insertion: LesionInsertion | None = None,
        **options: Any,
    ) -> None:
        self.masks = Path(masks).expanduser()
        self.brains = {name: None if path is None else Path(path).expanduser() for name, path in brains.items()}
        self.train_brains, self.test_brains = (list(names) if names else list(self.brains) for names in (train_brains, test_brains))
        for option, names in [("train_brains", self.train_brains), ("test_brains", self.test_brains)]:
            for name in names:
                if name not in self.brains:
                    raise unknown(f"brain (data.{option})", name, self.brains)
        self.insertion = insertion or LesionInsertion()
        settings = str(self.insertion).replace("LesionInsertion(", "Planting(", 1)  # as folders were first named
        super().__init__(Path(root) / f"{key(GENERATOR, settings, str(self.masks), self.brains) % 16**8:08x}", **options)

    def default_task(self) -> Task:
        return Task(("t1",), {"background": 0, "lesion": 1}, {"LESION": ("lesion",)})

    def find_cases(self) -> list[Case]:
        folder = require_root(self.masks, "of lesion masks", "data.masks")
        taken = {path.resolve() for path in self.brains.values() if path is not None}
        found = [p for p in sorted(folder.iterdir()) if p.name.endswith((".nii", ".nii.gz")) and p.resolve() not in taken]
        if not found:
            raise SuiteError(f"data.masks={folder}: no NIfTI file there; expected one lesion mask in MNI space per file")
        return [self._case(mask, name) for mask in found for name in self.brains]

    def _case(self, mask: Path, name: str) -> Case:
        patient = mask.name.removesuffix(".gz").removesuffix(".nii")
        case = f"{patient}_{name}"
        return Case(
            case,
            {"t1": self.root / "images" / f"{case}_t1.nii.gz"},
            self.root / "labels" / f"{case}.nii.gz",
            patient=patient,
            site=name,
            attributes={"mask": str(mask)},
        )

    def materialize(self) -> None:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(self._materialize, self.cases()))

    def _materialize(self, case: Case) -> None:
        sources = [Path(case.attributes["mask"]), self.brains[case.site]]
        derive(case.files, [path for path in sources if path is not None], lambda: self._make(case))

    def _make(self, case: Case) -> None:
        into = brain(self.brains[case.site], self.insertion.spacing)
        t1, label, affine = insert_lesion(self.insertion, into, Path(case.attributes["mask"]), case.site)
        write_volume(case.label, label, affine)
        write_volume(case.images["t1"], t1, affine)

    def divided(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        parts = super().divided(cases)
        brains = {part: self.test_brains if part == "test" else self.train_brains for part in parts}
        return {part: [c for c in members if c.site in brains[part]] for part, members in parts.items()}
