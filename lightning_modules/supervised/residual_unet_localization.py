"""Residual U-Net with localization: a narrow network finds the tumor, wide ones segment a crop around it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.ranges import Count
from lesionbench.task import Task
from lightning_modules.cascade import Cascade, drawn
from lightning_modules.localization import box_around, center_of, pasted

ORACLE = "oracle_center"


class LocalizedUNet(Cascade):
    """A network that segments a crop around what its first forerunner finds ("Residual 3D U-Net with Localization for Brain Tumor
    Segmentation", BrainLes 2021, Section 2.3).

    Without a forerunner it sees the whole case: the first stage. With one, the crop is centered on the first region that the forerunner
    draws; where it finds nothing, on the brain. Outside of the crop there is no lesion. Training crops are cut by the data
    (`data.sampling.name=lesion_center`). Further forerunners answer for their regions.

    Args:
        crop: voxels of the crop along each axis; an axis on which the case is shorter is kept.
        center: `box` = the middle of the box around the largest component, `centroid` = the mean of its voxels.
        oracle_center: where there is a label, answer a second time with all crops centered on the true region: the member
            `oracle_center`, whose rows in tables are marked as an oracle's.
        options: what `Cascade` takes.

    Raises:
        SuiteError: a crop without three sides, an oracle without forerunner to replace, or whose region the task's labels do not tell.
    """

    oracles = (ORACLE,)

    def __init__(
        self,
        task: Task,
        *,
        crop: Sequence[Count] = (128, 128, 128),
        center: Literal["box", "centroid"] = "box",
        oracle_center: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if len(crop) != 3:
            raise SuiteError(f"model.crop={list(crop)}: voxels along each of three axes")
        self.crop, self.center, self.oracle_center = tuple(crop), center, oracle_center
        self.locator = next(iter(self.forerunners), None)
        if oracle_center and self.locator is None:
            raise SuiteError("model.oracle_center=true: without model.forerunners nothing is cropped, so there is no center to be replaced")
        if oracle_center:
            found = self.forerunners[self.locator]
            self.inside = torch.tensor([*self._located(drawn(found)[0], found.task), False])

    def draw(self, batch: Batch, known: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.locator is None:
            return super().draw(batch, known)
        shape = batch["image"].shape[2:]
        box = self.box(known[self.locator][0, 0] > 0.5, batch.get("brain_mask"))
        inside = {**batch, "image": batch["image"][(..., *box)]}
        return pasted(super().draw(inside, known), box, shape)

    def box(self, mask: torch.Tensor, brain: torch.Tensor | None) -> tuple[slice, ...]:
        """The crop for a mask (X, Y, Z) of the located region; `brain` (1, 1, X, Y, Z) where there is one."""
        middle = center_of(mask, self.center)
        if middle is None and brain is not None:
            middle = center_of(brain[0, 0], "box")
        return box_around(middle or [side // 2 for side in mask.shape], self.crop, mask.shape)

    def predict_case(self, batch: Batch) -> Prediction:
        said = super().predict_case(batch)
        if not self.oracle_center or "label" not in batch or self.locator is None:
            return said
        truth = self.inside.to(batch["label"].device)[batch["label"].long()].float()  # index -1 (ignore) picks the last
        rest = {k: v for k, v in batch.items() if k not in self.forerunners}
        return replace(said, members={**said.members, ORACLE: self.answer({**rest, self.locator: truth})})

    def _located(self, region: str, theirs: Task) -> list[bool]:
        """Which of the task's classes lie in a region of the locator's task."""
        wanted = theirs.region_values()[region]
        inside = {name: set(values) <= wanted for name, values in self.task.classes.items()}
        if {value for name, values in self.task.classes.items() if inside[name] for value in values} != wanted:
            raise SuiteError(
                f"model.oracle_center=true: labels of the classes {', '.join(self.task.classes)} do not say where {region} is; "
                f"keep {region} in task.regions"
            )
        return list(inside.values())
